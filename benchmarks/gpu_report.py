"""Run everything that needs a GPU and write a report, in at most --max_seconds.

    python benchmarks/gpu_report.py --out FOLDER

Runs the `gpu` tests (in parallel where pytest-xdist is installed), the Python time of a call, all G cases of cases.py,
and a sweep over tile sizes. Each part is a process with its share of the time. What a part leaves unused goes to those
after it, and a part that fails or runs out of time does not stop the others. The folder gets summary.md, log.txt and
CSV files, eight files at most. Rows of attention.csv, model.csv, train.csv and pretrain.csv can be appended to those of
benchmarks/results. The command needs neither git nor a network.
"""

import argparse
import csv
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from cases import CASES

ROOT = Path(__file__).resolve().parent.parent

# Peak memory per token may differ by this share between the G11 cases of 512 to 8,192 tokens.
FLAT = 0.05


@dataclass(frozen=True)
class Part:
    """One process of the report.

    Attributes:
        name: what the report calls it.
        command: arguments of the Python interpreter.
        weight: its share of the time, against the weights of the parts that are still to run.
    """

    name: str
    command: tuple
    weight: float


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Attributes:
        seconds: how long it took.
        reason: what went wrong, or None.
        output: what it printed, standard error included.
    """

    seconds: float
    reason: Optional[str]
    output: str


def parts_of(out: Path, repeats: int, limit: float, commit: Optional[str], rehearse: bool) -> list:
    """The parts of the report, in the order in which they run.

    Args:
        out: folder of the report.
        repeats, limit, commit: as bench.py takes them.
        rehearse: run tiny sizes on the CPU.

    Returns:
        A list of `Part`.
    """
    workers = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    options = ("--repeats", str(repeats), "--limit", str(limit), *(("--commit", commit) if commit else ()))

    def bench(command, weight, *more):
        script = ("benchmarks/bench.py", command, "--keep_going", *options, *more, "--out", str(out / f"{command}.csv"))
        return Part(command, script, weight)

    on_device = ("--rehearse",) if rehearse else ("--device", "cuda")
    # Verbose, so that a stopped run shows its progress. A file that needs a missing package cannot be collected; the
    # others still run.
    pytest = ("-m", "pytest", "-m", "gpu or card", "-vv", "--continue-on-collection-errors", "-p", "no:cacheprovider")
    return [
        Part("tests", (*pytest, *workers), 11),
        bench("host", 2, "--device", "cpu"),
        bench("attention", 9, *on_device),
        bench("model", 9, *on_device),
        bench("train", 6, *on_device),
        bench("pretrain", 6, *on_device),
        Part("sweep", ("benchmarks/sweep.py", "--out", str(out / "sweep.csv")), 6),
    ]


def run_part(part: Part, limit: float, log) -> Outcome:
    """Run one part.

    Args:
        part: the part.
        limit: seconds after which it is stopped, with the processes that it started.
        log: text file that its output is copied to.

    Returns:
        How it ended.
    """
    log.write(f"\n=== {part.name}: python {shlex.join(part.command)} (at most {limit:.0f} s)\n")
    log.flush()
    begin, start = time.monotonic(), log.tell()
    process = subprocess.Popen(
        [sys.executable, "-u", *part.command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        status = process.wait(limit)
        reason = None if status == 0 else f"exit status {status}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reason = f"stopped at its limit of {limit:.0f} s"
    log.flush()
    with open(log.name, encoding="utf-8", errors="replace") as file:
        file.seek(start)
        output = file.read()
    if reason and reason.startswith("exit"):
        lines = output.strip().splitlines()
        reason += f": {lines[-1][:200]}" if lines else ""
    return Outcome(time.monotonic() - begin, reason, output)


def run_parts(parts: list, out: Path, max_seconds: float) -> dict:
    """Run all parts one after another.

    Args:
        parts: list of `Part`.
        out: folder of the report; gets log.txt.
        max_seconds: for all parts together.

    Returns:
        Name of the part to its `Outcome`.
    """
    begin, outcomes = time.monotonic(), {}
    with open(out / "log.txt", "w", encoding="utf-8") as log:
        for index, part in enumerate(parts):
            left = max_seconds - (time.monotonic() - begin)
            share = left * part.weight / sum(later.weight for later in parts[index:])
            if share < 1:
                outcomes[part.name] = Outcome(0.0, "no time was left", "")
                continue
            print(f"{part.name}: at most {share:.0f} s", flush=True)
            outcomes[part.name] = run_part(part, share, log)
            print(f"{part.name}: {outcomes[part.name].reason or 'done'}", flush=True)
    return outcomes


def read_rows(path: Path) -> list:
    """The rows of a CSV file, one dict each; none where the file does not exist."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def reason_for(case: str, contender: str, outcome: Outcome) -> str:
    """Why a contender of a case has no row."""
    lines = [line for line in outcome.output.splitlines() if line.startswith(f"{case}: ")]
    own = [line for line in lines if line.startswith(f"{case}: {contender} is left out")]
    if lines:
        return (own or lines)[-1].removeprefix(f"{case}: ")[:200]
    return outcome.reason or "its part wrote no row"


