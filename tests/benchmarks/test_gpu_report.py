"""The report of a GPU: a part that fails or hangs does not stop it, and the summary says what was not measured."""

import sys
import time

import bench
import gpu_report
import psutil
import pytest
from cases import CASES
from gpu_report import Outcome, Part

FINE = Outcome(1.0, None, "")


def write_case(folder, name, memory=None, **ratios):
    """Rows of a case: 1 MiB and 1 ms for ours, and for each contender its ratio; `memory` is that of contenders."""
    case = next(case for case in CASES if case.name == name)
    seconds = {case.ours: [0.001], **{contender: [0.001 * ratio] for contender, ratio in ratios.items()}}
    tokens, peaks = dict.fromkeys(seconds, sum(case.lengths)), dict.fromkeys(seconds, memory)
    rows = bench.make_rows(case, seconds, tokens, {**peaks, case.ours: 1.0}, "command")
    bench.append_rows(folder / f"{case.command}.csv", rows)


@pytest.fixture(autouse=True)
def without_device(monkeypatch):
    monkeypatch.setattr(bench, "provenance", lambda device: {"processor": "a card", "commit": "abc1234"})


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_parts_that_fail_or_hang_do_not_stop_the_others(tmp_path):
    child = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    parts = [
        Part("fails", ("-c", "import sys; print('what went wrong'); sys.exit(3)"), 3),
        Part("hangs", ("-c", f"{child}; import time; time.sleep(60)"), 1),
        Part("works", ("-c", "print('a number')"), 3),
    ]
    outcomes = gpu_report.run_parts(parts, tmp_path, 8)
    assert outcomes["fails"].reason == "exit status 3: what went wrong"
    assert outcomes["hangs"].reason.startswith("stopped at its limit of ")
    assert outcomes["works"].reason is None and "a number" in outcomes["works"].output
    pid = int(outcomes["hangs"].output.split()[0])
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid), "what a part started must be stopped with it"
    log = (tmp_path / "log.txt").read_text()
    assert log.index("=== fails") < log.index("what went wrong") < log.index("=== hangs") < log.index("a number")


def test_without_time_a_part_does_not_start(tmp_path):
    outcomes = gpu_report.run_parts([Part("late", ("-c", "print(1)"), 1)], tmp_path, 0.5)
    assert outcomes["late"] == Outcome(0.0, "no time was left", "")


def test_goals_are_judged_and_what_is_missing_has_its_reason(tmp_path):
    write_case(tmp_path, "G3", **{"SDPA, dense bias": 2.6})
    write_case(tmp_path, "G12", BERT=1.2)
    write_case(tmp_path, "G11", memory=5.0, published=4.0)
    for name in ("G11-512", "G11-2048", "G11-8192"):
        write_case(tmp_path, name)
    write_case(tmp_path, "G14-shipped-65536", **{"one large product": 0.4})
    printed = "G5: FlashAttention 4, no bias is left out: it needs a GPU\nG13: RuntimeError: capture failed\n"
    outcomes = {
        **{name: FINE for name in ("train", "pretrain")},
        "attention": Outcome(9.0, "stopped at its limit of 9 s", printed),
        "model": Outcome(9.0, "exit status 1: 1 of the cases failed", printed),
    }
    lines = {(row[0], row[2]): row[3:] for row in gpu_report.goal_rows(tmp_path, outcomes)}
    assert lines["G3", "SDPA, dense bias"] == ["2.600 (2.600–2.600)", "2.50", "yes"]
    assert lines["G12", "BERT"] == ["1.200 (1.200–1.200)", "1.80", "no"]
    assert lines["G11", "peak memory of published"] == ["0.200", "at most 0.18", "no"]
    assert lines["G11", "largest over smallest"] == ["1.000", "at most 1.05", "yes"]
    assert lines["G14-shipped-65536", "tokens per second"] == ["65,536,000", "3,000,000", "yes"]
    assert lines["G14-base", "tokens per second"][0] == "not measured: its part wrote no row"
    assert lines["G4-forward", "Flex"] == ["not measured: stopped at its limit of 9 s", "2.00", "–"]
    assert lines["G13", "ours, no mask"][0] == "not measured: RuntimeError: capture failed"
    not_installed = "not measured: FlashAttention 4, no bias is left out: it needs a GPU"
    assert lines["G5", "FlashAttention 4, no bias"][0] == not_installed
    goals = {(case.name, name) for case in CASES if case.device == "cuda" for name in case.against}
    assert goals <= lines.keys()


def test_the_summary_names_card_parts_tests_and_tiles(tmp_path):
    write_case(tmp_path, "G3", **{"SDPA, dense bias": 2.6})
    size = {"kernel": "forward", "B": 1, "S": 512, "step": 64, "warps": 4, "stages": 3}
    sizes = [{**size, "rows": rows, "microseconds": 700 - rows} for rows in (64, 128)]
    bench.append_rows(tmp_path / "sweep.csv", sizes)
    printed = "FAILED tests/a.py::test_one - assert\n== 1 failed, 123 passed, 1 skipped in 61.20s (0:01:01) ==\n"
    outcomes = {"tests": Outcome(62.0, "exit status 1", printed), "attention": FINE}
    text = gpu_report.summarize(tmp_path, outcomes, 480.0, rehearsed=False)
    assert "rehearsal" not in text and "rehearsal" in gpu_report.summarize(tmp_path, outcomes, 480.0, rehearsed=True)
    for expected in (
        "processor: a card",
        "commit: abc1234",
        "triton: unknown",
        "1 failed, 123 passed, 1 skipped in 61.20s",
        "- tests/a.py::test_one",
        "| tests | exit status 1 | 62 |",
        "(128, 64, 4, 3) 572 µs, (64, 64, 4, 3) 636 µs",
    ):
        assert expected in text
    stopped = Outcome(9.0, "stopped", "tests/a.py::b PASSED\ntests/a.py::c PASSED\ntests/a.py::d FAILED\n")
    assert gpu_report.tests_line(stopped) == "pytest did not end; so far 2 PASSED, 1 FAILED, 0 SKIPPED, 0 ERROR"


def test_the_report_is_at_most_eight_files_and_fails_when_a_part_did(monkeypatch, tmp_path):
    parts = gpu_report.parts_of(tmp_path, 1, 1.0, "abc1234", rehearse=False)
    files = [argument for part in parts for argument in part.command if argument.endswith(".csv")]
    assert len(set(files)) + len(("log.txt", "summary.md")) <= 8
    assert {case.command for case in CASES if case.device == "cuda"} <= {part.name for part in parts}
    programs = {"tests": "print('2 passed in 0.10s')", "model": "raise ValueError('no')"}
    fake = [Part(name, ("-c", program), 1) for name, program in programs.items()]
    monkeypatch.setattr(gpu_report, "parts_of", lambda *arguments: fake)
    out = tmp_path / "report"
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--out", str(out)])
    with pytest.raises(SystemExit, match="not whole: model"):
        gpu_report.main()
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "summary.md"]
    assert "| model | exit status 1: ValueError: no |" in (out / "summary.md").read_text()
    again = tmp_path / "again"
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--out", str(again), "--part", "tests"])
    gpu_report.main()
    assert "2 passed in 0.10s" in (again / "summary.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "filled"], "--out must be an empty or a new folder, filled is not"),
        (["--out", "new", "--part", "nothing"], "--part must be one of tests, host, "),
    ],
)
def test_a_wrong_command_line_is_refused_with_its_reason(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "a file").touch()
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", *arguments])
    with pytest.raises(SystemExit):
        gpu_report.main()
    assert message in capsys.readouterr().err
