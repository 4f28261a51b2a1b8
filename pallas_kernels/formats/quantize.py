"""FP8 and FP4 values with power-of-two block scales, as the released checkpoints use them.

Activations are rounded along their last axis in blocks of 64 or 128 (e4m3) or 32 (e2m1):

    scale  = smallest power of two >= amax / largest        (amax floored, see below)
    result = round_to_nearest_even(clip(x / scale)) * scale

Weights are kept as `QuantizedArray`s with logical shape [..., in, out]:

| format | values                          | scale (E8M0 or float32)           | block     |
|--------|---------------------------------|-----------------------------------|-----------|
| fp8    | float8_e4m3fn [..., in, out]    | [..., ceil(in/128), ceil(out/128)]| (128,128) |
| fp4    | uint8 [..., in/2, out]          | [..., in/32, out]                 | (32, 1)   |

FP4 codes are sign, two exponent bits, one mantissa bit: codes 0..7 are 0, .5, 1, 1.5, 2, 3, 4, 6,
codes 8..15 their negatives. Inputs lie in blocks of `fp4_block(in)`: 256, or all of them where 256
does not divide `in`. Byte row r of a block holds the block's inputs r and r + block / 2, so that a
kernel unpacks a block into two halves that are whole rows, and nothing is interleaved. From its
highest bit, with the sign s and the other bits eem of the first and of the second code, a byte is

    s1  eem2  eem1  s2

so that the bits of the first are where e5m2 has them, and one mask makes e5m2 of four bytes.
Checkpoints hold inputs 2r and 2r + 1 in byte r, as nibbles: `pack_planes` and `unpack_planes` turn
one into the other. Where the `in` axis is cut over devices, a device's part must be whole blocks.

Source: the released `inference/kernel.py` (act_quant, fp4_act_quant); report section 5.2.1.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import compact
from pallas_kernels.dispatch import target_platform
from pallas_kernels.formats.records import ACTIVATIONS, FP4_PLANES, FP4_WEIGHTS, FP8_WEIGHTS

E4M3_MAX = 448.0
E2M1_MAX = 6.0
FP8_WEIGHT_BLOCK = (FP8_WEIGHTS.block, FP8_WEIGHTS.outputs)
FP4_WEIGHT_BLOCK = (FP4_WEIGHTS.block, FP4_WEIGHTS.outputs)
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP8_AMAX_FLOOR = 1e-4
FP4_AMAX_FLOOR = 6.0 * 2.0**-126


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=["block"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class QuantizedArray:
    """A weight [..., in, out] in FP8 or packed FP4 with block scales. Accepted wherever one is."""

    values: jax.Array  # float8_e4m3fn [..., in, out], or uint8 [..., in / 2, out]
    scale: jax.Array  # float8_e8m0fnu or float32 [..., ceil(in / block[0]), ceil(out / block[1])]
    block: tuple[int, int]

    @property
    def is_fp4(self) -> bool:
        """Two values per byte."""
        return self.values.dtype == jnp.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape: one element per weight."""
        *batch, rows, cols = self.values.shape
        return (*batch, rows * 2 if self.is_fp4 else rows, cols)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.values.shape)

    @property
    def size(self) -> int:
        """Number of weights (scales not counted)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        # Of shapes and dtypes alone: printers put stand-ins in the place of arrays.
        parts = (self.values, self.scale)
        return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in parts)

    def __repr__(self) -> str:
        if not hasattr(self.values, "dtype"):  # a tree of something else, say of shardings
            return f"QuantizedArray({self.values!r}, {self.scale!r}, block={self.block})"
        fmt, shape = "fp4" if self.is_fp4 else "fp8", ",".join(map(str, self.shape))
        bits = 8 * self.nbytes / self.size if self.size else 0
        return f"QuantizedArray({fmt}[{shape}], {bits:.4g} bits per weight)"

    def __getitem__(self, index) -> "QuantizedArray":
        """Indexes leading axes (layers, experts); the last two stay."""
        if index is Ellipsis:
            return self
        return dataclasses.replace(self, values=self.values[index], scale=self.scale[index])

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The weights [..., in, out]; exact in bfloat16 and wider for power-of-two scales."""
        return _placed_like(self.values, functools.partial(_dequantize, dtype=dtype), self)


