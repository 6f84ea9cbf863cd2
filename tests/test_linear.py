"""Linear layers: each formula gives the product, and the faster one is taken where it may be."""

import numerics
import pytest
import torch
import torch.nn.functional as F
from models import ragged_batch, tiny_model

from mosaicbert import bert_attention, bert_layers
from mosaicbert.bert_attention import processor
from mosaicbert.bert_layers import BertGatedLinear, BertLinear, float32_product, onednn_product, product_for


def products(dtype):
    """The formulas that this processor can run in `dtype`, `F.linear` left out."""
    runs = {torch.float32: True, torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported()}
    return [float32_product] + [onednn_product] * runs.get(dtype, False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (200,), (3, 70)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_product_is_as_good_as_torch(dtype, rows, bias):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(*rows, 48, generator=generator), torch.randn(96, 48, generator=generator)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype) if bias else None
    truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for product in products(dtype):
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
        ("vendor_id\t: AuthenticAMD\nflags\t\t: avx512_bf16\n", torch.bfloat16, onednn_product),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: avx512f\n", torch.bfloat16, F.linear),
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

    monkeypatch.setattr(bert_attention.Path, "read_text", read_text)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    processor.cache_clear()
    try:
        assert product_for(dtype, 128) is expected and product_for(dtype, 15) is F.linear
        fewest = {float32_product: 80, onednn_product: 128 if dtype == torch.float32 else 16, F.linear: 16}[expected]
        assert product_for(dtype, fewest) is expected and product_for(dtype, fewest - 1) is F.linear
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
        for product in (F.linear, *products(dtype)):
            monkeypatch.setattr(bert_layers, "product_for", lambda dtype, rows, product=product: product)
            results.append(model(ids, mask).logits)
    for result in results[1:]:
        numerics.assert_no_worse(result, results[0], truth, numerics.MODEL)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", ["all", "x", "weight"])
def test_gradients_by_onednn_are_those_of_torch_second_ones_too(monkeypatch, trained, bias):
    monkeypatch.setattr(bert_layers, "product_for", lambda dtype, rows: onednn_product)
    generator = torch.Generator().manual_seed(0)
    layer = BertLinear(48, 96, bias=bias).requires_grad_(trained != "x")
    x = torch.randn(3, 70, 48, generator=generator, requires_grad=trained != "weight")
    grad = torch.randn(3, 70, 96, generator=generator, requires_grad=True)
    inputs = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    results = []
    for formula in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        output = formula(x)
        first = torch.autograd.grad(output, inputs, grad, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), [grad, *inputs[: trained == "all"]])
        single = torch.autograd.grad(formula(x), inputs, grad)
        results.append((output, *first, *second, *single))
    assert "OneDNNLinear" in type(layer(x).grad_fn).__name__
    for got, expected in zip(*results):
        numerics.assert_same(got, expected, numerics.SAME[torch.float32])


def test_quantized_weights_keep_torchs_formula(monkeypatch):
    monkeypatch.setattr(bert_layers, "product_for", lambda dtype, rows: onednn_product)

    class Quantized(torch.Tensor):
        pass

    layer = BertLinear(48, 96)
    assert layer.product(torch.randn(70, 48)) is not F.linear
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Quantized))
    assert layer.product(torch.randn(70, 48)) is F.linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_and_values_multiply_by_every_product(monkeypatch, dtype):
    generator = torch.Generator().manual_seed(0)
    layer = BertGatedLinear(48, 2 * 40, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(80, 48, generator=generator))
    x = torch.randn(2, 70, 48, generator=generator).to(dtype)
    gate, value = F.linear(x.double(), layer.weight.double()).chunk(2, dim=-1)
    truth = F.gelu(gate) * value
    plain = layer(x, gated=True)
    assert plain.requires_grad
    with torch.no_grad():
        for product in (F.linear, *products(dtype)):
            monkeypatch.setattr(bert_layers, "product_for", lambda dtype, rows, product=product: product)
            numerics.assert_no_worse(layer(x, gated=True), plain, truth, numerics.FORWARD)
            gate, value = layer(x).chunk(2, dim=-1)
            numerics.assert_no_worse(F.gelu(gate) * value, plain, truth, numerics.FORWARD)
