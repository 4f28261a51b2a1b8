"""Rows of attention's heads, finished in one pass: norm, rotation, rounding.

    norm      "rms"    x / rms(x), times weights where there are any; float32, then the dtype of x
              "steps"  x / rms(x), every step of it rounded to the dtype of x
    rotation  the last channels in interleaved pairs, by the angles of a row's position
    rounding  "rows"   the channels that are not rotated, as `records.KV_ROWS` says
              "keys"   all channels after a Hadamard transform, as `records.INDEX_KEYS` says

Each is optional, and they come in this order. Queries, key-value rows, compressed rows, the indexer's
queries and keys, and the output of attention (rotated back) are all made so; norms alone are too.

Why a kernel: of one token XLA makes seven to twelve operations of them, each of which takes longer to
start than to run, since pairs of channels that lie side by side are no axis of a TPU's registers. Here
a channel's neighbour comes by turning lanes, once to either side.

Source: report section 2.3; released `inference/model.py` (apply_rotary_emb, RMSNorm, Attention) and
`kernel.py` (act_quant, fp4_act_quant).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from pallas_kernels import dispatch
from pallas_kernels.formats.quantize import cast, hadamard, hadamard_matrix, rounded_to
from pallas_kernels.formats.quantize_rows import (
    block_max,
    over_lanes,
    round_rows,
    round_to_grid,
    scale_bits,
)
from pallas_kernels.formats.records import INDEX_KEYS, KV_ROWS, Format

LANES = 128
BLOCK_VALUES = 1 << 19  # of a program: 1 MiB of bfloat16
GROUP_VALUES = 1 << 15  # handled at once
ROW_TILE = 16  # rows of a tile of 16-bit values
MOST_CHANNELS = 1 << 13
_FORMATS = {"rows": KV_ROWS, "keys": INDEX_KEYS}


@dataclasses.dataclass(frozen=True)
class Steps:
    """What is done to rows, but for the rotation. Hashable."""

    norm: str | None = None  # "rms" or "steps"
    eps: float = 0.0  # of the norm
    rounding: str | None = None  # "rows" or "keys"

    def __post_init__(self):
        if self.norm not in (None, "rms", "steps"):
            raise ValueError(f'norm={self.norm!r}: expected "rms", "steps" or None.')
        if self.rounding not in (None, *_FORMATS):
            raise ValueError(f'rounding={self.rounding!r}: expected "rows", "keys" or None.')


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions"],
    meta_fields=["frequencies", "inverse"],
)
@dataclasses.dataclass(frozen=True)
class Turn:
    """By which angles rows are rotated. A token's heads share them."""

    positions: jax.Array  # [B, T] int32
    frequencies: tuple[float, ...]  # [rope / 2] float32: angle of a position
    inverse: bool = False  # back

    @property
    def rope(self) -> int:
        """Channels that are rotated."""
        return 2 * len(self.frequencies)

    def pairs(self) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines [B, T, rope / 2] float32."""
        return self._of(np.asarray(self.frequencies, np.float32))

    def lanes(self) -> tuple[jax.Array, jax.Array]:
        """The same for each of the last `LANES` channels, [B, T, LANES]; what is not turned has any."""
        both = np.repeat(np.asarray(self.frequencies, np.float32), 2)
        return self._of(np.pad(both, (LANES - self.rope, 0)))

    def _of(self, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
        angles = self.positions[..., None].astype(jnp.float32) * frequencies
        sin = jnp.sin(angles)
        return jnp.cos(angles), -sin if self.inverse else sin


@dispatch.operation
def finish_rows(
    x: Float[jax.Array, "B T *heads H"],
    weight: Float[jax.Array, " H"] | None = None,  # of the norm
    turn: Turn | None = None,
    *,
    steps: Steps = Steps(),
    implementation: dispatch.Implementation = None,
) -> Float[jax.Array, "B T *heads H"]:  # in the dtype of x
    """Rows after norm, rotation and rounding. Differentiable in x and weight; of rounding as if it
    did nothing.

    Args:
      steps: which norm and rounding.
      implementation: see `dispatch.choose`; "xla" is the specification, too.

    Raises:
      ValueError: shapes do not agree, or an implementation that cannot run.
    """
    if x.ndim not in (3, 4) or (weight is not None and weight.shape != x.shape[-1:]):
        shape = None if weight is None else weight.shape
        raise ValueError(f"x {x.shape} must be [B, T, H] or [B, T, N, H], and weight {shape} [H].")
    rope = 0 if turn is None else turn.rope
    if turn is not None and (turn.positions.shape != x.shape[:2] or rope > x.shape[-1]):
        raise ValueError(
            f"positions {turn.positions.shape} must be [B, T] of x {x.shape}, and {rope} channels "
            f"that are rotated no more than its {x.shape[-1]}."
        )
    chosen = dispatch.choose(implementation, unsupported=_unsupported(x, rope, steps))
    if chosen in ("tpu", "interpret"):
        lanes = None if turn is None else turn.lanes()
        return _kernel_form(x, weight, lanes, steps, rope, chosen == "interpret")
    pairs = None if turn is None else turn.pairs()
    return _xla(x, weight, pairs, steps, implementation)


# XLA ----------------------------------------------------------------------------------------------


def _xla(x, weight, pairs, steps: Steps, implementation: dispatch.Implementation) -> jax.Array:
    if steps.norm == "rms":
        normal = rms_normalize(x, steps.eps)
        if weight is not None:
            normal = weight.astype(jnp.float32) * normal
        x = cast(normal, x.dtype)
    elif steps.norm == "steps":
        square = cast(jnp.square(x.astype(jnp.float32)), x.dtype).astype(jnp.float32)
        mean = cast(jnp.mean(square, axis=-1, keepdims=True), x.dtype).astype(jnp.float32)
        inverse = cast(jax.lax.rsqrt(cast(mean + steps.eps, x.dtype).astype(jnp.float32)), x.dtype)
        x = cast(x.astype(jnp.float32) * inverse.astype(jnp.float32), x.dtype)
    if pairs is not None:
        x = _rotated(x, *pairs)
    if steps.rounding == "rows":
        nope = x.shape[-1] - (0 if pairs is None else 2 * pairs[0].shape[-1])
        rounded = _round(x[..., :nope], KV_ROWS, implementation)
        x = jnp.concatenate([rounded, x[..., nope:]], axis=-1)
    elif steps.rounding == "keys":
        x = _round(hadamard(x), INDEX_KEYS, implementation)
    return x


def rms_normalize(x: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def _rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The last channels turned in interleaved pairs; float32 inside."""
    dim = 2 * cos.shape[-1]
    cos, sin = (jnp.expand_dims(y, tuple(range(2, x.ndim - 1))) for y in (cos, sin))
    tail = x[..., -dim:].astype(jnp.float32).reshape(*x.shape[:-1], dim // 2, 2)
    a, b = tail[..., 0], tail[..., 1]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    turned = cast(turned.reshape(*x.shape[:-1], dim), x.dtype)
    return jnp.concatenate([x[..., :-dim], turned], axis=-1)


def _round(x: jax.Array, to: Format, implementation: dispatch.Implementation) -> jax.Array:
    return round_rows(x, to.values, to.block, implementation=implementation)


# The kernel ---------------------------------------------------------------------------------------


def _unsupported(x, rope: int, steps: Steps) -> str | None:
    width = x.shape[-1]
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x is {x.dtype}: the kernel takes float32 or bfloat16"
    if not x.size or width % LANES or width > MOST_CHANNELS:
        return (
            f"x {x.shape}: the kernel takes rows of whole {LANES} channels, {MOST_CHANNELS} at most"
        )
    if rope > LANES:
        return f"{rope} channels are rotated: the kernel rotates {LANES} at most"
    if steps.rounding == "rows" and rope % KV_ROWS.block:
        return f"{rope} channels are rotated: the kernel rounds others in whole {KV_ROWS.block}"
    if steps.rounding == "keys" and width != LANES:
        return f"keys of {width} channels: the kernel transforms {LANES}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _kernel_form(x, weight, lanes, steps, rope, interpret):
    return _call(x, weight, lanes, steps, rope, interpret)


def _fwd(x, weight, lanes, steps, rope, interpret):
    return _call(x, weight, lanes, steps, rope, interpret), (x, weight, lanes)


def _bwd(steps, rope, interpret, residuals, cotangent):
    """By XLA, which computes the rows again."""
    x, weight, lanes = residuals
    pairs = jax.tree.map(lambda y: y[..., LANES - rope :: 2], lanes)
    _, vjp = jax.vjp(lambda x, w: _xla(x, w, pairs, steps, "xla"), x, weight)
    return (*vjp(cotangent), jax.tree.map(jnp.zeros_like, lanes))


_kernel_form.defvjp(_fwd, _bwd)


def blocks(tokens: int, heads: int, width: int) -> tuple[int, int, int]:
    """Tokens and heads of a program, and heads that are handled at once."""
    group = max(GROUP_VALUES // width // ROW_TILE, 1) * ROW_TILE
    if heads <= group:
        group = own = heads
    else:
        own = min(BLOCK_VALUES // width, heads) // group * group
    return min(tokens, max(1, BLOCK_VALUES // (own * width))), own, group


def _call(x, weight, lanes, steps: Steps, rope: int, interpret: bool) -> jax.Array:
    """Where a token has one row, all tokens' rows lie together, as heads of a token do otherwise."""
    width, has_heads = x.shape[-1], x.ndim == 4
    heads = x.shape[2] if has_heads else 1
    tokens = x.size // (heads * width)
    if has_heads:
        shape: tuple[int, ...] = (tokens, heads, width)
        own_tokens, own_rows, group = blocks(tokens, heads, width)
        grid = (pl.cdiv(tokens, own_tokens), pl.cdiv(heads, own_rows))
        spec = pl.BlockSpec((own_tokens, own_rows, width), lambda i, j: (i, j, 0))
        turn_spec = pl.BlockSpec((own_tokens, 1, LANES), lambda i, j: (i, 0, 0))
        turn_shape: tuple[int, ...] = (tokens, 1, LANES)
    else:
        shape = (tokens, width)
        _, own_rows, group = blocks(1, tokens, width)
        grid = (1, pl.cdiv(tokens, own_rows))
        spec = pl.BlockSpec((own_rows, width), lambda i, j: (j, 0))
        turn_spec = pl.BlockSpec((own_rows, LANES), lambda i, j: (j, 0))
        turn_shape = (tokens, LANES)
    args, in_specs = [x.reshape(shape)], [spec]
    if weight is not None:
        args.append(weight)
        in_specs.append(pl.BlockSpec((width,), lambda i, j: (0,)))
    if lanes is not None:
        args += [y.reshape(turn_shape) for y in lanes]
        in_specs += [turn_spec, turn_spec]
    moved = 2 * x.dtype.itemsize * x.size
    out = pl.pallas_call(
        functools.partial(_kernel, steps, group, rope, weight is not None),
        grid=grid,
        in_specs=in_specs,
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(flops=20 * x.size, transcendentals=0, bytes_accessed=moved),
        interpret=interpret,
        name="finish_rows",
    )(*args)
    return out.reshape(x.shape)


def _kernel(steps: Steps, group: int, rope: int, is_weighted: bool, x_ref, *refs) -> None:
    *others, out_ref = refs
    weight_ref = others[0] if is_weighted else None
    turn_refs = others[is_weighted:]  # cosines and sines, if rows are rotated
    groups = x_ref.shape[-2] // group

    def one(i, carry):
        rows = pl.ds(pl.multiple_of(i % groups * group, group), group)
        at = (rows,) if x_ref.ndim == 2 else (i // groups, rows)
        turns = [ref[at] if ref.ndim == 2 else ref[i // groups] for ref in turn_refs]
        x = x_ref[at].astype(jnp.float32)
        weight = None if weight_ref is None else weight_ref[...].astype(jnp.float32)[None]
        tiles = _finished(x, weight, turns, steps, rope, out_ref.dtype)
        for tile, value in enumerate(tiles):
            out_ref[(*at, slice(tile * LANES, (tile + 1) * LANES))] = value.astype(out_ref.dtype)
        return carry

    jax.lax.fori_loop(0, groups * (1 if x_ref.ndim == 2 else x_ref.shape[0]), one, ())


def _finished(x, weight, turns, steps: Steps, rope: int, dtype) -> list[jax.Array]:
    """Tiles of 128 channels of float32 rows [n, H], which are rounded to `dtype` where XLA's are."""
    if steps.norm == "rms":
        x = rms_normalize(x, steps.eps)
        x = rounded_to(x if weight is None else weight * x, dtype)
    elif steps.norm == "steps":
        mean = jnp.mean(rounded_to(jnp.square(x), dtype), axis=-1, keepdims=True)
        mean = rounded_to(rounded_to(mean, dtype) + steps.eps, dtype)
        x = rounded_to(x * rounded_to(jax.lax.rsqrt(mean), dtype), dtype)
    tiles = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
    lane = jax.lax.broadcasted_iota(jnp.int32, tiles[-1].shape, 1)
    if turns:
        cos, sin = turns
        tail = tiles[-1]
        before, after = pltpu.roll(tail, 1, 1), pltpu.roll(tail, LANES - 1, 1)
        turned = tail * cos + jnp.where(lane % 2 == 0, -after, before) * sin
        tiles[-1] = jnp.where(lane < LANES - rope, tail, rounded_to(turned, dtype))
    if steps.rounding == "rows":
        *whole, tail = tiles
        tiles = [_rounded(tile, KV_ROWS) for tile in whole]
        tiles.append(jnp.where(lane < LANES - rope, _rounded(tail, KV_ROWS), tail))
    elif steps.rounding == "keys":
        matrix = hadamard_matrix(LANES)
        (tile,) = tiles
        product = jax.lax.dot(tile, matrix, precision=jax.lax.Precision.HIGHEST)
        tiles = [_rounded(rounded_to(product, dtype), INDEX_KEYS)]
    return tiles


def _rounded(tile: jax.Array, to: Format) -> jax.Array:
    """float32 [n, 128] rounded in blocks of lanes."""
    magnitude = jnp.abs(tile)
    if tile.shape[0] % LANES == 0:  # whole registers, turned over: maxima of sublanes
        bits = over_lanes(scale_bits(block_max(magnitude, to.block), to.values), to.block)
        return _scaled(tile, bits, to)
    lane = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 1)
    largest = jnp.zeros_like(tile)
    for first in range(0, LANES, to.block):
        mine = (lane >= first) & (lane < first + to.block)
        amax = jnp.max(jnp.where(mine, magnitude, 0.0), axis=1, keepdims=True)
        largest = jnp.where(mine, amax, largest)
    return _scaled(tile, scale_bits(largest, to.values), to)


def _scaled(tile: jax.Array, bits: jax.Array, to: Format) -> jax.Array:
    """Rounded, with scales of these bits [n, 128]."""
    return round_to_grid(tile, bits, to.values) * jax.lax.bitcast_convert_type(bits, jnp.float32)
