"""Rounding, packing and scales, bit for bit against ml_dtypes and plain NumPy."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.formats.quantize import (
    QuantizedArray,
    cast,
    cast_exactly,
    decode_e2m1,
    encode_e2m1,
    hadamard,
    pack_planes,
    quantize_weight,
    round_e2m1,
    round_e4m3,
    round_fp4,
    round_fp8,
    unpack_fp4,
    unpack_planes,
)
from tests.reference.fp4 import two_codes
from tests.tolerances import FLOAT32, assert_close

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e4m3_value(code: int) -> float:
    """Value of one e4m3fn code, from the definition of the format."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


E4M3 = np.array([e4m3_value(code) for code in range(256)])
# name -> (values of the non-negative codes in order, largest, floor of amax)
GRIDS = {
    "fp8": (E4M3[:127], 448.0, np.float32(1e-4)),
    "fp4": (E2M1[:8], 6.0, np.float32(6 * 2.0**-126)),
}
ROUND = {"fp8": jax.jit(round_fp8, static_argnums=1), "fp4": jax.jit(round_fp4, static_argnums=1)}
ROUND_TO_GRID = {"fp8": jax.jit(round_e4m3), "fp4": jax.jit(round_e2m1)}
pack = jax.jit(quantize_weight, static_argnums=1)
dense = jax.jit(QuantizedArray.dequantize, static_argnums=1)
ML_DTYPE = {"fp8": ml_dtypes.float8_e4m3fn, "fp4": ml_dtypes.float4_e2m1fn}


def nearest(fmt: str, x: np.ndarray) -> np.ndarray:
    """Nearest value of the format by search in its table, ties to the even code."""
    table, largest, _ = GRIDS[fmt]
    magnitude = np.minimum(np.abs(x.astype(np.float64)), largest)
    above = np.searchsorted(table, magnitude)
    below = np.maximum(above - 1, 0)
    up, down = table[above] - magnitude, magnitude - table[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.copysign(table[code], x)


def block_scale(fmt: str, block: np.ndarray) -> float:
    """Smallest power of two not below amax / largest, the product being in float32."""
    _, largest, floor = GRIDS[fmt]
    amax = np.maximum(np.abs(block.astype(np.float32)).max(), floor)
    wanted = float(np.float32(amax) * np.float32(1 / largest))
    scale = 2.0**-126
    while scale < wanted:
        scale *= 2
    return scale


def round_blocks(fmt: str, x: np.ndarray, block: int) -> np.ndarray:
    """`x` rounded block by block along its last axis, in its dtype."""
    out = np.zeros(x.shape, x.dtype)
    for row in np.ndindex(*x.shape[:-1]):
        for start in range(0, x.shape[-1], block):
            part = x[row][start : start + block]
            scale = block_scale(fmt, part)
            out[row][start : start + block] = nearest(fmt, part.astype(np.float64) / scale) * scale
    return out


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    np.testing.assert_array_equal(actual.view(np.uint8), expected.view(np.uint8))


def finite_bfloat16() -> np.ndarray:
    """Every finite bfloat16, as float32."""
    x = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    return x[np.isfinite(x)]


# Grids


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_rounding_equals_ml_dtypes_on_every_finite_bfloat16(fmt):
    x = finite_bfloat16()
    assert x.size == 65536 - 2 * 128
    clipped = np.clip(x, -GRIDS[fmt][1], GRIDS[fmt][1])
    expected = clipped.astype(ML_DTYPE[fmt]).astype(np.float32)
    assert_same_bits(ROUND_TO_GRID[fmt](x), expected)
    assert_same_bits(ROUND_TO_GRID[fmt](x.astype(ml_dtypes.bfloat16)), expected)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_ties_go_to_the_even_code_and_their_neighbours_to_the_nearest(fmt, sign):
    table = GRIDS[fmt][0]
    low, high = table[:-1], table[1:]
    tie = ((low + high) / 2).astype(np.float32)
    np.testing.assert_array_equal(tie, (low + high) / 2)  # exact in float32
    even = np.where(np.arange(len(low)) % 2 == 0, low, high)
    grid = ROUND_TO_GRID[fmt]
    np.testing.assert_array_equal(grid(sign * tie), sign * even)
    np.testing.assert_array_equal(grid(sign * np.nextafter(tie, np.float32(0))), sign * low)
    np.testing.assert_array_equal(grid(sign * np.nextafter(tie, np.float32(1e9))), sign * high)


@pytest.mark.parametrize(
    "tie, even",
    [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5.0, 4)],
)
def test_e2m1_tie(tie, even):
    np.testing.assert_array_equal(round_e2m1(jnp.array([tie, -tie])), [even, -even])


