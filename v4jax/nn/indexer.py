"""Lightning indexer of a CSA layer: scores compressed keys and picks the top k for each query.

    score[t, w] = sum_a weight[t, a] * relu(<q[t, a], key[w]>)

It has a compressor of its own (width 128), and its queries come from the latent that the main
queries come from. The selection carries no gradient: the indexer is trained by `indexer_loss`, over
the entries it selected, or before that by `dense_indexer_loss` over all, and its inputs are detached.

Source: report section 2.3.1; loss: DeepSeek-V3.2 report (arXiv 2512.02556) section 2.1.1 with the
denominator of V4's softmax, which also holds the window and the sink.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Float32, Int32

from pallas_kernels import signatures
from pallas_kernels.attention import visible_entries, visible_mass
from pallas_kernels.formats.pages import Pages
from pallas_kernels.indexer import index_topk, selected_scores, visible_scores
from pallas_kernels.selection import Selection
from sharding import collectives
from v4jax.config import CompressorSpec, IndexerSpec
from v4jax.nn.compressor import Compressor
from v4jax.nn.layers import Linear, ModelContext, Rope, WideLinear, rope_frequencies

BLOCK_QUERIES = 64  # of a dense teacher, which holds all heads' rows of them


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
        axes = ("embed", None)
        self.wq_b = Linear(context, cfg.q_lora_rank, heads * width, axes, out_width=width)
        self.weights_proj = WideLinear(context, cfg.embed_dim, heads)
        self.compressor = Compressor(context, compressor, width, rounding="keys")
        self.cfg, self.spec, self.numerics = cfg, spec, numerics

    @signatures.shaped
    @jax.named_scope("indexer/queries")
    def queries(
        self,
        x: Float[jax.Array, "B T D"],
        latent: Float[jax.Array, "B T q_lora_rank"],
        positions: Int32[jax.Array, "B T"],
    ) -> tuple[Float[jax.Array, "B T A I"], Float32[jax.Array, "B T A"]]:
        """Queries and the weights of their heads."""
        heads, width = self.spec.num_heads, self.spec.head_dim
        q = self.wq_b(latent).reshape(*latent.shape[:2], heads, width)
        turn = Rope(rope_frequencies(self.cfg, compressed=True)).turn(positions)
        weights = self.weights_proj(x) / math.sqrt(width * heads)
        return self.numerics.finish(q, None, turn, rounding="keys"), weights

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


@signatures.shaped
def indexer_loss(
    queries: Float[jax.Array, "B T A I"],
    weights: Float[jax.Array, "B T A"],
    keys: Float[jax.Array, "B S I"],
    indices: Int32[jax.Array, "B T K"],
    mass: Float[jax.Array, "B T K"],  # attention on the selected entries, summed over heads
    valid: Bool[jax.Array, "B T"] | None = None,  # queries that are tokens, not padding
) -> jax.Array:
    """Mean over queries of KL(attention mass || softmax of scores), both over the selected set.

    With tokens cut over devices, this device's share of it: shares add up to the mean. Queries that
    see fewer than two entries have nothing to learn and do not count. `mass` is detached.
    """
    scores = selected_scores(queries, weights, keys, indices)
    return _mean(*_divergences(mass, scores, indices >= 0, valid))


@signatures.shaped
def dense_indexer_loss(
    queries: Float[jax.Array, "B T A I"],
    weights: Float[jax.Array, "B T A"],
    keys: Float[jax.Array, "B S I"],
    q: Float[jax.Array, "B T N H"],  # of attention, this device's heads
    entries: Float[jax.Array, "B S H"],
    log_denominator: Float[jax.Array, "B T N"],  # of attention to all visible entries
    positions: Int32[jax.Array, "B T"],
    first: Int32[jax.Array, "B T"] | None = None,  # the first entry of each query's document
    valid: Bool[jax.Array, "B T"] | None = None,  # queries that are tokens, not padding
    *,
    ratio: int,
    scale: float,
) -> jax.Array:
    """`indexer_loss` over all visible entries: what an indexer is warmed up by.

    Attention is detached, whole rows of it are those of a block of queries, and they are made again for
    the gradient. Gradients of keys are summed in float32.
    """
    valid = jnp.ones(positions.shape, bool) if valid is None else valid
    q, entries, log_denominator = jax.lax.stop_gradient((q, entries, log_denominator))
    wide = keys.astype(jnp.float32)

    @jax.checkpoint
    def of_block(block):
        queries, weights, q, log_denominator, positions, first, valid = block
        visible = visible_entries(positions, keys.shape[1], ratio, first)
        mass = visible_mass(q, entries, visible, log_denominator, scale=scale)
        scores = visible_scores(queries, weights, wide.astype(keys.dtype), visible)
        return _divergences(collectives.psum(mass, "heads"), scores, visible, valid)

    batch, length = positions.shape
    size = min(BLOCK_QUERIES, length)

    def blocks(
        x: jax.Array,
    ) -> jax.Array:  # [B, T, ...] -> [T / size, B, size, ...], zeros at the end
        x = jnp.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    cut = jax.tree.map(blocks, (queries, weights, q, log_denominator, positions, first, valid))
    return _mean(*jax.lax.map(of_block, cut))


def _divergences(
    mass: jax.Array, scores: jax.Array, among: jax.Array, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """KL(mass || softmax of scores) over the entries `among` [B, T, S]: [B, T], and which of them count."""
    counted = jnp.sum(among, axis=-1) > 1
    if valid is not None:
        counted &= valid
    mass = jax.lax.stop_gradient(mass)
    target = mass / jnp.maximum(jnp.sum(mass, axis=-1, keepdims=True), 1e-20)
    scores = jnp.where(counted[..., None], scores, 0.0)  # no -inf row in the softmax
    log_q = jax.nn.log_softmax(scores, axis=-1)
    log_p = jnp.log(jnp.maximum(target, 1e-20))
    kl = jnp.sum(jnp.where(among, target * (log_p - jnp.where(among, log_q, 0.0)), 0.0), axis=-1)
    return jnp.where(counted, kl, 0.0), counted


def _mean(divergences: jax.Array, counted: jax.Array) -> jax.Array:
    """This device's share of the mean over the queries that count."""
    count = collectives.psum(jnp.sum(counted), "batch", "seq")
    return jnp.sum(divergences) / jnp.maximum(count, 1)
