"""Time this model against the published MosaicBERT and against what users would pick instead.

python benchmarks/bench.py attention|model|train|pretrain|serve|sorted|startup|host
                                                              measure the cases of this command, append rows to a CSV
python benchmarks/bench.py model --case "C3" --repeats 5      one case
python benchmarks/bench.py compare --with PATH                this checkout against another one, in one process
python benchmarks/bench.py table --write docs/performance.md  the tables of results, from the CSV
python benchmarks/bench.py table --goals --write benchmarks/README.md
python benchmarks/bench.py plot                               cost against length, from the CSV

The numbers of a case are checked first, and a wrong number stops the command. Contenders take turns in one
process. A ratio is a contender's time per token divided by ours in the same round, so above 1 we are faster.
"""

import argparse
import csv
import fnmatch
import gc
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Optional

import torch
import transformers
from cases import CASES
from contenders import (
    CHECKOUT,
    ROOT,
    SIZES,
    TINY,
    Attention,
    Encoder,
    Pretraining,
    Training,
    build,
    contender_declines,
    layers,
)
from engines import ENGINES, Serving, SortedTexts
from host import HostCall, stubbed_launches
from torch.profiler import ProfilerActivity, profile

RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = (
    "case backend mode dtype B S share_of_real_tokens repeats p20 p50 p80 ratio ratio_p20 ratio_p80 peak_memory_mib "
    "tokens_per_second processor threads torch triton transformers commit command"
).split()
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
LABELS = {
    "published": "published MosaicBERT",
    "BERT": "BERT-base, SDPA",
    "BERT, cut at 512": "BERT of the same size, SDPA, cut at 512",
    "ModernBERT": "ModernBERT-base, SDPA",
    "one SDPA call": "one SDPA call over all keys, no bias",
    "eager": "our eager attention",
    "one large product": "one large matrix product (ratio: model FLOP utilization)",
    "ours": "MosaicBERT, this code",
}

WORKLOADS = {
    "attention": Attention,
    "model": Encoder,
    "train": Training,
    "pretrain": Pretraining,
    "serve": Serving,
    "sorted": SortedTexts,
}

# A sample repeats its call for about this many seconds, so that the resolution of the clock does not matter.
SAMPLE_SECONDS = 0.01


def wait(device: str) -> None:
    """Wait until a GPU has finished, so that its work is timed."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(function, device: str, calls: int = 1, clock=time.perf_counter) -> float:
    """Seconds of one call by `clock`, the mean of `calls`."""
    wait(device)
    start = clock()
    for _ in range(calls):
        function()
    wait(device)
    return (clock() - start) / calls


def peak_memory(function, device: str) -> float:
    """Peak MiB that torch holds during a call beyond what it held before; weights do not count."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event["args"] for event in events if event["name"] == "[memory]"]
    totals = [change["Total Allocated"] for change in changes]
    return (max(totals) - (totals[0] - changes[0]["Bytes"])) / 2**20


def take_turns(samples: dict, repeats: int, limit_s: float) -> dict:
    """Time contenders in turns.

    Args:
        samples: name to a function that takes one sample and returns its seconds.
        repeats: rounds.
        limit_s: no further round starts after this many seconds, but at least three are made (or `repeats`).

    Returns:
        Name to a list of seconds, one per round.
    """
    seconds = {name: [] for name in samples}
    begin = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - begin > limit_s:
            break
        for name, sample in samples.items():
            seconds[name].append(sample())
    return seconds


def percentiles(values: list) -> list:
    """p20, p50 and p80."""
    return torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()


def make_rows(case, seconds: dict, tokens: dict, memory: dict, command: str) -> list:
    """The CSV rows of a case.

    Args:
        case: a `Case`.
        seconds: contender to seconds, one per round; includes `case.ours`.
        tokens: contender to the real tokens that it processes per call.
        memory: contender to its peak in MiB, or None.
        command: the command line.

    Returns:
        One dict per contender.
    """
    rows = []
    mine = [value / tokens[case.ours] for value in seconds[case.ours]]
    for name, values in seconds.items():
        p20, p50, p80 = percentiles(values)
        low, middle, high = percentiles([value / tokens[name] / own for value, own in zip(values, mine)])
        rows.append(
            {
                "case": case.name,
                "backend": name,
                "mode": case.mode,
                "dtype": case.dtype,
                "B": len(case.lengths),
                "S": max(case.lengths),
                "share_of_real_tokens": f"{sum(case.lengths) / (len(case.lengths) * max(case.lengths)):.3f}",
                "repeats": len(values),
                **{key: f"{value:.6f}" for key, value in zip(("p20", "p50", "p80"), (p20, p50, p80))},
                **{key: f"{value:.3f}" for key, value in zip(("ratio", "ratio_p20", "ratio_p80"), (middle, low, high))},
                "peak_memory_mib": "" if memory.get(name) is None else f"{memory[name]:.3f}",
                "tokens_per_second": f"{tokens[name] / p50:.0f}",
                **provenance(case.device),
                "command": command,
            }
        )
    return rows


