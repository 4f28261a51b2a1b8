"""Rows in pages, as an engine leaves them: in any order, among pages of others."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.packed_rows import PackedKeys
from pallas_kernels.formats.pages import PAGE, Pages


def paged(rows, kind=None, *, rope_dim: int = 64, wider: int = 0) -> Pages:
    """Rows [B, S, W] in pages anywhere in a pool; all else in the pool is no number.

    Args:
      kind: of packed rows that the pool holds, or a dtype.
      wider: pages that the table has behind those of S rows; all of them are another's.
    """
    rows = np.asarray(rows.astype(jnp.float32))
    batch, length, width = rows.shape
    count = -(-length // PAGE)
    order = np.random.default_rng(length).permutation(batch * count + 3)
    pool = np.full((order.size * PAGE, width), np.nan, np.float32)
    table = np.full((batch, count + wider), order[-1], np.int32)
    table[:, :count] = order[: batch * count].reshape(batch, count)
    for b, page in np.ndindex(batch, count):
        part = rows[b, page * PAGE : (page + 1) * PAGE]
        first = table[b, page] * PAGE
        pool[first : first + len(part)] = part
    return Pages(_as(kind, pool[None], rope_dim), jnp.asarray(table))


def _as(kind, pool, rope_dim):
    if not hasattr(kind, "pack"):
        return jnp.asarray(pool, kind)
    return kind.pack(pool) if kind is PackedKeys else kind.pack(pool, rope_dim)