def goal_rows(out: Path, outcomes: dict) -> list:
    """The goals of the G cases, and what was measured.

    Returns:
        Lists of cells: case, workload, baseline, measured, goal, whether it is reached.
    """
    lines, memory = [], {}
    for case in CASES:
        if case.device != "cuda":
            continue
        rows = {row["backend"]: row for row in read_rows(out / f"{case.command}.csv") if row["case"] == case.name}
        outcome = outcomes.get(case.command, Outcome(0.0, "the part did not run", ""))
        mine = rows.get(case.ours)
        if mine and case.name.startswith("G11-"):
            memory[case.name] = float(mine["peak_memory_mib"]) / sum(case.lengths)

        def add(baseline, measured, goal, reached, case=case):
            lines.append([case.name, case.what, baseline, measured, goal, reached])

        for name, goal in case.against.items():
            row = rows.get(name)
            wanted = "–" if goal is None else f"{goal:.2f}"
            if row is None:
                add(name, f"not measured: {reason_for(case.name, name, outcome)}", wanted, "–")
                continue
            reached = "–" if goal is None else yes_or_no(float(row["ratio"]) >= goal)
            add(name, "{ratio} ({ratio_p20}–{ratio_p80})".format(**row), wanted, reached)
        if case.memory_goal:
            name, goal = case.memory_goal
            if mine and name in rows:
                share = float(mine["peak_memory_mib"]) / float(rows[name]["peak_memory_mib"])
                add(f"peak memory of {name}", f"{share:.3f}", f"at most {goal:.2f}", yes_or_no(share <= goal))
            else:
                reason = reason_for(case.name, name, outcome)
                add(f"peak memory of {name}", f"not measured: {reason}", f"at most {goal:.2f}", "–")
        if case.command == "pretrain" or not case.against:
            wanted = f"{case.speed_goal:,}" if case.speed_goal else "–"
            if mine is None:
                reason = reason_for(case.name, case.ours, outcome)
                add("tokens per second", f"not measured: {reason}", wanted, "–")
            else:
                speed = int(mine["tokens_per_second"])
                reached = yes_or_no(speed >= case.speed_goal) if case.speed_goal else "–"
                add("tokens per second", f"{speed:,}", wanted, reached)
    names = [case.name for case in CASES if case.name.startswith("G11-")]
    cells = ["G11", "memory per token, 512 to 8,192 tokens", "largest over smallest"]
    if len(memory) == len(names):
        spread = max(memory.values()) / min(memory.values())
        return [*lines, [*cells, f"{spread:.3f}", f"at most {1 + FLAT:.2f}", yes_or_no(spread <= 1 + FLAT)]]
    lost = ", ".join(name for name in names if name not in memory)
    return [*lines, [*cells, f"not measured: no row of {lost}", f"at most {1 + FLAT:.2f}", "–"]]


def yes_or_no(reached: bool) -> str:
    return "yes" if reached else "no"


def markdown_table(head: list, rows: list) -> str:
    """A Markdown table; bars in cells are replaced."""
    cells = [[str(cell).replace("|", "/") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *cells])


