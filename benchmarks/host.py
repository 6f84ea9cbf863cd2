"""Times the Python of one attention call on any machine: all of it but the start of the compiled kernels."""

import contextlib
import sys

import torch
from contenders import layers, padding

# launch_triton.py of this checkout; None where Triton is not installed.
launching = layers.triton_declines and sys.modules[layers.triton_declines.__module__]


class CountedKernel:
    """A stand-in for every compiled kernel whose launch only counts."""

    def __init__(self):
        self.launches = 0

    def __getitem__(self, grid):
        return self.start

    def start(self, *arguments):
        """Count one launch."""
        self.launches += 1


class Always(dict):
    """A cache with the same value under every key, at the cost of a real look-up.

    Args:
        value: what it holds.
    """

    def __init__(self, value):
        super().__init__()
        self.value = value

    def get(self, key, default=None):
        hash(key)
        return self.value


@contextlib.contextmanager
def stubbed_launches():
    """Make the Triton kernels of this repository look compiled, and run none.

    Yields:
        The `CountedKernel` that counts their launches.
    """
    kernel, compiled = CountedKernel(), launching._compiled
    launching._compiled = Always(kernel)
    try:
        yield kernel
    finally:
        launching._compiled = compiled


class Nothing(torch.autograd.Function):
    """An operation that computes nothing: the least that a call costs in eager mode, forward and backward."""

    @staticmethod
    def forward(ctx, qkv):
        ctx.save_for_backward(qkv)
        return qkv.new_empty(len(qkv), *qkv.shape[2:])

    @staticmethod
    def backward(ctx, gradient):
        (qkv,) = ctx.saved_tensors
        return torch.empty_like(qkv)


class HostCall:
    """Contenders for the Python of one attention call, with small CPU tensors, since sizes do not matter.

    Args:
        case: a `Case`.
        kernel: what `stubbed_launches` yields.
    """

    def __init__(self, case, kernel: CountedKernel):
        self.case, self.kernel = case, kernel
        self.qkv = torch.zeros(sum(case.lengths), 3, 1, 16, dtype=torch.bfloat16)
        self.qkv.requires_grad_(case.mode != "forward")
        self.gradient = torch.zeros(len(self.qkv), 1, 16, dtype=torch.bfloat16)
        bounds = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int32)
        self.packed = padding.pack_flattened(bounds, max(case.lengths), (1, len(self.qkv)))
        self.slopes = torch.ones(1)

    def contender(self, name: str):
        """The function to time."""
        attend = Nothing.apply if name == "empty autograd.Function" else self.attend
        if self.case.mode == "forward":
            return torch.no_grad()(lambda: attend(self.qkv))
        return lambda: torch.autograd.grad(attend(self.qkv), self.qkv, self.gradient)

    def attend(self, qkv):
        """Our attention."""
        return layers.triton_attention(qkv, self.packed, self.slopes, 0.25, 0.0)

    def launches(self, name: str) -> int:
        """The number of kernels that one call of a contender launches."""
        before = self.kernel.launches
        self.contender(name)()
        return self.kernel.launches - before
