"""Compiling for a GPU needs the CUDA wheels, which the tests do not install."""

import importlib.util
import subprocess
import sys

import pytest

from tests.conftest import ROOT

HAS_CUDA = importlib.util.find_spec("jax_cuda12_plugin") is not None


def gpu_compile(only: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu_compile", "--only", only]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


@pytest.mark.skipif(HAS_CUDA, reason="the CUDA compiler is installed")
def test_without_the_cuda_compiler_it_says_what_to_install():
    done = gpu_compile("round")
    assert done.returncode != 0
    assert "pip install 'v4jax[cuda12]'" in done.stderr


@pytest.mark.skipif(not HAS_CUDA, reason="needs pip install 'v4jax[cuda12]'")
def test_temporaries_grow_no_faster_than_prompts_and_contexts():
    done = gpu_compile("")
    assert done.returncode == 0, done.stderr
