"""Rows in FP8 or FP4 with one power-of-two scale per block of channels, in one pass over them.

    scale  = smallest power of two >= amax / largest        of each `block` channels
    value  = x / scale rounded to e4m3 (fp8) or e2m1 (fp4), ties to even

    round_rows       x -> value * scale in the dtype of x       (`quantize.round_fp8`, `round_fp4`)
    quantize_rows    x -> value, scale                          as stored
    dequantize_rows  value, scale -> value * scale

| format | values                                                    | scale                        |
|--------|-----------------------------------------------------------|------------------------------|
| fp8    | float8_e4m3fn [..., D]                                    | uint8 [..., ceil(D / block)] |
| fp4    | uint8 [..., D / 2]: channel j low, channel j + D / 2 high | likewise                     |

A scale byte is E8M0: the exponent plus 127, the exponent field of the scale as a float32.

Why a kernel: XLA writes the blocks' maxima spread over all channels, and |x|, to HBM as float32.
For [8192, 4096] in bfloat16 it moves 1229 MB on a v6e where x and the result are 134 MB.

Rounding needs no division and no table: adding 1.5 * 2**23 steps to a float32, and subtracting them
again, rounds it to the nearest multiple of the step.

Blocks narrower than a register have their maxima taken of the transposed values, over sublanes: the
scale of a block is then computed once, and not in each of its channels.

Grid: blocks of rows, each with all its channels; a program walks over them in groups.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from pallas_kernels import compact, dispatch, signatures
from pallas_kernels.formats import quantize

LANES = 128
BLOCK_VALUES = 1 << 19  # of a program: 1 MiB of bfloat16
GROUP_VALUES = 1 << 15  # handled at once; twice as many where they are transposed
ROW_TILE = 32  # rows of a tile of 8-bit values
# format -> largest value, least amax that counts, least exponent and bits of the mantissa
_FORMATS = {
    "fp8": (quantize.E4M3_MAX, 1e-4, -6, 3),
    "fp4": (quantize.E2M1_MAX, 6.0 * 2.0**-126, 0, 1),
}


@dispatch.operation
def round_rows(
    x: Float[jax.Array, "*rows D"],  # float32 or bfloat16
    fmt: str,
    block: int,
    *,
    implementation: dispatch.Implementation = None,
) -> Float[jax.Array, "*rows D"]:
    """`x` rounded to a format with a scale per `block` channels. Gradient of the identity.

    Args:
      fmt: "fp8" or "fp4".
      block: channels per scale; a last partial block is allowed.
      implementation: see `dispatch.choose`.

    Raises:
      ValueError: unknown format, or an implementation that cannot run.
    """
    _check(fmt, block)
    chosen = dispatch.choose(implementation, unsupported=_unsupported(x, block))
    if chosen == "xla" and dispatch.target_platform() == "cpu":
        return _round_on_cpu(x, fmt, block)
    if chosen in ("reference", "xla"):
        rounding = quantize.round_fp8 if fmt == "fp8" else quantize.round_fp4
        return rounding(x, block)
    return _round(x, fmt, block, chosen == "interpret")


@signatures.shaped
def quantize_rows(
    x: Float[jax.Array, "*rows D"],  # float32 or bfloat16
    fmt: str,
    block: int,
    *,
    implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, jax.Array]:
    """Values and E8M0 scale bytes of `x`, as in the table above. Not differentiable.

    The kernel is for "fp8"; "fp4" rows are few, and XLA packs them.

    Raises:
      ValueError: unknown format, an odd D in "fp4", or an implementation that cannot run.
    """
    _check(fmt, block)
    width = x.shape[-1]
    if fmt == "fp4" and width % 2:
        raise ValueError(f"x has {width} channels: fp4 needs an even number.")
    reason = "the kernel stores fp8 only" if fmt == "fp4" else _unsupported(x, block)
    chosen = dispatch.choose(implementation, unsupported=reason)
    if chosen in ("tpu", "interpret"):
        return _call(x, fmt, block, chosen == "interpret", stored=True)
    values, exponent = _rounded_blocks(x, fmt, block)
    scale = (exponent >> 23).astype(jnp.uint8)
    if fmt == "fp8":
        return quantize.encode_e4m3(values), scale
    codes = e2m1_codes(values)
    low, high = codes[..., : width // 2], codes[..., width // 2 :]
    return (low | high << 4).astype(jnp.uint8), scale


@signatures.shaped
def dequantize_rows(
    values: jax.Array,
    scale: jax.Array,
    fmt: str,
    block: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[jax.Array, "*rows D"]:
    """Inverse of `quantize_rows`; exact in float32 and bfloat16.

    Raises:
      ValueError: unknown format.
    """
    _check(fmt, block)
    if fmt == "fp4":
        codes = jnp.concatenate([values & 0xF, values >> 4], axis=-1)
        values = quantize.decode_e2m1(codes)
    else:
        values = quantize.decode_e4m3(values)
    scale = jnp.repeat(quantize.scale_of_exponent(scale), block, axis=-1)
    return quantize.cast_exactly(values * scale[..., : values.shape[-1]], dtype)


def _check(fmt, block):
    if fmt not in _FORMATS:
        raise ValueError(f'{fmt=}: expected "fp8" or "fp4".')
    if block < 1:
        raise ValueError(f"{block=}: expected a positive number of channels.")


def _unsupported(x, block) -> str | None:
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x is {x.dtype}: the kernel takes float32 or bfloat16"
    if not x.size or LANES % block or block < 32 or x.shape[-1] % block:
        return (
            f"x {x.shape} in blocks of {block}: the kernel takes whole blocks of 32, 64 or 128 "
            "channels"
        )
    if x.shape[-1] > 1 << 13:
        return f"rows of {x.shape[-1]} channels are longer than the kernel takes (8192)"
    return None


def blocks(num_rows: int, width: int, *, transposed: bool) -> tuple[int, int]:
    """Rows of a program, and of a group of them."""
    values, unit = (2 * GROUP_VALUES, LANES) if transposed else (GROUP_VALUES, ROW_TILE)
    group = unit * max(1, values // width // unit)
    group = min(group, pl.cdiv(num_rows, ROW_TILE) * ROW_TILE)
    return group * max(1, min(BLOCK_VALUES // width, num_rows) // group), group


def transposes(block: int, *, stored: bool) -> bool:
    """Whether maxima are taken of transposed values; stored scales are made of rows of them."""
    return stored or block < LANES


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _round(x, fmt, block, interpret):
    return _call(x, fmt, block, interpret, stored=False)


@_round.defjvp
def _round_jvp(fmt, block, interpret, primals, tangents):
    return _round(primals[0], fmt, block, interpret), tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _round_on_cpu(x, fmt, block):
    """`quantize.round_fp8` and `round_fp4` in two loops over the values, without a division."""
    values, exponent = _rounded_blocks(x, fmt, block)
    scale = jnp.repeat(jax.lax.bitcast_convert_type(exponent, jnp.float32), block, axis=-1)
    return quantize.cast(values * scale[..., : x.shape[-1]], x.dtype)


@_round_on_cpu.defjvp
def _round_on_cpu_jvp(fmt, block, primals, tangents):
    return _round_on_cpu(primals[0], fmt, block), tangents[0]


def _rounded_blocks(x, fmt, block):
    """x / scale, rounded to the format, float32 [..., D], and the bits of the scales [..., blocks]."""
    width = x.shape[-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % block)])
    blocks = padded.reshape(*x.shape[:-1], padded.shape[-1] // block, block).astype(jnp.float32)
    exponent = scale_bits(compact.largest(jnp.abs(blocks))[..., None], fmt)
    values = round_to_grid(blocks, exponent, fmt)
    return values.reshape(padded.shape)[..., :width], exponent[..., 0]


def _call(x, fmt, block, interpret, *, stored: bool):
    *batch, width = x.shape
    rows = x.reshape(-1, width)
    transposed = transposes(block, stored=stored)
    size, group = blocks(rows.shape[0], width, transposed=transposed)
    widths = [width, pl.cdiv(width, block)] if stored else [width]
    dtypes = [jnp.float8_e4m3fn, jnp.uint8] if stored else [x.dtype]
    moved = x.dtype.itemsize + jnp.dtype(dtypes[0]).itemsize
    out = pl.pallas_call(
        functools.partial(_kernel, fmt=fmt, block=block, group=group, transposed=transposed),
        grid=(pl.cdiv(rows.shape[0], size),),
        in_specs=[pl.BlockSpec((size, width), lambda i: (i, 0))],
        out_specs=[pl.BlockSpec((size, w), lambda i: (i, 0)) for w in widths],
        out_shape=[jax.ShapeDtypeStruct((rows.shape[0], w), d) for w, d in zip(widths, dtypes)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=15 * x.size, transcendentals=0, bytes_accessed=moved * x.size
        ),
        interpret=interpret,
        name=f"{'quantize' if stored else 'round'}_{fmt}",
    )(rows)
    out = [y.reshape(*batch, y.shape[-1]) for y in out]
    return tuple(out) if stored else out[0]


def _kernel(x_ref, values_ref, *scale_ref, fmt, block, group, transposed):
    width = x_ref.shape[1]

    @pl.loop(0, x_ref.shape[0] // group)
    def _(i):
        rows = pl.ds(pl.multiple_of(i * group, group), group)
        scales = []
        for start in range(0, width, LANES):
            tile = pl.ds(start, min(LANES, width - start))
            x = x_ref[rows, tile].astype(jnp.float32)
            if transposed:
                exponent = scale_bits(block_max(jnp.abs(x), block), fmt)
                bits = over_lanes(exponent, block)
            else:
                bits = scale_bits(jnp.max(jnp.abs(x), axis=1, keepdims=True), fmt)
            values = round_to_grid(x, bits, fmt)
            if scale_ref:
                scales.append(exponent)
            else:
                values *= jax.lax.bitcast_convert_type(bits, jnp.float32)
            values_ref[rows, tile] = values.astype(values_ref.dtype)
        if scale_ref:
            exponents = jnp.concatenate(scales, axis=0) >> 23
            scale_ref[0][rows] = exponents.T.astype(jnp.uint8)


def rounded_lanes(x: jax.Array, fmt: str) -> jax.Array:
    """float32 rows [n, D] of a kernel as `round_rows` leaves them, in blocks of 128 channels."""
    tiles = []
    for start in range(0, x.shape[1], LANES):
        tile = x[:, start : start + LANES]
        bits = scale_bits(jnp.max(jnp.abs(tile), axis=1, keepdims=True), fmt)
        scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
        tiles.append(round_to_grid(tile, bits, fmt) * scale)
    return jnp.concatenate(tiles, axis=1)


def block_max(magnitude, block):
    """[rows, lanes] -> [lanes / block, rows]"""
    rows, width = magnitude.shape
    return jnp.max(magnitude.T.reshape(width // block, block, rows), axis=1)


def over_lanes(exponent, block):
    """[lanes / block, rows] -> [rows, lanes]"""
    num_blocks, rows = exponent.shape
    spread = jnp.broadcast_to(exponent[:, None], (num_blocks, block, rows))
    return spread.reshape(num_blocks * block, rows).T


def scale_bits(amax, fmt):
    """The scale of blocks with these maxima: a power of two, as the bits of its float32."""
    largest, floor, _, _ = _FORMATS[fmt]
    ratio = jnp.maximum(amax, jnp.float32(floor)) * jnp.float32(1 / largest)
    bits = jax.lax.bitcast_convert_type(ratio, jnp.int32)
    return (bits + 0x7FFFFF) & 0x7F800000  # up to the next power of two


def round_to_grid(x, scale_bits, fmt):
    """x / scale rounded to the nearest value of the format, as float32."""
    _, _, least_exponent, mantissa_bits = _FORMATS[fmt]
    x *= jax.lax.bitcast_convert_type((254 << 23) - scale_bits, jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    exponent = jnp.maximum(bits & 0x7F800000, (127 + least_exponent) << 23)
    # 1.5 * 2**23 steps: the sum's last bit is one step.
    large = jax.lax.bitcast_convert_type(
        exponent + ((23 - mantissa_bits << 23) + (1 << 22)), jnp.float32
    )
    rounded = jax.lax.bitcast_convert_type((x + large) - large, jnp.int32)
    sign = bits & jnp.int32(-(1 << 31))  # of a value that became zero, too
    return jax.lax.bitcast_convert_type(rounded | sign, jnp.float32)


def e2m1_codes(values):
    """float32 values of e2m1 -> codes 0..15; zero of either sign is code 0."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    # From 1 on, a code is the float's exponent and first mantissa bit, counted from those of 0.5.
    code = jnp.where(magnitude == 126 << 23, 1, jnp.maximum((magnitude >> 22) - 252, 0))
    return jnp.where(code == 0, 0, code | (bits >> 28) & 8)
