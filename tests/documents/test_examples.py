"""The notebook of examples/ runs against the shipped checkpoint, offline, and the file holds its pictures."""

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "examples/extrapolation.ipynb"


def outputs(notebook, kind):
    return [
        output["data"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if kind in output.get("data", ())
    ]


def test_the_notebook_was_saved_with_its_picture():
    nbformat = pytest.importorskip("nbformat")
    assert outputs(nbformat.read(NOTEBOOK, as_version=4), "image/png")


def test_the_notebook_runs():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "same numbers: True" in text
    assert outputs(notebook, "image/png")
