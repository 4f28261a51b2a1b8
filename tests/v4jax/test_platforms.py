"""With libtpu installed, a machine without a TPU is not searched for one."""

import os
import subprocess
import sys

from tests.conftest import ROOT

PROGRAM = "import {first}; import {second}; import jax; print(jax.devices()[0].platform)"


def run(first: str, second: str, **variables: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "-c", PROGRAM.format(first=first, second=second)]
    environment = {**kept, **variables, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT
    )


def test_no_page_of_warnings_is_printed():
    for order in (("v4jax", "jax"), ("jax", "v4jax")):
        done = run(*order)
        assert done.stdout == "cpu\n"
        assert "libtpu" not in done.stderr and "TPU" not in done.stderr


def test_what_is_asked_for_stays():
    assert run("v4jax", "jax", JAX_PLATFORMS="cpu").stdout == "cpu\n"
