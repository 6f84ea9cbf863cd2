"""LayerNorm(dropout(x) + residual) in Triton: one kernel forward and one backward.

The sum and the dropout mask are never stored: backward reads `x` and `residual` again, draws the same mask and
recomputes mean and variance. For the gradients of weight and bias, each of `PARTS` programs sums its rows in a fixed
order and torch adds up the partial sums, so every run gives the same bits.

Letters: T tokens, E hidden size.
"""

import functools
from typing import Optional

import torch
from torch.autograd.function import once_differentiable

from .launch_triton import Tile, dropout_seed, launch, with_channels

try:
    import triton
    import triton.language as tl
except ImportError:  # The Hub's loader skips imports inside `try`; the caller decides what a missing Triton means.
    raise

# At most this many programs run backward: enough to fill a card, few enough that adding their sums costs nothing.
PARTS = 512


@triton.jit
def _keep(seed, row, dropout_p, BLOCK: tl.constexpr):
    """Which numbers of a row dropout keeps, bool [BLOCK].

    Philox keyed by the seed and counted by (channel // 4, row); each draw serves four channels. Seven rounds are the
    fewest that pass BigCrush (https://doi.org/10.1145/2063384.2063405).
    """
    quads = tl.arange(0, BLOCK // 4)
    zero = quads * 0
    first, second, third, fourth = tl.philox(tl.load(seed), quads, zero + row, zero, zero, 7)
    draws = tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))
    return tl.uint_to_uniform_float(draws) >= dropout_p


@triton.jit
def _sum_of_row(x, residual, seed, stride, residual_stride, row, size, dropout_p, BLOCK: tl.constexpr):
    """dropout(x) + residual of a row, float32 [BLOCK], zero beyond its size; and what dropout multiplied."""
    channels = tl.arange(0, BLOCK)
    exists = channels < size
    offset = row.to(tl.int64)
    values = tl.load(x + offset * stride + channels, mask=exists, other=0.0).to(tl.float32)
    factor = tl.full((BLOCK,), 1.0, tl.float32)
    if seed is not None:
        factor = tl.where(_keep(seed, row, dropout_p, BLOCK), 1.0 / (1.0 - dropout_p), 0.0)
        values = values * factor
    values += tl.load(residual + offset * residual_stride + channels, mask=exists, other=0.0).to(tl.float32)
    return values, factor


@triton.jit
def _normalize(values, size, eps, BLOCK: tl.constexpr):
    """A row with mean 0 and variance 1, float32 [BLOCK], zero beyond its size; and 1 / its standard deviation."""
    mean = tl.sum(values, axis=0) / size
    centred = tl.where(tl.arange(0, BLOCK) < size, values - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / size + eps)
    return centred * inverse, inverse


