"""What a layer did with a text: for researchers, and for short texts (nothing here is blockwise)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from v4jax.nn.compilation import jitted
from v4jax.nn.shared import Shared


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "streams",
        "attention_input",
        "attention_output",
        "window_weights",
        "compressed_weights",
        "sink_weights",
        "indexer_scores",
        "picks",
        "router_scores",
        "experts",
        "expert_weights",
    ],
    meta_fields=["kind", "ratio"],
)
@dataclasses.dataclass(frozen=True)
class LayerView:
    """One layer's inner values for tokens [B, T]; of the queries [Q] that were asked for.

    Column c of the window is token t - C + 1 + c of query t. Compressed row s stands for the `ratio`
    tokens from `ratio * s` on (with overlapping windows, for those before them too). Weights of a head
    over window, compressed rows and sink add up to 1. With another layer's picks there are no scores.
    """

    kind: str  # "window", "CSA", "HCA" ...
    ratio: int  # tokens of a compressed row; 0 without any
    streams: jax.Array  # [B, T, M * D] residual streams before the layer
    attention_input: jax.Array  # [B, T, D] collapsed and normalised
    attention_output: jax.Array  # [B, T, D]
    window_weights: jax.Array  # [B, Q, N, C] float32
    compressed_weights: jax.Array | None  # [B, Q, N, S] float32; 0 where not picked
    sink_weights: jax.Array  # [B, Q, N] float32
    indexer_scores: jax.Array | None  # [B, Q, S] float32, -inf for rows that are not complete yet
    picks: jax.Array | None  # [B, Q, K] int32 compressed rows, -1 where there are fewer
    router_scores: jax.Array  # [B, T, E] float32, before any bias
    experts: jax.Array  # [B, T, K] int32
    expert_weights: jax.Array  # [B, T, K] float32


@jitted()
def view(block, streams: jax.Array, tokens: jax.Array, queries: jax.Array, shared: Shared):
    """A `Block` on whole sequences: its view of queries [Q], the streams after it, and what it shares."""
    x, *mix = block.attn_hc.pre(streams)
    x = block.attn_norm(x)
    attended, made, weights = _attention(block.attention, x, queries, shared)
    after, y, *mix = block.ffn_hc.post_pre(attended, streams, *mix)
    y = block.ffn_norm(y)
    experts, expert_weights, _ = block.moe.router(y, tokens)
    out, _ = block.moe(y, tokens)
    spec = block.attention.spec
    found = LayerView(
        kind=spec.kind,
        ratio=spec.ratio,
        streams=streams,
        attention_input=x,
        attention_output=attended,
        router_scores=block.moe.router.scores(y),
        experts=experts,
        expert_weights=expert_weights,
        **weights,
    )
    return found, block.ffn_hc.post(out, after, *mix), made


def _attention(
    attention, x: jax.Array, queries: jax.Array, shared: Shared
) -> tuple[jax.Array, Shared, dict]:
    """The layer's own output, what it shares, and what its queries weigh: computed here densely."""
    batch, length, _ = x.shape
    out, _, made = attention(x, shared=shared)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    latent, q, kv = attention.project(x, positions)
    q = q[:, queries].astype(jnp.float32)
    size = attention.cfg.window
    at = queries[:, None] - size + 1 + jnp.arange(size)  # [Q, C] tokens
    rows = kv[:, jnp.maximum(at, 0)].astype(jnp.float32)  # [B, Q, C, H]
    scale = attention.cfg.head_dim**-0.5
    near = jnp.where(at[:, None] >= 0, jnp.einsum("bqnh,bqch->bqnc", q, rows) * scale, -jnp.inf)
    sink = jnp.broadcast_to(attention.sink[...].astype(jnp.float32), q.shape[:3])
    logits = [near, sink[..., None]]
    scores = picks = None
    if made.entries is not None:
        compressed = made.entries.astype(jnp.float32)
        count = compressed.shape[1]
        seen = jnp.arange(count) < (queries[:, None] + 1) // attention.spec.ratio  # [Q, S]
        seen = jnp.broadcast_to(seen, (batch, *seen.shape))
        if made.selection is not None:
            picks = made.selection.to_indices()[:, queries]
            if attention.indexer:
                scores = _scores(attention, x, latent, positions, queries, seen)
            chosen = jnp.any(picks[..., None] == jnp.arange(count), axis=-2)
            far_seen = seen & chosen
        else:
            far_seen = seen
        far = jnp.einsum("bqnh,bsh->bqns", q, compressed) * scale
        logits.insert(1, jnp.where(far_seen[:, :, None], far, -jnp.inf))
    weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1)
    found = {
        "window_weights": weights[..., :size],
        "compressed_weights": weights[..., size:-1] if len(logits) == 3 else None,
        "sink_weights": weights[..., -1],
        "indexer_scores": scores,
        "picks": picks,
    }
    return out, made, found


def _scores(attention, x, latent, positions, queries, seen) -> jax.Array:
    indexer = attention.indexer
    index_q, head_weights = indexer.queries(x, latent, positions)
    keys = indexer.compressor(x)
    index_q, head_weights = index_q[:, queries], head_weights[:, queries]
    products = jnp.einsum("bqai,bsi->bqas", *(y.astype(jnp.float32) for y in (index_q, keys)))
    scores = jnp.einsum("bqas,bqa->bqs", jax.nn.relu(products), head_weights.astype(jnp.float32))
    return jnp.where(seen, scores, -jnp.inf)
