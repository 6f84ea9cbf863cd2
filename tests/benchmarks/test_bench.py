"""The benchmark command: it measures, refuses wrong numbers, and writes the tables of the documentation."""

import contextlib
import csv
import functools
import gc
import shutil
import subprocess
import types
from dataclasses import replace

import bench
import numerics
import pytest
import torch
from cases import CASES, RAGGED
from conftest import ROOT
from contenders import TINY, Encoder, Pretraining, unfused
from engines import ENGINES, Serving
from lib.recipe import count_flops


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["bench.py", *map(str, arguments)])
    bench.main()


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("command", "case", "contenders"),
    [
        ("attention", "C5-4096", ["ours", "one SDPA call", "eager"]),
        ("model", "C1-2", ["ours", "published", "BERT", "ModernBERT"]),
        ("model", "C4-ragged", ["ours", "published", "BERT"]),
        ("train", "C8", ["ours", "published", "BERT"]),
    ],
)
def test_a_case_passes_its_gate_and_leaves_a_row_for_each_contender(
    command, case, contenders, monkeypatch, tmp_path, capsys
):
    out = tmp_path / "rows.csv"
    run(monkeypatch, command, "--quick", "--case", case, "--repeats", 2, "--device", "cpu", "--out", out)
    rows = rows_of(out)
    assert [row["backend"] for row in rows] == contenders and list(rows[0]) == bench.COLUMNS
    for row in rows:
        assert row["repeats"] == "2" and row["command"].startswith("python benchmarks/bench.py")
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert float(row["peak_memory_mib"]) > 0 and row["processor"] and row["commit"]
    assert case in capsys.readouterr().out


def test_exports_are_timed_beside_torch_without_a_memory_that_torch_cannot_see(monkeypatch, tmp_path):
    pytest.importorskip("openvino")
    out = tmp_path / "rows.csv"
    run(monkeypatch, "serve", "--quick", "--case", "S-16", "--repeats", 1, "--device", "cpu", "--out", out)
    rows = {row["backend"]: row for row in rows_of(out)}
    assert list(rows) == ["ours", *next(case for case in CASES if case.name == "S-16").against]
    assert all((row["peak_memory_mib"] == "") == (name in ENGINES) for name, row in rows.items())


def test_an_engine_that_answers_otherwise_is_left_out(monkeypatch, tmp_path, capsys):
    pytest.importorskip("openvino")
    monkeypatch.setattr(Serving, "openvino", lambda self, path: lambda: 1 - self.ids[..., None].float().numpy())
    arguments = ("--case", "S-16-bf16", "--repeats", 1, "--device", "cpu", "--out", tmp_path / "rows.csv")
    run(monkeypatch, "serve", "--quick", *arguments)
    assert "S-16-bf16: ours, OpenVINO is left out: AssertionError" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["C1-2", "C8"])
def test_two_checkouts_are_timed_in_turns_and_their_difference_is_shown(case, monkeypatch, tmp_path, capsys):
    other, out = tmp_path / "other", tmp_path / "rows.csv"
    other.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, other)
    arguments = ("compare", "--with", other, "--quick", "--case", case, "--repeats", 2, "--device", "cpu")
    run(monkeypatch, *arguments, "--out", out)
    assert [row["backend"] for row in rows_of(out)] == ["ours", f"checkout {other}"]
    printed = capsys.readouterr().out
    assert f"{case}: largest difference " in printed
    assert numerics.printed_difference(printed) <= numerics.SAME[torch.float32]
    config = (other / "configuration_bert.py").read_text()
    assert "layer_norm_eps: float = 1e-12" in config
    changed = tmp_path / "changed"
    shutil.copytree(other, changed)
    (changed / "configuration_bert.py").write_text(config.replace("eps: float = 1e-12", "eps: float = 0.1"))
    run(monkeypatch, "compare", "--with", changed, *arguments[3:])
    printed = capsys.readouterr().out
    assert f"checkout {changed}" in printed
    assert numerics.printed_difference(printed) > numerics.SAME[torch.float32]


@pytest.mark.parametrize(
    ("command", "case", "contenders"),
    [
        ("attention", "G5", ["ours", "SDPA flash, no bias"]),
        ("model", "G15-8x128", ["ours, SDPA", "BERT"]),
        ("pretrain", "G14-base", ["ours", "one large product"]),
        ("pretrain", "G14-layers", ["ours", "ours, unfused layers", "ours, layers compiled"]),
    ],
)
def test_a_gpu_case_can_be_rehearsed_on_a_cpu(command, case, contenders, monkeypatch, tmp_path, capsys):
    plain = functools.partialmethod(torch.nn.Module.compile, backend="eager")  # no compiler of C++ is waited for
    monkeypatch.setattr(torch.nn.Module, "compile", plain)
    out = tmp_path / "rows.csv"
    run(monkeypatch, command, "--rehearse", "--case", case, "--repeats", 1, "--commit", "abc1234", "--out", out)
    assert [(row["backend"], row["commit"]) for row in rows_of(out)] == [(name, "abc1234") for name in contenders]


