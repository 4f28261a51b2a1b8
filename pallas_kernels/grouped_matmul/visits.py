"""Which tile of rows meets which expert, in the order the kernels go through them.

Rows are sorted by expert, so an expert's rows are a range. A tile of rows that has rows of several
experts is visited once for each, one after another, and each visit keeps what the others wrote.
Experts without rows are not visited (for the gradient of the weights they are, to be zeroed).
Rows past the last expert's, should there be any, are visited with an empty range, and become zero.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.grouped_matmul import order


class Visits(NamedTuple):
    """Scalars the kernels prefetch; `count` is the bound of their grid."""

    # [] how many visits there are; takes the place of a tuple's method.
    count: jax.Array  # type: ignore[assignment]
    expert: jax.Array  # [V] whose weights
    tile: jax.Array  # [V] which rows of x
    start: jax.Array  # [V] first row of the expert
    end: jax.Array  # [V] after its last row; `start` for a visit that only zeroes


def max_visits(num_rows: int, num_groups: int, rows: int) -> int:
    """The most visits there can be with tiles of `rows` rows."""
    return -(-num_rows // rows) + num_groups


def tiled(group_sizes: jax.Array, num_rows: int, rows: int, *, visit_empty: bool = False) -> Visits:
    """Visits of the tiles [i * rows, (i + 1) * rows)."""
    num_tiles = -(-num_rows // rows)
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    first = jnp.minimum(starts // rows, num_tiles - 1)
    has_rows = group_sizes > 0
    counts = jnp.where(has_rows, -(-ends // rows) - first, int(visit_empty))
    # One more group: tiles in which no expert has rows.
    total = ends[-1:]
    unvisited = 0 * total if visit_empty else num_tiles - -(-total // rows)
    first = jnp.concatenate([first, -(-total // rows)])
    starts, ends = jnp.concatenate([starts, total]), jnp.concatenate([ends, total])
    size = max_visits(num_rows, group_sizes.shape[0], rows)
    counts = jnp.concatenate([counts, unvisited])
    last = jnp.cumsum(counts)
    index = jnp.arange(size, dtype=jnp.int32)
    group = jnp.sum(last[None, :] <= index[:, None], axis=1)  # few groups: no search
    group = jnp.minimum(group, counts.shape[0] - 1)
    tile = first[group] + index - (last - counts)[group]
    expert = jnp.minimum(group, group_sizes.shape[0] - 1)
    scalars = (last[-1], expert, tile, starts[group], ends[group])
    return Visits(*(s.astype(jnp.int32) for s in scalars))


def from_first_rows(
    group_sizes: jax.Array, num_rows: int, rows: int, *, interpret: bool = False
) -> Visits:
    """Visits of `rows` rows from an expert's first, whatever it is; `tile` is the row it starts at.

    A visit's last rows may be of the next expert, which comes next, or past the end. There is one
    visit at least, as a grid must not be empty. By a kernel: few numbers, of which XLA makes some 25
    operations.
    """
    num_groups = group_sizes.shape[0]
    size = max_visits(num_rows, num_groups, rows)
    found = pl.pallas_call(
        functools.partial(_kernel, rows),
        out_shape=[jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (1, *[size] * 4)],
        interpret=interpret,
        name="list_visits",
    )(group_sizes.reshape(1, -1).astype(jnp.int32))
    total, *lists = (x.reshape(-1) for x in found)
    return Visits(total[0], *lists)


def _kernel(rows: int, sizes_ref, count_ref, *visit_refs) -> None:
    expert_ref, tile_ref, start_ref, end_ref = visit_refs
    sizes = sizes_ref[...]  # [1, E]
    one, other = order.places(sizes.shape[1], sizes.shape[1])

    def sum_before(x, is_before):  # [1, E] -> [E, 1]
        return jnp.sum(jnp.where(is_before, x, 0), axis=1, keepdims=True)

    counts = (sizes + (rows - 1)) >> (rows.bit_length() - 1)
    expert = jax.lax.broadcasted_iota(jnp.int32, sizes.shape, 1)
    counts += jnp.where((expert == 0) & (jnp.sum(sizes) == 0), 1, 0)
    count_ref[...] = jnp.sum(counts, axis=1, keepdims=True)
    first, last = sum_before(counts, other < one), sum_before(counts, other <= one)
    start, end = sum_before(sizes, other < one), sum_before(sizes, other <= one)
    group, visit = order.places(sizes.shape[1], expert_ref.shape[1])
    chosen = jnp.minimum(order.count(last <= visit, 0), sizes.shape[1] - 1)  # few: no search
    expert_ref[...] = chosen

    def pick(x):  # [E, 1] -> [1, V]
        return jnp.sum(jnp.where(group == chosen, x, 0), axis=0, keepdims=True)

    tile_ref[...] = pick(start + (visit - first) * rows)
    start_ref[...], end_ref[...] = pick(start), pick(end)
