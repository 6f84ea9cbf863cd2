"""Every tolerance of the test suite, each with its origin, and the only functions that compare numbers.

Errors are relative to the largest absolute value of the expected tensor. Comparing nothing is an error.
"""

import re

import torch

# Published values are float32 roundings of a float64 computation: "about 1e-5 of each tensor's largest value" is the
# tolerance that came with them. Measured here: outputs at most 2e-6 and gradients 5.8e-6 in float32, at most 6e-8 (the
# rounding) in float64.
PUBLISHED = {torch.float32: 1e-5, torch.float64: 1e-7}

# Triton's interpreter multiplies with NumPy, whose BLAS sums in an order of its own on each processor. Measured for the
# gradient that is a sum over all tokens: 6.4e-6 with the kernels of SkylakeX, 1.3e-5 Haswell, 1.4e-5 Nehalem.
INTERPRETED_GRADIENT = 2e-5

# Two float32 formulas for the same number, summed in another order (packed, padded, compiled, another backend).
# Measured: up to 4e-6 through twelve layers; the bound is the published one.
SAME = {torch.float32: 1e-5, torch.float64: 1e-12}

# Weights and activations in 8 bits through two layers: half a step of 1/127 of the largest value for each of the ten
# linear layers. Measured: 0.029.
QUANTIZED = 0.05

# An export that computes in float16 through two layers, where each of some twenty operators rounds. Measured: 0.0013.
EXPORTED_FLOAT16 = 0.005

# A kernel may err at most this many times as much as the plain PyTorch formula in the same dtype, both against float64
# (the rule of flash-attention's tests).
FORWARD, GRADIENT, MODEL = 2.0, 3.0, 4.0

# Below these errors the ratio rule compares noise: a few roundings of one number in the dtype (2, 2, 2 and 4 ulp).
FLOOR = {torch.float64: 1e-15, torch.float32: 2.4e-7, torch.bfloat16: 7.9e-3, torch.float16: 9.8e-4}

# The same for gradients. In a sequence of 2 tokens they are differences of almost equal numbers: in float32 torch's own
# kernel then errs by less than 2.4e-7 on an Intel processor and by 5.05e-7 on an AMD one, and ours by 1.0e-6 with the
# instructions of SSE4; in float64 ours errs by 1.5e-15 with those of AVX2.
GRADIENT_FLOOR = {**FLOOR, torch.float32: 2e-6, torch.float64: 2e-15}


def relative_error(actual, expected):
    """Largest absolute difference over the largest absolute expected value; refuses empty or misshapen input."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    if actual.numel() == 0:
        raise AssertionError("there is nothing to compare")
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if not torch.isfinite(actual).all():
        raise AssertionError("the result has values that are not finite")
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def assert_same(actual, expected, tolerance, what=""):
    """Fail unless the relative error stays within `tolerance`."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what} relative error {error:.2e} exceeds {tolerance:.2e}"


def printed_difference(text):
    """The number that a program printed behind "differ by" or "largest difference".

    Two models with the same weights may differ in the last digits: a matrix product depends on the alignment of its
    operands in memory on some processors.
    """
    return float(re.search(r"(?:differ by|largest difference) (\S+)", text)[1])


def assert_no_worse(actual, plain, truth, factor, what=""):
    """Fail unless `actual` errs at most `factor` times as much as `plain`, both against float64 `truth`."""
    floor = (GRADIENT_FLOOR if factor == GRADIENT else FLOOR)[actual.dtype]
    allowed = max(factor * relative_error(plain, truth), floor)
    assert_same(actual, truth, allowed, what)
