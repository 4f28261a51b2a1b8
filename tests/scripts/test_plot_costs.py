"""The plot of FLOP and cache against the length of the context."""

import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")

from scripts.plot_costs import CONTEXTS, curves
from tests.conftest import ROOT


def test_curves_end_at_a_million_tokens_with_the_reports_shares():
    found = curves()
    theirs = found["V3.2"]

    assert CONTEXTS[-1] == 2**20
    for name, flops, cache in (("V4-Pro", 0.27, 0.10), ("V4-Flash", 0.10, 0.07)):
        ours = found[name]
        assert ours[0][-1] / theirs[0][-1] == pytest.approx(flops, abs=0.005)
        assert ours[1][-1] / theirs[1][-1] == pytest.approx(cache, abs=0.01)
        assert list(ours[1]) == sorted(ours[1])


def test_the_figure_is_written(tmp_path):
    path = tmp_path / "costs.svg"
    command = [sys.executable, "-m", "scripts.plot_costs", "--output", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)

    text = path.read_text(encoding="utf-8")
    assert text.startswith("<?xml")
    assert "V4-Flash" in text
