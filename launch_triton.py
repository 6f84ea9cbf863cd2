"""Starts Triton kernels: where they can run, with which tile size, and without Triton's dispatch once compiled."""

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
        rows: rows that a program owns.
        step: rows or channels that it reads at a time.
        warps: warps per block.
        stages: stages of the software pipeline.
    """

    rows: int
    step: int
    warps: int
    stages: int


def _runs_compiled(version: str) -> bool:
    """Whether a compiled kernel of this Triton runs by the arguments of its function: from 3.6 to the newest tested."""
    return (3, 6) <= tuple(int(part) for part in version.split(".")[:2]) <= (3, 7)


_RUNS_COMPILED = _runs_compiled(triton.__version__)
_compiled = {}


def launch(kernel, grid, tile: Tile, tensors: dict, strides: dict, numbers: dict, constants: dict) -> None:
    """Run a kernel on the current stream of the first tensor's device.

    Triton's dispatch takes 13 to 14 µs of Python for the attention kernels (Triton 3.7.1, without the driver);
    what it compiled is kept and runs again in 5 to 6 µs.

    Args:
        kernel: a triton.jit function; `numbers` must not be specialized (floats never are).
        grid: three integers.
        tile: gives the warps and the stages.
        tensors: the kernel's arguments by name, in its order: the tensors, None where an optional one is absent.
        strides: then integers that the kernel is compiled for (whether they are 1 or divisible by 16).
        numbers: then integers and floats that change from call to call.
        constants: then values of its constexpr arguments.

    Raises:
        TypeError: names or order are not those of the kernel.
    """
    arguments = (*tensors.values(), *strides.values(), *numbers.values(), *constants.values())
    device = arguments[0].get_device()
    with torch.cuda.device(device):
        key = _key(kernel, device, tile, tensors, strides, constants)
        compiled = _compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments)
            return
        names = [*tensors, *strides, *numbers, *constants]
        if names != list(kernel.arg_names):
            raise TypeError(f"the kernel takes {', '.join(kernel.arg_names)}, got {', '.join(names)}")
        # Multiply and add in one instruction: Triton's default up to 3.9, its option from 3.10 on.
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
        compiled = kernel[grid](*arguments, **options)
        if key is not None and compiled is not None:  # the interpreter compiles nothing
            _compiled[key] = compiled


def _key(kernel, device, tile, tensors, strides, constants) -> Optional[tuple]:
    """All that decides what Triton compiles, or None where only its own dispatch can tell; arguments of `launch`.

    Beside types, alignment and options, the key of Triton's own cache (`JITFunction.run`, 3.7.1) holds the knobs for
    debugging and instrumentation, and what a hook that may change the compiler's stages returns.
    """
    knobs = triton.knobs if _RUNS_COMPILED else None
    if knobs is None or knobs.runtime.add_stages_inspection_hook is not None:
        return None
    kinds = [x if x is None else (x.dtype, x.data_ptr() % 16) for x in tensors.values()]
    if torch.version.hip:  # Triton addresses what lies within 2 GiB by 32 bits there
        kinds += [x is not None and x.untyped_storage().nbytes() < 2**31 for x in tensors.values()]
    modes = (knobs.runtime.debug, knobs.compilation.instrumentation_mode)
    # The function, as a kernel computes its hash at every look-up.
    return (kernel.fn, device, tile, *modes, *kinds, *strides.values(), *constants.values())


def is_observed(tensor: torch.Tensor) -> bool:
    """Whether something needs to see operators where a kernel would run: a compiler, a tracer, a mode, a subclass."""
    return is_traced() or type(tensor) not in (torch.Tensor, torch.nn.Parameter) or dispatch_mode_is_active()


def fastest(tiles: list[Tile], run: Callable[[Tile], None]) -> Tile:
    """The one of `tiles` with which `run` takes the least time; those that ask for more than the card has are left out.

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


def dropout_seed(dropout_p: float, device: torch.device) -> Optional[torch.Tensor]:
    """int64 [1], the key of one call's dropout, or None where nothing is dropped.

    It comes from torch's generator on the device: torch.manual_seed reproduces it, checkpointing restores it, and
    nothing waits for the host.
    """
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device) if dropout_p > 0 else None


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may use on a device."""
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


@triton.jit
def _product_kernel(out, SIZE: tl.constexpr):
    """Writes the matrix product of two matrices of ones, [SIZE, SIZE]."""
    rows = tl.arange(0, SIZE)
    ones = tl.full((SIZE, SIZE), 1.0, tl.float16)
    tl.store(out + rows[:, None] * SIZE + rows[None, :], tl.dot(ones, ones))


@functools.cache
def _device_declines(device: torch.device) -> Optional[str]:
    """What `triton_declines` returns; torch.compile cannot take the result of a cached function for a constant."""
    if device.type == "cpu":
        is_interpreted = not isinstance(_product_kernel, triton.runtime.JITFunction)
        return None if is_interpreted else "Triton runs on the CPU under its interpreter only"
    if device.type != "cuda":
        return f"it is written for CUDA and ROCm devices, got {device.type}"
    try:
        out = torch.empty(16, 16, device=device)
        for _ in range(2):  # by Triton's dispatch, then without it
            out.fill_(float("nan"))
            launch(_product_kernel, (1, 1, 1), Tile(16, 16, 4, 1), {"out": out}, {}, {}, {"SIZE": 16})
            if not (out == 16).all():
                raise RuntimeError(f"a matrix product of ones must be 16 everywhere, got {out[0, 0].item()}")
    except Exception as error:  # Drivers, compilers and cards fail in more ways than can be named.
        reason = f"a small kernel failed on {device}: {type(error).__name__}: {error}"
        logger.warning("Triton kernels are not used: %s", reason)
        return reason
    return None


@torch.compiler.assume_constant_result
def triton_declines(device: torch.device) -> Optional[str]:
    """Why Triton kernels cannot run on a device (with its index), in words, or None when they can.

    The first call for a device compiles and runs a small kernel; a failure is logged once as a warning.
    """
    return _device_declines(device)
