"""Gated pooling: the weighted mean of a window of token rows, with one softmax per channel.

    pooled[d] = sum_r exp(gate[r, d]) * value[r, d] / sum_r exp(gate[r, d])

Both compressors of DeepSeek-V4 are this operation (report eqs. 9-14). It is kept in three parts,
like a streaming softmax, because a window is not always seen at once: a CSA entry joins two windows
(the previous one through other channels), and while decoding a window fills one token at a time.

    pool_windows   rows of each window -> partial sums of it
    Pool.join      partial sums of two disjoint sets of rows -> partial sums of their union
    Pool.mean      partial sums -> pooled value

All of it is float32. An empty window has `weight` zero and joins as nothing.

Why a kernel for `pool_windows`: the op is bound by reading `value` and `gate`, and XLA reads the
gates twice (for the peaks, then for the weights) and copies both where the R rows of a window do
not fill whole tiles. The kernel takes the rows as they come from the projections, [B * S * R, F].
A window of few rows is read with a stride of R, so that row r of eight windows is one register and
the sums go over registers; a window of a multiple of 8 rows is summed over its own registers.

Grid: (windows / block, F / block). The backward pass recomputes the weights, in XLA.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float

from pallas_kernels import dispatch

BLOCK_VALUES = 1 << 19  # of a program: value and gate are 2 MiB each
TILED_CHANNELS = 512
STRIDED_CHANNELS = 128  # loads with a stride need arrays of one tile's width
GROUP_WINDOWS = 32  # windows of few rows handled at once
SUBLANES, LANES = 8, 128
LOWEST = -1e30  # finite, so that the difference of two empty windows is not NaN


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["peak", "weight", "total"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Pool:
    """Partial sums of a gated mean. All float32, any common shape."""

    peak: jax.Array  # largest gate seen
    weight: jax.Array  # sum of exp(gate - peak)
    total: jax.Array  # sum of exp(gate - peak) * value

    @staticmethod
    def empty(shape: tuple[int, ...]) -> "Pool":
        """The partial sums of no rows."""
        # Three buffers: a cache is donated, and a buffer can be donated once.
        peak = jnp.full(shape, LOWEST, jnp.float32)
        return Pool(peak, jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

    def join(self, other: "Pool") -> "Pool":
        """The partial sums of the rows of both."""
        if dispatch.target_platform() != "cpu":
            return joined(self, other)
        # The same numbers; an exp is much code there.
        is_mine, less = self.peak >= other.peak, jnp.exp(-jnp.abs(self.peak - other.peak))
        mine, theirs = jnp.where(is_mine, 1.0, less), jnp.where(is_mine, less, 1.0)
        return _added(self, other, mine, theirs)

    def mean(self) -> jax.Array:
        """The pooled value; zero where no row was seen."""
        return self.total / jnp.where(self.weight == 0, 1.0, self.weight)


def joined(one: Pool, other: Pool) -> Pool:
    """`Pool.join`, in kernels too."""
    peak = jnp.maximum(one.peak, other.peak)
    return _added(one, other, jnp.exp(one.peak - peak), jnp.exp(other.peak - peak))


def _added(one: Pool, other: Pool, factor: jax.Array, other_factor: jax.Array) -> Pool:
    return Pool(
        jnp.maximum(one.peak, other.peak),
        factor * one.weight + other_factor * other.weight,
        factor * one.total + other_factor * other.total,
    )


@dispatch.operation
def pool_windows(
    value: Float[jax.Array, "B S R F"],
    gate: Float[jax.Array, "B S R F"],
    bias: Float[jax.Array, "R F"],  # added to the gates of each window
    valid: Bool[jax.Array, "B S R"] | None = None,  # rows that count (default: all)
    *,
    implementation: dispatch.Implementation = None,
) -> Pool:  # of [B, S, F]
    """Partial sums of S windows of R token rows each. Differentiable in value, gate and bias.

    Args:
      implementation: see `dispatch.choose`; "xla" is the specification, too.

    Raises:
      ValueError: shapes do not agree, or an implementation that cannot run.
    """
    if value.ndim != 4 or value.shape != gate.shape or bias.shape != value.shape[2:]:
        raise ValueError(
            f"value {value.shape} and gate {gate.shape} must both be [B, S, R, F] and bias "
            f"{bias.shape} [R, F]."
        )
    if valid is not None and valid.shape != value.shape[:3]:
        raise ValueError(f"valid {valid.shape} must be [B, S, R] = {value.shape[:3]}.")
    chosen = dispatch.choose(implementation, unsupported=_unsupported(value, gate))
    if chosen in ("xla", "reference"):
        return _pool_xla(value, gate, bias, valid)
    return _pool_kernel(value, gate, bias, valid, chosen == "interpret")


def _pool_xla(value, gate, bias, valid):
    gate = gate.astype(jnp.float32) + bias
    if valid is not None:
        gate = jnp.where(valid[..., None], gate, LOWEST)
    peak = jnp.max(gate, axis=2)
    weights = jnp.exp(gate - peak[:, :, None])
    if valid is not None:  # a window without any valid row has exp(0) everywhere
        weights = jnp.where(valid[..., None], weights, 0.0)
    return Pool(
        peak, jnp.sum(weights, axis=2), jnp.sum(weights * value.astype(jnp.float32), axis=2)
    )


def _unsupported(value, gate) -> str | None:
    if (value.dtype, gate.dtype) != (jnp.float32, jnp.float32):
        return f"value is {value.dtype} and gate {gate.dtype}: the kernel takes float32"
    *_, num_rows, width = value.shape
    if not value.size or width % LANES or num_rows > LANES:
        return (
            f"windows {value.shape}: the kernel takes whole blocks of {LANES} channels and up to "
            f"{LANES} rows"
        )
    return None


def blocks(num_windows: int, num_rows: int, width: int) -> tuple[int, int]:
    """Windows and channels of a program."""
    if num_rows % SUBLANES == 0:
        channels = next(c for c in (TILED_CHANNELS, 2 * LANES, LANES) if width % c == 0)
        unit = SUBLANES
    else:
        channels, unit = STRIDED_CHANNELS, GROUP_WINDOWS
    most = BLOCK_VALUES // channels // num_rows // unit * unit
    return min(most, pl.cdiv(num_windows, unit) * unit), channels


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _pool_kernel(value, gate, bias, valid, interpret):
    batch, windows, num_rows, width = value.shape
    total = batch * windows
    tiled = num_rows % SUBLANES == 0
    block, channels = blocks(total, num_rows, width)
    rows = pl.BlockSpec((block * num_rows, channels), lambda i, j: (i, j))
    in_specs = [rows, rows, pl.BlockSpec((num_rows, channels), lambda i, j: (0, j))]
    args = [value.reshape(-1, width), gate.reshape(-1, width), bias.astype(jnp.float32)]
    if valid is not None:  # a column per row of a window; per window where its rows are tiles
        valid = valid.reshape(total, num_rows).astype(jnp.float32)
        if tiled:
            valid = jnp.pad(valid, ((0, -total % block), (0, 0)))
            args.append(valid.reshape(-1, block, num_rows).swapaxes(1, 2))
            in_specs.append(pl.BlockSpec((None, num_rows, block), lambda i, j: (i, 0, 0)))
        else:
            args.append(valid)
            in_specs.append(pl.BlockSpec((block, num_rows), lambda i, j: (i, 0)))
    sums = pl.pallas_call(
        functools.partial(_tiled_kernel if tiled else _strided_kernel, masked=valid is not None),
        grid=(pl.cdiv(total, block), width // channels),
        in_specs=in_specs,
        out_specs=[pl.BlockSpec((block, channels), lambda i, j: (i, j))] * 3,
        out_shape=[jax.ShapeDtypeStruct((total, width), jnp.float32)] * 3,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=6 * value.size,
            transcendentals=value.size,
            bytes_accessed=8 * value.size + 12 * total * width,
        ),
        interpret=interpret,
        name="pool_windows",
    )(*args)
    return Pool(*(x.reshape(batch, windows, width) for x in sums))


def _strided_kernel(value_ref, gate_ref, bias_ref, *refs, masked):
    """Windows of few rows: row r of a group of windows is one strided load."""
    valid_ref: Any = refs[0] if masked else None
    peak_ref, weight_ref, total_ref = refs[-3:]
    num_rows = bias_ref.shape[0]
    group = GROUP_WINDOWS

    @pl.loop(0, peak_ref.shape[0] // group)
    def _(i):
        here = pl.ds(pl.multiple_of(i * group, group), group)
        gates, valid = [], []
        for r in range(num_rows):
            gate = gate_ref[pl.ds(i * group * num_rows + r, group, stride=num_rows)]
            gates.append(gate + bias_ref[pl.ds(r, 1)])
            if masked:
                valid.append(valid_ref[here, r : r + 1])
                gates[r] = jnp.where(valid[r] > 0, gates[r], LOWEST)
        peak = functools.reduce(jnp.maximum, gates)
        weight = total = jnp.zeros_like(peak)
        for r in range(num_rows):
            w = jnp.exp(gates[r] - peak)
            if masked:
                w *= valid[r]
            weight += w
            total += w * value_ref[pl.ds(i * group * num_rows + r, group, stride=num_rows)]
        peak_ref[here], weight_ref[here], total_ref[here] = peak, weight, total


def _tiled_kernel(value_ref, gate_ref, bias_ref, *refs, masked):
    """Windows of whole tiles, one after the other."""
    valid_ref: Any = refs[0] if masked else None
    out_refs = refs[-3:]
    num_rows = bias_ref.shape[0]
    for i in range(out_refs[0].shape[0]):
        rows = pl.ds(i * num_rows, num_rows)
        gate = gate_ref[rows] + bias_ref[...]
        if masked:
            valid = valid_ref[:, i : i + 1]
            gate = jnp.where(valid > 0, gate, LOWEST)
        peak = jnp.max(gate, axis=0, keepdims=True)
        weights = jnp.exp(gate - peak)
        if masked:
            weights *= valid
        weight = jnp.sum(weights, axis=0, keepdims=True)
        total = jnp.sum(weights * value_ref[rows], axis=0, keepdims=True)
        for ref, x in zip(out_refs, (peak, weight, total)):
            ref[pl.ds(i, 1)] = x


def _fwd(value, gate, bias, valid, interpret):
    return _pool_kernel(value, gate, bias, valid, interpret), (value, gate, bias, valid)


def _bwd(interpret, residuals, cotangents):
    value, gate, bias, valid = residuals
    _, vjp = jax.vjp(lambda v, g, b: _pool_xla(v, g, b, valid), value, gate, bias)
    return (*vjp(cotangents), None)


_pool_kernel.defvjp(_fwd, _bwd)