@triton.jit
def _forward_kernel(
    bias, out, x, residual, weight, seed, stride, residual_stride, size, eps, dropout_p, BLOCK: tl.constexpr
):
    """A program computes a row of `out` [T, E]."""
    row = tl.program_id(0)
    channels = tl.arange(0, BLOCK)
    exists = channels < size
    values, _ = _sum_of_row(x, residual, seed, stride, residual_stride, row, size, dropout_p, BLOCK)
    normal, _ = _normalize(values, size, eps, BLOCK)
    w = tl.load(weight + channels, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(bias + channels, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * size + channels, (normal * w + b).to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["total"])
def _backward_kernel(
    out_gradient,
    x_gradient,
    residual_gradient,
    sums,
    x,
    residual,
    weight,
    seed,
    stride,
    residual_stride,
    size,
    eps,
    dropout_p,
    total,
    BLOCK: tl.constexpr,
):
    """A program walks over every PARTS-th row.

    Writes `residual_gradient` [T, E], `x_gradient` [T, E] (None where the two are equal), and the program's row of
    `sums` float32 [PARTS, 2, E], gradients of weight and bias.
    """
    channels = tl.arange(0, BLOCK)
    exists = channels < size
    w = tl.load(weight + channels, mask=exists, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    row = tl.program_id(0)
    while row < total:
        values, factor = _sum_of_row(x, residual, seed, stride, residual_stride, row, size, dropout_p, BLOCK)
        normal, inverse = _normalize(values, size, eps, BLOCK)
        offset = row.to(tl.int64)
        dout = tl.load(out_gradient + offset * size + channels, mask=exists, other=0.0).to(tl.float32)
        weight_sum += dout * normal
        bias_sum += dout
        dnormal = dout * w
        mean = tl.sum(dnormal, axis=0) / size
        projection = tl.sum(dnormal * normal, axis=0) / size
        dvalues = (dnormal - mean - normal * projection) * inverse
        at = residual_gradient + offset * size + channels
        tl.store(at, dvalues.to(residual_gradient.dtype.element_ty), mask=exists)
        if x_gradient is not None:
            at = x_gradient + offset * size + channels
            tl.store(at, (dvalues * factor).to(x_gradient.dtype.element_ty), mask=exists)
        row += tl.num_programs(0)
    sums += tl.program_id(0) * 2 * size + channels
    tl.store(sums, weight_sum, mask=exists)
    tl.store(sums + size, bias_sum, mask=exists)


@functools.cache
def _tile(size: int) -> Tile:
    """One row per program: 8 numbers per thread up to size 1,024, then 16 and more."""
    block = max(16, triton.next_power_of_2(size))
    return Tile(1, block, 4 if block <= 1024 else 8, 1)


def _run(kernel, programs: int, own: dict, x, residual, weight, seed, eps, dropout_p, **numbers) -> None:
    """Launch a kernel; `own` and `numbers` are what it takes beside the tensors and numbers that both kernels take."""
    tile = _tile(x.shape[1])
    launch(
        kernel,
        grid=(programs, 1, 1),
        tile=tile,
        tensors={**own, "x": x, "residual": residual, "weight": weight, "seed": seed},
        strides={"stride": x.stride(0), "residual_stride": residual.stride(0), "size": x.shape[1]},
        numbers={"eps": eps, "dropout_p": dropout_p, **numbers},
        constants={"BLOCK": tile.step},
    )


def _forward(x, residual, weight, bias, seed, eps: float, dropout_p: float, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty_like(x, dtype=dtype)  # contiguous, even where the rows of x lie apart
    if out.numel():
        _run(_forward_kernel, len(x), {"bias": bias, "out": out}, x, residual, weight, seed, eps, dropout_p)
    return out


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, seed, eps, dropout_p, dtype):
        ctx.save_for_backward(x, residual, weight, seed)
        ctx.eps, ctx.dropout_p, ctx.bias_dtype = eps, dropout_p, bias.dtype
        return _forward(x, residual, weight, bias, seed, eps, dropout_p, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, out_gradient):
        x, residual, weight, seed = ctx.saved_tensors
        total, size = x.shape
        residual_gradient = residual.new_empty(residual.shape)
        x_gradient = None if seed is None and x.dtype == residual.dtype else x.new_empty(x.shape)
        sums = x.new_empty(min(total, PARTS), 2, size, dtype=torch.float32)
        if total:
            own = {
                "out_gradient": out_gradient.contiguous(),
                "x_gradient": x_gradient,
                "residual_gradient": residual_gradient,
                "sums": sums,
            }
            shared = (x, residual, weight, seed, ctx.eps, ctx.dropout_p)
            _run(_backward_kernel, len(sums), own, *shared, total=total)
        weight_gradient, bias_gradient = sums.sum(0)
        x_gradient = residual_gradient if x_gradient is None else x_gradient
        weight_gradient, bias_gradient = weight_gradient.to(weight.dtype), bias_gradient.to(ctx.bias_dtype)
        return x_gradient, residual_gradient, weight_gradient, bias_gradient, None, None, None, None


def triton_add_layer_norm(
    x, residual, weight, bias, eps: float, dropout_p: float = 0.0, dtype: Optional[torch.dtype] = None
):
    """LayerNorm(dropout(x) + residual), computed in float32.

    Args:
        x: float16, bfloat16 or float32 [..., E], E at most 8,192; any strides.
        residual: [..., E], of any of these dtypes.
        weight: [E], of any of these dtypes.
        bias: like `weight`.
        eps: added to the variance.
        dropout_p: probability of dropping a number of `x`, in [0, 1); drawn from torch's generator.
        dtype: of the result; None: that of `x` + `residual`.

    Returns:
        [..., E].

    Source: https://arxiv.org/abs/1607.06450, equation 3.
    """
    rows = (with_channels(tensor.flatten(0, -2)) for tensor in (x, residual))
    dtype = torch.promote_types(x.dtype, residual.dtype) if dtype is None else dtype
    parameters = (weight.contiguous(), bias.contiguous(), dropout_seed(dropout_p, x.device))
    arguments = (*rows, *parameters, float(eps), float(dropout_p), dtype)
    compute = _AddLayerNorm.apply if torch.is_grad_enabled() else _forward
    return compute(*arguments).view(x.shape)
