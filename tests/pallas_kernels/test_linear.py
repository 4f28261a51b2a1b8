"""Dense linears: packed weights in the kernels, against unpacked ones in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.quantize import FP8_WEIGHT_BLOCK, QuantizedArray
from pallas_kernels.linear import linear
from tests.tolerances import BFLOAT16, FLOAT32, assert_close

SHAPES = [
    (1, 256, 128, 1),
    (8, 384, 512, 1),
    (5, 128, 256, 2),
    (33, 256, 384, 3),
    (300, 128, 256, 1),
]


def _make(rows: int, num_inputs: int, num_outputs: int, groups: int, dtype):
    keys = jax.random.split(jax.random.key(rows), 3)
    x = jax.random.normal(keys[0], (rows, groups * num_inputs), dtype)
    values = jax.random.normal(keys[1], (num_inputs, num_outputs)).astype(jnp.float8_e4m3fn)
    blocks = (num_inputs // 128, num_outputs // 128)
    scale = jnp.exp2(jax.random.randint(keys[2], blocks, -9, 3)).astype(jnp.float8_e8m0fnu)
    return x, QuantizedArray(values, scale, FP8_WEIGHT_BLOCK)


def _expected(x, w, groups: int) -> np.ndarray:
    x, w = np.asarray(x, np.float64), np.asarray(w.dequantize(), np.float64)
    parts = zip(np.split(x, groups, axis=-1), np.split(w, groups, axis=-1))
    return np.concatenate([a @ b for a, b in parts], axis=-1)


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_product_of_unpacked_weights(shape, dtype, implementation):
    """Products of bfloat16 are exact in float32, so both dtypes are held to float32's bound."""
    x, w = _make(*shape, dtype)
    groups = shape[-1]

    out = linear(x, w, groups=groups, implementation=implementation)

    assert out.dtype == jnp.float32
    assert_close(out, _expected(x, w, groups), FLOAT32)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradient_of_the_rows(groups):
    x, w = _make(9, 128, 256, groups, jnp.float32)
    d_out = jax.random.normal(jax.random.key(1), (9, 256))

    weights = np.asarray(w.dequantize(), np.float64)
    parts = zip(np.split(np.asarray(d_out), groups, -1), np.split(weights, groups, -1))
    expected = np.concatenate([d @ part.T for d, part in parts], axis=-1)
    for implementation in ("interpret", "xla"):
        run = functools.partial(linear, w=w, groups=groups, implementation=implementation)
        (found,) = jax.vjp(run, x)[1](d_out)
        assert_close(found, expected, FLOAT32)


def test_float_weights_and_leading_axes():
    x, w = _make(12, 128, 256, 2, jnp.bfloat16)
    x, floats = x.reshape(3, 4, -1), w.dequantize(jnp.bfloat16)

    out = linear(x, floats, groups=2)

    np.testing.assert_array_equal(out, linear(x, w, groups=2, implementation="xla"))
    assert_close(out, linear(x, w, groups=2, implementation="interpret"), BFLOAT16)
    d_w = jax.grad(lambda floats: linear(x, floats, groups=2).sum())(floats)
    assert d_w.shape == floats.shape and jnp.any(d_w != 0)


@pytest.mark.parametrize(
    ("shape", "groups", "message"),
    [
        ((3, 100), 1, r"x \(3, 100\) must be .*\[in, groups \* out\], for groups=1"),
        ((3, 3 * 128), 3, "groups=3"),
        ((3, 4 * 128), 4, r"4 groups of w \(128, 256\) cut its blocks of \(128, 128\)"),
    ],
)
def test_bad_input(shape, groups, message):
    _, w = _make(1, 128, 256, 1, jnp.float32)
    with pytest.raises(ValueError, match=message):
        linear(jnp.zeros(shape), w, groups=groups, implementation="interpret")
