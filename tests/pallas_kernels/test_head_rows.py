"""Finished rows: the kernel against XLA bit for bit, and XLA against NumPy in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.head_rows import Steps, Turn, finish_rows
from tests.tolerances import FLOAT32, GRADIENT_FLOAT32, assert_close

FREQUENCIES = (1e4 ** (-np.arange(32) / 32)).astype(np.float32)
EPS = 1e-6
# name: shape, weights of a norm, rotation, steps
CASES = {
    "queries": ((2, 1, 5, 512), False, "there", Steps("steps", EPS)),
    "one query": ((1, 1, 64, 256), False, "there", Steps("steps", EPS)),
    "plain queries": ((1, 3, 2, 256), False, "there", Steps("rms", EPS)),
    "one row": ((1, 1, 512), True, "there", Steps("rms", EPS, "rows")),
    "rows": ((3, 1, 512), True, "there", Steps("rms", EPS, "rows")),
    "many rows": ((2, 45, 512), True, "there", Steps("rms", EPS, "rows")),  # no whole blocks
    "keys": ((8, 1, 128), True, "there", Steps("rms", EPS, "keys")),
    "key queries": ((1, 3, 7, 128), False, "there", Steps(rounding="keys")),
    "output": ((1, 3, 64, 512), False, "back", Steps()),
    "norm": ((2, 9, 1024), True, None, Steps("rms", EPS)),
}


def _case(name: str, dtype):
    shape, is_weighted, direction, steps = CASES[name]
    rng = np.random.default_rng(len(name))
    size = np.exp2(rng.integers(-9, 9, shape[:2] + (1,) * len(shape[2:])))
    x = (rng.standard_normal(shape) * size).astype(dtype)
    weight = rng.uniform(0.5, 2, shape[-1]).astype(ml_dtypes.bfloat16) if is_weighted else None
    positions = rng.integers(0, 1 << 17, shape[:2])
    frequencies = tuple(FREQUENCIES.tolist())
    turn = direction and Turn(jnp.asarray(positions), frequencies, inverse=direction == "back")
    return x, weight, positions, turn, steps


@functools.cache
def _run(implementation: str, steps: Steps):
    return jax.jit(functools.partial(finish_rows, steps=steps, implementation=implementation))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_the_bits_of_the_xla_form(name, dtype):
    x, weight, _, turn, steps = _case(name, dtype)

    kernel, xla = (_run(i, steps)(x, weight, turn) for i in ("interpret", "xla"))

    assert kernel.dtype == x.dtype and kernel.shape == x.shape
    kernel, xla = (np.asarray(y, np.float32) for y in (kernel, xla))
    if steps.norm and not steps.rounding and dtype == np.float32:  # sums in another order
        np.testing.assert_allclose(kernel, xla, rtol=2**-20)
    else:
        np.testing.assert_array_equal(kernel, xla)


@pytest.mark.parametrize("name", ["plain queries", "output", "norm"])
def test_rows_equal_those_of_numpy(name):
    x, weight, positions, turn, steps = _case(name, np.float32)
    expected = x.astype(np.float64)
    if steps.norm:
        expected /= np.sqrt(np.mean(expected**2, axis=-1, keepdims=True) + EPS)
    if weight is not None:
        expected *= weight.astype(np.float64)
    if turn:  # as complex numbers
        sign = -1 if name == "output" else 1
        # Angles in float32, as the model has them: at position 1e5 they are off by 1e-2 otherwise.
        angle = (positions[..., None].astype(np.float32) * FREQUENCIES).astype(np.float64)
        pairs = expected[..., -64::2] + 1j * expected[..., -63::2]
        pairs *= np.exp(sign * 1j * angle)[:, :, None]
        expected[..., -64::2], expected[..., -63::2] = pairs.real, pairs.imag

    assert_close(_run("xla", steps)(x, weight, turn), expected, FLOAT32)


def test_rows_that_are_not_finite_stay_alone():
    x, weight, _, turn, steps = _case("rows", ml_dtypes.bfloat16)
    sound = np.asarray(_run("interpret", steps)(x, weight, turn), np.float32)
    x[1] = np.inf

    found = np.asarray(_run("interpret", steps)(x, weight, turn), np.float32)

    assert not np.isfinite(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], sound[[0, 2]])


def test_gradients_are_those_of_the_xla_form():
    x, weight, _, turn, steps = _case("many rows", np.float32)
    x, weight = x[:, :3] / 512, weight.astype(np.float32)
    turn = dataclasses.replace(turn, positions=turn.positions[:, :3])

    def loss(x, weight, implementation):
        out = finish_rows(x, weight, turn, steps=steps, implementation=implementation)
        return jnp.sum(jnp.sin(jnp.arange(out.size).reshape(out.shape)) * out)

    kernel, xla = (
        jax.jit(jax.grad(functools.partial(loss, implementation=i), argnums=(0, 1)))(x, weight)
        for i in ("interpret", "xla")
    )

    for actual, expected in zip(kernel, xla, strict=True):
        assert np.abs(expected).max() > 0
        assert_close(actual, expected, GRADIENT_FLOAT32)


@pytest.mark.parametrize(
    ("shape", "weight", "turn", "steps", "message"),
    [
        ((1, 128), None, None, Steps(), "must be .B, T, H."),
        ((1, 1, 128), (64,), None, Steps(), r"weight \(64,\)"),
        ((2, 1, 128), None, 32, Steps(), "positions .1, 1. must be .B, T. of x .2, 1, 128."),
        ((1, 1, 96), None, None, Steps("rms"), "whole 128 channels"),
        ((1, 1, 256), None, None, Steps(rounding="keys"), "keys of 256"),
        ((1, 1, 512), None, 16, Steps(rounding="rows"), "in whole 64"),
    ],
)
def test_rows_that_cannot_be_finished_are_refused(shape, weight, turn, steps, message):
    weight = None if weight is None else jnp.ones(weight)
    turn = None if turn is None else Turn(jnp.ones((1, 1), jnp.int32), (1.0,) * turn)
    with pytest.raises(ValueError, match=message):
        finish_rows(jnp.ones(shape), weight, turn, steps=steps, implementation="interpret")


def test_unknown_steps_are_refused():
    with pytest.raises(ValueError, match="norm='mean': expected"):
        Steps("mean")
    with pytest.raises(ValueError, match="rounding='fp8': expected"):
        Steps(rounding="fp8")
