"""Linear layers on the CPU: every implementation gives the result of F.linear, and the fastest suitable one runs."""

import functools

import numerics
import pytest
import torch
import torch.nn.functional as F
from models import ragged_batch, tiny_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from mosaicbert import bert_linear_cpu
from mosaicbert.bert_linear_cpu import choose_linear, float32_linear, linear, onednn_linear, processor


def implementations(dtype):
    """The implementations of a linear layer in `dtype` on this processor, without `F.linear`."""
    runs = {torch.float32: True, torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported()}
    return [float32_linear] + [onednn_linear] * runs.get(dtype, False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (200,), (3, 70)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_implementation_is_as_good_as_torch(dtype, rows, bias):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(*rows, 48, generator=generator), torch.randn(96, 48, generator=generator)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype) if bias else None
    truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for implementation in implementations(dtype):
        got = implementation(x, weight, bias)
        assert got.dtype == dtype
        numerics.assert_no_worse(got, F.linear(x, weight, bias), truth, numerics.FORWARD)


@pytest.fixture
def taken(monkeypatch):
    """The shapes of the inputs of the implementation that `choose_linear` returns."""
    shapes = []

    def implementation(x, weight, bias):
        shapes.append(tuple(x.shape))
        return F.linear(x, weight, bias)

    monkeypatch.setattr(bert_linear_cpu, "choose_linear", lambda dtype: implementation)
    return shapes


def test_a_plain_layer_takes_the_faster_implementation_for_inference(taken):
    layer, x = nn.Linear(8, 4), torch.randn(2, 64, 8)
    with torch.no_grad():
        assert torch.equal(linear(layer, x), layer(x)) and taken == [(2, 64, 8)]
    linear(layer, x).sum().backward()
    assert len(taken) == 1 and layer.weight.grad is not None


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return layer


def hooked_before(layer):
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return layer


def replaced(layer):
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias) + 1
    return layer


class Adapter(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Quantized(torch.Tensor):
    pass


def quantized(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantized), requires_grad=False)
    return layer


CHANGED = {
    "hook": hooked(nn.Linear(8, 4)),
    "hook before": hooked_before(nn.Linear(8, 4)),
    "forward replaced": replaced(nn.Linear(8, 4)),
    "subclass": Adapter(8, 4),
    "quantized": quantized(nn.Linear(8, 4)),
    "pruned": prune.l1_unstructured(nn.Linear(8, 4), "weight", 0.5),
    "parametrized": parametrizations.weight_norm(nn.Linear(8, 4)),
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("layer", CHANGED.values(), ids=CHANGED)
def test_a_layer_that_a_tool_has_changed_is_called_as_it_is(taken, layer, grad):
    x = torch.randn(128, 8)
    with torch.set_grad_enabled(grad):
        assert torch.equal(linear(layer, x), layer(x)) and taken == []


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_a_hook_for_all_modules_has_its_effect(taken, grad):
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: output * 0)
    try:
        with torch.set_grad_enabled(grad):
            assert (linear(nn.Linear(8, 4), torch.randn(128, 8)) == 0).all() and taken == []
    finally:
        handle.remove()


def test_an_input_of_another_dtype_than_the_weights_is_refused_by_torch(taken):
    with pytest.raises(RuntimeError, match="dtype"):
        linear(nn.Linear(8, 4).double(), torch.randn(128, 8))
    assert taken == []


@torch.no_grad()
def test_few_rows_autocast_tracing_and_torch_func_keep_torchs_linear(taken):
    layer, x = nn.Linear(8, 4).requires_grad_(False), torch.randn(128, 8)
    linear(layer, x[:127])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear(layer, x)
    torch.jit.trace(lambda x: linear(layer, x), x, check_trace=False)
    torch.compile(lambda x: linear(layer, x), backend="eager", fullgraph=True)(x)
    torch.vmap(lambda x: linear(layer, x))(x[None])
    assert taken == []


