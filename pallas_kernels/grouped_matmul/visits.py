"""Which tile of rows meets which expert, in the order the kernels go through them.

Rows are sorted by expert, so an expert's rows are a range, which begins anywhere. So do tiles of rows:
each belongs to one expert, and its last rows may be the next one's. Experts without rows are not
visited (for the gradient of the weights they are, to be zeroed). Rows past the last expert's, should there
be any, are visited as those of an expert that does not exist, and become zero.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.grouped_matmul import order
from pallas_kernels.grouped_matmul.block_sizes import PACKED_ROWS


class Visits(NamedTuple):
    """Scalars the kernels prefetch; `count` is the bound of their grid."""

    # [] how many visits there are; takes the place of a tuple's method.
    count: jax.Array  # type: ignore[assignment]
    expert: jax.Array  # [V] whose weights
    tile: jax.Array  # [V] where its rows of x begin
    start: jax.Array  # [V] first row of the expert, or of the visit if tiles are aligned
    end: jax.Array  # [V] after its last row; `start` if there is none


def max_visits(num_rows: int, num_groups: int, rows: int, aligned: int = 1) -> int:
    """The most visits there can be with tiles of `rows` rows from multiples of `aligned`."""
    return (num_rows + num_groups * (rows + aligned - 2)) // rows


def tiled(group_sizes: jax.Array, num_rows: int, rows: int, *, visit_empty: bool = False) -> Visits:
    """Visits of tiles that begin at an expert's first row, or up to `PACKED_ROWS` - 1 before it.

    `tile` is a tile's first row over `PACKED_ROWS`; `start` and `end` are the visit's own rows, each
    visit's next to the one before. Rows after the last expert's are of an expert that does not exist.

    Args:
      num_rows: a multiple of `PACKED_ROWS`, not less than `rows`, which is one, too.
      visit_empty: visit experts without rows, and no rows without experts.
    """
    num_groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes)
    if not visit_empty:
        ends = jnp.append(ends, num_rows)
    sizes = jnp.diff(ends, prepend=0)
    starts = ends - sizes
    first = starts // PACKED_ROWS * PACKED_ROWS
    counts = jnp.where(sizes > 0, -(-(ends - first) // rows), int(visit_empty))
    last = jnp.cumsum(counts)
    size = max_visits(num_rows, num_groups + 1, rows, PACKED_ROWS)
    index = jnp.arange(size, dtype=jnp.int32)
    group = jnp.sum(last[None, :] <= index[:, None], axis=1)  # few groups: no search
    group = jnp.minimum(group, counts.shape[0] - 1)
    begin = first[group] + (index - (last - counts)[group]) * rows
    tile = jnp.minimum(begin, num_rows - rows) // PACKED_ROWS
    start = jnp.maximum(starts[group], begin)
    end = jnp.minimum(ends[group], begin + rows)
    return Visits(*(s.astype(jnp.int32) for s in (last[-1], group, tile, start, end)))


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
