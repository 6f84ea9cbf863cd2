"""Linear layers: each formula gives the product, and the faster one is taken where it may be."""

import numerics
import pytest
import torch
import torch.nn.functional as F
from models import ragged_batch, tiny_model

from mosaicbert import bert_layers
from mosaicbert.bert_layers import BertLinear, float32_product, onednn_product, processor, product_for


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

    monkeypatch.setattr(bert_layers, "product_for", lambda dtype, rows: product if rows >= 128 else F.linear)
    layer, x = BertLinear(8, 4), torch.randn(128, 8)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        assert torch.equal(layer(x), expected) and len(taken) == 1
        layer(x[:127])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
        torch.jit.trace(layer, x, check_trace=False)
        torch.compile(layer, backend="eager", fullgraph=True)(x)
    layer(x).sum().backward()
    assert len(taken) == 1


@pytest.mark.parametrize(
    "cpuinfo, dtype, expected",
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: avx512_bf16\n", torch.float32, onednn_product),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: avx512_bf16\n", torch.bfloat16, F.linear),
        ("vendor_id\t: GenuineIntel\nflags\t\t: avx512_bf16\n", torch.float32, F.linear),
        ("vendor_id\t: GenuineIntel\nflags\t\t: avx512_fp16\n", torch.float16, F.linear),
        ("vendor_id\t: GenuineIntel\nflags\t\t: avx512_bf16\n", torch.bfloat16, float32_product),
        ("vendor_id\t: GenuineIntel\nflags\t\t: avx512_bf16 amx_tile\n", torch.bfloat16, F.linear),
        ("CPU implementer\t: 0x41\nFeatures\t: bf16\n", torch.bfloat16, F.linear),
        (None, torch.float32, F.linear),
        (None, torch.float64, F.linear),
    ],
)
def test_the_processor_decides_the_product(monkeypatch, cpuinfo, dtype, expected):
    def read_text(path):
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(bert_layers.Path, "read_text", read_text)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    processor.cache_clear()
    try:
        assert product_for(dtype, 128) is expected and product_for(dtype, 79) is F.linear
        assert product_for(dtype, 80) is (F.linear if expected is onednn_product else expected)
    finally:
        processor.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_agrees_with_either_product(monkeypatch, dtype):
    ids, mask = ragged_batch([90, 70])
    model = tiny_model()
    with torch.no_grad():
        truth = model.double()(ids, mask).logits
        model.to(dtype)
        results = []
        for product in (F.linear, onednn_product if dtype == torch.float32 else float32_product):
            monkeypatch.setattr(bert_layers, "product_for", lambda dtype, rows, product=product: product)
            results.append(model(ids, mask).logits)
    numerics.assert_no_worse(results[1], results[0], truth, numerics.MODEL)
