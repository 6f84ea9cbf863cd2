"""What all tests of the Triton kernels share.

On a machine without a GPU the kernels run under Triton's interpreter, which has to be chosen before Triton is imported:
`test_triton_interpreter.py` runs the `test_triton_*.py` files in a process of its own with TRITON_INTERPRET=1. On a
GPU, `pytest -m gpu` runs everything on the device.
"""

import os

import pytest
import reference
import torch
from numerics import FORWARD, GRADIENT, assert_no_worse

from mosaicbert.bert_attention import alibi_slopes, eager_attention

triton = pytest.importorskip("triton", reason="Triton is not installed")

from mosaicbert import flash_attn_triton as leaf  # noqa: E402
from mosaicbert.launch_triton import Tile  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
KERNELS = (leaf._forward_kernel, leaf._query_gradient_kernel, leaf._key_value_gradient_kernel)


def on_gpu(test):
    """Mark a test that shows something on a device only."""
    return pytest.mark.gpu(pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")(test))


def on_kernels(test):
    """Mark a test that runs kernels: on a device, or under the interpreter in its process."""
    test = pytest.mark.usefixtures("bfloat16_in_the_interpreter", "poisoned_memory", "small_tiles")(test)
    return test if INTERPRETED else on_gpu(test)


def use_tiles(monkeypatch, own, other):
    """Give all three attention kernels one tile size."""
    monkeypatch.setattr(leaf, "tiles_for", lambda *arguments: [Tile(own, other, 4, 2)])
    monkeypatch.setattr(leaf, "_chosen", {})


def skip_in_short_sequences(monkeypatch):
    """Measure and skip at every length."""
    monkeypatch.setattr(leaf, "LONGEST_UNSKIPPED", 0)


def packed_input(lengths, heads, head_dim, dtype=torch.float32, size=1.0, seed=0):
    """qkv [T, 3, H, D] that wants a gradient, and cu_seqlens [N + 1]."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator) * size
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return qkv.to(dtype).to(DEVICE).requires_grad_(), cu_seqlens.to(DEVICE)


def slopes_of(heads):
    return torch.tensor(alibi_slopes(heads), dtype=torch.float32, device=DEVICE)


def with_gradient(attend, *tensors, seed=1):
    """A context [T, H, D] and the gradients of `tensors` for one random gradient of the context."""
    context = attend(*tensors)
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(context.shape, generator=generator).to(context)
    return context, torch.autograd.grad(context, tensors, gradient)


def assert_as_good_as_eager(kernel, qkv, packed, slopes, positions=None):
    """Context and gradients of `kernel(qkv)` against float64, by the rule of numerics.py.

    `positions` are the columns of the tokens where a mask has holes.
    """
    scale = qkv.shape[-1] ** -0.5
    bounds = packed.cu_seqlens.tolist()
    context, (gradient,) = with_gradient(kernel, qkv)
    plain, (plain_gradient,) = with_gradient(lambda x: eager_attention(x, packed, slopes, scale, 0.0), qkv)
    truth, (true_gradient,) = with_gradient(
        lambda x: reference.attention(*x.unbind(1), bounds, positions, slopes.tolist(), scale), qkv
    )
    assert context.dtype == gradient.dtype == qkv.dtype
    assert_no_worse(context, plain, truth, FORWARD, "context")
    for place, name in enumerate(("query", "key", "value")):
        parts = (tensor[:, place] for tensor in (gradient, plain_gradient, true_gradient))
        assert_no_worse(*parts, GRADIENT, f"gradient of {name}")


def launch_recorder(monkeypatch, module):
    """A list that collects the kernels that a module launches; nothing runs."""
    launches = []
    monkeypatch.setattr(module, "launch", lambda kernel, *arguments: launches.append(kernel))
    return launches
