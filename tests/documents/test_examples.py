"""The notebook of examples/ prints what it shows, offline, with the shipped checkpoint."""

import ast
import json

import pytest
from conftest import ROOT
from processes import run_python

FOLDER = ROOT / "examples"
CELLS = json.loads((FOLDER / "extrapolation.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SHOWN = [output for cell in CODE for output in cell["outputs"]]


def test_the_notebook_was_saved_with_its_picture():
    assert any("image/png" in output.get("data", ()) for output in SHOWN)


def test_the_notebook_prints_what_it_shows():
    pytest.importorskip("matplotlib")
    program = "\n".join("".join(cell["source"]) for cell in CODE)
    printed = run_python(program, cwd=FOLDER, environment={"MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": ""})
    *lines, losses = printed.splitlines()
    *expected, measured = "".join("".join(output.get("text", ())) for output in SHOWN).splitlines()
    assert lines == expected
    # In another processor's float32 the third digit may differ.
    assert ast.literal_eval(losses) == pytest.approx(ast.literal_eval(measured), abs=0.002)
