"""Runs the tests of loading with the newest patch of every minor release of transformers, and writes the table of docs.

Each release is installed in a folder of its own, beside the torch of the environment that this runs in.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from uv import find_uv_bin

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "releases.md"
BEFORE, AFTER = "<!-- make releases -->\n", "<!-- end -->\n"
# Files that import only torch and transformers: loading, running, tying, saving, and no stock BERT whatever fails.
TESTS = [f"tests/{name}" for name in ("card/test_loads.py", "loading/test_loading.py", "loading/test_architectures.py")]
COUNTS = re.compile(r"\d+ (?:passed|failed|skipped|errors?)\b")


def bounds():
    """The lowest supported release, and the major release that is too new, from setup.cfg; tuples of int."""
    line = re.search(r"transformers>=([\d.]+),<(\d+)", (ROOT / "setup.cfg").read_text(encoding="utf-8"))
    return tuple(map(int, line[1].split("."))), (int(line[2]),)


def supported():
    """The lowest supported release and the newest patch of each minor release from there on, lowest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers", "--disable-pip-version-check"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    versions = re.search(r"Available versions: (.*)", listed)[1].split(", ")
    numbers = sorted(tuple(map(int, version.split("."))) for version in versions if re.fullmatch(r"[\d.]+", version))
    lowest, end = bounds()
    newest = {number[:2]: number for number in numbers if lowest <= number < end}
    return [".".join(map(str, number)) for number in sorted({lowest, *newest.values()})]


def run(version):
    """Test one release; returns what pytest printed and its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        install = [find_uv_bin(), "pip", "install", "--quiet", "--python", sys.executable, "--target", folder]
        subprocess.run([*install, f"transformers=={version}"], check=True)
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )


def main():
    """Test the releases that are named on the command line, or all, and then write the table."""
    named = sys.argv[1:]
    rows, failed = [], []
    for version in named or supported():
        found = run(version)
        counts = ", ".join(COUNTS.findall(found.stdout.strip().rpartition("\n")[2])) or "did not start"
        if found.returncode:
            failed.append(version)
            print(found.stdout, found.stderr, sep="\n", file=sys.stderr)
        print(f"{version}: {counts}", flush=True)
        rows.append(f"| {version} | {counts} |\n")
    if not named:
        text = TABLE.read_text(encoding="utf-8")
        start, end = text.index(BEFORE) + len(BEFORE), text.index(AFTER)
        head = f"With torch {importlib.metadata.version('torch')}:\n\n| transformers | tests |\n| --- | --- |\n"
        TABLE.write_text(text[:start] + head + "".join(rows) + text[end:], encoding="utf-8")
    sys.exit(f"fails on {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
