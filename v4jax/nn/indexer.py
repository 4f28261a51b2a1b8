"""Lightning indexer of a CSA layer: scores compressed keys and picks the top k for each query.

    score[t, w] = sum_a weight[t, a] * relu(<q[t, a], key[w]>)

It has a compressor of its own (width 128), and its queries come from the latent that the main
queries come from. The selection carries no gradient: the indexer is trained by `indexer_loss`
alone, and its inputs are detached.

Source: report section 2.3.1; loss: DeepSeek-V3.2 report (arXiv 2512.02556) section 2.1.1 with the
denominator of V4's softmax, which also holds the window and the sink.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.formats.pages import Pages
from pallas_kernels.indexer import index_topk, selected_scores
from pallas_kernels.selection import Selection
from sharding import collectives
from v4jax.config import CompressorSpec, IndexerSpec
from v4jax.nn.compressor import Compressor
from v4jax.nn.layers import Linear, ModelContext, WideLinear, rope_frequencies, rotate


class Indexer(nnx.Module):
    """Which compressed entries each query attends to."""

    def __init__(self, context: ModelContext, spec: IndexerSpec, compressor: CompressorSpec):
        cfg, numerics = context.cfg, context.numerics
        heads, width = spec.num_heads, spec.head_dim
        if numerics.is_released and width & (width - 1):
            raise ValueError(
                f"indexer.head_dim={width} with released numerics: expected a power of two, which "
                "the Hadamard transform of queries and keys needs. v4jax.plain() takes any."
            )
        self.wq_b = Linear(context, cfg.q_lora_rank, heads * width, ("embed", None))
        self.weights_proj = WideLinear(context, cfg.embed_dim, heads)
        self.compressor = Compressor(context, compressor, width)
        self.cfg, self.spec, self.numerics = cfg, spec, numerics

    @jax.named_scope("indexer/queries")
    def queries(
        self,
        x: jax.Array,  # [B, T, D]
        latent: jax.Array,  # [B, T, q_lora_rank]
        positions: jax.Array,  # [B, T]
    ) -> tuple[jax.Array, jax.Array]:
        """Queries [B, T, A, I] and the weights of their heads [B, T, A] in float32."""
        heads, width = self.spec.num_heads, self.spec.head_dim
        q = self.wq_b(latent).reshape(*latent.shape[:2], heads, width)
        q = rotate(q, positions, rope_frequencies(self.cfg, compressed=True))
        weights = self.weights_proj(x) / math.sqrt(width * heads)
        return self.numerics.round_indexer(q), weights

    @jax.named_scope("indexer/select")
    def select(
        self,
        queries: jax.Array,
        weights: jax.Array,
        keys: jax.Array | Pages,
        positions: jax.Array,
        first: jax.Array | None = None,
    ) -> Selection:
        """The entries each query attends to: all that are visible where there are few.

        Args:
          first: [B, T] the first entry of each query's document, in rows of several documents.
        """
        return index_topk(
            queries,
            weights,
            keys,
            positions,
            first,
            topk=min(self.spec.topk, keys.shape[1]),
            ratio=self.compressor.ratio,
            implementation=self.numerics.implementation,
        )


def indexer_loss(
    queries: jax.Array,  # [B, T, A, I]
    weights: jax.Array,  # [B, T, A]
    keys: jax.Array,  # [B, S, I]
    indices: jax.Array,  # [B, T, K]
    mass: jax.Array,  # [B, T, K] attention on the selected entries, summed over heads
    valid: jax.Array | None = None,  # [B, T] bool: queries that are tokens, not padding
) -> jax.Array:
    """Mean over queries of KL(attention mass || softmax of scores), both over the selected set.

    With tokens cut over devices, this device's share of it: shares add up to the mean. Queries that
    see fewer than two entries have nothing to learn and do not count. `mass` is detached.
    """
    chosen = indices >= 0
    counted = jnp.sum(chosen, axis=-1) > 1
    if valid is not None:
        counted &= valid
    mass = jax.lax.stop_gradient(mass)
    target = mass / jnp.maximum(jnp.sum(mass, axis=-1, keepdims=True), 1e-20)
    scores = selected_scores(queries, weights, keys, indices)
    scores = jnp.where(counted[..., None], scores, 0.0)  # no -inf row in the softmax
    log_q = jax.nn.log_softmax(scores, axis=-1)
    log_p = jnp.log(jnp.maximum(target, 1e-20))
    kl = jnp.sum(jnp.where(chosen, target * (log_p - jnp.where(chosen, log_q, 0.0)), 0.0), axis=-1)
    count = collectives.psum(jnp.sum(counted), "batch", "seq")
    return jnp.sum(jnp.where(counted, kl, 0.0)) / jnp.maximum(count, 1)
