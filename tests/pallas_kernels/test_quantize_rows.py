"""Rounding, storing and packing rows: bit for bit against `round_fp8` and `round_fp4`."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.packed_rows import PackedKeys, PackedRows
from pallas_kernels.quantize import round_fp4, round_fp8
from pallas_kernels.quantize_rows import dequantize_rows, quantize_rows, round_rows

ROUND = {"fp8": jax.jit(round_fp8, static_argnums=1), "fp4": jax.jit(round_fp4, static_argnums=1)}
pack_rows = jax.jit(PackedRows.pack, static_argnums=1)
pack_keys = jax.jit(PackedKeys.pack)
unpack = jax.jit(lambda packed, dtype=jnp.bfloat16: packed.unpack(dtype), static_argnums=1)
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


# Packed rows and keys


@pytest.mark.parametrize(
    "width, rope_dim, num_bytes", [(512, 64, 584), (96, 32, 136), (64, 0, 72), (24, 24, 48)]
)
def test_rounded_rows_survive_packing(width, rope_dim, num_bytes):
    x = jnp.asarray(wide_range(10, width).reshape(2, 5, width), jnp.bfloat16)
    split = width - rope_dim
    rows = jnp.concatenate([ROUND["fp8"](x[..., :split], 64), x[..., split:]], axis=-1)
    packed = pack_rows(rows, rope_dim)
    assert packed.data.shape == (2, 5, num_bytes) and packed.data.dtype == jnp.uint8
    assert packed.shape == rows.shape and packed.ndim == 3
    assert_same_bits(unpack(packed), rows)
    assert_same_bits(unpack(packed, jnp.float32), rows.astype(jnp.float32))


def test_bytes_of_a_packed_row():
    row = np.zeros(512, ml_dtypes.bfloat16)
    row[0], row[64], row[447], row[448], row[511] = 448.0, -3.5, 2.0, 1.0, -1.0
    data = np.asarray(pack_rows(jnp.asarray(row)[None], 64).data[0])
    assert data[0] == 0x3F and data[64] == 0x80  # 1.0 is 0x3F80
    assert data[63] == 0xBF and data[127] == 0x80
    assert data[128] == 0x7E and data[576] == 127  # 448 with a scale of one
    assert data[192] == 0xFE and data[577] == 120  # 3.5 is 448 * 2**-7
    assert data[575] == 0x78 and data[582] == 120  # 2.0 is 256 * 2**-7
    assert data[583] == 0


def test_rounded_keys_survive_packing():
    keys = ROUND["fp4"](jnp.asarray(wide_range(10, 128), jnp.bfloat16), 32)
    packed = pack_keys(keys)
    assert packed.data.shape == (10, 68) and packed.data.dtype == jnp.uint8
    assert packed.shape == keys.shape and packed.ndim == 2
    np.testing.assert_array_equal(unpack(packed), keys)


def test_packed_rows_and_keys_are_pytrees():
    x = jnp.ones((3, 4, 96), jnp.bfloat16)
    for packed in (pack_rows(x, 32), pack_keys(x)):
        part = jax.tree.map(lambda a: a[1], packed)
        assert part.shape == (4, 96)
        np.testing.assert_array_equal(unpack(part), x[1])


def test_empty_rows_and_keys_are_zeros_packed():
    zeros = jnp.zeros((2, 3, 96), jnp.bfloat16)
    rows, keys = PackedRows.zeros(zeros.shape, 32), PackedKeys.zeros(zeros.shape)
    for empty, packed in ((rows, pack_rows(zeros, 32)), (keys, pack_keys(zeros))):
        assert jax.tree.structure(empty) == jax.tree.structure(packed)
        assert empty.data.shape == packed.data.shape
        np.testing.assert_array_equal(unpack(empty), zeros)


@pytest.mark.parametrize("rope_dim", [-1, 97])
def test_packing_refuses_a_rope_wider_than_the_row(rope_dim):
    with pytest.raises(ValueError, match=r"expected 0\.\.96"):
        PackedRows.pack(jnp.zeros((2, 96)), rope_dim)
