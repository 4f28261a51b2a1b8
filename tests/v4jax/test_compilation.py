"""Programs of one process are there for the next, are few, and small."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import v4jax
from benchmarks import operations
from tests.conftest import ROOT, environment
from v4jax import Engine, Sampling, Transformer
from v4jax.nn import compilation

# Instructions of nano's optimised programs per layer, those in fusions included.
MOST_PREFILL, MOST_DECODE = 5400, 5500

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


@pytest.mark.usefixtures("optimized")
def test_the_library_for_cpus_takes_products_alone():
    """What surrounds them it takes too by default, and is slow at that (docs/measurements/cpu.md)."""

    def scores(q, keys, weights):
        return jnp.sum(jax.nn.relu(q @ keys) * weights[..., None], axis=1)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 4, 64), (64, 256), (8, 4))]
    text = compilation.jit(scores).lower(*shapes).compile().as_text()

    (called,) = re.findall(r"kind=kCustom, calls=%([\w.-]+).*ynn", text)
    (body,) = re.findall(rf"%{re.escape(called)} .*?\n}}", text, re.DOTALL)
    assert {opcode for opcode, _ in operations.operations(body)} - {"parameter", "bitcast"} == {
        "dot"
    }


def test_an_option_that_xla_no_longer_has_is_left_out(monkeypatch):
    monkeypatch.setattr(compilation, "_PRODUCTS", {"xla_cpu_no_such_option": "x"})

    assert compilation._known_products.__wrapped__() == {}


@pytest.fixture(scope="module")
def model() -> Transformer:
    """nano as a notebook has it."""
    return v4jax.load("nano", v4jax.released())


def test_a_session_compiles_a_program_of_each_kind(model):
    # Programs are shared with other models of the same parts, so this one is of parts of its own.
    model = model.variant(dataclasses.replace(model.cfg, name="nano of this test"))
    engine = Engine(model, v4jax.Tokenizer(v4jax.nano_path()))
    words = "She was happy to see him, and he was not sorry to be seen. "
    for prompt in ("Emma was", words, 6 * words):
        for temperature in (0.0, 0.7):
            engine.generate(prompt, Sampling(temperature=temperature, max_new_tokens=2))
    engine.chat("Who is Emma?", "think-high", Sampling(top_k=5, max_new_tokens=2))
    engine.generate(["Emma was", words], Sampling(top_p=0.9, min_p=0.1, max_new_tokens=2))

    assert (engine._prefill._cache_size(), engine._decode._cache_size()) == (1, 1)


@pytest.mark.parametrize(("step", "most"), [("prefill", MOST_PREFILL), ("decode", MOST_DECODE)])
def test_a_layer_is_so_many_operations(model, step, most):
    """What a program takes to compile grows with them (docs/measurements/compile_time.md)."""
    make_step, arguments = operations.programs(model)[step]
    text = make_step().lower(*arguments).compile().as_text()

    assert sum(1 for _ in operations.operations(text)) / len(model.cfg.layers) <= most
