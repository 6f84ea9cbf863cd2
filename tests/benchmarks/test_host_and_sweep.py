"""What benchmarks do around stubbed launches: the Python of a call, and kernels launched with each tile size."""

import csv
import itertools

import bench
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import host  # noqa: E402
import sweep  # noqa: E402


def test_the_python_of_a_call_is_timed_and_its_launches_are_counted(monkeypatch, tmp_path):
    out, compiled = tmp_path / "rows.csv", host.launching._compiled
    arguments = ["bench.py", "host", "--quick", "--repeats", "1", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    bench.main()
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["backend"] for row in rows} == {"ours", "empty autograd.Function"}
    launches = {(row["case"], row["backend"]): int(row["launches"]) for row in rows}
    for length in (128, 4096):
        assert 1 <= launches[f"host-forward-{length}", "ours"] < launches[f"host-step-{length}", "ours"]
        assert launches[f"host-step-{length}", "empty autograd.Function"] == 0
    assert all(float(row["p50"]) > 0 for row in rows)
    assert host.launching._compiled is compiled


def test_each_kernel_is_launched_with_each_tile_size(monkeypatch):
    launched = []

    def launch(kernel, grid, tile, tensors, strides, numbers, constants):
        launched.append((kernel.__name__, grid[0], (constants["BLOCK_M"], constants["BLOCK_N"]), tuple(tile)))

    monkeypatch.setattr(sweep.leaf, "launch", launch)
    chosen, run = sweep.leaf._chosen, sweep.leaf._run
    calls = sweep.launches((2, 256), "cpu")
    assert [kernel for kernel, _ in calls] == list(sweep.KERNELS)
    launched.clear()
    for _, start in calls:
        for size in sweep.SIZES:
            start(sweep.launching.Tile(*size))
    expected = []
    for kernel, (rows, step, *rest) in itertools.product(sweep.KERNELS, sweep.SIZES):
        block = (step, rows) if kernel == "_key_value_gradient_kernel" else (rows, step)  # queries, keys
        expected.append((kernel, 512 // rows + 2, block, (rows, step, *rest)))
    assert launched == expected
    assert sweep.leaf._chosen is chosen and sweep.leaf._run is run and sweep.leaf.LONGEST_UNSKIPPED == 512


def test_a_tile_size_that_does_not_run_is_left_out_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(sweep.leaf, "launch", lambda *_, **arguments: None)

    def milliseconds(run):
        if run.args[-1].warps == 8:
            raise RuntimeError("out of resource")
        return 2.0

    rows = sweep.rows_of((2, 256), "cpu", {"processor": "a card"}, milliseconds)
    few = [size for size in sweep.SIZES if size[2] == 4]
    assert len(rows) == 3 * len(few) and {row["warps"] for row in rows} == {4}
    # 2 products of 2 x 256 x 256 x 12 x 64 multiplications and additions in 2 ms
    first = {"kernel": "forward", "B": 2, "S": 256, "microseconds": 2000, "tflops": 0, "processor": "a card"}
    assert first.items() <= rows[0].items()
    assert "forward 2 × 256 (128, 64, 8, 2): RuntimeError: out of resource" in capsys.readouterr().out
