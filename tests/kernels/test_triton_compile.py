"""The Triton kernels compiled ahead of time, without a device.

A sample is compiled here; `benchmarks/triton_report.py` compiles all and writes the table that is checked here.
"""

import csv
import importlib
import itertools
import os

import pytest
import torch
from conftest import ROOT
from packaging.version import Version

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted cannot be compiled"),
    pytest.mark.skipif(Version(triton.__version__) < Version("3.3"), reason="the compiler is called otherwise there"),
]

TABLE = ROOT / "benchmarks" / "results" / "triton_compile.csv"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """benchmarks/triton_report.py, with a compile cache of its own, so that everything is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield importlib.import_module("triton_report")


FORWARD, QUERY, KEY_VALUE = "_forward_kernel", "_query_gradient_kernel", "_key_value_gradient_kernel"


@pytest.mark.parametrize(
    "target, name, dtype, head_dim, extras",
    [
        ("sm_90", FORWARD, torch.bfloat16, 64, ()),
        ("sm_90", QUERY, torch.bfloat16, 64, ()),
        ("sm_90", KEY_VALUE, torch.bfloat16, 64, ("dropout",)),
        ("sm_80", FORWARD, torch.float16, 80, ("dropout", "holes", "masked")),
        ("sm_80", QUERY, torch.float32, 64, ()),
        ("sm_100", QUERY, torch.bfloat16, 16, ("holes", "masked")),
        ("gfx942", QUERY, torch.bfloat16, 64, ("dropout",)),
    ],
)
def test_attention_kernels_compile_without_a_device(report, target, name, dtype, head_dim, extras):
    tile = report.tiles_for(name, target, dtype, head_dim, extras)[0]
    usage = report.compile_kernel(name, tile, target, dtype, head_dim, extras)
    assert usage["registers"] > 0 and 0 < usage["shared_bytes"] <= report.SHARED_LIMIT[target]
    if target == "sm_90":
        assert usage["spilled_bytes"] == 0


@pytest.mark.parametrize("target", TARGETS)
def test_measuring_compiles_without_a_device(report, target):
    rows, step, warps, stages = report.kernels._MEASURING
    constants = {"HEAD_DIM": 64, "BLOCK_DIM": 64, "ROWS": rows, "STEP": step}
    kernel = report.kernels._measure_kernel
    usage = report.compile_function(kernel, constants, target, torch.bfloat16, warps, stages)
    assert usage["registers"] > 0 and usage["spilled_bytes"] == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "file, extras", [("geglu_triton", ()), ("layer_norm_triton", ()), ("layer_norm_triton", ("dropout",))]
)
def test_backward_of_fused_layers_compiles_without_a_device(report, target, file, extras):
    _, usage = report.compile_fused(file, "_backward_kernel", target, extras)
    assert 0 < usage["registers"] <= 128 and usage["spilled_bytes"] == 0


VARIANT = ("target", "kernel", "dtype", "head_dim", "extras")


def table():
    """The rows of the table by what they compile: target, kernel, dtype, head size and extras."""
    rows = {}
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            rows.setdefault(tuple(row[name] for name in VARIANT), []).append(row)
    return rows


def test_table_covers_every_kernel_and_tile_size_for_every_target(report):
    listed = table()
    # The release of Triton that the pinned torch requires.
    assert {row["triton"] for rows in listed.values() for row in rows} == {"3.7.1"}
    for target in TARGETS:
        for name, (dtype, head_dim, extras) in itertools.product(report.KERNELS, report.VARIANTS):
            rows = listed.pop((target, name.strip("_"), report.DTYPES[dtype], str(head_dim), "+".join(extras)))
            sizes = [tuple(int(row[column]) for column in ("rows", "step", "warps", "stages")) for row in rows]
            assert sizes == report.tiles_for(name, target, dtype, head_dim, extras)
        for (file, extras), name in itertools.product(report.FUSED, report.FUSED_KERNELS):
            kernel = file.removesuffix("_triton") + name
            assert len(listed.pop((target, kernel, "bf16", "", "+".join(extras)))) == 1
    assert not listed


def test_table_shows_no_spill_on_sm_90_and_none_elsewhere_in_what_runs_untuned():
    for (target, *_), rows in table().items():
        for row in rows if target == "sm_90" else rows[:1]:
            assert row["spilled_bytes"] == "0", row
