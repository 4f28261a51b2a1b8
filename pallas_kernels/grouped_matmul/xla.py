"""Grouped matmul in plain XLA: a loop over tiles of rows that belong to one expert.

Only experts that have rows are touched, and only one expert's weights are unpacked at a time. A
tile may have rows of other experts after its own, or, where it would reach past the last row and is
moved up, before them; those keep what the results had there.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compact
from pallas_kernels.formats.quantize import QuantizedArray, cast
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.grouped_matmul.reference import swiglu

MAX_TILE = 256
MIN_TILE = 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x, w, group_sizes, in_fp8=False):
    """See `ops.grouped_matmul`."""
    tiles = _Tiles(x, group_sizes)

    def tile(i, out):
        return tiles.put(out, i, tiles.product(tiles.rows(x, i), w, i, in_fp8))

    return tiles.loop(tile, jnp.zeros((x.shape[0], w.shape[-1]), x.dtype))


def _matmul_fwd(x, w, group_sizes, in_fp8):
    return grouped_matmul(x, w, group_sizes, in_fp8), (x, w, group_sizes)


def _matmul_bwd(in_fp8, residuals, d_out):
    x, w, group_sizes = residuals
    tiles = _Tiles(x, group_sizes)

    def tile(i, carry):
        d_x, d_w = carry
        d_rows = tiles.rows(d_out, i)
        d_x = tiles.put(d_x, i, _dot(d_rows, tiles.weight(w, i, d_rows.dtype).T))
        return d_x, tiles.add_weight(d_w, i, tiles.rows(x, i), d_rows)

    d_x, d_w = tiles.loop(tile, (jnp.zeros_like(x), _weight_gradient(w)))
    return d_x, _cast_like(d_w, w), None


grouped_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def grouped_swiglu(x, w_gate, w_up, group_sizes, row_weights, limit, in_fp8=False):
    """See `ops.grouped_swiglu`."""
    tiles = _Tiles(x, group_sizes)

    def tile(i, out):
        rows = tiles.rows(x, i)
        gate = cast(tiles.product(rows, w_gate, i, in_fp8), x.dtype)
        up = cast(tiles.product(rows, w_up, i, in_fp8), x.dtype)
        hidden = tiles.rows(row_weights, i)[:, None] * swiglu(gate, up, limit)
        return tiles.put(out, i, hidden)

    return tiles.loop(tile, jnp.zeros((x.shape[0], w_gate.shape[-1]), x.dtype))


def _swiglu_fwd(x, w_gate, w_up, group_sizes, row_weights, limit, in_fp8):
    out = grouped_swiglu(x, w_gate, w_up, group_sizes, row_weights, limit, in_fp8)
    return out, (x, w_gate, w_up, group_sizes, row_weights)


def _swiglu_bwd(limit, in_fp8, residuals, d_out):
    x, w_gate, w_up, group_sizes, row_weights = residuals
    tiles = _Tiles(x, group_sizes)

    def tile(i, carry):
        d_x, d_gate, d_up, d_weights = carry
        rows, d_rows = tiles.rows(x, i), tiles.rows(d_out, i).astype(jnp.float32)
        gate_w, up_w = tiles.weight(w_gate, i, x.dtype), tiles.weight(w_up, i, x.dtype)
        hidden, pull = jax.vjp(
            lambda gate, up: swiglu(gate, up, limit), _dot(rows, gate_w), _dot(rows, up_w)
        )
        d_weights = tiles.put(d_weights, i, jnp.sum(hidden * d_rows, axis=-1))
        g, u = (d.astype(x.dtype) for d in pull(tiles.rows(row_weights, i)[:, None] * d_rows))
        d_x = tiles.put(d_x, i, _dot(g, gate_w.T) + _dot(u, up_w.T))
        d_gate = tiles.add_weight(d_gate, i, rows, g)
        return d_x, d_gate, tiles.add_weight(d_up, i, rows, u), d_weights

    d_x, d_gate, d_up, d_weights = tiles.loop(
        tile,
        (
            jnp.zeros_like(x),
            _weight_gradient(w_gate),
            _weight_gradient(w_up),
            jnp.zeros_like(row_weights),
        ),
    )
    d_gate, d_up = _cast_like(d_gate, w_gate), _cast_like(d_up, w_up)
    return d_x, d_gate, d_up, None, d_weights


grouped_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


class _Tiles:
    """Row tiles of the groups: each has one expert, a first row and a range of rows of its own."""

    def __init__(self, x, group_sizes):
        num_rows, num_groups = x.shape[0], group_sizes.shape[0]
        mean = max(num_rows // num_groups, 1)
        size = min(MAX_TILE, max(MIN_TILE, 1 << (mean - 1).bit_length()))
        self.size = min(size, num_rows)
        per_group = -(-group_sizes // max(self.size, 1))
        last_tile, last_row = compact.running_sum(jnp.stack([per_group, group_sizes]))
        self.count = last_tile[-1]
        index = jnp.arange(-(-num_rows // max(self.size, 1)) + num_groups)
        expert = jnp.sum(last_tile <= index[:, None], axis=1, dtype=jnp.int32)
        self.expert = jnp.minimum(expert, num_groups - 1)
        firsts = jnp.stack([last_tile - per_group, last_row - group_sizes, last_row])
        first_tile, first_row, self.end = jnp.take(firsts, self.expert, axis=1, mode="clip")
        self.own = first_row + (index - first_tile) * self.size
        self.start = jnp.minimum(self.own, num_rows - self.size)

    def rows(self, x, i):
        return jax.lax.dynamic_slice_in_dim(x, self.start[i], self.size)

    def is_own(self, i):
        row = self.start[i] + jnp.arange(self.size)
        return (row >= self.own[i]) & (row < self.end[i])

    def put(self, out, i, rows):
        is_own = self.is_own(i).reshape(-1, *[1] * (rows.ndim - 1))
        rows = jnp.where(is_own, cast(rows, out.dtype), self.rows(out, i))
        return jax.lax.dynamic_update_slice_in_dim(out, rows, self.start[i], 0)

    def product(self, rows, w, i, in_fp8):
        if in_fp8:
            return fp8_matmul(rows, _expert(w, self.expert[i]))
        return _dot(rows, self.weight(w, i, rows.dtype))

    def weight(self, w, i, dtype):
        w = _expert(w, self.expert[i])
        return w.dequantize(dtype) if isinstance(w, QuantizedArray) else w.astype(dtype)

    def add_weight(self, d_w, i, rows, d_rows):
        if d_w is None:
            return None
        d_rows = jnp.where(self.is_own(i)[:, None], d_rows, 0)
        return d_w.at[self.expert[i]].add(_dot(rows.T, d_rows))

    def loop(self, body, init):
        return jax.lax.fori_loop(0, self.count, body, init)


def _expert(w, index):
    """One expert's weights.

    To take a part of an 8-bit float array, XLA on a CPU widens all of it. So the part is taken of
    its bytes, behind a barrier, or they would be copied before the loop.
    """

    def one(x):
        if x.dtype.itemsize > 1 or not jnp.issubdtype(x.dtype, jnp.floating):
            return x[index]
        inside, at = jax.lax.optimization_barrier((x, index))
        part = jax.lax.bitcast_convert_type(inside, jnp.uint8)[at]
        return jax.lax.bitcast_convert_type(part, x.dtype)

    return jax.tree.map(one, w)


def _weight_gradient(w):
    """Zeros to add gradients to, in float32; quantised weights are frozen and have none."""
    return None if isinstance(w, QuantizedArray) else jnp.zeros(w.shape, jnp.float32)


def _cast_like(d_w, w):
    return None if d_w is None else d_w.astype(w.dtype)


def _dot(a, b):
    """float32 product of [m, k] and [k, n]."""
    wide = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=wide, preferred_element_type=jnp.float32)
