"""Programs of one process are there for the next."""

import os
import subprocess
import sys

from tests.conftest import ROOT, environment

PROGRAM = """
import jax, sys
from v4jax.nn.compilation import keep_programs
jax.jit(lambda x: x + 1)(1.0)  # before: jax has looked for a cache and found none
folder = keep_programs()
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event == "/jax/compilation_cache/cache_hits"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 3 + 2)(1.0)
print(folder, sum(hits), jax.config.jax_compilation_cache_dir)
"""


def run(**variables: str) -> list[str]:
    """What the program prints: the folder, the programs it found there, and jax's own setting."""
    kept = {k: v for k, v in environment().items() if k != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, env={**kept, **variables}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    folder = str(tmp_path / "programs")

    assert run(V4JAX_CACHE=folder) == [folder, "0", folder]
    assert os.listdir(folder)
    assert run(V4JAX_CACHE=folder) == [folder, "1", folder]


def test_the_place_is_under_home_and_can_be_turned_off(tmp_path):
    place = str(tmp_path / ".cache" / "v4jax")

    assert run(HOME=str(tmp_path))[0] == place
    assert run(V4JAX_CACHE="off") == ["None", "0", "None"]


def test_a_cache_of_jax_stays(tmp_path):
    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path)) == ["None", "0", str(tmp_path)]
