"""Runs `release_check.py` with the newest patch of every minor release of transformers, and writes the table of docs.

Each release is installed beside the torch of the environment that this runs in, in a folder of its own.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from uv import find_uv_bin

HERE = Path(__file__).resolve().parent
TABLE = HERE.parents[1] / "docs" / "releases.md"
BEFORE, AFTER = "<!-- make releases -->\n", "<!-- end -->\n"


def bounds():
    """The lowest supported release, and the major release that is too new, from setup.cfg; tuples of int."""
    line = re.search(r"transformers>=([\d.]+),<(\d+)", (HERE.parents[1] / "setup.cfg").read_text(encoding="utf-8"))
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
    """Check one release.

    Returns:
        Its output, whose last line counts what passed.
    """
    with tempfile.TemporaryDirectory() as folder:
        install = [find_uv_bin(), "pip", "install", "--quiet", "--python", sys.executable, "--target", folder]
        subprocess.run([*install, f"transformers=={version}"], check=True)
        environment = {**os.environ, "PYTHONPATH": folder, "HF_HOME": f"{folder}/home", "HF_HUB_OFFLINE": "1"}
        check = [sys.executable, str(HERE / "release_check.py")]
        return subprocess.run(check, env=environment, capture_output=True, text=True)


def main():
    """Check the releases that are named on the command line, or all, and then write the table."""
    named = sys.argv[1:]
    rows, failed = [], []
    for version in named or supported():
        found = run(version)
        *_, packages, counts = found.stdout.splitlines() or ["", "did not start"]
        if found.returncode:
            failed.append(version)
            print(found.stdout, found.stderr, sep="\n", file=sys.stderr)
        print(f"{version}: {counts}", flush=True)
        rows.append(f"| {version} | {counts} |\n")
    if not named:
        text = TABLE.read_text(encoding="utf-8")
        start, end = text.index(BEFORE) + len(BEFORE), text.index(AFTER)
        table = f"With {packages.split(', ')[1]}:\n\n| transformers | checks |\n| --- | --- |\n{''.join(rows)}"
        TABLE.write_text(text[:start] + table + text[end:], encoding="utf-8")
    sys.exit(f"fails on {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
