"""Notebooks run from top to bottom, and agree with the scripts beside them."""

import os
import pathlib

import jupytext
import nbclient
import nbformat
import pytest

from tests.conftest import ROOT, environment

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_the_script(script: pathlib.Path):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    expected = jupytext.read(script)

    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        (c.cell_type, c.source) for c in expected.cells
    ]
    assert len(notebook.cells) <= 20


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(script: pathlib.Path, monkeypatch):
    path = str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", "")
    for name, value in {**environment(), "PYTHONPATH": path}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)

    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.get("name") == "stderr" and output.text]
