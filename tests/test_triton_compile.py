"""The Triton kernels compiled ahead of time, without a device.

A sample is compiled here; `benchmarks/triton_report.py` compiles all and writes the table that is checked here.
"""

import csv
import importlib.util
import itertools
import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted cannot be compiled"
)

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "triton_compile.csv"
# Largest shared memory of a block, in bytes: "Technical Specifications per Compute Capability" of the CUDA C++
# Programming Guide, and the local data share in AMD's CDNA 3 white paper.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """benchmarks/triton_report.py, with a compile cache of its own, so that everything is compiled."""
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    spec = importlib.util.spec_from_file_location("triton_report", ROOT / "benchmarks" / "triton_report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del os.environ["TRITON_CACHE_DIR"]


FORWARD, QUERY, KEY_VALUE = "_forward_kernel", "_query_gradient_kernel", "_key_value_gradient_kernel"


@pytest.mark.parametrize(
    "target, name, dtype, head_dim, extras",
    [
        ("sm_90", FORWARD, torch.bfloat16, 64, ()),
        ("sm_90", QUERY, torch.bfloat16, 64, ()),
        ("sm_90", KEY_VALUE, torch.bfloat16, 64, ()),
        ("sm_80", FORWARD, torch.float16, 80, ("DROPOUT",)),
        ("sm_80", QUERY, torch.float32, 64, ()),
        ("sm_100", KEY_VALUE, torch.bfloat16, 64, ()),
        ("sm_100", QUERY, torch.bfloat16, 16, ("HOLES", "MASKED")),
        ("gfx942", FORWARD, torch.bfloat16, 64, ("HOLES", "MASKED")),
        ("gfx942", KEY_VALUE, torch.bfloat16, 64, ("DROPOUT",)),
    ],
)
def test_attention_kernels_compile_without_a_device(report, target, name, dtype, head_dim, extras):
    kernel = getattr(report.kernels, name)
    config = report.tiles_for(kernel, dtype)[1]
    usage = report.compile_kernel(kernel, config, target, dtype, head_dim, extras)
    assert usage["registers"] > 0 and 0 < usage["shared_bytes"] <= SHARED_LIMIT[target]
    if (target, head_dim) == ("sm_90", 64):
        assert usage["spilled_bytes"] == 0


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_measuring_compiles_without_a_device(report, target):
    constants = {"ROWS": report.kernels.MEASURE_ROWS, "HEADS": 16, "HEAD_DIM": 64, "BLOCK_DIM": 64}
    usage = report.compile_function(report.kernels._measure_kernel, constants, target, torch.bfloat16)
    assert usage["registers"] > 0 and usage["spilled_bytes"] == 0


def table():
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_covers_every_tile_size_for_every_target(report):
    listed = {}
    for row in table():
        what = (row["triton"], row["target"], row["kernel"], row["dtype"], int(row["head_dim"]), row["extras"])
        listed.setdefault(what, set()).add(tuple(int(row[column]) for column in ("own", "other", "warps", "stages")))
    releases = {(release, target) for release, target, *_ in listed}
    assert releases == set(itertools.product(("3.9.0", "3.6.0"), SHARED_LIMIT))
    for (release, target), name, variant in itertools.product(releases, report.KERNELS, report.VARIANTS):
        dtype, head_dim, extras = variant
        configs = report.tiles_for(getattr(report.kernels, name), dtype, extras)
        sizes = {(*config.kwargs.values(), config.num_warps, config.num_stages) for config in configs}
        what = (release, target, name.strip("_"), report.DTYPES[dtype], head_dim, "+".join(extras).lower())
        assert listed.pop(what) == sizes
    assert not listed


def test_table_shows_no_spill_at_head_size_64_on_sm_90():
    rows = [row for row in table() if (row["target"], row["head_dim"]) == ("sm_90", "64")]
    assert rows and all(row["spilled_bytes"] == "0" for row in rows)


def test_table_of_tiles_has_the_shares_that_skipping_leaves():
    with (ROOT / "benchmarks" / "results" / "triton_tiles.csv").open(newline="") as file:
        shares = {(row["bound"], int(row["length"])): float(row["share"]) for row in csv.DictReader(file)}
    # By the first of the two bounds alone, C = 10 leaves 0.53 and 0.29 for MosaicBERT's 12 slopes.
    assert shares["C=10", 2048] < 0.53 and shares["C=10", 8192] < 0.29