def test_e4m3_subnormals_share_one_step():
    step = 2.0**-9
    x = np.array([0.4, 0.5, 0.6, 1.0, 1.5, 2.5, 6.5, 7.4, 7.5, 8.4], np.float32) * step
    expected = np.array([0, 0, 1, 1, 2, 2, 6, 7, 8, 8]) * step
    np.testing.assert_array_equal(round_e4m3(x), expected)


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_values_of_the_format_stay_and_larger_ones_saturate(fmt):
    table, largest, _ = GRIDS[fmt]
    np.testing.assert_array_equal(ROUND_TO_GRID[fmt](table.astype(np.float32)), table)
    beyond = jnp.array([largest * 1.01, 1e30, jnp.inf])
    np.testing.assert_array_equal(ROUND_TO_GRID[fmt](beyond), np.full(3, largest))
    np.testing.assert_array_equal(ROUND_TO_GRID[fmt](-beyond), np.full(3, -largest))


def test_e2m1_codes_decode_to_their_values():
    decoded = decode_e2m1(jnp.arange(16, dtype=jnp.uint8))
    assert_same_bits(decoded, E2M1.astype(np.float32))  # the sign of code 8 too


def test_e2m1_values_encode_to_their_codes_and_minus_zero_to_code_zero():
    codes = encode_e2m1(jnp.asarray(E2M1, jnp.float32))
    np.testing.assert_array_equal(codes, [*range(8), 0, *range(9, 16)])


# Activations


def activations(width: int, dtype) -> np.ndarray:
    """Rows of very different size, with outliers."""
    rng = np.random.default_rng(width)
    x = rng.standard_normal((2, 6, width)) * np.exp2(rng.integers(-30, 30, (2, 6, 1)))
    x *= np.exp(rng.standard_normal(x.shape))
    return x.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    "fmt, block, width",
    [
        ("fp8", 128, 256),
        ("fp8", 64, 448),
        ("fp8", 128, 200),  # a last block that is not full
        ("fp8", 64, 7),
        ("fp4", 32, 128),
        ("fp4", 32, 40),
        ("fp4", 16, 5),
    ],
)
def test_blocks_round_as_in_numpy(fmt, block, width, dtype):
    x = activations(width, dtype)
    rounded = ROUND[fmt](x, block)
    assert_same_bits(rounded, round_blocks(fmt, x, block))
    assert (np.asarray(rounded) != x).any()


@pytest.mark.parametrize("steps", [-1, 0, 1], ids=["just below", "exact", "just above"])
@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_scale_changes_where_amax_passes_a_power_of_two_times_the_largest(fmt, steps):
    largest = GRIDS[fmt][1]
    exponents = np.arange(-12, 13)
    amax = (largest * np.exp2(exponents)).astype(np.float32)
    for _ in range(abs(steps)):
        amax = np.nextafter(amax, np.float32(steps * np.inf))
    x = amax[:, None] * np.linspace(0.01, 1, 32, dtype=np.float32)  # amax last
    assert_same_bits(ROUND[fmt](x, 32), round_blocks(fmt, x, 32))


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_amax_that_is_a_power_of_two(fmt):
    x = np.exp2(np.arange(-8, 9))[:, None] * np.linspace(-1, 1, 33, dtype=np.float32)
    x = x.astype(np.float32)
    assert_same_bits(ROUND[fmt](x, 33), round_blocks(fmt, x, 33))


def test_fp8_scale_does_not_fall_below_that_of_the_amax_floor():
    # 1e-4 / 448 lies just below 2**-22, the scale of this block; its step near zero is 2**-31.
    x = np.array([4.2 * 2.0**-22, 2.0**-31, 2.0**-33, -1.01 * 2.0**-32], np.float32)
    expected = np.array([2.0**-20, 2.0**-31, 0.0, -(2.0**-31)], np.float32)
    assert_same_bits(ROUND["fp8"](x, 4), expected)


