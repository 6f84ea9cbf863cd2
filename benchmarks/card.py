"""What the model promises, measured: run tests/card, keep its results in a CSV, and write README's table from it.

python benchmarks/card.py           on this machine, with its GPU where there is one
python benchmarks/card.py --table   only the table
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import torch
from bench import RESULTS, ROOT, provenance

BEGIN, END = "<!-- card:begin -->", "<!-- card:end -->"
COLUMNS = ("promise", "device", "result", "tests", "processor", "torch", "triton", "transformers", "commit")


class Promise(NamedTuple):
    """One line of the table.

    Attributes:
        words: what is promised.
        measure: how it is measured.
        result: what is shown, a format over the largest `error` and the losses at `short` and `long` length.
    """

    words: str
    measure: str
    result: str


# By the file of tests/card that keeps it.
PROMISES = {
    "loads": Promise(
        "**Loads** by every auto class",
        "from a folder and the Hub cache, saved and loaded again, with each attention backend",
        "yes",
    ),
    "parity": Promise(
        "**Is the published model**",
        "largest relative error of outputs and gradients; Triton kernels in the interpreter",
        "{error:.0e}",
    ),
    "extrapolation": Promise(
        "**Reads longer texts**",
        "loss on a speech of 7,281 tokens, in pieces of 128 / as a whole",
        "{short:.3f} / {long:.3f}",
    ),
    "conversion": Promise(
        "**Converts old checkpoints**", "same outputs for every published family and a Composer file", "yes"
    ),
}


def run_tests(report: Path) -> None:
    """Run tests/card and write what each test recorded to `report`, in JUnit's format.

    Raises:
        SystemExit: a test failed or was skipped.
    """
    command = [sys.executable, "-m", "pytest", "-o", "junit_family=xunit1", f"--junitxml={report}", "tests/card"]
    run = subprocess.run(command, cwd=ROOT)
    suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None
    if run.returncode or suite is None or int(suite.get("skipped")):
        raise SystemExit("no result is kept, as every test of tests/card has to pass")


def rows_of(report: Path, device: str) -> list:
    """One row a promise from what the tests recorded."""
    counts, errors, losses = dict.fromkeys(PROMISES, 0), [0.0], {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        counts[re.search(r"test_(\w+)", case.get("classname"))[1]] += 1
        recorded = {item.get("name"): float(item.get("value")) for item in case.iter("property")}
        errors.append(recorded.pop("error", 0.0))
        losses.update({int(name.split()[-1]): loss for name, loss in recorded.items()})
    shown = {"error": max(errors), "short": losses[min(losses)], "long": losses[max(losses)]}
    where = {name: value for name, value in provenance(device).items() if name in COLUMNS}
    return [
        {"promise": name, "device": device, "result": promise.result.format(**shown), "tests": counts[name], **where}
        for name, promise in PROMISES.items()
    ]


def table(rows: list) -> str:
    """README's table; of each promise and device the newest row counts."""
    newest = {(row["promise"], row["device"]): row for row in rows}
    lines = ["| promise | how it is measured | CPU | GPU |", "| --- | --- | --- | --- |"]
    for name, promise in PROMISES.items():
        on_gpu = newest.get((name, "cuda"))
        gpu = "{result} ({processor}, {commit})".format(**on_gpu) if on_gpu else "not run yet"
        lines.append(f"| {promise.words} | {promise.measure} | {newest[name, 'cpu']['result']} | {gpu} |")
    cpu = [newest[name, "cpu"] for name in PROMISES]
    tests = sum(int(row["tests"]) for row in cpu)
    made = "{processor}, torch {torch}, transformers {transformers}, commit {commit}".format(**cpu[0])
    return "\n".join([*lines, "", f"`make card` runs these {tests} tests. CPU: {made}."])


def read_rows(path: Path) -> list:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Parse the command line, run the tests, keep their results and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing, write README's table from the CSV")
    parser.add_argument("--results", type=Path, default=RESULTS / "card.csv", help="CSV of results (%(default)s)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="page with the markers of the table")
    arguments = parser.parse_args()
    rows = read_rows(arguments.results) if arguments.results.exists() else []
    if not arguments.table:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            run_tests(report)
            new = rows_of(report, device)
        rows = [row for row in rows if row["device"] != device] + new
        with arguments.results.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    page = arguments.readme.read_text(encoding="utf-8")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    arguments.readme.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
