"""Starting Triton kernels: whether a device can, with which tile size, and without Triton's dispatch once compiled.

A kernel that goes through `launch` takes its arguments in this order: tensors (or None), strides, numbers, constants.
"""

import functools
import logging
from typing import Callable, NamedTuple, Optional

import torch

from .bert_checks import dispatch_mode_is_active, is_traced

try:
    import triton
    import triton.language as tl
except ImportError:  # The Hub's loader skips imports inside `try`; the caller decides what a missing Triton means.
    raise

logger = logging.getLogger(__name__)


class Tile(NamedTuple):
    """A tile size, and how a block computes it.

    Attributes:
        own: rows that a program owns.
        other: rows or channels that it takes at a time.
        warps: warps a block.
        stages: stages of the software pipeline.
    """

    own: int
    other: int
    warps: int
    stages: int


# From 3.6 on, a compiled kernel takes the same arguments as the function it was compiled from; earlier releases differ.
_RUNS_COMPILED = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
_compiled = {}


def launch(kernel, grid, tensors, strides, numbers, constants, tile: Tile) -> None:
    """Run a kernel on the current stream of the first tensor's device.

    Triton's dispatch takes 30 to 38 µs of Python for the attention kernels; what it compiled is kept and runs again in
    about 10 µs.

    Args:
        kernel: a triton.jit function; `numbers` must not be specialized (floats never are).
        grid: three integers.
        tensors: the tensors, None where an optional one is absent.
        strides: integers that the kernel is compiled for (whether they are 1 or divisible by 16).
        numbers: integers and floats that change from call to call.
        constants: values of the kernel's constexpr arguments.
        tile: gives the warps and the stages.

    Source: ours.
    """
    device = tensors[0].get_device()
    with torch.cuda.device(device):
        kinds = tuple([x if x is None else (x.dtype, x.data_ptr() % 16) for x in tensors])
        key = (kernel, device, kinds, strides, constants, tile)
        if torch.version.hip:  # Triton addresses what lies within 2 GiB by 32 bits there
            key += tuple([x is not None and x.untyped_storage().nbytes() < 2**31 for x in tensors])
        compiled = _compiled.get(key)
        if compiled is not None:
            compiled[grid](*tensors, *strides, *numbers, *constants)
            return
        # Multiply and add in one instruction: Triton's default up to 3.9, its option from 3.10 on.
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
        compiled = kernel[grid](*tensors, *strides, *numbers, *constants, **options)
        if _RUNS_COMPILED and compiled is not None:  # the interpreter compiles nothing
            _compiled[key] = compiled


def is_observed(tensor: torch.Tensor) -> bool:
    """Whether something needs to see operators where a kernel would run: a compiler, a tracer, a mode, a subclass."""
    return is_traced() or type(tensor) not in (torch.Tensor, torch.nn.Parameter) or dispatch_mode_is_active()


def fastest(tiles: list[Tile], run: Callable[[Tile], None]) -> Tile:
    """The tile size that takes the least time on the device.

    Args:
        tiles: candidates; those that ask for more than the card has are left out.
        run: starts the kernel with a tile size.

    Returns:
        One of `tiles`.

    Raises:
        triton.runtime.OutOfResources: none of them fits.
    """
    times, failure = {}, None
    for tile in tiles:
        try:
            times[tile] = triton.testing.do_bench(lambda tile=tile: run(tile), warmup=5, rep=20)
        except triton.runtime.OutOfResources as error:
            failure = error
    if not times:
        raise failure
    return min(times, key=times.get)


def with_channels(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last axis is contiguous, as all kernels here need, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may use on a device."""
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


@triton.jit
def _product_kernel(out, SIZE: tl.constexpr):
    """Writes a product of two matrices of ones, [SIZE, SIZE]."""
    rows = tl.arange(0, SIZE)
    ones = tl.full((SIZE, SIZE), 1.0, tl.float16)
    tl.store(out + rows[:, None] * SIZE + rows[None, :], tl.dot(ones, ones))


@functools.cache
def _reason_against(device: torch.device) -> Optional[str]:
    """Why kernels cannot run on a device, found by running a small one, once."""
    if device.type == "cpu":
        is_interpreted = not isinstance(_product_kernel, triton.runtime.JITFunction)
        return None if is_interpreted else "Triton runs on the CPU under its interpreter only"
    if device.type != "cuda":
        return f"it is written for CUDA and ROCm devices, got {device.type}"
    try:
        out = torch.empty(16, 16, device=device)
        for _ in range(2):  # by Triton's dispatch, then without it
            out.fill_(float("nan"))
            launch(_product_kernel, (1, 1, 1), (out,), (), (), (16,), Tile(16, 16, 4, 1))
            if not (out == 16).all():
                raise RuntimeError(f"a product of ones must be 16 everywhere, got {out[0, 0].item()}")
    except Exception as error:  # Drivers, compilers and cards fail in more ways than can be named.
        reason = f"a small kernel failed on {device}: {type(error).__name__}: {error}"
        logger.warning("Triton kernels are not used: %s", reason)
        return reason
    return None


@torch.compiler.assume_constant_result
def triton_declines(device: torch.device) -> Optional[str]:
    """Whether Triton kernels cannot run on a device.

    The first call for a device compiles and runs a small kernel; a failure is logged once as a warning.

    Args:
        device: where they would run, with its index.

    Returns:
        The reason in words, or None when they run there.

    Source: ours.
    """
    return _reason_against(device)
