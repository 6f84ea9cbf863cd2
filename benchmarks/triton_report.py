"""What the compiler reports on the Triton kernels, without a GPU: registers, spills and shared memory.

    python benchmarks/triton_report.py

Compiles every tile size for every target and writes benchmarks/results/triton_compile.csv.
"""

import argparse
import csv
import importlib
import itertools
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from loading import ROOT, load_checkout
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TABLE = ROOT / "benchmarks" / "results" / "triton_compile.csv"

PACKAGE = load_checkout(ROOT).__package__
kernels = importlib.import_module(f"{PACKAGE}.flash_attn_triton")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Largest shared memory of a block, in bytes: "Technical Specifications per Compute Capability" of the CUDA C++
# Programming Guide, and the local data share in AMD's CDNA 3 white paper.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
KERNELS = ("_forward_kernel", "_query_gradient_kernel", "_key_value_gradient_kernel")

# What is compiled of the attention kernels: dtype, head size, extras.
VARIANTS = [(torch.float32, 64, ())]
VARIANTS += [(torch.bfloat16, head_dim, extras) for head_dim in (32, 64, 128) for extras in ((), ("dropout",))]
# What is compiled of the fused layers, at the base size: file, extras.
FUSED_KERNELS = ("_forward_kernel", "_backward_kernel")
FUSED = [("geglu_triton", ()), ("layer_norm_triton", ()), ("layer_norm_triton", ("dropout",))]
# The arguments that are None without an extra.
OPTIONAL = {"dropout": "seed", "holes": "positions", "masked": "key_mask"}


def tiles_for(name: str, target: str, dtype: torch.dtype, head_dim: int, extras=()) -> list:
    """The tile sizes among which the fastest is looked for on a target; arguments of `compile_kernel`."""
    return kernels.tiles_for(getattr(kernels, name), dtype, head_dim, "dropout" in extras, SHARED_LIMIT[target])


def argument_type(name: str, dtype: torch.dtype, constants: dict) -> str:
    """Triton's type of a kernel argument, as the host functions pass it."""
    if name in constants:
        return "constexpr"
    if name in ("scale", "dropout_p", "eps"):
        return "fp32"
    if name.endswith("stride") or name in ("num_sequences", "total", "size", "features"):
        return "i32"
    pointers = {"cu_seqlens": "*i32", "positions": "*i64", "key_mask": "*u8", "seed": "*i64"}
    if name in ("slopes", "peaks", "lse", "delta", "sums"):
        return "*fp32"
    return pointers.get(name, "*" + DTYPES[dtype])


def compile_function(function, constants: dict, target: str, dtype: torch.dtype, warps=4, stages=3, extras=()) -> dict:
    """Compile a kernel and read the compiler's report.

    Args:
        function: a triton.jit function of one of the Triton files.
        constants: its constexpr arguments.
        target: a key of `TARGETS`.
        dtype: a key of `DTYPES`.
        warps: warps per block.
        stages: stages of the pipeline.
        extras: of "dropout", "holes" and "masked", those that are on; the arguments of the others are None.

    Returns:
        Registers per thread, bytes spilled per thread, bytes of shared memory per block.
    """
    absent = {name for extra, name in OPTIONAL.items() if extra not in extras}
    constants = {**constants, **{name: None for name in function.arg_names if name in absent}}
    signature = {name: argument_type(name, dtype, constants) for name in function.arg_names}
    # torch aligns what it allocates, and strides and sizes are multiples of 16 for any usual model.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.endswith("stride") or name in ("size", "features")
    }
    source = ASTSource(function, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    registers, spilled = usage_on_amd(compiled) if target.startswith("gfx") else usage_on_nvidia(compiled)
    return {"registers": registers, "spilled_bytes": spilled, "shared_bytes": compiled.metadata.shared}


def compile_kernel(name: str, tile, target: str, dtype: torch.dtype, head_dim: int, extras=()) -> dict:
    """Compile one attention kernel with one tile size.

    Args:
        name: one of `KERNELS`.
        tile: a `Tile`.
        target: a key of `TARGETS`.
        dtype: a key of `DTYPES`.
        head_dim: D.
        extras: of "dropout", "holes" and "masked", those that are on.

    Returns:
        What `compile_function` returns.
    """
    kernel = getattr(kernels, name)
    constants = kernels.constants_of(kernel is kernels._key_value_gradient_kernel, 12, head_dim, tile)
    return compile_function(kernel, constants, target, dtype, tile.warps, tile.stages, extras)


def compile_fused(file: str, name: str, target: str, extras=()) -> tuple:
    """Compile a kernel of a fused layer in bfloat16 at the base size; returns its tile size and the report."""
    leaf = importlib.import_module(f"{PACKAGE}.{file}")
    tile = leaf.TILE if file == "geglu_triton" else leaf._tile(768)
    constants = {"BLOCK": tile.step}
    arguments = (constants, target, torch.bfloat16, tile.warps, tile.stages, extras)
    return tile, compile_function(getattr(leaf, name), *arguments)


def usage_on_nvidia(compiled) -> tuple:
    """Registers and bytes of stack, where spills go, read from the finished binary by Triton's own cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        command = [tool, "--dump-resource-usage", binary.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(int(number) for number in re.search(r"REG:(\d+) STACK:(\d+)", report).groups())


def usage_on_amd(compiled) -> tuple:
    """Vector registers and bytes of scratch memory, where spills go, from the metadata of the assembly."""
    names = ("vgpr_count", "private_segment_fixed_size")
    return tuple(int(re.search(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"]).group(1)) for name in names)


def compile_rows(targets):
    """One row of the table for each kernel, tile size, variant and target."""

    def row(kernel, dtype, head_dim, extras, tile, usage):
        what = {"triton": triton.__version__, "target": target, "kernel": kernel, "dtype": DTYPES[dtype]}
        return {**what, "head_dim": head_dim, "extras": "+".join(extras), **tile._asdict(), **usage}

    for target in targets:
        for dtype, head_dim, extras in VARIANTS:
            for name in KERNELS:
                for tile in tiles_for(name, target, dtype, head_dim, extras):
                    usage = compile_kernel(name, tile, target, dtype, head_dim, extras)
                    yield row(name.strip("_"), dtype, head_dim, extras, tile, usage)
        for (file, extras), name in itertools.product(FUSED, FUSED_KERNELS):
            kernel = file.removesuffix("_triton") + name
            yield row(kernel, torch.bfloat16, None, extras, *compile_fused(file, name, target, extras))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="may be given again (default: all)")
    targets = parser.parse_args().target or list(TARGETS)
    with TABLE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["target"] not in targets]
    rows += compile_rows(targets)
    partial = TABLE.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[-1], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(TABLE)
    print(f"{len(rows)} rows in {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
