"""The tests of the Triton kernels under Triton's interpreter, each file in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

# All but this file and those that need the compiler or a device.
FILES = sorted(
    path
    for path in Path(__file__).parent.glob("test_triton_*.py")
    if path.stem.removeprefix("test_triton_") not in ("interpreter", "compile", "gpu")
)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is such a process")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_under_the_interpreter(path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]
