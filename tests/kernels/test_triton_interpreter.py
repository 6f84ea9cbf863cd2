"""The tests of the Triton kernels under Triton's interpreter, a case for each file."""

import multiprocessing
import os
from pathlib import Path

import interpreter
import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is such a process")

# All but this file and those that need the compiler or a device.
FILES = sorted(
    path
    for path in Path(__file__).parent.glob("test_triton_*.py")
    if path.stem.removeprefix("test_triton_") not in ("interpreter", "compile", "gpu")
)


@pytest.fixture(scope="module")
def interpreted():
    """A connection to a process that runs kernels under the interpreter; importing torch and ours once is enough."""
    context = multiprocessing.get_context("spawn")
    connection, end = context.Pipe()
    process = context.Process(target=interpreter.serve, args=(end,), daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        process.start()
    end.close()
    yield connection
    process.kill()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_under_the_interpreter(interpreted, path):
    interpreted.send(str(path))
    assert interpreted.poll(600), "the file takes longer than 10 minutes"
    status, output = interpreted.recv()
    assert status == 0 and " passed" in output, output[-8000:]