def test_fp4_scale_does_not_fall_below_that_of_the_amax_floor():
    x = np.array([1.0, 1.2, 1.3, -2.4, 2.6], np.float32) * np.float32(2.0**-126)
    expected = np.array([1, 1, 1.5, -2, 3], np.float32) * np.float32(2.0**-126)
    assert_same_bits(ROUND["fp4"](x, 5), expected)


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_zeros_stay_zeros(fmt):
    x = np.array([[0.0, -0.0] * 20] * 2, np.float32)
    assert_same_bits(ROUND[fmt](x, 32), x)


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_gradient_of_block_rounding_is_exactly_the_identity(fmt):
    rng = np.random.default_rng(0)
    x, d = (rng.standard_normal((3, 70)).astype(np.float32) for _ in range(2))
    x[0] = 0
    out, vjp = jax.vjp(lambda x: ROUND[fmt](x, 32), x)
    assert_same_bits(vjp(d)[0], d)
    assert_same_bits(out, round_blocks(fmt, x, 32))
    assert_same_bits(jax.jvp(lambda x: ROUND[fmt](x, 32), (x,), (d,))[1], d)
    low = jnp.asarray(x, jnp.bfloat16)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(ROUND[fmt](x, 32) * d.astype(x.dtype))))(low)
    assert_same_bits(grad, d.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_rounding_is_unbiased(fmt):
    # Uniform over the whole range and a scale of one: each cell of the grid is filled evenly, so
    # half of all values must go up. Five standard deviations of that share: 5 * 0.5 / sqrt(n).
    largest = GRIDS[fmt][1]
    x = np.random.default_rng(1).uniform(-largest, largest, (512, 128)).astype(np.float32)
    x[:, 0] = largest  # fixes the scale, not counted
    rounded, x = np.asarray(ROUND[fmt](x, 128))[:, 1:], x[:, 1:]
    moved = rounded != x
    bound = 2.5 / math.sqrt(moved.sum())
    assert abs((rounded > x)[moved].mean() - 0.5) < bound  # towards plus infinity
    assert abs((np.abs(rounded) > np.abs(x))[moved].mean() - 0.5) < bound  # away from zero


# Weights


def test_every_e4m3_code_dequantizes_to_its_value_times_the_scale():
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    values = jnp.asarray(codes.view(ml_dtypes.float8_e4m3fn))
    scale = jnp.full((1, 1), 0.125, jnp.float8_e8m0fnu)
    weight = QuantizedArray(values, scale, (128, 128)).dequantize()
    np.testing.assert_array_equal(weight, E4M3.reshape(16, 16) * 0.125)  # NaNs equal too
    assert_same_bits(np.signbit(weight), (codes & 0x80) != 0)


@pytest.mark.parametrize("scale", [2.0**-100, 1.0, 2.0**100])
def test_what_is_cast_exactly_is_cast(scale):
    codes = jnp.arange(256, dtype=jnp.uint8)
    values = np.asarray(jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn), np.float32) * scale

    found = cast_exactly(jnp.asarray(values), jnp.bfloat16)

    np.testing.assert_array_equal(np.asarray(found, np.float32), values)  # NaN where NaN is
    assert cast_exactly(jnp.asarray(values), jnp.float32).dtype == jnp.float32


def test_first_codes_are_the_first_half_of_the_inputs():
    # Codes (1, 2), (0, 15), (10, 9), (7, 0).
    unpacked = unpack_fp4(jnp.array([[0x22, 0x71], [0x95, 0x0E]], jnp.uint8))
    expected = np.array([[0.5, 0.0], [-1.0, 6.0], [1.0, -6.0], [-0.5, 0.0]], np.float32)
    np.testing.assert_array_equal(unpacked, expected)


def test_fp4_packs_two_inputs_per_byte():
    column = np.zeros((32, 1), np.float32)
    column[[0, 16, 1, 17], 0] = [0.5, 1.0, -2.0, 6.0]  # codes 1, 2, 12, 7 under a scale of one
    packed = pack(jnp.asarray(column), "fp4")
    np.testing.assert_array_equal(packed.values[:, 0], [0x22, 0xF8] + [0] * 14)
    np.testing.assert_array_equal(packed.scale.astype(jnp.float32), [[1.0]])


