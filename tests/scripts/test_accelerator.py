"""The check for machines with an accelerator, rehearsed on a CPU."""

import subprocess
import sys

from tests.conftest import ROOT, environment


def test_the_check_writes_its_page_and_survives_a_section_that_fails(tmp_path):
    page = tmp_path / "page.md"
    command = [sys.executable, "-m", "benchmarks.accelerator", "--rehearse", "--output", page]
    command += ["--only", "ceilings", "--only", "operations", "--only", "nano", "--seconds", "45"]

    subprocess.run([*map(str, command)], check=True, cwd=ROOT, env=environment(), timeout=300)

    text = page.read_text()
    assert "TFLOP/s" in text and "| copy |" in text
    assert "grouped_swiglu: Flash FP4, 1 rows | traced" in text
    assert "plain float32 | largest difference 0," in text or "more than" in text
