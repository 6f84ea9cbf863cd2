"""Linear layers: each formula gives the product, and the faster one is taken where it may be."""

import numerics
import pytest
import torch
import torch.nn.functional as F
from models import ragged_batch, tiny_model

from mosaicbert import bert_layers
from mosaicbert.bert_layers import BertLinear, fastest_product, float32_product, onednn_product


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (200,), (3, 70)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_product_is_as_good_as_torch(dtype, rows, bias):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(*rows, 48, generator=generator), torch.randn(96, 48, generator=generator)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype) if bias else None
    truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    product = onednn_product if dtype == torch.float32 else float32_product
    got = product(x, weight, bias)
    assert got.dtype == dtype
    numerics.assert_no_worse(got, F.linear(x, weight, bias), truth, numerics.FORWARD)


def test_the_faster_product_is_taken_where_it_may_be(monkeypatch):
    taken = []

    def product(x, weight, bias):
        taken.append(x.shape)
        return F.linear(x, weight, bias)

    monkeypatch.setattr(bert_layers, "fastest_product", lambda dtype: product)
    layer, x = BertLinear(8, 4), torch.randn(128, 8)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        assert torch.equal(layer(x), expected) and len(taken) == 1
        layer(x[:127])
        layer.double()(x.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer.float()(x)
        torch.jit.trace(layer, x, check_trace=False)
        torch.compile(layer, backend="eager", fullgraph=True)(x)
    layer(x).sum().backward()
    assert len(taken) == 1


def test_the_choice_is_measured_once_and_leaves_the_random_state_alone():
    fastest_product.cache_clear()
    state = torch.random.get_rng_state()
    for dtype, known in (
        (torch.float32, (F.linear, onednn_product)),
        (torch.bfloat16, (F.linear, float32_product)),
    ):
        assert fastest_product(dtype) in known
        assert fastest_product(dtype) is fastest_product(dtype)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_build_without_onednn_takes_torch(monkeypatch):
    def missing(x, weight, bias):
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(bert_layers, "onednn_product", missing)
    fastest_product.cache_clear()
    assert fastest_product(torch.float32) is F.linear
    fastest_product.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_agrees_with_either_product(monkeypatch, dtype):
    ids, mask = ragged_batch([90, 70])
    model = tiny_model()
    with torch.no_grad():
        truth = model.double()(ids, mask).logits
        model.to(dtype)
        results = []
        for product in (F.linear, onednn_product if dtype == torch.float32 else float32_product):
            monkeypatch.setattr(bert_layers, "fastest_product", lambda dtype, product=product: product)
            results.append(model(ids, mask).logits)
    numerics.assert_no_worse(results[1], results[0], truth, numerics.MODEL)