def provenance(device: str) -> dict:
    """The columns on machine and software."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def processor_name() -> str:
    """The name of the processor from Linux, or elsewhere from Python."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that was measured, with `-dirty` if the model or the benchmark differs from it."""

    def git(*arguments):
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)

    try:
        name = git("rev-parse", "--short", "HEAD").stdout.strip()
    except FileNotFoundError:  # git is not installed
        name = ""
    if not name:
        return "unknown"
    changed = git("diff", "--quiet", "HEAD", "--", ":(glob)*.py", ":(glob)benchmarks/*.py").returncode
    return name + "-dirty" * bool(changed)


def measure(case, sizes, repeats: int, limit_s: float, command: str) -> list:
    """Gate, memory and times of one case of `WORKLOADS`; returns its rows.

    A contender that cannot run here is left out, with its reason printed.

    Raises:
        AssertionError: the numbers are wrong.
    """
    if reason := contender_declines(case.ours, case.device):
        raise AssertionError(f"{case.ours} cannot be measured: {reason}")
    bench = WORKLOADS[case.command](case, sizes)
    bench.gate()
    samples, tokens, memory = {}, {}, {}
    for name in (case.ours, *case.against):
        if reason := contender_declines(name, case.device):
            print(f"{case.name}: {name} is left out: {reason}")
            continue
        try:
            function, tokens[name] = bench.contender(name)
            if case.device == "cuda" or "compiled" in name:
                for _ in range(3):  # compiles, tunes, and captures what torch.compile keeps as a graph
                    function()
        except Exception as error:
            if name == case.ours:
                raise
            print(f"{case.name}: {name} is left out: {type(error).__name__}: {error}")
            continue
        begin = time.perf_counter()
        if name in ENGINES:  # which allocate by themselves
            memory[name] = None
            function()
        else:
            memory[name] = peak_memory(function, case.device)
        wait(case.device)
        calls = max(1, min(100, int(SAMPLE_SECONDS / (time.perf_counter() - begin))))
        samples[name] = lambda function=function, calls=calls: seconds_of(function, case.device, calls)
    return make_rows(case, take_turns(samples, repeats, limit_s), tokens, memory, command)


def measure_checkouts(case, sizes, repeats: int, limit_s: float, command: str) -> list:
    """As `measure`, against another checkout; prints the largest difference between the two results."""
    rows = measure(case, sizes, repeats, limit_s, command)
    (other,) = case.against
    print(f"{case.name}: largest difference {WORKLOADS[case.command](case, sizes).difference(other):.1e}")
    return rows


def measure_host(case, sizes, repeats: int, limit_s: float, command: str) -> list:
    """CPU time of the Python of one attention call, with launches that do nothing; the rows also count the launches.

    Raises:
        AssertionError: Triton is not installed, or the call launched nothing.
    """
    assert layers.triton_attention is not None, "Triton is not installed"
    with stubbed_launches() as kernel:
        call = HostCall(case, kernel)
        contenders = {name: call.contender(name) for name in (case.ours, *case.against)}
        launches = {name: call.launches(name) for name in contenders}
        assert launches[case.ours] > 0, "the call launched nothing"
        samples = {
            name: partial(seconds_of, function, "cpu", 200, time.process_time) for name, function in contenders.items()
        }
        seconds = take_turns(samples, repeats, limit_s)
    rows = make_rows(case, seconds, dict.fromkeys(contenders, 1), {}, command)
    return [{**row, "launches": launches[row["backend"]]} for row in rows]


