"""Runs Python in a process of its own."""

import json
import os
import subprocess
import sys
import textwrap

from conftest import ROOT

# Runs programs one after the other, each in a namespace of its own, with a mark after what it prints.
BLOCKS = """
import json, sys
for block in json.load(sys.stdin):
    exec(compile(block, "block", "exec"), {"__name__": "__main__"})
    print(end=chr(0), flush=True)
"""
PATHS = os.pathsep.join(str(ROOT / folder) for folder in ("scripts", "tests/support"))


def run_python(program, *arguments, cwd=None, fails=False, environment=None, stdin=None):
    """Run a program that can import what scripts and tests import.

    Args:
        program: its text, which may be indented.
        *arguments: of its command line.
        cwd: its working directory.
        fails: whether it has to.
        environment: variables beside those of this process.
        stdin: text that it reads.

    Returns:
        What it prints: on standard error where it fails, else on standard output.
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", **(environment or {})},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (run.returncode != 0) == fails, run.stderr[-3000:]
    return run.stderr if fails else run.stdout


def run_blocks(blocks, **options):
    """Run programs one after the other in one process; returns what each prints. Options are those of `run_python`."""
    *printed, nothing = run_python(BLOCKS, stdin=json.dumps(blocks), **options).split("\0")
    assert len(printed) == len(blocks) and nothing == ""
    return printed