def interleaved_codes(num_inputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Codes [4, in] and the bytes a checkpoint has for them: inputs 2r and 2r + 1 in byte r."""
    codes = np.random.default_rng(seed).integers(0, 16, (4, num_inputs)).astype(np.uint8)
    return codes, codes[:, 0::2] | codes[:, 1::2] << 4


@pytest.mark.parametrize(
    "num_inputs, block", [(512, 256), (256, 256), (64, 64), (96, 96), (32, 32)]
)
def test_planes_of_checkpoint_bytes(num_inputs, block):
    codes, stored = interleaved_codes(num_inputs)
    planes = pack_planes(stored.T)
    for start in range(0, num_inputs, block):
        rows = planes[start // 2 : (start + block) // 2].T
        half = block // 2
        first, second = two_codes(rows)
        np.testing.assert_array_equal(first, codes[:, start : start + half])
        np.testing.assert_array_equal(second, codes[:, start + half : start + block])
    np.testing.assert_array_equal(unpack_planes(planes), stored.T)
    np.testing.assert_array_equal(unpack_fp4(jnp.asarray(planes)).T, E2M1[codes])


def test_whole_blocks_of_planes_stand_for_themselves():
    # What a device holds of weights cut along their inputs is a valid packed array.
    codes, stored = interleaved_codes(1024)
    half = pack_planes(stored.T)[256:]
    np.testing.assert_array_equal(unpack_fp4(jnp.asarray(half)).T, E2M1[codes[:, 512:]])


def representable(fmt: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Weights on the format's grid times a power of two per block, whose largest value is there."""
    rng = np.random.default_rng(seed)
    table = GRIDS[fmt][0]
    rows, cols = (128, 128) if fmt == "fp8" else (32, 1)
    weight = table[rng.integers(0, len(table), shape)] * rng.choice([-1, 1], shape)
    for index in np.ndindex(*shape[:-2]):
        for i in range(0, shape[-2], rows):
            for j in range(0, shape[-1], cols):
                tile = weight[index][i : i + rows, j : j + cols]
                tile[rng.integers(tile.shape[0]), 0] = table[-1]
                tile *= 2.0 ** rng.integers(-6, 4)
    return weight.astype(np.float32)


@pytest.mark.parametrize(
    "fmt, shape, values_shape, scale_shape",
    [
        ("fp8", (130, 200), (130, 200), (2, 2)),
        ("fp8", (3, 128, 40), (3, 128, 40), (3, 1, 1)),
        ("fp4", (64, 5), (32, 5), (2, 5)),
        ("fp4", (2, 3, 32, 4), (2, 3, 16, 4), (2, 3, 1, 4)),
    ],
)
def test_representable_weights_survive_quantization(fmt, shape, values_shape, scale_shape):
    weight = representable(fmt, shape)
    packed = pack(jnp.asarray(weight), fmt)
    assert packed.values.shape == values_shape and packed.scale.shape == scale_shape
    assert packed.values.dtype == (jnp.uint8 if fmt == "fp4" else jnp.float8_e4m3fn)
    assert packed.scale.dtype == jnp.float8_e8m0fnu
    assert packed.shape == shape and packed.ndim == len(shape)
    np.testing.assert_array_equal(dense(packed), weight)
    np.testing.assert_array_equal(dense(packed, jnp.bfloat16).astype(jnp.float32), weight)


@pytest.mark.parametrize(
    "fmt, rows, cols, shape", [("fp8", 128, 128, (150, 140)), ("fp4", 32, 1, (96, 6))]
)
def test_weights_round_tile_by_tile_as_in_numpy(fmt, rows, cols, shape):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape) * np.exp2(rng.integers(-9, 9, shape[1]))
    weight = weight.astype(np.float32)
    expected = np.zeros(shape)
    for i in range(0, shape[0], rows):
        for j in range(0, shape[1], cols):
            tile = weight[i : i + rows, j : j + cols]
            scale = block_scale(fmt, tile)
            expected[i : i + rows, j : j + cols] = nearest(fmt, tile / scale) * scale
    packed = pack(jnp.asarray(weight), fmt)
    np.testing.assert_array_equal(dense(packed), expected)


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_rounding_of_weights_is_unbiased(fmt):
    # As for activations: uniform, with the largest value of the format in every block.
    largest = GRIDS[fmt][1]
    x = np.random.default_rng(2).uniform(-largest, largest, (512, 256)).astype(np.float32)
    x[::32] = largest
    rounded = np.asarray(dense(pack(jnp.asarray(x), fmt)))
    moved = rounded != x
    bound = 2.5 / math.sqrt(moved.sum())
    assert abs((rounded > x)[moved].mean() - 0.5) < bound
    assert abs((np.abs(rounded) > np.abs(x))[moved].mean() - 0.5) < bound


def test_scale_may_be_any_float32():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 127, (130, 3)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    scale = np.array([[0.3], [1.7]], np.float32)
    weight = QuantizedArray(jnp.asarray(values), jnp.asarray(scale), (128, 128)).dequantize()
    expected = values.astype(np.float64)
    expected[:128] *= scale[0, 0]
    expected[128:] *= scale[1, 0]
    assert_close(weight, expected, FLOAT32)
    assert_close(weight[128:], expected[128:], FLOAT32)  # small beside the rest


