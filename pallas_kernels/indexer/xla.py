"""The indexer in jax.numpy.

Scores are formed for one block of queries at a time, in chunks of entries no further than the last
one the block can see, so memory is [block, S] and never [T, S]. Gradients are of a block at a time too.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import target_platform
from pallas_kernels.formats.pages import PAGE, Pages

BLOCK_QUERIES = 128
BLOCK_ENTRIES = 1024


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

    def select(i):
        def mine(x):
            return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis=1)

        q_i, weights_i, visible_i = map(mine, (q, weights, num_visible))
        first_i = None if first is None else mine(first)
        begin = 0 if first_i is None else jnp.min(first_i) // chunk

        def fill(c, scores):
            at = jnp.minimum(
                c * chunk, num_entries - chunk
            )  # the last one may begin inside another
            if isinstance(keys, Pages):
                keys_c = keys.part(at // PAGE, chunk // PAGE, q.dtype)
            else:
                keys_c = jax.lax.dynamic_slice_in_dim(keys, at, chunk, axis=1)
            part = scores_of(q_i, weights_i, keys_c, "bsi")
            return jax.lax.dynamic_update_slice_in_dim(scores, part, at, axis=2)

        scores = jnp.zeros((q.shape[0], block, num_entries), jnp.float32)
        scores = jax.lax.fori_loop(begin, -(-jnp.max(visible_i) // chunk), fill, scores)
        seen = _is_visible(jnp.arange(num_entries), visible_i, first_i)
        _, index = jax.lax.top_k(jnp.where(seen, scores, -jnp.inf), topk)
        is_visible = _is_visible(index, visible_i, first_i)
        if isinstance(keys, Pages):
            index = jnp.sort(jnp.where(is_visible, index, num_entries), axis=-1)
            return jnp.where(index < num_entries, index, -1)
        return jnp.where(is_visible, index, -1)

    indices = jnp.moveaxis(jax.lax.map(select, jnp.arange(num_blocks)), 0, 1)
    return indices.reshape(q.shape[0], -1, topk)[:, :num_queries]


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
        rows = jax.vmap(lambda k, i: jnp.take(k, jnp.maximum(i, 0), axis=0))(wide, indices)
        return scores_of(q, weights, rows.astype(keys.dtype), "btsi")

    found = jnp.moveaxis(jax.lax.map(scores, (blocks(q), blocks(weights), blocks(indices))), 0, 1)
    found = found.reshape(batch, -1, topk)[:, :num_queries]
    return jnp.where(indices >= 0, found, -jnp.inf)


def scores_of(q: jax.Array, weights: jax.Array, keys: jax.Array, axes: str) -> jax.Array:
    """[B, T, S] float32 of keys [B, S, I] (axes "bsi") or [B, T, S, I] ("btsi")."""
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