@pytest.mark.parametrize(
    "cpuinfo, dtype, expected",
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: avx512_bf16\n", torch.float32, onednn_linear),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: avx512_bf16\n", torch.bfloat16, onednn_linear),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: avx512f\n", torch.bfloat16, F.linear),
        ("vendor_id\t: GenuineIntel\nflags\t\t: avx512_bf16\n", torch.float32, F.linear),
        ("vendor_id\t: GenuineIntel\nflags\t\t: avx512_fp16\n", torch.float16, F.linear),
        ("vendor_id\t: GenuineIntel\nflags\t\t: avx512_bf16\n", torch.bfloat16, float32_linear),
        ("vendor_id\t: GenuineIntel\nflags\t\t: avx512_bf16 amx_tile\n", torch.bfloat16, F.linear),
        ("CPU implementer\t: 0x41\nFeatures\t: bf16\n", torch.bfloat16, F.linear),
        (None, torch.float32, F.linear),
        (None, torch.float64, F.linear),
    ],
)
def test_the_processor_decides_the_implementation(monkeypatch, cpuinfo, dtype, expected):
    def read_text(path):
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(bert_linear_cpu.Path, "read_text", read_text)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    processor.cache_clear()
    try:
        assert choose_linear(dtype) is expected
    finally:
        processor.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_agrees_with_either_implementation(monkeypatch, dtype):
    ids, mask = ragged_batch([90, 70])
    model = tiny_model()
    with torch.no_grad():
        truth = model.double()(ids, mask).logits
        model.to(dtype)
        results = []
        for chosen in (F.linear, *implementations(dtype)):
            monkeypatch.setattr(bert_linear_cpu, "choose_linear", lambda dtype, chosen=chosen: chosen)
            results.append(model(ids, mask).logits)
    for result in results[1:]:
        numerics.assert_no_worse(result, results[0], truth, numerics.MODEL)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", ["all", "x", "weight"])
def test_first_and_second_gradients_by_onednn_equal_torchs(monkeypatch, trained, bias):
    monkeypatch.setattr(bert_linear_cpu, "choose_linear", lambda dtype: onednn_linear)
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(48, 96, bias=bias).requires_grad_(trained != "x")
    x = torch.randn(3, 70, 48, generator=generator, requires_grad=trained != "weight")
    grad = torch.randn(3, 70, 96, generator=generator, requires_grad=True)
    inputs = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    results = []
    for function in (functools.partial(linear, layer), layer):
        output = function(x)
        first = torch.autograd.grad(output, inputs, grad, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), [grad, *inputs[: trained == "all"]])
        single = torch.autograd.grad(function(x), inputs, grad)
        results.append((output, *first, *second, *single))
    assert "OneDNNLinear" in type(linear(layer, x).grad_fn).__name__
    for got, expected in zip(*results):
        numerics.assert_same(got, expected, numerics.SAME[torch.float32])


@torch.no_grad()
def test_in_parts_gives_the_result_of_one_call(monkeypatch):
    monkeypatch.setattr(bert_linear_cpu, "PART_BYTES", 10 * 8 * 4)
    rows = []
    x = torch.randn(37, 8)
    result = bert_linear_cpu.in_parts(lambda part: rows.append(len(part)) or part * 2, x, width=8)
    assert torch.equal(result, x * 2) and rows == [10, 10, 10, 7]
    with torch.enable_grad():
        assert bert_linear_cpu.in_parts(len, x, width=8) == 37


def test_feed_forward_in_parts_equals_the_whole_and_keeps_the_outputs_that_hooks_saw(monkeypatch):
    layer = tiny_model().bert.encoder.layer[0].mlp
    hidden = torch.randn(37, 48, generator=torch.Generator().manual_seed(0))
    whole = layer(hidden)
    seen = []
    layer.gated_layers.register_forward_hook(lambda module, arguments, output: seen.append((output, output.clone())))
    monkeypatch.setattr(bert_linear_cpu, "PART_BYTES", 10 * 80 * 4)
    with torch.no_grad():
        numerics.assert_same(layer(hidden), whole, numerics.SAME[torch.float32])
    assert [len(output) for output, _ in seen] == [10, 10, 10, 7]
    assert all(torch.equal(output, copy) for output, copy in seen)