def tests_line(outcome: Outcome) -> str:
    """The totals in the output of pytest, even if it was stopped."""
    totals = re.findall(r"^=* ?(\d+ \w+.* in [\d.]+s.*?) ?=*$", outcome.output, re.M)
    if totals:
        return totals[-1]
    words = ("PASSED", "FAILED", "SKIPPED", "ERROR")
    counts = ", ".join(f"{len(re.findall(rf'{word}', outcome.output))} {word}" for word in words)
    return f"pytest did not end; so far {counts}"


def summarize(out: Path, outcomes: dict, seconds: float, rehearsed: bool) -> str:
    """The text of summary.md."""
    rows = [row for path in sorted(out.glob("*.csv")) for row in read_rows(path)]
    about = []
    for name in ("processor", "torch", "triton", "transformers", "commit"):
        values = sorted({row[name] for row in rows if row.get(name)})
        about.append(f"{name}: {', '.join(values) or 'unknown'}")
    parts = [[name, outcome.reason or "done", f"{outcome.seconds:.0f}"] for name, outcome in outcomes.items()]
    text = [
        "# GPU report",
        *(["**A rehearsal on the CPU with tiny sizes: ignore its numbers.**"] if rehearsed else []),
        f"{'; '.join(about)}. {seconds:.0f} s in all.",
        "Ratios are the baseline's time per token divided by ours (p20–p80); in pretraining, model FLOP utilization.",
        "## Goals",
        markdown_table(["case", "workload", "baseline", "measured", "goal", "reached"], goal_rows(out, outcomes)),
        "## Parts",
        markdown_table(["part", "outcome", "seconds"], parts),
    ]
    if "tests" in outcomes:
        failed = sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+)", outcomes["tests"].output, re.M)))
        text += ["## Tests", tests_line(outcomes["tests"]), *(f"- {name}" for name in failed)]
    host = read_rows(out / "host.csv")
    if host:
        cells = [[row["case"], row["backend"], f"{float(row['p50']) * 1e6:.0f}", row["launches"]] for row in host]
        text += ["## Python of one attention call", markdown_table(["case", "contender", "µs", "launches"], cells)]
    best = {}
    for row in read_rows(out / "sweep.csv"):
        best.setdefault((row["kernel"], row["B"], row["S"]), []).append(row)
    if best:
        cells = []
        for (kernel, count, length), sizes in best.items():
            fastest = sorted(sizes, key=lambda row: float(row["microseconds"]))[:3]
            shown = ["({rows}, {step}, {warps}, {stages}) {microseconds} µs".format(**row) for row in fastest]
            cells.append([kernel, f"{count} × {length}", ", ".join(shown)])
        head = ["kernel", "batch", "fastest (rows, step, warps, stages)"]
        text += ["## Tile sizes", markdown_table(head, cells)]
    return "\n\n".join(text) + "\n"


def main() -> None:
    """Parse the command line, run the parts and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the report; must be empty or new")
    parser.add_argument("--max_seconds", type=float, default=480.0, help="time for everything (default: 480)")
    parser.add_argument("--part", action="append", help="run this part only; may be given again")
    parser.add_argument("--repeats", type=int, default=7, help="rounds per case (default: 7)")
    parser.add_argument("--limit", type=float, default=3.0, help="seconds per case, as for bench.py (default: 3)")
    parser.add_argument("--commit", help="commit that the rows name (default: from git)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, to try the command")
    arguments = parser.parse_args()
    begin = time.monotonic()
    out = arguments.out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"--out must be an empty or a new folder, {arguments.out} is not")
    out.mkdir(parents=True, exist_ok=True)
    parts = parts_of(out, arguments.repeats, arguments.limit, arguments.commit, arguments.rehearse)
    names = [part.name for part in parts]
    if unknown := [name for name in arguments.part or [] if name not in names]:
        parser.error(f"--part must be one of {', '.join(names)}, got {unknown[0]}")
    chosen = [part for part in parts if not arguments.part or part.name in arguments.part]
    outcomes = run_parts(chosen, out, arguments.max_seconds - (time.monotonic() - begin))
    text = summarize(out, outcomes, time.monotonic() - begin, arguments.rehearse)
    (out / "summary.md").write_text(text, encoding="utf-8")
    print(f"{out / 'summary.md'}")
    failed = [name for name, outcome in outcomes.items() if outcome.reason]
    if failed:
        sys.exit(f"not whole: {', '.join(failed)}")


if __name__ == "__main__":
    main()
