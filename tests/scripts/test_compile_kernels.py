"""Kernels at real sizes through the real TPU compiler; needs libtpu, not a TPU.

The schedules of the hottest kernels must not get worse than they were: MEASURED is what
`python -m benchmarks.compile_kernels` printed, schedule over the larger of the algorithm's matrix-unit
and memory floors.
"""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from benchmarks.hlo import largest_of_xla
from pallas_kernels.chips import CHIPS
from tests.conftest import ROOT

pytest.importorskip("libtpu")

MEASURED_WITH = "0.0.42"
MEASURED = {
    "attention: Flash CSA 8k": {"v5e": 1.20, "v5p": 1.21, "v6e": 1.67, "v7x": 1.46},
    "decode_attention: Flash HCA 1M x8": {"v5e": 0.61, "v5p": 0.88, "v6e": 0.64, "v7x": 1.04},
    "decode_attention: Flash CSA 1M x64 packed": {
        "v5e": 5.18,
        "v5p": 7.57,
        "v6e": 8.26,
        "v7x": 14.67,
    },
    "grouped_matmul: Flash FP4, decode 8": {"v5e": 0.68, "v5p": 1.00, "v6e": 0.89, "v7x": 1.67},
    "grouped_swiglu: Flash FP4, decode 8": {"v5e": 0.66, "v5p": 1.01, "v6e": 0.79, "v7x": 1.43},
    "grouped_swiglu: Flash FP4, 256 rows": {"v5e": 1.23, "v5p": 1.24, "v6e": 1.47, "v7x": 1.26},
    "hc_post_pre: Flash prefill 8k": {"v5e": 0.78, "v5p": 1.13, "v6e": 0.86, "v7x": 1.48},
    "indexer: Flash prefill 8k": {"v5e": 1.38, "v5p": 1.38, "v6e": 3.54, "v7x": 3.31},
    "indexer: Flash decode 1M x8 packed": {"v5e": 2.64, "v5p": 2.63, "v6e": 3.18, "v7x": 4.80},
    "linear: Flash output groups, 8 rows": {"v5e": 0.21, "v5p": 0.31, "v6e": 0.27, "v7x": 0.37},
    "linear: Flash output, 4096 rows, gradient": {
        "v5e": 0.96,
        "v5p": 0.96,
        "v6e": 1.11,
        "v7x": 0.71,
    },
    "linear: Flash output, 8 rows": {"v5e": 0.22, "v5p": 0.31, "v6e": 0.29, "v7x": 0.36},
}
SLACK = 1.1  # another version of libtpu schedules differently
OTHER_VERSION_SLACK = 1.5
MAX_TEMP_BYTES = 16 << 20  # smaller than any packed weight, and than scores or indices [T, T / 4]


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("reports") / "reports.json"
    only = [part for name in MEASURED for part in ("--only", name)]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_kernels", *only, "--json", str(path)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        check=True,
        capture_output=True,
        text=True,
        timeout=900,
    )
    reports = json.loads(path.read_text(encoding="utf-8"))
    return [r for r in reports if r["case"] in MEASURED]


def test_every_case_compiles_for_every_chip(reports):
    compiled = {(r["case"], r["chip"]) for r in reports}

    assert compiled == {(case, chip) for case, chips in MEASURED.items() for chip in chips}
    assert all(r["bundles"] for r in reports)


def test_no_large_buffer_beside_arguments_and_results(reports):
    assert {r["case"]: r["temp_bytes"] for r in reports if r["temp_bytes"] > MAX_TEMP_BYTES} == {}


def test_xla_copies_no_packed_weights_and_makes_no_scores_around_the_kernels(reports):
    """Read from the compiled HLO, where a copy may reuse memory that is counted anyway."""
    assert {r["case"]: r["xla_bytes"] for r in reports if r["xla_bytes"] > MAX_TEMP_BYTES} == {}


def test_xla_makes_nothing_around_packed_linears(reports):
    """Groups of a weight, of rows and of results are found where they lie.

    v5p and v7x lay out scales anew, 2 KB forward and 8 KB in the gradient of 4,096 rows; the rows
    of these cases have 128 KB and more.
    """
    linears = [r for r in reports if r["case"].startswith("linear")]

    assert {r["case"] for r in linears} == {c for c in MEASURED if c.startswith("linear")}
    assert {(r["case"], r["chip"]): r["xla_bytes"] for r in linears if r["xla_bytes"] > 8192} == {}


def test_memory_is_what_kernels_hold_and_packed_arguments_take(reports):
    for r in reports:
        assert 0 < r["vmem_bytes"] <= CHIPS[r["chip"]].vmem
    weights = 2 * 32 * 4096 * 2048 * (1 / 2 + 1 / 32)  # gate and up of 32 experts, e2m1 and scales
    rows = 256 * 32 * (4096 + 2048) * 2
    for r in reports:
        if r["case"] == "grouped_swiglu: Flash FP4, 256 rows":
            assert weights + rows <= r["hbm_bytes"] <= weights + rows + MAX_TEMP_BYTES


def test_the_largest_array_of_xla_is_found():
    hlo = """
ENTRY %main (x: bf16[64,128]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %copy.1 = u8[32,128]{1,0:T(8,128)(4,1)} copy(%w)
  %copy.2 = f32[32,128]{1,0:T(8,128)S(1)} copy(%w)
  %call = (f32[8,8]{1,0}, bf16[9,9]{1,0}) custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %fusion = bf16[32,16]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop
}"""
    assert largest_of_xla(hlo) == 32 * 128


def test_schedules_are_no_worse_than_they_were(reports):
    same = importlib.metadata.version("libtpu").startswith(MEASURED_WITH)
    slack = SLACK if same else OTHER_VERSION_SLACK
    worse = {
        (r["case"], r["chip"]): r["ratio"]
        for r in reports
        if r["ratio"] > slack * MEASURED[r["case"]][r["chip"]]
    }
    assert worse == {}


def test_a_case_that_does_not_exist_is_refused_with_the_names():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_kernels", "--only", "no such case"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )

    assert done.returncode != 0
    assert "indexer: Flash prefill 8k" in done.stderr