def fp4_block(num_inputs: int) -> int:
    """Inputs of a block of packed FP4: byte row r has inputs r and r + block / 2 of its block."""
    return FP4_PLANES if num_inputs % FP4_PLANES == 0 else num_inputs


def join_codes(first, second):
    """Two arrays of e2m1 codes 0..15 -> bytes as above, in the arrays' integer dtype."""
    return (first & 8) << 4 | (second & 7) << 4 | (first & 7) << 1 | second >> 3


def split_codes(packed):
    """The inverse of `join_codes`."""
    return packed >> 4 & 8 | packed >> 1 & 7, (packed & 1) << 3 | packed >> 4 & 7


def _dequantize(w: QuantizedArray, dtype: jax.typing.DTypeLike) -> jax.Array:
    values = unpack_fp4(w.values) if w.is_fp4 else decode_e4m3(w.values)
    *_, rows, cols = values.shape
    scale = float32_scale(w)
    # Along outputs first, while there are few: on a TPU that is a copy in memory, the other is not.
    for axis, size in ((-1, w.block[1]), (-2, w.block[0])):
        scale = jnp.repeat(scale, size, axis=axis) if size > 1 else scale
    values = values * scale[..., :rows, :cols]
    if w.scale.dtype == jnp.float8_e8m0fnu:
        return cast_exactly(values, dtype)
    return values.astype(dtype)


def float32_scale(w: QuantizedArray) -> jax.Array:
    """The block scales. In two steps: libtpu 0.0.42 aborts for v5p on e8m0 [32, 64] -> float32."""
    if w.scale.dtype == jnp.float8_e8m0fnu and target_platform() == "cpu":
        return scale_of_exponent(jax.lax.bitcast_convert_type(w.scale, jnp.uint8))
    scale = w.scale.astype(jnp.bfloat16) if w.scale.dtype == jnp.float8_e8m0fnu else w.scale
    return scale.astype(jnp.float32)


