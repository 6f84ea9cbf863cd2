"""Triton attention within torch: operators, compilation, checkpointing, autocast; and the compiled model."""

import importlib
import importlib.machinery
import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from heads import assert_equal_outputs, loss_and_gradients
from models import ragged_batch, tiny_model
from numerics import assert_same
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton_kernels import DEVICE, INTERPRETED, attend, leaf, on_kernels, packed_input, slopes_of, with_gradient

from mosaicbert import bert_layers


@on_kernels
def test_operator_is_registered_as_torch_expects():
    qkv, packed = packed_input([20, 13], 2, 16)
    arguments = (qkv, packed.cu_seqlens, slopes_of(2), None, None, None, 0.25, 0.0, 4000)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(leaf._attention, arguments, test_utils=checks)


@on_kernels
def test_only_observers_see_an_operator(monkeypatch):
    qkv, packed = packed_input([40], 2, 16)
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(function.name())
            return function(*arguments, **(options or {}))

    def function(x):
        return attend(x, packed, slopes_of(2))

    with Recorder():
        observed = with_gradient(function, qkv)
    names = [name.split("::")[1] for name in seen if "alibi" in name]
    assert names == ["alibi_attention", "alibi_attention_backward"]
    monkeypatch.setattr(leaf, "_attention", None)
    eager = with_gradient(function, qkv)
    assert torch.equal(observed[0], eager[0]) and torch.equal(observed[1][0], eager[1][0])


@on_kernels
def test_fake_tensors_pass_through_with_the_right_shapes():
    _, packed = packed_input([40, 50, 0], 2, 16)
    with FakeTensorMode() as mode:
        for max_seqlen in (40, 4000):
            qkv = torch.empty(90, 3, 2, 16, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
            fake = replace(packed, cu_seqlens=mode.from_tensor(packed.cu_seqlens), max_seqlen=max_seqlen)
            context = attend(qkv, fake, torch.empty(2, device=DEVICE))
            assert context.shape == (90, 2, 16) and context.dtype == torch.bfloat16
            (gradient,) = torch.autograd.grad(context, qkv, torch.empty_like(context))
            assert gradient.shape == qkv.shape and gradient.is_contiguous()


@on_kernels
def test_compiles_without_graph_breaks_forward_and_backward():
    slopes = slopes_of(2)

    def function(x, packed):
        return attend(x * 2, packed, slopes) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor", dynamic=True)
    for lengths in ([30, 5], [20, 30, 7]):
        qkv, packed = packed_input(lengths, 2, 16)
        expected, (gradient,) = with_gradient(lambda x, packed=packed: function(x, packed), qkv)
        context, (compiled_gradient,) = with_gradient(lambda x, packed=packed: compiled(x, packed), qkv)
        assert_same(context, expected.double(), 1e-6)
        assert_same(compiled_gradient, gradient.double(), 1e-6)


@on_kernels
def test_checkpointing_recomputes_the_same_dropout():
    from torch.utils.checkpoint import checkpoint

    qkv, packed = packed_input([40], 2, 16)

    def dropped(x):
        return attend(x.sin(), packed, slopes_of(2), 0.4)

    def seeded(x, function):
        torch.manual_seed(8)
        return function(x)

    plain = with_gradient(lambda x: seeded(x, dropped), qkv)
    recomputed = with_gradient(lambda x: seeded(x, lambda y: checkpoint(dropped, y, use_reentrant=False)), qkv)
    assert torch.equal(plain[0], recomputed[0]) and torch.equal(plain[1][0], recomputed[1][0])


@on_kernels
def test_autocast_leaves_the_dtype_of_the_tensors():
    qkv, packed = packed_input([30], 2, 16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        context = attend(qkv, packed, slopes_of(2))
        half = attend(torch.nn.functional.linear(qkv, torch.eye(16, device=DEVICE)), packed, slopes_of(2))
    assert context.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert_same(half, context.double(), 2e-2)
    half.float().sum().backward()
    assert qkv.grad.isfinite().all()


@on_kernels
def test_two_copies_of_the_file_live_in_one_process():
    copies = []
    for name in ("revision_one", "revision_two"):
        spec = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
        spec.submodule_search_locations = [str(ROOT)]
        sys.modules[name] = importlib.util.module_from_spec(spec)
        copies.append(importlib.import_module(f"{name}.flash_attn_triton"))
    qkv, packed = packed_input([10], 1, 16)
    arguments = (qkv, packed.cu_seqlens, slopes_of(1), None, None, None, 0.25, 0.0, 10)
    contexts = [copy._attention(*arguments)[0] for copy in copies]
    assert copies[0]._attention._qualname != copies[1]._attention._qualname
    assert torch.equal(contexts[0], contexts[1])


@pytest.fixture
def served_here(monkeypatch):
    """All Triton rows of the hub's tables serve the device of these tests."""
    for table in (bert_layers.ATTENTION_BACKENDS, bert_layers.FUSED_LAYERS):
        for name in {"triton", *bert_layers.FUSED_LAYERS} & set(table):
            monkeypatch.setitem(table, name, replace(table[name], devices=(DEVICE,)))


@on_kernels
def test_a_model_computes_the_same_under_another_default_device(served_here):
    model = tiny_model(attn_implementation="triton", num_attention_heads=2).to(DEVICE)
    ids, mask = (tensor.to(DEVICE) for tensor in ragged_batch([9, 5]))
    expected = loss_and_gradients(model, ids, attention_mask=mask, labels=ids)
    with torch.device("meta"):
        found = loss_and_gradients(model, ids, attention_mask=mask, labels=ids)
    assert_equal_outputs(found, expected)


@on_kernels
def test_compiled_model_is_one_graph_with_an_operator_for_each_attention(served_here):
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    model = tiny_model(attn_implementation="triton", num_attention_heads=2).to(DEVICE)
    ids, mask = (tensor.to(DEVICE) for tensor in ragged_batch([9, 5]))
    with torch.no_grad():
        logits = torch.compile(model, fullgraph=True, backend=record)(ids, attention_mask=mask).logits
        expected = model(ids, attention_mask=mask).logits
    assert [str(node.target).count("alibi_attention") for graph in graphs for node in graph.graph.nodes].count(1) == 2
    assert_same(logits, expected.double(), 1e-5)
