"""The indexer in jax.numpy.

Scores are formed for one block of queries at a time, in chunks of entries no further than the last
one the block can see, so memory is [block, S] and never [T, S]. Gradients are of a block at a time too.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import target_platform
from pallas_kernels.formats.packed_rows import PackedKeys
from pallas_kernels.formats.pages import PAGE, Pages

BLOCK_QUERIES = 128
BLOCK_ENTRIES = 1024
ROW_ENTRIES = 256  # of one query on a CPU, which has few where the context is short
PIECE = 16_384  # scores of a query among which the largest are searched at once


def all_visible(
    num_visible: jax.Array, num_entries: int, first: jax.Array | None = None
) -> jax.Array:
    """[B, T, S] int32: every visible entry, whatever its score."""
    index = jnp.arange(num_entries, dtype=jnp.int32)
    return jnp.where(_is_visible(index, num_visible, first), index, -1)


def _is_visible(index, num_visible, first):
    """Whether indices [S] or [B, T, S] are of entries `first` .. `num_visible` - 1 of [B, T] queries."""
    before_end = index < num_visible[..., None]
    return before_end if first is None else before_end & (index >= first[..., None])


def index_topk(
    q: jax.Array,  # [B, T, A, I]
    weights: jax.Array,  # [B, T, A]
    keys: jax.Array | Pages,  # [B, S, I]; what is packed is unpacked chunk by chunk
    num_visible: jax.Array,  # [B, T] int32, at most S
    topk: int,  # at most S
    first: jax.Array | None = None,  # [B, T] int32: visible entries begin here (None: at 0)
) -> jax.Array:  # [B, T, topk] int32
    """Indices, then -1 where fewer are visible. In the order of their scores; of pages ascending.

    Ascending, what is summed over them has the same bits whatever the number of pages in the table.
    """
    num_entries, num_queries = keys.shape[1], q.shape[1]
    if num_entries == topk:
        return all_visible(num_visible, num_entries, first)
    block = min(BLOCK_QUERIES, num_queries)
    num_blocks = -(-num_queries // block)
    padding = num_blocks * block - num_queries
    q, weights, num_visible = (
        jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        for x in (q, weights, num_visible)
    )
    if first is not None:
        first = jnp.pad(first, [(0, 0), (0, padding)])
    chunk = min(BLOCK_ENTRIES, num_entries)
    if block == 1 and target_platform() == "cpu":
        q = q.astype(jnp.float32)  # products of one row are faster in it
        chunk = min(ROW_ENTRIES, num_entries)

    def select(scores, i):  # `scores` hold those of an earlier block where this one sees nothing
        def mine(x):
            return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=1)

        q_i, weights_i, visible_i = map(mine, (q, weights, num_visible))
        first_i = None if first is None else mine(first)
        begin = 0 if first_i is None else jnp.min(first_i) // chunk

        def fill(c, scores):
            at = jnp.minimum(
                c * chunk, num_entries - chunk
            )  # the last one may begin inside another
            part = scores_of(q_i, weights_i, *_part(keys, at, chunk, q.dtype))
            return jax.lax.dynamic_update_slice_in_dim(scores, part, at, axis=2)

        scores = jax.lax.fori_loop(begin, -(-jnp.max(visible_i) // chunk), fill, scores)
        index = _largest(scores, visible_i, first_i, topk)
        is_visible = _is_visible(index, visible_i, first_i)
        if isinstance(keys, Pages):
            index = jnp.sort(jnp.where(is_visible, index, num_entries), axis=-1)
            return scores, jnp.where(index < num_entries, index, -1)
        return scores, jnp.where(is_visible, index, -1)

    scores = jnp.zeros((q.shape[0], block, num_entries), jnp.float32)
    _, indices = jax.lax.scan(select, scores, jnp.arange(num_blocks))
    return jnp.moveaxis(indices, 0, 1).reshape(q.shape[0], -1, topk)[:, :num_queries]


def _part(keys: jax.Array | Pages, at: jax.Array, count: int, dtype) -> tuple[jax.Array, str]:
    """Keys at .. at + count - 1 and their axes, see `scores_of`."""
    if not isinstance(keys, Pages):
        return jax.lax.dynamic_slice_in_dim(keys, at, count, axis=1), "bsi"
    rows = keys.rows_from(at // PAGE, count // PAGE)
    if isinstance(rows, PackedKeys):
        return rows.columns(dtype), "bis"
    assert isinstance(rows, jax.Array)
    return rows, "bsi"


def _largest(
    scores: jax.Array, num_visible: jax.Array, first: jax.Array | None, topk: int
) -> jax.Array:
    """Indices [B, T, topk] of the largest visible of scores [B, T, S]; any where fewer are visible.

    Piece by piece, no further than some query sees. Of equals the first.
    """
    num_entries = scores.shape[2]
    size = min(PIECE, num_entries)

    def piece(c):
        begin = c * size
        at = jnp.minimum(begin, num_entries - size)  # the last one may begin inside another
        index = at + jnp.arange(size, dtype=jnp.int32)
        seen = _is_visible(index, num_visible, first) & (index >= begin)
        part = jax.lax.dynamic_slice_in_dim(scores, at, size, axis=2)
        return jnp.where(seen, part, -jnp.inf), jnp.broadcast_to(index, part.shape)

    if size == num_entries:
        return jax.lax.top_k(piece(0)[0], topk)[1]

    def join(c, best):
        values, index = (jnp.concatenate(x, axis=-1) for x in zip(best, piece(c), strict=True))
        values, place = jax.lax.top_k(values, topk)
        return values, jnp.take_along_axis(index, place, axis=-1, mode="clip")

    shape = (*scores.shape[:2], topk)
    best = jnp.full(shape, -jnp.inf), jnp.full(shape, num_entries, jnp.int32)
    return jax.lax.fori_loop(0, -(-jnp.max(num_visible) // size), join, best)[1]


def selected_scores(
    q: jax.Array,  # [B, T, A, I]
    weights: jax.Array,  # [B, T, A] float32
    keys: jax.Array,  # [B, S, I]
    indices: jax.Array,  # [B, T, K] int32 (-1: none)
) -> jax.Array:  # [B, T, K] float32, -inf where the index is -1
    """Scores of the selected entries.

    Gathered rows and products of heads are those of a block of queries, made again for its gradient.
    Gradients of keys are summed in float32: a key is picked by hundreds of queries.
    """
    batch, num_queries, topk = indices.shape
    if not topk:
        return jnp.zeros(indices.shape, jnp.float32)
    block = min(BLOCK_QUERIES, num_queries)
    padding = -num_queries % block

    def blocks(x):  # [B, T, ...] -> [T / block, B, block, ...]
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    wide = keys.astype(jnp.float32)

    @jax.checkpoint
    def scores(args):
        q, weights, indices = args
        rows = jax.vmap(lambda k, i: jnp.take(k, i, axis=0, mode="clip"))(wide, indices)
        return scores_of(q, weights, rows.astype(keys.dtype), "btsi")

    found = jnp.moveaxis(jax.lax.map(scores, (blocks(q), blocks(weights), blocks(indices))), 0, 1)
    found = found.reshape(batch, -1, topk)[:, :num_queries]
    return jnp.where(indices >= 0, found, -jnp.inf)


def scores_of(q: jax.Array, weights: jax.Array, keys: jax.Array, axes: str) -> jax.Array:
    """[B, T, S] float32 of keys [B, S, I] (axes "bsi"), [B, I, S] ("bis") or [B, T, S, I] ("btsi")."""
    wide = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dots = jnp.einsum(
        f"btai,{axes}->btas", q, keys, precision=wide, preferred_element_type=jnp.float32
    )
    dots, weights = jax.nn.relu(dots), weights.astype(jnp.float32)
    if target_platform() == "cpu":  # a loop; as a product, one that LLVM takes long to compile
        scores = jnp.sum(dots * weights[..., None], axis=2)
    else:
        scores = jnp.einsum("btas,bta->bts", dots, weights)
    return jnp.where(scores == 0.0, 0.0, scores)  # lax.top_k puts 0 before -0
