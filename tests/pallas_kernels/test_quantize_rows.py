"""Rounding and storing rows: bit for bit against `round_fp8` and `round_fp4`."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.formats.quantize import round_fp4, round_fp8
from pallas_kernels.formats.quantize_rows import dequantize_rows, quantize_rows, round_rows

ROUND = {"fp8": jax.jit(round_fp8, static_argnums=1), "fp4": jax.jit(round_fp4, static_argnums=1)}
FORMATS = pytest.mark.parametrize("fmt, block", [("fp8", 128), ("fp8", 64), ("fp4", 32)])


def every_bfloat16() -> np.ndarray:
    """All finite patterns: in order, so that blocks are alike, and shuffled."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    finite = patterns[patterns & 0x7F80 != 0x7F80].view(ml_dtypes.bfloat16)
    shuffled = np.random.default_rng(0).permutation(finite)
    return np.concatenate([finite, shuffled]).reshape(-1, 256)


def wide_range(rows: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, width)) * np.exp2(rng.integers(-30, 30, (rows, width)))
    return x.astype(np.float32)


INPUTS = {
    "every bfloat16": every_bfloat16,
    "float32": lambda: wide_range(70, 256),
    "one row": lambda: wide_range(1, 128),
    "zeros": lambda: np.array([[0.0, -0.0] * 64] * 2, np.float32),
}


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    bits = np.dtype(f"u{actual.dtype.itemsize}")
    np.testing.assert_array_equal(actual.view(bits), expected.view(bits))


@FORMATS
@pytest.mark.parametrize("name", INPUTS)
def test_rounding_kernel_gives_the_same_bits(name, fmt, block):
    x = INPUTS[name]()
    rounded = jax.jit(lambda x: round_rows(x, fmt, block, implementation="interpret"))(x)
    assert_same_bits(rounded, ROUND[fmt](x, block))


@FORMATS
@pytest.mark.parametrize("name", INPUTS)
def test_stored_rows_hold_the_rounded_values(name, fmt, block):
    x = INPUTS[name]()
    store = jax.jit(lambda x: quantize_rows(x, fmt, block, implementation="xla"))
    values, scale = store(x)
    assert values.dtype == (jnp.float8_e4m3fn if fmt == "fp8" else jnp.uint8)
    assert scale.dtype == jnp.uint8 and scale.shape == (len(x), x.shape[1] // block)
    read = jax.jit(lambda v, s: dequantize_rows(v, s, fmt, block, x.dtype))(values, scale)
    np.testing.assert_array_equal(read, ROUND[fmt](x, block))  # FP4 has no -0 here


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("name", INPUTS)
def test_storing_kernel_gives_the_same_bytes(name, block):
    x = INPUTS[name]()
    kernel, xla = (
        jax.jit(functools.partial(quantize_rows, fmt="fp8", block=block, implementation=i))(x)
        for i in ("interpret", "xla")
    )
    for actual, expected in zip(kernel, xla, strict=True):
        assert_same_bits(actual, expected)


def test_widths_of_no_whole_vector_register_and_leading_axes():
    x = wide_range(6, 448).reshape(2, 3, 448)
    rounded = jax.jit(lambda x: round_rows(x, "fp8", 64, implementation="interpret"))(x)
    assert_same_bits(rounded, ROUND["fp8"](x, 64))
    store = jax.jit(lambda x: quantize_rows(x, "fp8", 64, implementation="interpret"))
    values, scale = store(x)
    assert values.shape == x.shape and scale.shape == (2, 3, 7)
    read = jax.jit(lambda v, s: dequantize_rows(v, s, "fp8", 64))(values, scale)
    np.testing.assert_array_equal(read, rounded)


def test_more_rows_than_a_block_and_a_last_one_that_is_not_full():
    x = wide_range(2 * 4096 + 5, 64)
    rounded = jax.jit(lambda x: round_rows(x, "fp8", 64, implementation="interpret"))(x)
    assert_same_bits(rounded, ROUND["fp8"](x, 64))


def test_gradient_is_exactly_the_identity():
    x, d = wide_range(3, 128), wide_range(3, 128)
    _, vjp = jax.vjp(lambda x: round_rows(x, "fp4", 32, implementation="interpret"), x)
    assert_same_bits(vjp(d)[0], d)


@pytest.mark.parametrize("fmt, block", [("fp8", 128), ("fp4", 32)])
def test_no_rows_at_all(fmt, block):
    x = np.zeros((2, 0, 200), np.float32)
    assert round_rows(x, fmt, block).shape == x.shape
    values, scale = quantize_rows(x, fmt, block)
    assert scale.shape == (2, 0, -(-200 // block))
    assert dequantize_rows(values, scale, fmt, block).shape == x.shape


def test_what_cannot_run_is_refused_by_name():
    x = np.zeros((2, 96), np.float32)
    with pytest.raises(ValueError, match="fmt='int8': expected"):
        round_rows(x, "int8", 32)
    with pytest.raises(ValueError, match="block=0: expected a positive"):
        quantize_rows(x, "fp8", 0)
    with pytest.raises(ValueError, match="whole blocks of 32, 64 or 128"):
        round_rows(x, "fp8", 64, implementation="interpret")
    with pytest.raises(ValueError, match="stores fp8 only"):
        quantize_rows(x, "fp4", 32, implementation="interpret")
    with pytest.raises(ValueError, match="3 channels: fp4 needs an even number"):
        quantize_rows(x[:, :3], "fp4", 32)
    assert_same_bits(round_rows(x, "fp8", 64), x)  # falls back
