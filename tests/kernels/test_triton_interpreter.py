"""The tests of the Triton kernels under Triton's interpreter, a case for each file."""

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is such a process")

# All but this file and those that need the compiler or a device.
FILES = sorted(
    path
    for path in Path(__file__).parent.glob("test_triton_*.py")
    if path.stem.removeprefix("test_triton_") not in ("interpreter", "compile", "gpu")
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_under_the_interpreter(interpreted, path):
    assert " passed" in interpreted(path)
