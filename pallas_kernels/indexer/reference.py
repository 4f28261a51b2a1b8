"""The specification of the indexer: all scores, and a stable sort of them."""

import jax
import jax.numpy as jnp

from pallas_kernels.indexer.xla import scores_of


def index_topk(
    q: jax.Array,  # [B, T, A, I]
    weights: jax.Array,  # [B, T, A]
    keys: jax.Array,  # [B, S, I]
    num_visible: jax.Array,  # [B, T] int32
    topk: int,
    first: jax.Array | None = None,  # [B, T] int32
) -> jax.Array:  # [B, T, topk] int32
    """Indices in the order of their scores; -1 where fewer are visible: `first` .. `num_visible` - 1."""
    first = jnp.zeros_like(num_visible) if first is None else first
    index = jnp.arange(keys.shape[1])
    visible = (index < num_visible[..., None]) & (index >= first[..., None])
    scores = jnp.where(visible, scores_of(q, weights, keys, "bsi"), -jnp.inf)
    index = jnp.argsort(-scores, axis=-1, stable=True)[..., :topk].astype(jnp.int32)
    return jnp.where((index < num_visible[..., None]) & (index >= first[..., None]), index, -1)
