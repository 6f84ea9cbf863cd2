"""Time the attention kernels with many tile sizes on this machine's GPU.

    python benchmarks/sweep.py --out sweep.csv

Head size 64, bfloat16, 12 heads, nothing skipped. Kernels are compiled by several processes first, into Triton's cache,
and then timed one by one, launched as the model does.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from bench import append_rows, provenance
from contenders import attention, layers, padding
from host import Always, launching
from triton.testing import do_bench

leaf = sys.modules[layers.triton_attention.__module__]

HEADS, HEAD_DIM = 12, 64
# Sequences and their length in tokens.
BATCHES = ((1, 8192), (4, 2048), (32, 512))
# Each kernel's name in the table, and its matrix products of [length, D] matrices.
KERNELS = {
    "_forward_kernel": ("forward", 2),
    "_query_gradient_kernel": ("query gradient", 3),
    "_key_value_gradient_kernel": ("key and value gradient", 4),
}
# Rows per program, rows per step, warps, stages: 8 warps only where the tile is large enough.
SIZES = (
    *itertools.product((64, 128), (32, 64, 128), (4,), (2, 3, 4)),
    *itertools.product((128,), (64, 128), (8,), (2, 3)),
)


def launches(batch, device: str) -> list:
    """Forward and backward of a batch, and how to start each of its kernels again.

    Args:
        batch: sequences and their length in tokens.
        device: `cuda`; on a CPU the launches must be stubbed.

    Returns:
        Pairs of a key of `KERNELS` and `run(tile)`, which launches it with a tile size.
    """
    count, length = batch
    calls, run = [], leaf._run

    def recorded(*arguments, **named):
        calls.append(partial(run, *arguments, **named))
        calls[-1]()

    qkv = torch.randn(count * length, 3, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device, requires_grad=True)
    starts = torch.arange(count + 1, dtype=torch.int32, device=device) * length
    packed = padding.pack_flattened(starts, length, (1, len(qkv)))
    slopes = torch.tensor(attention.alibi_slopes(HEADS), device=device)

    def start(call, tile):
        chosen, leaf._chosen = leaf._chosen, Always(tile)
        try:
            call()
        finally:
            leaf._chosen = chosen

    leaf._run, unskipped, leaf.LONGEST_UNSKIPPED = recorded, leaf.LONGEST_UNSKIPPED, length
    leaf._chosen, chosen = Always(launching.Tile(*SIZES[0])), leaf._chosen
    try:
        leaf.triton_attention(qkv, packed, slopes, HEAD_DIM**-0.5, 0.0).sum().backward()
    finally:
        leaf._run, leaf._chosen, leaf.LONGEST_UNSKIPPED = run, chosen, unskipped
    return [(call.args[0].__name__, partial(start, call)) for call in calls]


def compile_share(first: int, shares: int) -> None:
    """Compile every `shares`-th tile size from `first` on, by running it."""
    for _, run in launches(BATCHES[-1], "cuda"):
        for size in SIZES[first::shares]:
            with contextlib.suppress(Exception):  # reported when it is timed
                run(launching.Tile(*size))


def rows_of(batch, device: str, about: dict, milliseconds) -> list:
    """One row for each kernel and tile size that runs.

    Args:
        batch: sequences and their length in tokens.
        device: as for `launches`.
        about: columns on machine and software.
        milliseconds: `(function) -> time of a call`.

    Returns:
        The rows of the table.
    """
    count, length = batch
    rows = []
    for kernel, run in launches(batch, device):
        name, products = KERNELS[kernel]
        for size in SIZES:
            tile = launching.Tile(*size)
            try:
                time = milliseconds(partial(run, tile))
            except Exception as error:  # too much shared memory, or what a compiler refuses
                print(f"{name} {count} × {length} {size}: {type(error).__name__}: {error}", flush=True)
                continue
            flops = products * 2 * count * length**2 * HEADS * HEAD_DIM
            speed = {"microseconds": round(time * 1000), "tflops": round(flops / time / 1e9)}
            rows.append({"kernel": name, "B": count, "S": length, **tile._asdict(), **speed, **about})
    return rows


def main() -> None:
    """Parse the command line, compile and time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV to append to")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="that compile")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("sweep.py: it needs a GPU")
    shares = arguments.processes
    with ProcessPoolExecutor(shares, multiprocessing.get_context("spawn")) as pool:
        for share in [pool.submit(compile_share, first, shares) for first in range(shares)]:
            if error := share.exception():  # what is not compiled yet is compiled when it is timed
                print(f"compiling: {type(error).__name__}: {error}", flush=True)
    about = {name: value for name, value in provenance("cuda").items() if name != "threads"}
    for batch in BATCHES:
        append_rows(arguments.out, rows_of(batch, "cuda", about, partial(do_bench, warmup=2, rep=10)))


if __name__ == "__main__":
    main()