def test_a_contender_that_cannot_run_is_left_out_with_its_reason(monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.csv"
    run(monkeypatch, "attention", "--rehearse", "--case", "G6-2048", "--repeats", 1, "--out", out)
    assert [row["backend"] for row in rows_of(out)] == ["ours"]
    assert "G6-2048: ours, skipping off is left out: it needs a GPU" in capsys.readouterr().out


def test_a_failing_case_lets_others_run_where_that_was_asked_for(monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.csv"
    arguments = ("model", "--rehearse", "--case", "G13", "--case", "G8", "--repeats", 1, "--out", out)
    with pytest.raises(SystemExit, match="1 of the cases failed"):
        run(monkeypatch, *arguments, "--keep_going")
    assert "G13: ours, CUDA graph cannot be measured: it needs a GPU" in capsys.readouterr().out
    assert [row["case"] for row in rows_of(out)] == ["G8", "G8"]
    with pytest.raises(SystemExit, match="G13: ours, CUDA graph cannot be measured"):
        run(monkeypatch, *arguments)


def test_utilization_is_the_share_of_the_flops_of_a_large_product():
    case = replace(next(case for case in CASES if case.name == "G14-base"), device="cpu", lengths=(8, 8))
    workload = Pretraining(case, TINY)
    _, tokens = workload.contender("one large product")
    predicted = int((workload.labels != -100).sum())
    flops = count_flops(workload.model.config, 16, 2 * 8**2, predicted)
    assert tokens / 16 == pytest.approx(2 * 512**3 / flops)


def test_unfused_layers_are_those_of_torch_while_they_are_timed():
    rows = dict(bench.layers.FUSED_LAYERS)
    seen = unfused(lambda: [row.function for row in bench.layers.FUSED_LAYERS.values()])()
    assert seen == [None] * len(rows) and rows == bench.layers.FUSED_LAYERS


def test_a_captured_graph_is_compared_with_a_plain_call(monkeypatch):
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, stub in (
        ("Stream", lambda: stream),
        ("current_stream", lambda: stream),
        ("stream", contextlib.nullcontext),
        ("graph", contextlib.nullcontext),
        ("CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None)),
    ):
        monkeypatch.setattr(torch.cuda, name, stub)
    case = replace(next(case for case in CASES if case.name == "G13"), device="cpu", dtype="float32", lengths=(8, 8))
    workload = Encoder(case, TINY)
    replay, tokens = workload.contender("ours, CUDA graph")
    plain, _ = workload.contender("ours, no mask")
    assert tokens == 16 and torch.equal(replay(), plain())
    model, calls = workload.model.base_model, iter(range(9))

    def forgetful(ids):  # gives other numbers while the graph is captured, after three calls to warm up
        return model(ids.flip(0) if next(calls) == 3 else ids)

    with pytest.raises(AssertionError, match="hidden states of the CUDA graph relative error"):
        workload.captured(forgetful)


@pytest.mark.parametrize("git", ["missing", "no repository"])
def test_without_git_the_commit_is_unknown(git, monkeypatch):
    def process(command, **kwargs):
        if git == "missing":
            raise FileNotFoundError("git")
        return subprocess.CompletedProcess(command, 128, "", "not a git repository")

    monkeypatch.setattr(bench.subprocess, "run", process)
    assert bench.commit() == "unknown"


def test_a_case_leaves_no_model_behind(monkeypatch, tmp_path):
    run(
        *(monkeypatch, "train", "--quick", "--case", "C8", "--repeats", 1, "--device", "cpu"),
        *("--out", tmp_path / "rows.csv"),
    )
    assert not any(type(thing) is bench.layers.BertForMaskedLM for thing in gc.get_objects())


def test_wrong_numbers_stop_the_benchmark_before_a_row(monkeypatch, tmp_path):
    right = bench.layers.sdpa_attention
    monkeypatch.setattr(
        bench.layers, "choose_attention", lambda *_: lambda q, k, v, *rest: right(q, k, v.flip(0), *rest)
    )
    out = tmp_path / "rows.csv"
    with pytest.raises(SystemExit, match="C5-4096: context relative error"):
        run(monkeypatch, "attention", "--quick", "--case", "C5-4096", "--device", "cpu", "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--quick"], "--quick needs --out"),
        (["model", "--rehearse"], "--rehearse needs --out"),
        (["model", "--case", "nothing", "--device", "cpu"], "no model case for cpu is named nothing"),
        (["model", "--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["compare", "--with", "nowhere"], "--with must be a checkout of this repository, nowhere holds no"),
    ],
)
def test_a_wrong_command_line_is_refused_with_its_reason(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert message in capsys.readouterr().err


def test_ratios_are_those_of_one_round_and_count_real_tokens():
    case = next(case for case in CASES if case.name == "C3")
    seconds = {"ours": [1.0, 2.0, 4.0], "full": [4.0, 8.0, 16.0]}
    mine, other = bench.make_rows(case, seconds, {"ours": 10, "full": 20}, {"ours": 5.0}, "command")
    assert mine["ratio"] == "1.000" and mine["tokens_per_second"] == "5" and mine["peak_memory_mib"] == "5.000"
    # Four times the time for twice the tokens, in every round.
    assert (other["ratio_p20"], other["ratio"], other["ratio_p80"]) == ("2.000", "2.000", "2.000")
    assert other["p50"] == "8.000000" and other["peak_memory_mib"] == ""


def test_startup_asks_both_checkpoints_in_turns_and_stops_when_one_does_not_answer(monkeypatch, tmp_path):
    asked, answers = [], "\n".join(["0.5  an answer"] * 5)

    def process(command, **kwargs):
        if command[0] == "git":
            return subprocess.CompletedProcess(command, 0, "abc1234\n", "")
        asked.append(command[command.index("--model") + 1])
        return subprocess.CompletedProcess(command, 0, answers, "")

    monkeypatch.setattr(bench.subprocess, "run", process)
    out = tmp_path / "rows.csv"
    run(monkeypatch, "startup", "--quick", "--repeats", 2, "--device", "cpu", "--out", out)
    assert [row["backend"] for row in rows_of(out)] == ["ours", "BERT"]
    assert len(asked) == 6 and asked == [ROOT, asked[1]] * 3
    answers = "no answer"
    with pytest.raises(SystemExit, match="C9: no answer"):
        run(monkeypatch, "startup", "--quick", "--device", "cpu", "--out", out)


def test_turns_end_at_the_limit_but_not_before_three_rounds():
    order = []
    samples = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    assert bench.take_turns(samples, 10, limit_s=0.0) == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert order == list("ababab")
    assert len(bench.take_turns(samples, 2, limit_s=60.0)["a"]) == 2


def test_cases_are_what_their_names_say():
    assert sum(RAGGED) == 1776 and max(RAGGED) == 512 and len(RAGGED) == 8
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert min(case.lengths) >= 1 and case.ours not in case.against
    short = next(case for case in CASES if case.name == "C7-short").lengths
    assert len(short) == 64 and (min(short), max(short)) == (5, 32)


@pytest.mark.parametrize("page, write", [("docs/performance.md", bench.table), ("benchmarks/README.md", bench.goals)])
def test_the_tables_in_docs_are_those_of_results_and_cases(page, write):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert bench.read_rows(), "there are no results"
    assert bench.between_markers(text, write()) == text


def test_the_table_has_a_column_for_each_processor(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    case = next(case for case in CASES if case.name == "C7-short")
    for processor, seconds, names in (("One", 2.0, ("ours", "BERT")), ("Two", 3.0, ("ours", "BERT", "published"))):
        times = {name: [1.0 if name == "ours" else seconds] for name in names}
        rows = bench.make_rows(case, times, dict.fromkeys(names, 1), dict.fromkeys(names, 1.0), "command")
        bench.append_rows(tmp_path / "model.csv", [{**row, "processor": processor} for row in rows])
    head, _, *lines = bench.table().splitlines()
    assert "| baseline | One | Two | memory, MiB | case |" in head
    assert "| BERT-base, SDPA | 2.00 (2.00–2.00) | 3.00 (3.00–3.00) | 1 / 1 | C7-short |" in lines[0]
    assert "| published MosaicBERT | – | 3.00 (3.00–3.00) | 1 / 1 | C7-short |" in lines[1]
    assert [line.split(",")[0] for line in lines[2:] if line] == ["Measured on One", "Measured on Two"]


def test_the_serving_table_has_milliseconds_and_a_dash_for_what_was_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    case = next(case for case in CASES if case.name == "S-16")
    seconds = {"ours": [0.0652], "ours, ONNX Runtime": [1.25]}
    rows = bench.make_rows(case, seconds, dict.fromkeys(seconds, 16), {}, "command")
    bench.append_rows(tmp_path / "serve.csv", rows)
    lines = bench.serving_table().splitlines()
    assert lines[0].startswith("| workload | dtype | ours, torch | ours, ONNX Runtime | ours, OpenVINO |")
    assert "| one text of 16 tokens | float32 | 65 | 1,250 | – | – | – | – |" in lines
    assert lines[-1].startswith("Milliseconds per forward pass. ")


def test_a_file_without_markers_is_refused():
    with pytest.raises(ValueError, match="must hold <!-- benchmarks:begin -->"):
        bench.between_markers("# A title\n", "table")


def test_the_plot_is_drawn_from_rows_and_refused_without(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="nothing to draw"):
        bench.plot(tmp_path / "cost.png")
    for case in CASES:
        if case.name in ("length-128", "length-256"):
            names = (case.ours, *case.against)
            seconds = {name: [float(max(case.lengths))] for name in names}
            rows = bench.make_rows(case, seconds, dict.fromkeys(names, 1), dict.fromkeys(names, 1.0), "command")
            bench.append_rows(tmp_path / "model.csv", rows)
    bench.plot(tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
