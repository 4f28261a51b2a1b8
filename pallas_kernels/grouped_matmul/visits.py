"""Which tile of rows meets which expert, in the order the kernels go through them.

Rows are sorted by expert, so an expert's rows are a range. A tile of rows that has rows of several
experts is visited once for each, one after another, and each visit keeps what the others wrote.
Experts without rows are not visited (for the gradient of the weights they are, to be zeroed).
Rows past the last expert's, should there be any, are visited with an empty range, and become zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


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
    visits = _listed(counts, first, 1, starts, ends, size)
    return visits._replace(expert=jnp.minimum(visits.expert, group_sizes.shape[0] - 1))


def from_first_rows(group_sizes: jax.Array, num_rows: int, rows: int) -> Visits:
    """Visits of `rows` rows from an expert's first, whatever it is; `tile` is the row it starts at.

    A visit's last rows may be of the next expert, which comes next, or past the end.
    """
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    counts = jnp.asarray(-(-group_sizes // rows))
    counts = counts.at[0].add(jnp.where(ends[-1] == 0, 1, 0))  # the grid must not be empty
    size = max_visits(num_rows, group_sizes.shape[0], rows)
    return _listed(counts, starts, rows, starts, ends, size)


def _listed(counts, first, step, starts, ends, size) -> Visits:
    """Visit `i` of a group is of the tile `first + i * step`."""
    last = jnp.cumsum(counts)
    index = jnp.arange(size, dtype=jnp.int32)
    group = jnp.sum(last[None, :] <= index[:, None], axis=1)  # few groups: no search
    group = jnp.minimum(group, counts.shape[0] - 1)
    tile = first[group] + (index - (last - counts)[group]) * step
    scalars = (last[-1], group, tile, starts[group], ends[group])
    return Visits(*(s.astype(jnp.int32) for s in scalars))
