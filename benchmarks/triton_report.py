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
import importlib.util
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


def load_kernels():
    """flash_attn_triton.py as a module of its own: it imports nothing of ours."""
    spec = importlib.util.spec_from_file_location("flash_attn_triton", ROOT / "flash_attn_triton.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


kernels = load_kernels()

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
KERNELS = ("_forward_kernel", "_query_gradient_kernel", "_key_value_gradient_kernel")

# What the sweep compiles: dtype, head size, extras.
VARIANTS = [
    (torch.bfloat16, 64, ()),
    (torch.float16, 64, ()),
    (torch.float32, 64, ()),
    (torch.bfloat16, 64, ("DROPOUT",)),
    (torch.bfloat16, 128, ()),
]

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
BOUNDS = (0, 5, 10, 20)


def tiles_for(kernel, dtype: torch.dtype, extras=()):
    """The tile sizes that the autotuner may try on a card with ample shared memory; arguments of `compile_kernel`."""
    return [config for config in kernel.configs if kernels.is_worth_trying(config, dtype, "DROPOUT" in extras)]


def argument_type(name: str, dtype: torch.dtype, constants: dict) -> str:
    """Triton's type of a kernel argument, as the host functions pass it."""
    if name in constants:
        return "constexpr"
    if name in ("scale", "dropout_p"):
        return "fp32"
    if name.endswith("stride") or name in ("num_sequences", "total", "length_bucket"):
        return "i32"
    pointers = {"cu_seqlens": "*i32", "order": "*i32", "positions": "*i64", "key_mask": "*u8", "seed": "*i64"}
    if name in ("slopes", "peaks", "normalizer", "delta"):
        return "*fp32"
    return pointers.get(name, "*" + DTYPES[dtype])


def compile_function(function, constants: dict, target: str, dtype: torch.dtype, warps=4, stages=3) -> dict:
    """Compile a kernel and read the compiler's report.

    Args:
        function: a triton.jit function of flash_attn_triton.py.
        constants: its constexpr arguments and those that are None.
        target: a key of `TARGETS`.
        dtype: a key of `DTYPES`.
        warps: warps of a block.
        stages: stages of the pipeline.

    Returns:
        Registers a thread, bytes a thread spilled, bytes of shared memory a block.
    """
    signature = {name: argument_type(name, dtype, constants) for name in function.arg_names}
    # torch aligns what it allocates, and strides are multiples of 16 for any head size that is one.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.endswith("stride")
    }
    source = ASTSource(function, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    registers, spilled = usage_on_amd(compiled) if target.startswith("gfx") else usage_on_nvidia(compiled)
    return {"registers": registers, "spilled_bytes": spilled, "shared_bytes": compiled.metadata.shared}


def compile_kernel(kernel, config, target: str, dtype: torch.dtype, head_dim: int, extras=()) -> dict:
    """Compile one attention kernel with one tile size.

    Args:
        kernel: an autotuned kernel of flash_attn_triton.py.
        config: a triton.Config.
        target: a key of `TARGETS`.
        dtype: a key of `DTYPES`.
        head_dim: D.
        extras: of "DROPOUT", "HOLES", "MASKED", those that are on.

    Returns:
        What `compile_function` returns.
    """
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": max(16, triton.next_power_of_2(head_dim)),
        "SKIP": True,
        **{name: name in extras for name in ("DROPOUT", "HOLES", "MASKED")},
        **config.kwargs,
    }
    for name, extra in (("positions", "HOLES"), ("key_mask", "MASKED"), ("seed", "DROPOUT")):
        if extra not in extras:
            constants[name] = None
    return compile_function(kernel.fn, constants, target, dtype, config.num_warps, config.num_stages)


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
    for target in targets:
        for dtype, head_dim, extras in VARIANTS:
            for name in KERNELS:
                kernel = getattr(kernels, name)
                for config in tiles_for(kernel, dtype, extras):
                    yield {
                        "triton": triton.__version__,
                        "target": target,
                        "kernel": name.strip("_"),
                        "dtype": DTYPES[dtype],
                        "head_dim": head_dim,
                        "extras": "+".join(extras).lower(),
                        "own": config.kwargs["OWN"],
                        "other": config.kwargs["OTHER"],
                        "warps": config.num_warps,
                        "stages": config.num_stages,
                        **compile_kernel(kernel, config, target, dtype, head_dim, extras),
                    }


_window, _radius = kernels._window, kernels._radius


@triton.jit
def _count_kernel(peaks, slopes, visited, length, TILES: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):
    """Tiles that one head visits over all its own tiles, by the loop bounds of the attention kernels."""
    head = tl.program_id(0)
    first = tl.arange(0, TILES) * OWN
    radius = _radius(peaks + head * 3, tl.load(slopes + head), 1.0, True, False)
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
    attention = importlib.import_module(f"{load_checkout(ROOT).__package__}.bert_attention")
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
    """What `_measure_kernel` would find on a text: float32 [H, 3] for each layer, for a scale of 1."""
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
            keep=lambda row: row["triton"] != triton.__version__ or row["target"] not in targets,
        )
    elif (arguments.checkpoint is None) != (arguments.text is None):
        parser.error("--checkpoint and --text go together")
    elif os.environ.get("TRITON_INTERPRET") == "1":
        write_table(RESULTS / "triton_tiles.csv", all_tile_rows(arguments.checkpoint, arguments.text))
    else:  # the interpreter has to be chosen before Triton is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})


if __name__ == "__main__":
    main()
