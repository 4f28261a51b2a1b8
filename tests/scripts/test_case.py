"""Operations of microseconds are timed in a loop that computes them in every turn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import case
from pallas_kernels.formats.quantize import quantize_weight
from v4jax.planning.hlo import computations


def _multiplied(x, packed, ids):
    return jnp.sin(x) @ packed.dequantize(jnp.float32) + ids.sum()


def _arguments():
    packed = quantize_weight(jax.random.normal(jax.random.key(0), (64, 32)), "fp4")
    return jax.random.normal(jax.random.key(1), (4, 64)), packed, jnp.arange(3)


def test_a_loop_gives_what_a_run_gives():
    expected = jax.jit(_multiplied)(*_arguments())

    found = jax.jit(functools.partial(case.in_a_loop, _multiplied))(5, *_arguments())

    np.testing.assert_array_equal(found, expected)


def test_every_turn_computes_all_of_it(optimized):
    """What depends on one argument alone too, such as weights that are unpacked."""
    del optimized
    loop = jax.jit(functools.partial(case.in_a_loop, _multiplied))
    bodies, entry = computations(loop.lower(5, *_arguments()).compile().as_text())

    assert any("sine(" in line for name, lines in bodies.items() for line in lines)
    (while_line,) = [line for line in bodies[entry] if " while(" in line]
    assert not [line for line in bodies[entry] if "sine" in line or " fusion(" in line]
    assert "body=" in while_line


def test_long_and_short_runs_are_timed():
    waited = case.Case("op", "shape", _run, _arguments, 1.0, 1.0, lambda chip: {})

    seconds, compiling = case.measure(waited, "any", repeats=3)

    assert 0 < seconds < case.LEAST_SECONDS and compiling > 0


def _run(*arguments, implementation):
    assert implementation == "any"
    return _multiplied(*arguments)
