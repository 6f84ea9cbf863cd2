"""Triton attention within torch: operators, compilation, checkpointing, autocast; and the compiled model."""

import importlib
import importlib.machinery
import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from models import ragged_batch, tiny_model
from numerics import assert_same
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton_kernels import DEVICE, INTERPRETED, leaf, on_kernels, packed_input, slopes_of, with_gradient

from mosaicbert import bert_layers


@on_kernels
def test_operator_is_registered_as_torch_expects():
    qkv, cu_seqlens = packed_input([20, 13], 2, 16)
    arguments = (qkv, cu_seqlens, slopes_of(2), None, None, None, 0.25, 0.0, 20, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(leaf._attention, arguments, test_utils=checks)


@on_kernels
def test_only_observers_see_an_operator(monkeypatch):
    qkv, cu_seqlens = packed_input([40], 2, 16)
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(function.name())
            return function(*arguments, **(options or {}))

    def attend(x):
        return leaf.flash_attn_varlen_qkvpacked_func(x, cu_seqlens, 40, alibi_slopes=slopes_of(2))

    with Recorder():
        observed = with_gradient(attend, qkv)
    names = [name.split("::")[1] for name in seen if "alibi" in name]
    assert names == ["alibi_attention", "alibi_attention_backward"]
    monkeypatch.setattr(leaf, "_attention", None)
    eager = with_gradient(attend, qkv)
    assert torch.equal(observed[0], eager[0]) and torch.equal(observed[1][0], eager[1][0])


@on_kernels
def test_fake_tensors_pass_through_with_the_right_shapes():
    with FakeTensorMode():
        for max_seqlen in (40, 4000):
            qkv = torch.empty(90, 3, 2, 16, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
            cu_seqlens = torch.empty(4, dtype=torch.int32, device=DEVICE)
            slopes = torch.empty(2, device=DEVICE)
            context = leaf.flash_attn_varlen_qkvpacked_func(
                qkv, cu_seqlens, max_seqlen, alibi_slopes=slopes, check=False
            )
            assert context.shape == (90, 2, 16) and context.dtype == torch.bfloat16
            (gradient,) = torch.autograd.grad(context, qkv, torch.empty_like(context))
            assert gradient.shape == qkv.shape and gradient.is_contiguous()


@on_kernels
def test_compiles_without_graph_breaks_forward_and_backward():
    slopes = slopes_of(2)

    def attend(x, cu_seqlens, max_seqlen):
        return leaf.flash_attn_varlen_qkvpacked_func(x * 2, cu_seqlens, max_seqlen, 0.0, None, slopes) + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor", dynamic=True)
    for lengths in ([30, 5], [20, 30, 7]):
        qkv, cu_seqlens = packed_input(lengths, 2, 16)
        expected, (gradient,) = with_gradient(lambda x, c=cu_seqlens: attend(x, c, 30), qkv)
        context, (compiled_gradient,) = with_gradient(lambda x, c=cu_seqlens: compiled(x, c, 30), qkv)
        assert_same(context, expected.double(), 1e-6)
        assert_same(compiled_gradient, gradient.double(), 1e-6)


@on_kernels
def test_checkpointing_recomputes_the_same_dropout():
    from torch.utils.checkpoint import checkpoint

    qkv, cu_seqlens = packed_input([40], 2, 16)

    def attend(x):
        return leaf.flash_attn_varlen_qkvpacked_func(x.sin(), cu_seqlens, 40, 0.4, alibi_slopes=slopes_of(2))

    def seeded(x, function):
        torch.manual_seed(8)
        return function(x)

    plain = with_gradient(lambda x: seeded(x, attend), qkv)
    recomputed = with_gradient(lambda x: seeded(x, lambda y: checkpoint(attend, y, use_reentrant=False)), qkv)
    assert torch.equal(plain[0], recomputed[0]) and torch.equal(plain[1][0], recomputed[1][0])


@on_kernels
def test_autocast_leaves_the_dtype_of_the_tensors():
    qkv, cu_seqlens = packed_input([30], 2, 16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        context = leaf.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 30, alibi_slopes=slopes_of(2))
        projected = torch.nn.functional.linear(qkv, torch.eye(16, device=DEVICE))
        half = leaf.flash_attn_varlen_qkvpacked_func(projected, cu_seqlens, 30, alibi_slopes=slopes_of(2))
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
    qkv, cu_seqlens = packed_input([10], 1, 16)
    contexts = [copy._attention(qkv, cu_seqlens, slopes_of(1), *[None] * 3, 0.25, 0.0, 10, False)[0] for copy in copies]
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
    model = tiny_model(attn_implementation="triton").to(DEVICE)
    ids, mask = (tensor.to(DEVICE) for tensor in ragged_batch([9, 5]))

    def loss_and_gradients():
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = loss_and_gradients()
    with torch.device("meta"):
        found = loss_and_gradients()
    for got, want in zip(found, expected):
        assert_same(got, want, 1e-5)


@on_kernels
def test_compiled_model_is_one_graph_with_an_operator_for_each_attention(served_here):
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    model = tiny_model(attn_implementation="triton").to(DEVICE)
    ids, mask = (tensor.to(DEVICE) for tensor in ragged_batch([9, 5]))
    with torch.no_grad():
        logits = torch.compile(model, fullgraph=True, backend=record)(ids, attention_mask=mask).logits
        expected = model(ids, attention_mask=mask).logits
    assert [str(node.target).count("alibi_attention") for graph in graphs for node in graph.graph.nodes].count(1) == 2
    assert_same(logits, expected.double(), 1e-5)
