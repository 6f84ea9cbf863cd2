"""Runs Python in a process of its own."""

import json
import os
import textwrap

import forks
from conftest import ROOT

# Runs programs one after the other, each in a namespace of its own, with a mark after what it prints.
BLOCKS = """
import json, sys
for block in json.load(sys.stdin):
    exec(compile(block, "block", "exec"), {"__name__": "__main__"})
    print(end=chr(0), flush=True)
"""
PATHS = os.pathsep.join(str(ROOT / folder) for folder in ("scripts", "tests/support"))


def start_python(program, *arguments, cwd=None, environment=None, stdin=""):
    """Run a program that can import what scripts and tests import, to its end.

    Args:
        program: its text, which may be indented.
        *arguments: of its command line.
        cwd: its working directory.
        environment: variables beside those of this process.
        stdin: text that it reads.

    Returns:
        `subprocess.CompletedProcess`, with text of both streams.
    """
    variables = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", **(environment or {})}
    return forks.call(textwrap.dedent(program), [*map(str, arguments)], cwd or os.getcwd(), variables, stdin)


def run_python(program, *arguments, fails=False, **options):
    """`start_python`, for a program that succeeds, or with `fails` fails.

    Returns:
        What it prints: on standard error where it fails, else on standard output.
    """
    run = start_python(program, *arguments, **options)
    assert (run.returncode != 0) == fails, run.stderr[-3000:]
    return run.stderr if fails else run.stdout


def run_blocks(blocks, **options):
    """Run programs one after the other in one process; returns what each prints. Options are those of `run_python`."""
    *printed, nothing = run_python(BLOCKS, stdin=json.dumps(blocks), **options).split("\0")
    assert len(printed) == len(blocks) and nothing == ""
    return printed
