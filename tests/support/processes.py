"""Runs Python in a process of its own."""

import os
import subprocess
import sys
import textwrap

from conftest import ROOT

PATHS = os.pathsep.join(str(ROOT / folder) for folder in ("scripts", "tests/support"))


def run_python(program, *arguments, cwd=None, fails=False, environment=None):
    """Run a program that can import what scripts and tests import.

    Args:
        program: its text, which may be indented.
        *arguments: of its command line.
        cwd: its working directory.
        fails: whether it has to.
        environment: variables beside those of this process.

    Returns:
        What it prints: on standard error where it fails, else on standard output.
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (run.returncode != 0) == fails, run.stderr[-3000:]
    return run.stderr if fails else run.stdout