def unpack_fp4(packed: jax.Array) -> jax.Array:
    """uint8 [..., in / 2, out] -> float32 [..., in, out] of e2m1 values, scales not applied."""
    *batch, rows, cols = packed.shape
    half = fp4_block(2 * rows) // 2
    values = unpack_codes(packed.reshape(*batch, rows // half, half, cols), axis=-2)
    return values.reshape(*batch, rows * 2, cols)


def unpack_codes(packed: jax.Array, axis: int) -> jax.Array:
    """Bytes of `join_codes`, in any integer dtype -> float32 of all first, then all second along `axis`."""
    if target_platform() == "cpu":
        packed = packed.astype(jnp.uint16)
        first = (packed & 0x0E) << 8 | (packed & 0x80) << 8
        second = (packed & 0x70) << 5 | packed << 15
        return _float_of_half(jnp.concatenate([first, second], axis=axis), 14)
    return decode_e2m1(jnp.concatenate(split_codes(packed), axis=axis))


def decode_e4m3(values: jax.Array) -> jax.Array:
    """float8_e4m3fn -> float32.

    On a CPU by moving bits into a float16, whose exponent is 8 less: XLA's own conversion is some
    20 operations, and LLVM makes slow code of it.
    """
    if target_platform() != "cpu":
        return values.astype(jnp.float32)
    code = jax.lax.bitcast_convert_type(values, jnp.uint8).astype(jnp.uint16)
    bits = (code & 0x7F) << 7 | (code & 0x80) << 8
    is_nan = code & 0x7F == 0x7F
    return _float_of_half(jnp.where(is_nan, bits | 0x7C00, bits), 8)


def encode_e4m3(values: jax.Array) -> jax.Array:
    """float32 values on the e4m3 grid -> float8_e4m3fn; the inverse of `decode_e4m3`."""
    if target_platform() != "cpu":
        return values.astype(jnp.float8_e4m3fn)
    half = (values * 2.0**-8).astype(jnp.float16)
    bits = jax.lax.bitcast_convert_type(half, jnp.uint16)
    code = jnp.where(jnp.isnan(values), 0x7F, bits >> 7 & 0x7F | bits >> 8 & 0x80).astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(code, jnp.float8_e4m3fn)


def scale_of_exponent(exponent: jax.Array) -> jax.Array:
    """E8M0 bytes, the exponent fields of float32 powers of two -> float32."""
    return jax.lax.bitcast_convert_type(exponent.astype(jnp.int32) << 23, jnp.float32)


def cast_exactly(values: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """float32 values that `dtype` holds exactly, in it.

    For bfloat16 on a CPU by dropping the bits that are 0: rounding is some ten operations, and LLVM
    makes slow code of it.
    """
    if dtype != jnp.bfloat16 or target_platform() != "cpu":
        return values.astype(dtype)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32) >> 16
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)


def _float_of_half(bits: jax.Array, exponent: int) -> jax.Array:
    """The bits of float16 values, uint16 -> float32, times 2**exponent; subnormals are exact."""
    half = jax.lax.bitcast_convert_type(bits, jnp.float16)
    return half.astype(jnp.float32) * 2.0**exponent


def pack_planes(turned: np.ndarray) -> np.ndarray:
    """uint8 [in / 2, out], bytes as in checkpoints (row r has inputs 2r and 2r + 1) -> planes, as above."""
    half = fp4_block(2 * len(turned)) // 4  # rows of a half of a block's inputs
    halves = turned.reshape(-1, 2, half, *turned.shape[1:])
    first, second = halves[:, 0], halves[:, 1]
    low, high = join_codes(first & 0xF, second & 0xF), join_codes(first >> 4, second >> 4)
    return np.stack([low, high], axis=2).reshape(turned.shape)


def unpack_planes(planes: np.ndarray) -> np.ndarray:
    """The inverse of `pack_planes`."""
    half = fp4_block(2 * len(planes)) // 4
    pairs = planes.reshape(-1, half, 2, *planes.shape[1:])
    low, high = split_codes(pairs[:, :, 0]), split_codes(pairs[:, :, 1])
    halves = [a | b << 4 for a, b in zip(low, high)]
    return np.stack(halves, axis=1).reshape(planes.shape)


def decode_e2m1(code: jax.Array) -> jax.Array:
    """e2m1 codes 0..15 (any integer dtype) -> float32, by moving bits into a float32.

    Exponent and mantissa bits `eem` of e2m1 become the top exponent and mantissa bits of a float32
    whose value is 2**-126 times too small; 0.5 (code 1) would be a denormal, so it is added as one.
    """
    if target_platform() == "cpu":
        code = code.astype(jnp.uint16)
        return _float_of_half((code & 7) << 9 | (code & 8) << 12, 14)
    code = code.astype(jnp.int32)
    magnitude = code & 7
    normal = ((magnitude >> 1) + 126) << 23 | (magnitude & 1) << 22
    bits = jnp.where(magnitude > 1, normal, jnp.where(magnitude == 1, 126 << 23, 0))
    return jax.lax.bitcast_convert_type(bits | (code & 8) << 28, jnp.float32)


def encode_e2m1(values: jax.Array) -> jax.Array:
    """float32 values on the e2m1 grid -> codes 0..15 (int32). Zero of either sign gives code 0."""
    magnitude = jnp.abs(values)
    code = jnp.searchsorted(jnp.asarray(E2M1_VALUES), magnitude, side="left").astype(jnp.int32)
    return jnp.where(values < 0, code | 8, code)


def cast(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`x` as `dtype` (float32 or bfloat16), with a rounding that stays.

    XLA may drop a conversion to bfloat16 whose result is widened again
    (`xla_allow_excess_precision`, on by default). Where the rounding is part of the model, or a
    program is to give the same numbers however it is cut up, it has to be asked for.
    """
    if x.dtype == jnp.dtype(dtype):
        return x
    if jnp.dtype(dtype) == jnp.bfloat16:
        x = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def rounded_to(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`cast` in a kernel, as float32: values that `dtype` has, ties to even."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & jnp.int32(-0x10000)
    return jnp.where(jnp.isnan(x), x, jax.lax.bitcast_convert_type(bits, jnp.float32))


def ceil_to_power_of_two(x: jax.Array) -> jax.Array:
    """Smallest power of two >= x, elementwise, for positive normal float32 x."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def round_e4m3(x: jax.Array) -> jax.Array:
    """Nearest float8_e4m3fn value (ties to even), saturating at 448, as float32."""
    x = jnp.clip(x.astype(jnp.float32), -E4M3_MAX, E4M3_MAX)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    exponent = jnp.maximum((bits >> 23) & 0xFF, 127 - 6)  # subnormals share the step of 2**-6
    step = jax.lax.bitcast_convert_type((exponent - 3) << 23, jnp.float32)
    return jnp.round(x / step) * step


def round_e2m1(x: jax.Array) -> jax.Array:
    """Nearest float4_e2m1fn value (ties to even), saturating at 6, as float32."""
    x = jnp.clip(x.astype(jnp.float32), -E2M1_MAX, E2M1_MAX)
    magnitude = jnp.abs(x)
    step = jnp.where(magnitude < 2, 0.5, jnp.where(magnitude < 4, 1.0, 2.0))
    return jnp.round(x / step) * step


def _in_blocks(x: jax.Array, block: int) -> jax.Array:
    """[..., D] -> float32 [..., ceil(D / block), block], padded with zeros."""
    pad = -x.shape[-1] % block
    x = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, pad)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def _out_of_blocks(blocks: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_in_blocks`, in the shape and dtype of `like`; there may be no rows."""
    *batch, count, block = blocks.shape
    return cast(blocks.reshape(*batch, count * block)[..., : like.shape[-1]], like.dtype)


def _scale(blocks: jax.Array, axes: int | tuple[int, ...], largest: float, floor: float):
    amax = jnp.maximum(jnp.max(jnp.abs(blocks), axis=axes, keepdims=True), floor)
    return ceil_to_power_of_two(amax * jnp.float32(1 / largest))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def round_fp8(x: jax.Array, block: int = ACTIVATIONS.block) -> jax.Array:
    """`x` rounded to e4m3 with a power-of-two scale per `block` channels of the last axis.

    The gradient is that of the identity (straight-through).

    Args:
      x: [..., D] float.
      block: channels per scale; a last partial block is allowed.

    Returns:
      [..., D] in the dtype of `x`.
    """
    blocks = _in_blocks(x, block)
    scale = _scale(blocks, -1, E4M3_MAX, FP8_AMAX_FLOOR)
    rounded = round_e4m3(blocks / scale) * scale
    return _out_of_blocks(rounded, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def round_fp4(x: jax.Array, block: int = 32) -> jax.Array:
    """`x` rounded to e2m1 with a power-of-two scale per `block` channels of the last axis.

    The gradient is that of the identity (straight-through).

    Args:
      x: [..., D] float.
      block: channels per scale; a last partial block is allowed.

    Returns:
      [..., D] in the dtype of `x`.
    """
    blocks = _in_blocks(x, block)
    scale = _scale(blocks, -1, E2M1_MAX, FP4_AMAX_FLOOR)
    rounded = round_e2m1(blocks / scale) * scale
    return _out_of_blocks(rounded, x)


@round_fp8.defjvp
def _round_fp8_jvp(block, primals, tangents):
    return round_fp8(primals[0], block), tangents[0]


@round_fp4.defjvp
def _round_fp4_jvp(block, primals, tangents):
    return round_fp4(primals[0], block), tangents[0]


def _fitting(sharding: jax.NamedSharding, shape: tuple[int, ...]) -> jax.P:
    """The spec of `sharding` for an array of `shape`, without the axes that do not divide it.

    Block scales are placed like their weights where that is possible, and replicated elsewhere.
    """
    spec = list(sharding.spec) + [None] * (len(shape) - len(sharding.spec))
    for i, axes in enumerate(spec):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        if shape[i] % math.prod(sharding.mesh.shape[name] for name in axes):
            spec[i] = None
    return jax.P(*spec)


def _placed_like(array: jax.Array, function, *args):
    """`function(*args)`, with results spread like `array`, which has as many axes as they.

    Cutting split axes into blocks needs automatic mode in a mesh with explicit axes.
    """
    sharding = jax.typeof(array).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return function(*args)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    specs = jax.tree.map(lambda a: _fitting(sharding, a.shape), jax.eval_shape(function, *shapes))
    return jax.sharding.auto_axes(function, out_sharding=specs)(*args)


def quantize_weight(
    weight: jax.Array,  # [..., in, out] float
    fmt: str,
) -> QuantizedArray:
    """Quantises a weight to the released format, scales E8M0.

    Args:
      weight: [..., in, out]; for "fp4", `in` must be a multiple of 32.
      fmt: "fp8" (e4m3, 128 x 128 blocks) or "fp4" (e2m1, 32 inputs x 1 output).

    Raises:
      ValueError: unknown format, or a shape that cannot be packed.
    """
    return _placed_like(weight, functools.partial(_quantize_weight, fmt=fmt), weight)


def _quantize_weight(weight: jax.Array, fmt: str) -> QuantizedArray:
    *batch, rows, cols = weight.shape
    weight = weight.astype(jnp.float32)
    match fmt:
        case "fp8":
            bi, bo = FP8_WEIGHT_BLOCK
            pad = [(0, 0)] * len(batch) + [(0, -rows % bi), (0, -cols % bo)]
            tiles = jnp.pad(weight, pad)
            ni, no = tiles.shape[-2] // bi, tiles.shape[-1] // bo
            tiles = tiles.reshape(*batch, ni, bi, no, bo)
            scale = _scale(tiles, (-3, -1), E4M3_MAX, FP8_AMAX_FLOOR)
            values = round_e4m3(tiles / scale).reshape(*batch, ni * bi, no * bo)
            return QuantizedArray(
                values[..., :rows, :cols].astype(jnp.float8_e4m3fn),
                scale.reshape(*batch, ni, no).astype(jnp.float8_e8m0fnu),
                FP8_WEIGHT_BLOCK,
            )
        case "fp4":
            bi = FP4_WEIGHT_BLOCK[0]
            if rows % bi:
                raise ValueError(f"weight has {rows} inputs: fp4 needs a multiple of {bi}.")
            groups = weight.reshape(*batch, rows // bi, bi, cols)
            scale = _scale(groups, -2, E2M1_MAX, FP4_AMAX_FLOOR)
            half = fp4_block(rows) // 2
            code = encode_e2m1(round_e2m1(groups / scale))
            code = code.reshape(*batch, rows // (2 * half), 2, half, cols)
            packed = join_codes(code[..., 0, :, :], code[..., 1, :, :])
            return QuantizedArray(
                packed.reshape(*batch, rows // 2, cols).astype(jnp.uint8),
                scale[..., 0, :].astype(jnp.float8_e8m0fnu),
                FP4_WEIGHT_BLOCK,
            )
        case _:
            raise ValueError(f'fmt={fmt!r}: expected "fp8" or "fp4".')


def expand_to_fp8(w: QuantizedArray) -> QuantizedArray:
    """An FP4 weight as FP8 with the same values, in twice the memory.

    A tile of 128 x 128 gets the largest of its 4 x 128 scales divided by 2**6 (6 * 2**6 <= 448), and
    each value is multiplied by what remains of its own scale, a power of two. Exact where the scales
    of a tile are within 2**14 of each other, as the smallest subnormal of e4m3 is 2**-9.

    Looks at the values, so not for use inside jit. Source: `--expert-dtype fp8` of the released
    `inference/convert.py`.

    Raises:
      ValueError: `w` is not FP4 with E8M0 scales, or has tiles whose values e4m3 cannot hold.
    """
    if not (w.is_fp4 and w.scale.dtype == jnp.float8_e8m0fnu):
        raise ValueError(f"{w} is not FP4 with E8M0 scales.")
    expanded, is_rounded = _placed_like(w.values, jax.jit(_expand_to_fp8), w)
    bad = np.argwhere(is_rounded)
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {is_rounded.size} tiles of 128 x 128 have FP4 values that e4m3 cannot "
            f"hold (scales more than 2**14 apart), the first at {bad[0].tolist()}: keep FP4."
        )
    return expanded


def _expand_to_fp8(w: QuantizedArray) -> tuple[QuantizedArray, jax.Array]:
    """The expanded weight and which tiles [..., in / 128, out / 128] were rounded."""
    group = FP4_WEIGHT_BLOCK[0]
    (tile_in, tile_out), groups = FP8_WEIGHT_BLOCK, FP8_WEIGHT_BLOCK[0] // group
    *batch, _, cols = w.shape

    def in_tiles(x: jax.Array, height: int) -> jax.Array:
        """[..., R, C] -> [..., R / height, height, C / 128, 128], padded with zeros."""
        pad = [(0, 0)] * len(batch) + [(0, -x.shape[-2] % height), (0, -x.shape[-1] % tile_out)]
        x = jnp.pad(x, pad)
        return x.reshape(*batch, x.shape[-2] // height, height, -1, tile_out)

    exponent = jax.lax.bitcast_convert_type(w.scale, jnp.uint8).astype(jnp.int32)
    scale = jnp.maximum(in_tiles(exponent, groups).max(axis=(-3, -1)) - 6, 0)
    of_tile = jnp.repeat(jnp.repeat(scale, groups, axis=-2), tile_out, axis=-1)
    shift = exponent - of_tile[..., : exponent.shape[-2], :cols]  # at most 6
    factor = jax.lax.bitcast_convert_type(jnp.maximum(shift + 127, 1) << 23, jnp.float32)
    exact = unpack_fp4(w.values) * jnp.repeat(factor, group, axis=-2)
    values = exact.astype(jnp.float8_e4m3fn)
    is_rounded = in_tiles(values.astype(jnp.float32) != exact, tile_in).any(axis=(-3, -1))
    scale = jax.lax.bitcast_convert_type(scale.astype(jnp.uint8), jnp.float8_e8m0fnu)
    return QuantizedArray(values, scale, FP8_WEIGHT_BLOCK), is_rounded


def hadamard(x: jax.Array) -> jax.Array:
    """Orthonormal Walsh-Hadamard transform (Sylvester order) of the last axis, in float32 inside.

    Args:
      x: [..., D] float, D a power of two.
    """
    width = x.shape[-1]
    if width & (width - 1):
        raise ValueError(f"x has {width} channels: the Hadamard transform needs a power of two.")
    matrix = hadamard_matrix(width)
    out = compact.matmul(x.astype(jnp.float32), matrix, precision=jax.lax.Precision.HIGHEST)
    return cast(out, x.dtype)


def hadamard_matrix(width: int) -> jax.Array:
    """The matrix [width, width] of `hadamard`, float32; in kernels, too."""
    shape = (width, width)
    common = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    common &= jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    for shift in (16, 8, 4, 2, 1):  # the parity of the bits that both have, in the lowest
        common ^= common >> shift
    return jnp.where(common & 1 == 1, -1.0, 1.0) * jnp.float32(width**-0.5)