@pytest.mark.parametrize(
    "shape, fmt, message",
    [
        ((33, 4), "fp4", r"weight has 33 inputs: fp4 needs a multiple of 32"),
        ((32, 4), "int8", r"fmt='int8': expected \"fp8\" or \"fp4\""),
    ],
)
def test_what_cannot_be_packed_is_refused(shape, fmt, message):
    with pytest.raises(ValueError, match=message):
        quantize_weight(jnp.zeros(shape), fmt)


@pytest.mark.parametrize(
    "fmt, nbytes", [("fp8", 3 * (64 * 10 + 1)), ("fp4", 3 * (32 * 10 + 2 * 10))]
)
def test_quantized_array_counts_weights_and_bytes_and_indexes_leading_axes(fmt, nbytes):
    weight = representable(fmt, (3, 64, 10))
    packed = pack(jnp.asarray(weight), fmt)
    assert packed.size == 3 * 64 * 10
    assert packed.nbytes == nbytes
    assert packed.is_fp4 == (fmt == "fp4")
    assert packed[...] is packed
    assert packed[1].shape == (64, 10) and packed[1].block == packed.block
    np.testing.assert_array_equal(dense(packed[1]), weight[1])
    np.testing.assert_array_equal(dense(packed[1:]), weight[1:])


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_quantized_array_is_a_pytree_that_passes_jit_vmap_and_scan(fmt):
    weight = representable(fmt, (3, 64, 10))
    packed = pack(jnp.asarray(weight), fmt)
    leaves, treedef = jax.tree.flatten(packed)
    assert [leaf.dtype for leaf in leaves] == [packed.values.dtype, packed.scale.dtype]
    assert jax.tree.unflatten(treedef, leaves).block == packed.block

    same = jax.jit(lambda w: w)(packed)
    assert isinstance(same, QuantizedArray) and same.block == packed.block
    np.testing.assert_array_equal(dense(packed), weight)
    np.testing.assert_array_equal(jax.vmap(QuantizedArray.dequantize)(packed), weight)
    _, scanned = jax.lax.scan(lambda carry, w: (carry, w.dequantize()), None, packed)
    np.testing.assert_array_equal(scanned, weight)


# Hadamard transform and casts


def sylvester(width: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(width)


@pytest.mark.parametrize("width", [1, 2, 8, 128])
def test_hadamard_is_the_orthonormal_sylvester_transform_and_its_own_inverse(width):
    x = np.random.default_rng(width).standard_normal((3, 2, width)).astype(np.float32)
    once = hadamard(x)
    assert_close(once, x.astype(np.float64) @ sylvester(width), FLOAT32)
    assert_close(hadamard(once), x, FLOAT32)


def test_hadamard_of_bfloat16_is_rounded_once():
    x = np.random.default_rng(0).integers(-8, 9, (4, 64)).astype(np.float32)
    exact = x @ (sylvester(64) * 8) / 8  # sums of small integers
    out = hadamard(x.astype(ml_dtypes.bfloat16))
    assert_same_bits(out, exact.astype(np.float32).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("width", [3, 96])
def test_hadamard_refuses_other_widths(width):
    with pytest.raises(ValueError, match=f"{width} channels"):
        hadamard(jnp.zeros((2, width)))


def test_cast_rounds_to_bfloat16_even_when_the_result_is_widened_again():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(1000) * np.exp2(rng.integers(-100, 100, 1000))
    ties = np.float32(1) + np.arange(16, dtype=np.float32) * np.float32(2.0**-8)
    x = np.concatenate([x, ties, -ties, [0.0, 3.39e38, -3.39e38, 3.4e38]]).astype(np.float32)
    expected = x.astype(ml_dtypes.bfloat16)
    assert (expected.astype(np.float32) != x).sum() > 900
    assert_same_bits(jax.jit(lambda x: cast(x, jnp.bfloat16))(x), expected)
    widened = jax.jit(lambda x: cast(x, jnp.bfloat16).astype(jnp.float32))(x)
    assert_same_bits(widened, expected.astype(np.float32))
    y = x[:1000]
    program = jax.jit(lambda y: y - cast(y * 1.5, jnp.bfloat16).astype(jnp.float32) / 2)
    # Which conversions a backend drops is its affair; this operation it has to keep.
    assert "stablehlo.reduce_precision" in program.lower(y).as_text()
    rounded = (y * np.float32(1.5)).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert_same_bits(program(y), y - rounded / 2)


def test_cast_to_float32_changes_nothing():
    x = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    assert_same_bits(jax.jit(lambda x: cast(x, jnp.float32))(x), x)
