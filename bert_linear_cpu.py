"""Faster linear layers on the CPU; the only file that asks which processor this is.

Measurements: benchmarks/README.md.
"""

import math
import re
from functools import cache
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .bert_checks import is_plain, is_traced, onednn_pointwise

# Below this many rows, always use F.linear.
FEWEST_ROWS = 128

# Largest intermediate result of `in_parts`. glibc maps memory from 32 MiB up anew at each call, and the kernel clears
# it: at 1,776 and 2,048 tokens of base size a forward in parts is 1.05 times as fast.
PART_BYTES = 30 * 2**20


@cache
def processor() -> tuple[str, frozenset]:
    """Vendor and feature flags of this machine's processor, as Linux names them; empty where they are not known."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "", frozenset()
    vendor, flags = (re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE) for name in ("vendor_id", "flags"))
    return vendor[1] if vendor else "", frozenset(flags[1].split() if flags else ())


def is_amd_with_bfloat16() -> bool:
    """Whether this is an AMD processor that multiplies bfloat16 in hardware."""
    vendor, flags = processor()
    return vendor == "AuthenticAMD" and "avx512_bf16" in flags


def float32_linear(x, weight, bias):
    """x @ weight.T + bias in float32, returned in the dtype of `x`."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def onednn_linear(x, weight, bias):
    """x @ weight.T + bias by oneDNN, which torch itself calls in float32 under inductor only; without a gradient."""
    return onednn_pointwise(x, weight, bias, "none", [], "none")


class OneDNNLinear(torch.autograd.Function):
    """`onednn_linear` with its gradients; second derivatives come from `F.linear`.

    On AMD in float32, 1,776 rows: 1.8 to 2.3 times as fast as `F.linear`, the gradient of x 1.8 to 1.9 times, that of
    the weight 1.1 to 1.6 times.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        """[..., in], [out, in] and [out] or None to [..., out]."""
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        """Gradient [..., out] of the result to those of the three arguments."""
        x, weight = ctx.saved_tensors
        multiply = F.linear if torch.is_grad_enabled() else onednn_linear
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = multiply(grad_rows, weight.t(), None).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = multiply(grad_rows.t(), rows.t(), None)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0)
        return grad_x, grad_weight, grad_bias


def choose_linear(dtype: torch.dtype) -> Callable:
    """The fastest `(x, weight, bias) -> x @ weight.T + bias` for inference on this processor, from 128 rows up.

    - float32 on AMD: oneDNN is about 2 times as fast as `F.linear`, which calls MKL; on Intel 0.9 to 1.05 times. For
      training see `OneDNNLinear`.
    - bfloat16 on AMD with avx512_bf16: calling oneDNN directly is 1.01 to 1.07 times as fast.
    - bfloat16 on Intel without AMX: float32 is 1.4 to 1.5 times as fast (for float16 0.8 to 0.9 times).
    - Anything else: `F.linear`.
    """
    vendor, flags = processor()
    if vendor == "AuthenticAMD" and torch.backends.mkldnn.is_available() and onednn_pointwise is not None:
        if dtype == torch.float32 or dtype == torch.bfloat16 and is_amd_with_bfloat16():
            return onednn_linear
    if dtype == torch.bfloat16 and vendor == "GenuineIntel" and "amx_tile" not in flags:
        return float32_linear
    return F.linear


def linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)`, in the fastest way where the layer is a plain `nn.Linear` on the CPU.

    Args:
        layer: an `nn.Linear`, or its replacement, such as an adapter or a quantized layer.
        x: floating [..., in].

    Returns:
        [..., out] in the dtype of `x`.
    """
    if (
        x.device.type != "cpu"
        or is_traced()
        or x.shape[:-1].numel() < FEWEST_ROWS
        or torch.is_autocast_enabled("cpu")
        or not is_plain(layer)
        or x.dtype != layer.weight.dtype
    ):
        return layer(x)
    compute = choose_linear(x.dtype)
    if torch.is_grad_enabled():
        # F.linear has gradients in every dtype, and itself calls oneDNN for bfloat16.
        compute = OneDNNLinear.apply if compute is onednn_linear and x.dtype == torch.float32 else F.linear
    return compute(x, layer.weight, layer.bias)


def in_parts(function: Callable, x: torch.Tensor, width: int) -> torch.Tensor:
    """`function(x)`, for inference on the CPU some rows at a time, so that intermediate results stay small.

    Args:
        function: maps the rows of x [T, ...] to rows, each by itself.
        x: floating [T, ...].
        width: numbers per row of the largest intermediate result.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or is_traced():
        return function(x)
    parts = math.ceil(x.shape[:-1].numel() * width * x.element_size() / PART_BYTES)
    return torch.cat([function(part) for part in x.chunk(parts)]) if parts > 1 else function(x)
