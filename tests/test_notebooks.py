"""Notebooks run from top to bottom, and agree with the scripts beside them."""

import os
import pathlib

import jupytext
import nbclient
import nbformat
import pytest

from tests.conftest import CACHE_ENVIRONMENT, ROOT

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
    monkeypatch.setenv("XLA_FLAGS", "")
    for name, value in CACHE_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)

    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.get("name") == "stderr" and output.text]
