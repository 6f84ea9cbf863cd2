"""GeGLU in Triton: gelu(gate) * value in one pass, and its gradient in another that recomputes the GELU.

Letters: T tokens, F intermediate size.
"""

import torch
from torch.autograd.function import once_differentiable

from .launch_triton import Tile, launch, with_channels

try:
    import triton
    import triton.language as tl
except ImportError:  # The Hub's loader skips imports inside `try`; the caller decides what a missing Triton means.
    raise

# One row and 1,024 channels per program, 8 numbers per thread. Nothing is kept or reused, so memory bandwidth is the
# limit, and any size that fills the card reaches it.
TILE = Tile(1, 1024, 4, 1)

# 1 / sqrt(2) and 1 / sqrt(2 pi).
INV_SQRT_2 = tl.constexpr(0.7071067811865476)
INV_SQRT_TAU = tl.constexpr(0.3989422804014327)


@triton.jit
def _forward_kernel(out, gated, stride, features, BLOCK: tl.constexpr):
    """Writes gelu(gate) * value, [T, F], for rows [gate, value] of `gated` [T, 2 F]."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = channels < features
    gate = tl.load(gated + row * stride + channels, mask=exists, other=0.0).to(tl.float32)  # [BLOCK]
    value = tl.load(gated + row * stride + features + channels, mask=exists, other=0.0).to(tl.float32)
    gelu = gate * 0.5 * (1.0 + tl.erf(gate * INV_SQRT_2))
    # Rounded as torch rounds it between its two operators.
    gelu = gelu.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * features + channels, (gelu * value).to(out.dtype.element_ty), mask=exists)


@triton.jit
def _backward_kernel(out_gradient, gradient, gated, stride, features, BLOCK: tl.constexpr):
    """Writes the gradient of `gated`, [T, 2 F], for `out_gradient` [T, F]."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = channels < features
    gate = tl.load(gated + row * stride + channels, mask=exists, other=0.0).to(tl.float32)  # [BLOCK]
    value = tl.load(gated + row * stride + features + channels, mask=exists, other=0.0).to(tl.float32)
    dout = tl.load(out_gradient + row * features + channels, mask=exists, other=0.0).to(tl.float32)
    normal = 0.5 * (1.0 + tl.erf(gate * INV_SQRT_2))  # distribution function
    density = tl.exp(-0.5 * gate * gate) * INV_SQRT_TAU
    dgate = dout * value * (normal + gate * density)
    dvalue = dout * gate * normal
    gradient += row * 2 * features + channels
    tl.store(gradient, dgate.to(gradient.dtype.element_ty), mask=exists)
    tl.store(gradient + features, dvalue.to(gradient.dtype.element_ty), mask=exists)


def _run(kernel, gated: torch.Tensor, **own) -> None:
    """Launch a kernel for `gated` [T, 2 F], channels contiguous; `own`: the tensors that it takes before `gated`."""
    if gated.numel():
        total, features = gated.shape[0], gated.shape[1] // 2
        grid = (total, triton.cdiv(features, TILE.step), 1)
        strides = {"stride": gated.stride(0), "features": features}
        launch(kernel, grid, TILE, {**own, "gated": gated}, strides, numbers={}, constants={"BLOCK": TILE.step})


def _forward(gated: torch.Tensor) -> torch.Tensor:
    out = gated.new_empty(gated.shape[0], gated.shape[1] // 2)
    _run(_forward_kernel, gated, out=out)
    return out


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gated):
        ctx.save_for_backward(gated)
        return _forward(gated)

    @staticmethod
    @once_differentiable
    def backward(ctx, out_gradient):
        (gated,) = ctx.saved_tensors
        gradient = gated.new_empty(gated.shape)
        _run(_backward_kernel, gated, out_gradient=out_gradient.contiguous(), gradient=gradient)
        return gradient


def triton_geglu(gated):
    """gelu(gate) * value with the exact GELU, computed in float32; backward keeps nothing but `gated`.

    Args:
        gated: float16, bfloat16 or float32 [..., 2 F], gates first; any strides, copied only if its channels are not
            contiguous.

    Returns:
        [..., F] in the dtype of `gated`.

    Source: https://arxiv.org/abs/2002.05202, equation 6.
    """
    rows = with_channels(gated.flatten(0, -2))
    out = _GeGLU.apply(rows) if rows.requires_grad and torch.is_grad_enabled() else _forward(rows)
    return out.view(*gated.shape[:-1], rows.shape[1] // 2)
