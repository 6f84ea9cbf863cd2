"""What can be known about the Triton kernels without a GPU: the compiler's report, and how many tiles they visit.

    python benchmarks/triton_report.py compile                       registers, spills, shared memory of every tile size
    python benchmarks/triton_report.py tiles                         tiles visited with and without skipping
    python benchmarks/triton_report.py tiles --checkpoint . --text FILE   also with the norms of a checkpoint

Tables go to benchmarks/results/.
"""

import argparse
import csv
import gzip
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from loading import ROOT, load_checkout
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

RESULTS = ROOT / "benchmarks" / "results"

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

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
BOUNDS = (0, 5, 10, 20)


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
        warps: warps of a block.
        stages: stages of the pipeline.
        extras: of "dropout", "holes" and "masked", those that are on; the arguments of the others are None.

    Returns:
        Registers a thread, bytes a thread spilled, bytes of shared memory a block.
    """
    absent = {name for extra, name in OPTIONAL.items() if extra not in extras}
    constants = {**constants, **{name: None for name in function.arg_names if name in absent}}
    signature = {name: argument_type(name, dtype, constants) for name in function.arg_names}
    # torch aligns what it allocates, and strides and sizes are multiples of 16 for any usual model.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
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
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(head_dim)),
        "POWER": 8,  # of 12 heads
        "MEASURED": kernels.MEASURED_TOKENS,
        "OWN": tile.own,
        "OTHER": tile.other,
    }
    return compile_function(getattr(kernels, name), constants, target, dtype, tile.warps, tile.stages, extras)


def compile_fused(file: str, name: str, target: str, extras=()) -> tuple:
    """Compile a kernel of a fused layer in bfloat16 at the base size; returns its tile size and the report."""
    leaf = importlib.import_module(f"{PACKAGE}.{file}")
    tile = leaf.TILE if file == "geglu_triton" else leaf._tile(768)
    constants = {"BLOCK": tile.other}
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


_window, _radius = kernels._window, kernels._radius


@triton.jit
def _count_kernel(peaks, slopes, visited, length, TILES: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):
    """Tiles that one head visits over all its own tiles, by the loop bounds of the attention kernels."""
    head = tl.program_id(0)
    first = tl.arange(0, TILES) * OWN
    peaks += head * 3
    slope = tl.load(slopes + head)
    radius = _radius(tl.load(peaks), tl.load(peaks + 1), tl.load(peaks + 2), slope, 1.0, False)
    begin, _, leave, stop = _window(first, length, radius, OWN, OTHER)
    tiles = (leave - begin) // OTHER + (stop - leave + OTHER - 1) // OTHER
    tl.store(visited + head, tl.sum(tl.where(first < length, tiles, 0), axis=0))


def count_tiles(length: int, peaks: torch.Tensor, slopes: torch.Tensor, own=128, other=64) -> list:
    """Tiles that each head visits in a sequence.

    Args:
        length: S.
        peaks: float32 [H, 3], for a scale of 1: largest |q|^2 and |k|^2, and the most negative score of a query with
            itself, negated.
        slopes: float32 [H].
        own: rows of the tile that a program owns.
        other: rows of the tiles that it walks over.

    Returns:
        H integers. Without skipping, each would be ceil(S / own) * ceil(S / other).
    """
    visited = torch.zeros(len(slopes), dtype=torch.int32)
    tiles = triton.next_power_of_2(-(-length // own))
    _count_kernel[(len(slopes),)](peaks, slopes, visited, length, TILES=tiles, OWN=own, OTHER=other)
    return visited.tolist()


def tile_rows(source: str, peaks: torch.Tensor, slopes: torch.Tensor):
    """One row of the table for each length."""
    for length in LENGTHS:
        visited = sum(count_tiles(length, peaks, slopes))
        dense = len(slopes) * -(-length // 128) * -(-length // 64)
        yield {
            "bound": source,
            "length": length,
            "heads": len(slopes),
            "tile": "128x64",
            "visited": visited,
            "dense": dense,
            "share": f"{visited / dense:.4f}",
        }


def slopes_of(num_heads: int) -> torch.Tensor:
    attention = importlib.import_module(f"{PACKAGE}.bert_attention")
    return torch.tensor(attention.alibi_slopes(num_heads), dtype=torch.float32)


def all_tile_rows(checkpoint, text):
    slopes = slopes_of(12)
    for bound in BOUNDS:
        # The worst that C allows: a query that scores -C with itself.
        yield from tile_rows(f"C={bound}", torch.tensor([[bound, bound, bound]] * 12, dtype=torch.float32), slopes)
    if checkpoint is not None:
        for layer, peaks in enumerate(measured_peaks(checkpoint, text)):
            bound = (peaks[:, 0] * peaks[:, 1]).sqrt()
            what = f"checkpoint layer {layer} (C {bound.min():.1f} to {bound.max():.1f})"
            yield from tile_rows(what, peaks, slopes_of(len(peaks)))


def read_text(path: str) -> str:
    """A text file, or the longest document of a .jsonl.gz file with a field "text"."""
    if not path.endswith(".jsonl.gz"):
        return Path(path).read_text()
    with gzip.open(path, "rt") as file:
        return max((json.loads(line)["text"] for line in file), key=len)


def measured_peaks(checkpoint, text, max_length=2048):
    """What `_measure_kernel` would find on a whole text: float32 [H, 3] for each layer, for a scale of 1."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model = AutoModelForMaskedLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer(read_text(text), truncation=True, max_length=max_length, return_tensors="pt")
    heads = model.config.num_attention_heads
    projections = []
    for layer in model.bert.encoder.layer:
        layer.attention.self.Wqkv.register_forward_hook(lambda module, args, output: projections.append(output))
    with torch.no_grad():
        model(**inputs)
    for projection in projections:
        query, key, _ = projection.flatten(0, -2).unflatten(-1, (3, heads, -1)).unbind(1)
        query = query * query.shape[-1] ** -0.5
        lowest = -(query * key).sum(-1).amin(0).clamp_max(0)
        yield torch.stack((query.square().sum(-1).amax(0), key.square().sum(-1).amax(0), lowest), dim=-1)


def write_table(path: Path, rows, keep=lambda row: False) -> None:
    """Write rows to a CSV file, beside it first; rows of the present file for which `keep` holds stay."""
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if keep(row)]
    rows = kept + list(rows)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
    print(f"{len(rows)} rows in {path.relative_to(ROOT)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser("compile", help="compile every tile size for every target")
    compiling.add_argument("--target", choices=TARGETS, action="append", help="may be given again (default: all)")
    tiles = commands.add_parser("tiles", help="count visited tiles under Triton's interpreter")
    tiles.add_argument("--checkpoint", help="folder of a checkpoint whose norms are measured too")
    tiles.add_argument("--text", help="text file, or .jsonl.gz, whose longest document it is measured on")
    arguments = parser.parse_args()
    if arguments.command == "compile":
        targets = arguments.target or list(TARGETS)
        write_table(
            RESULTS / "triton_compile.csv",
            compile_rows(targets),
            keep=lambda row: row["target"] not in targets,
        )
    elif (arguments.checkpoint is None) != (arguments.text is None):
        parser.error("--checkpoint and --text go together")
    elif os.environ.get("TRITON_INTERPRET") == "1":
        write_table(RESULTS / "triton_tiles.csv", all_tile_rows(arguments.checkpoint, arguments.text))
    else:  # the interpreter has to be chosen before Triton is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})


if __name__ == "__main__":
    main()
