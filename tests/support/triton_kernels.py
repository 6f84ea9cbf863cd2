"""What all tests of the Triton kernels share.

On a machine without a GPU the kernels run under Triton's interpreter, which has to be chosen before Triton is imported:
`test_triton_interpreter.py` runs the files in a process with TRITON_INTERPRET=1. On a
GPU, `pytest -m gpu` runs everything on the device.
"""

import os

import pytest
import reference
import torch
from numerics import FORWARD, GRADIENT, assert_no_worse

from mosaicbert.bert_attention import alibi_slopes, eager_attention
from mosaicbert.bert_padding import pack_flattened

triton = pytest.importorskip("triton", reason="Triton is not installed")

from mosaicbert import flash_attn_triton as leaf  # noqa: E402
from mosaicbert.launch_triton import Tile  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
KERNELS = (leaf._forward_kernel, leaf._query_gradient_kernel, leaf._key_value_gradient_kernel)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def on_gpu(test):
    """Mark a test that shows something on a device only."""
    return pytest.mark.gpu(pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no GPU")(test))


def on_kernels(test):
    """Mark a test that runs kernels: on a device, or under the interpreter in its process."""
    test = pytest.mark.usefixtures("bfloat16_in_the_interpreter", "poisoned_memory", "small_tiles")(test)
    return test if INTERPRETED else on_gpu(test)


def use_tiles(monkeypatch, rows, step):
    """Give all three attention kernels one tile size."""
    monkeypatch.setattr(leaf, "tiles_for", lambda *arguments: [Tile(rows, step, 4, 2)])
    monkeypatch.setattr(leaf, "_chosen", {})


def skip_at_every_length(monkeypatch, skip=True):
    """Measure and skip at every length, or never."""
    monkeypatch.setattr(leaf, "LONGEST_UNSKIPPED", 0 if skip else 2**31)


def packed_input(lengths, heads, head_dim, dtype=torch.float32, size=1.0, seed=0):
    """qkv [T, 3, H, D] that requires a gradient, and its `PackedBatch`."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator) * size
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    return qkv.to(dtype).to(DEVICE).requires_grad_(), pack_flattened(cu_seqlens, max(lengths), (1, len(qkv)))


def slopes_of(heads):
    return torch.tensor(alibi_slopes(heads), dtype=torch.float32, device=DEVICE)


def attend(qkv, packed, slopes, dropout_p=0.0):
    """Triton attention with the usual scale."""
    return leaf.triton_attention(qkv, packed, slopes, qkv.shape[-1] ** -0.5, dropout_p)


def with_gradient(function, *tensors, seed=1):
    """What a function returns, and the gradients of `tensors` for one random gradient of that."""
    context = function(*tensors)
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(context.shape, generator=generator).to(context)
    return context, torch.autograd.grad(context, tensors, gradient)


def assert_as_good_as_eager(qkv, packed, slopes):
    """Context and gradients of Triton attention against float64, by the rule of numerics.py."""
    scale = qkv.shape[-1] ** -0.5
    bounds = packed.cu_seqlens.tolist()
    positions = packed.positions.tolist() if packed.has_holes else None
    context, (gradient,) = with_gradient(lambda x: attend(x, packed, slopes), qkv)
    plain, (plain_gradient,) = with_gradient(lambda x: eager_attention(x, packed, slopes, scale, 0.0), qkv)
    truth, (true_gradient,) = with_gradient(
        lambda x: reference.attention(*x.unbind(1), bounds, positions, slopes.tolist(), scale), qkv
    )
    assert context.dtype == gradient.dtype == qkv.dtype
    assert_no_worse(context, plain, truth, FORWARD, "context")
    for index, name in enumerate(("query", "key", "value")):
        parts = (tensor[:, index] for tensor in (gradient, plain_gradient, true_gradient))
        assert_no_worse(*parts, GRADIENT, f"gradient of {name}")


def launch_recorder(monkeypatch, module):
    """A list that collects the kernels that a module launches; nothing runs."""
    launches = []
    monkeypatch.setattr(module, "launch", lambda kernel, *_, **arguments: launches.append(kernel))
    return launches