def measure_startup(case, sizes, repeats: int, limit_s: float, command: str) -> list:
    """Time from `python` to the answer of fill-mask, each in its own process; returns the rows of the case.

    The stock model has as many encoder weights as the checkpoint, and the same tokenizer.

    Raises:
        AssertionError: a process failed or did not give five answers.
    """
    config = layers.BertConfig.from_pretrained(ROOT)
    fields = {field: getattr(config, field) for field in vars(sizes)}
    # A gated layer has three matrices where BERT has two.
    stock = replace(sizes, **{**fields, "intermediate_size": config.intermediate_size * 3 // 2})
    with tempfile.TemporaryDirectory() as folder:
        build("BERT", stock, torch.bfloat16, "cpu").save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(ROOT).save_pretrained(folder)

        def sample(model):
            script = [sys.executable, ROOT / "scripts" / "fill_mask.py", "--model", model, "The sky is [MASK] today."]
            begin = time.perf_counter()
            done = subprocess.run(script, capture_output=True, text=True)
            seconds = time.perf_counter() - begin
            answers = done.stdout.splitlines()
            assert done.returncode == 0 and len(answers) == 5, done.stderr or done.stdout
            return seconds

        samples = {"ours": lambda: sample(ROOT), "BERT": lambda: sample(folder)}
        for function in samples.values():
            function()
        seconds = take_turns(samples, repeats, limit_s)
    return make_rows(case, seconds, dict.fromkeys(samples, sum(case.lengths)), {}, command)


def append_rows(path: Path, rows: list) -> None:
    """Append rows to a CSV file; a new file gets a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def read_rows() -> dict:
    """The newest row of every processor, case and backend in benchmarks/results: (processor, case, backend) to row."""
    rows = {}
    for name in (*WORKLOADS, "startup", "host"):
        path = RESULTS / f"{name}.csv"
        if path.exists():
            with path.open(newline="") as file:
                rows.update({(r["processor"], r["case"], r["backend"]): r for r in csv.DictReader(file)})
    return rows


def show(row: dict) -> str:
    """A row as a line for the terminal."""
    return (
        f"{row['case']:16} {row['backend']:24} {float(row['p50']):10.6f} s  "
        f"ratio {row['ratio']:>7} ({row['ratio_p20']}–{row['ratio_p80']})  "
        f"{mib(row):>7} MiB  {row['repeats']} rounds"
    )


def mib(row: dict) -> str:
    """Peak memory of a row, for a table."""
    return f"{float(row['peak_memory_mib']):,.0f}" if row["peak_memory_mib"] else "–"


def table() -> str:
    """The tables of docs/performance.md, Markdown, from the newest rows of each processor: the CPUs, then the GPUs.

    Cases of the plot and of docs/serving.md are left out.
    """
    rows = read_rows()
    parts = [device_table(rows, device) for device in ("cpu", "cuda")]
    return "\n\n".join(part for part in parts if part)


def device_table(rows: dict, device: str) -> str:
    """The table of the cases for `device` and what it was measured on; empty where there are no rows."""
    cases = [case for case in CASES if case.device == device and not case.name.startswith(("length-", "S-"))]
    names = {case.name for case in cases}
    processors = sorted({processor for processor, case, _ in rows if case in names})
    head = ["workload", "baseline", *processors, "memory, MiB", "case"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    sources = {}
    for case in cases:
        for name in case.against:
            found = [rows.get((processor, case.name, name)) for processor in processors]
            if not any(found):
                continue
            mine = [rows.get((processor, case.name, case.ours)) for processor in processors]
            memory = next(f"{mib(own)} / {mib(row)}" for own, row in zip(mine, found) if row)
            cells = [case.what, LABELS.get(name, name), *map(partial(ratio_of, case), found, mine), memory, case.name]
            lines.append(f"| {' | '.join(cells)} |")
            for row in filter(None, found):
                about = "{processor}, {threads} threads, torch {torch}, transformers {transformers}".format(**row)
                if device == "cuda":
                    about += f", Triton {row['triton']}"
                sources.setdefault(about, set()).add(row["commit"])
    for about, commits in sorted(sources.items()):
        lines += ["", f"Measured on {about}; commit {', '.join(sorted(commits))}."]
    return "\n".join(lines) if sources else ""


def serving_table() -> str:
    """The table of docs/serving.md: milliseconds of each engine, Markdown, from the newest rows of each processor."""
    rows = read_rows()
    cases = [case for case in CASES if case.command == "serve"]
    contenders = [cases[0].ours, *cases[0].against]
    lines = []
    for processor in sorted({processor for processor, name, _ in rows if name.startswith("S-")}):
        head = ["workload", "dtype", *(name if "," in name else f"{name}, torch" for name in contenders)]
        lines += ["", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
        for case in cases:
            found = [rows.get((processor, case.name, name)) for name in contenders]
            times = [f"{float(row['p50']) * 1000:,.0f}" if row else "–" for row in found]
            lines.append(f"| {' | '.join([case.what, case.dtype, *times])} |")
        newest = rows[processor, cases[0].name, "ours"]
        made = "{processor}, {threads} threads; commit {commit}".format(**newest)
        lines += ["", f"Milliseconds per forward pass. {made}."]
    return "\n".join(lines).strip()


def ratio_of(case, row: Optional[dict], mine: Optional[dict]) -> str:
    """Median, p20 and p80 of a row's ratio, in pretraining also our speed; a dash where there is no row."""
    if row is None:
        return "–"
    text = "{:.2f} ({:.2f}–{:.2f})".format(*(float(row[f"ratio{x}"]) for x in ("", "_p20", "_p80")))
    return text + (f", {int(mine['tokens_per_second']):,} tokens/s" if case.command == "pretrain" else "")


def goals() -> str:
    """The goals of benchmarks/README.md, a Markdown table of what each case is to reach against its contenders."""
    lines = ["| case | goal |", "| --- | --- |"]
    for case in CASES:
        wanted = [f"{LABELS.get(name, name)} {goal:.2f}" for name, goal in case.against.items() if goal]
        if case.memory_goal:
            wanted.append(f"memory of {LABELS[case.memory_goal[0]]} {case.memory_goal[1]:.2f}")
        if case.speed_goal:
            wanted.append(f"{case.speed_goal:,} tokens/s")
        if wanted:
            lines.append(f"| {case.name} | {'; '.join(wanted)} |")
    return "\n".join(lines)


def between_markers(text: str, inner: str) -> str:
    """`text` with `inner` between the two markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the file must hold {BEGIN} and then {END}, once each")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    return f"{head}{BEGIN}\n{inner}\n{END}{tail}"


def plot(path: Path) -> None:
    """Plot time and memory of the `length-*` cases against length, for the processor of the newest row.

    Raises:
        ValueError: there are no such rows.
    """
    from matplotlib.figure import Figure

    rows = [row for (_, case, _), row in read_rows().items() if case.startswith("length-")]
    if not rows:
        raise ValueError('nothing to draw; run: python benchmarks/bench.py model --case "length-*"')
    rows = [row for row in rows if row["processor"] == rows[-1]["processor"]]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = zip(figure.subplots(1, 2), (("p50", "seconds per forward pass"), ("peak_memory_mib", "peak memory, MiB")))
    for axes, (column, label) in panels:
        for name in dict.fromkeys(row["backend"] for row in rows):
            points = sorted((int(row["S"]), float(row[column])) for row in rows if row["backend"] == name)
            axes.loglog(*zip(*points), marker="o", markersize=3, label=LABELS[name], base=2)
        axes.set(xlabel="length of the text (tokens)", ylabel=label)
        axes.set_yscale("log", base=10)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small", frameon=False)
    row = rows[0]
    figure.suptitle(
        f"Encoder, base size, {row['dtype']}, {row['processor']}, {row['threads']} threads", fontsize="medium"
    )
    figure.savefig(path, dpi=150)


def free(device: str) -> None:
    """Release what the cases so far held: models, their gradients, and what torch's allocator keeps of them."""
    build.cache_clear()
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    """Parse the command line, and measure, write tables or plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in (*WORKLOADS, "startup", "host", "compare"):
        about = "time this checkout against another one" if name == "compare" else f"measure the {name} cases"
        measuring = commands.add_parser(name, help=about)
        if name == "compare":
            measuring.add_argument(
                "--with", dest="other", type=Path, required=True, help="folder of the other checkout"
            )
            measuring.add_argument("--case", action="append", help='name or pattern (default: "C*", on a GPU "G*")')
        else:
            measuring.add_argument("--case", action="append", help="name or pattern; may be given again (default: all)")
        measuring.add_argument("--repeats", type=int, default=10, help="rounds per case (default: 10)")
        measuring.add_argument(
            "--limit", type=float, default=60.0, help="seconds per case after which no fourth or later round starts"
        )
        measuring.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
        measuring.add_argument("--threads", type=int, help="CPU threads (default: what torch chooses)")
        default = "none" if name == "compare" else "benchmarks/results"
        measuring.add_argument("--out", type=Path, help=f"CSV to append to (default: {default})")
        measuring.add_argument("--commit", help="commit that the rows name (default: from git)")
        measuring.add_argument("--keep_going", action="store_true", help="continue with the next case when one fails")
        measuring.add_argument("--quick", action="store_true", help="tiny sizes, to try the command; needs --out")
        measuring.add_argument(
            "--rehearse", action="store_true", help="run the GPU cases on the CPU with tiny sizes; needs --out"
        )
    tabulating = commands.add_parser("table", help="print the tables of results, or the goals")
    tabulating.add_argument("--goals", action="store_true", help="the table of goals instead")
    tabulating.add_argument("--serving", action="store_true", help="the table of docs/serving.md instead")
    tabulating.add_argument("--write", type=Path, help="file to write them into, between its markers")
    drawing = commands.add_parser("plot", help="plot cost against length")
    drawing.add_argument("--out", type=Path, default=RESULTS / "cost_by_length.png")
    arguments = parser.parse_args()
    if arguments.command == "plot":
        plot(arguments.out)
    elif arguments.command == "table":
        tables = goals() if arguments.goals else serving_table() if arguments.serving else table()
        if arguments.write is None:
            print(tables)
        else:
            text = arguments.write.read_text(encoding="utf-8")
            arguments.write.write_text(between_markers(text, tables), encoding="utf-8")
    else:
        run(parser, arguments)


def choose_cases(parser, arguments, device: str) -> list:
    """The cases that the command line chooses; ends the program if there is none."""
    comparing = arguments.command == "compare"
    patterns = arguments.case or [{"cpu": "C*", "cuda": "G*"}[device] if comparing else "*"]
    wanted = ("model", "train") if comparing else (arguments.command,)
    chosen = [
        case
        for case in CASES
        if case.command in wanted
        and case.device == device
        and any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)
    ]
    if not chosen:
        parser.error(f"no {arguments.command} case for {device} is named {' or '.join(patterns)}")
    if comparing:
        chosen = [replace(case, against={f"{CHECKOUT}{arguments.other}": None}) for case in chosen]
    return chosen


def run(parser, arguments) -> None:
    """Measure the chosen cases."""
    comparing = arguments.command == "compare"
    if arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {arguments.repeats}")
    arguments.quick |= arguments.rehearse
    if arguments.quick and arguments.out is None and not comparing:
        parser.error(f"--{'rehearse' if arguments.rehearse else 'quick'} needs --out: its rows are not results")
    if comparing and not (arguments.other / "bert_layers.py").is_file():
        parser.error(f"--with must be a checkout of this repository, {arguments.other} holds no bert_layers.py")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = arguments.device or ("cuda" if arguments.rehearse or torch.cuda.is_available() else "cpu")
    out = arguments.out if comparing else arguments.out or RESULTS / f"{arguments.command}.csv"
    command = shlex.join(["python", "benchmarks/bench.py", *sys.argv[1:]])
    special = {"startup": measure_startup, "host": measure_host, "compare": measure_checkouts}
    function = special.get(arguments.command, measure)
    failures = []
    for case in choose_cases(parser, arguments, device):
        if arguments.quick:
            case = replace(case, lengths=tuple(max(1, length // 32) for length in case.lengths))
        if arguments.rehearse:
            case = replace(case, device="cpu", lengths=case.lengths[:16])
        sizes = TINY if arguments.quick else SIZES[case.sizes]
        rows, failure = [], None
        try:
            rows = function(case, sizes, arguments.repeats, arguments.limit, command)
        except AssertionError as error:
            failure = f"{case.name}: {error}"
        except Exception as error:  # torch's word for too little memory, a compiler's, a driver's
            if not arguments.keep_going:
                raise
            failure = f"{case.name}: {type(error).__name__}: {error}"
        free(case.device)
        if failure is not None:
            if not arguments.keep_going:
                sys.exit(failure)
            failures.append(failure)
            print(failure, flush=True)
            continue
        if arguments.commit:
            rows = [{**row, "commit": arguments.commit} for row in rows]
        if out is not None:
            append_rows(out, rows)
        print(*map(show, rows), sep="\n", flush=True)
    if failures:
        sys.exit(f"{len(failures)} of the cases failed")


if __name__ == "__main__":
    main()
