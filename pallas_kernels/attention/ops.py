"""Attention over a sliding window and compressed entries, in one softmax with a sink.

    scores = scale * <q, key> for the window's and the visited entries' keys, which are the values
    out    = sum exp(score) * key / (sum exp(score) + exp(sink))

`window_attention` visits every visible entry (HCA) or none (window-only layers),
`selected_attention` the entries an indexer picked (CSA). An entry of `ratio` tokens is visible from
its last token on. All of them take one KV head shared by all query heads.

Source: report section 2.3; visibility and sink as in the released `inference/model.py`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import reference, xla
from pallas_kernels.quantize import cast

IMPLEMENTATIONS = ("xla", "reference")


def window_attention(
    q: jax.Array,  # [B, T, N, H]
    window: jax.Array,  # [B, C + T, H]: the C rows before the first query, then those of the T
    entries: jax.Array,  # [B, S, H]; S may be 0
    sink: jax.Array,  # [N] float32
    positions: jax.Array,  # [B, T] int32: position of each query in its sequence
    *,
    ratio: int,
    scale: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends to the last C tokens (the query's own included) and all visible entries.

    Differentiable in q, window, entries and sink.

    Args:
      ratio: tokens per entry (any positive number when there are no entries).
      implementation: "xla", "reference" or None for the best one.

    Returns:
      out [B, T, N, H] in the dtype of q, and the log of the softmax's denominator [B, T, N].

    Raises:
      ValueError: shapes do not agree, or `implementation` is unknown.
    """
    _check(q, window, entries, sink, positions)
    if _choose(implementation) == "reference":
        visible = reference.visible_entries(positions, entries.shape[1], max(ratio, 1))
        return reference.attention_reference(q, window, entries, visible, sink, positions, scale)
    return xla.attention(q, window, entries, None, sink, positions, ratio=ratio, scale=scale)


def selected_attention(
    q: jax.Array,  # [B, T, N, H]
    window: jax.Array,  # [B, C + T, H]
    entries: jax.Array,  # [B, S, H]
    indices: jax.Array,  # [B, T, K] int32, distinct; -1 selects nothing
    sink: jax.Array,  # [N] float32
    positions: jax.Array,  # [B, T] int32
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends to the last C tokens and to the selected entries of each query.

    Differentiable in q, window, entries and sink.

    Returns:
      out [B, T, N, H] in the dtype of q, and the log of the softmax's denominator [B, T, N].

    Raises:
      ValueError: shapes do not agree, or `implementation` is unknown.
    """
    _check(q, window, entries, sink, positions)
    if indices.shape[:2] != q.shape[:2] or indices.ndim != 3:
        raise ValueError(f"indices {indices.shape} must be [B, T, K] with [B, T] of q {q.shape}.")
    if _choose(implementation) == "reference":
        mask = reference.selection_mask(indices, entries.shape[1])
        return reference.attention_reference(q, window, entries, mask, sink, positions, scale)
    return xla.attention(q, window, entries, indices, sink, positions, ratio=1, scale=scale)


def decode_attention(
    q: jax.Array,  # [B, N, H]: one query per sequence
    window: jax.Array,  # [B, C, H] ring: token t lies in row t mod C, the query's own included
    entries: jax.Array,  # [B, S, H]
    indices: jax.Array | None,  # [B, K] int32 (-1: none), or None for every visible entry
    sink: jax.Array,  # [N] float32
    positions: jax.Array,  # [B] int32
    *,
    ratio: int,
    scale: float,
) -> jax.Array:  # [B, N, H]
    """One decoding step over a ring of window rows and a cache of entries."""
    if indices is not None:
        rows = xla.gather_rows(entries, indices)
        visible = indices >= 0
    else:
        rows = entries
        visible = reference.visible_entries(positions[:, None], rows.shape[1], max(ratio, 1))[:, 0]
    in_ring = jnp.arange(window.shape[1]) <= positions[:, None]
    keys = jnp.concatenate([window, rows], axis=1)
    scores = scale * xla.einsum_f32("bnh,bsh->bns", q, keys)
    mask = jnp.concatenate([in_ring, visible], axis=1)[:, None]
    sink = sink.astype(jnp.float32)[:, None]
    peak = jnp.max(jnp.where(mask, scores, -jnp.inf), axis=-1, keepdims=True)
    p = jnp.where(mask, jnp.exp(scores - peak), 0.0)
    total = xla.einsum_f32("bns,bsh->bnh", p.astype(keys.dtype), keys)
    weight = jnp.sum(p, axis=-1, keepdims=True) + jnp.exp(sink - peak)
    return cast(total / weight, q.dtype)


def selected_mass(
    q: jax.Array,  # [B, T, N, H]
    entries: jax.Array,  # [B, S, H]
    indices: jax.Array,  # [B, T, K] int32 (-1: none)
    log_denominator: jax.Array,  # [B, T, N] as returned by selected_attention
    *,
    scale: float,
) -> jax.Array:  # [B, T, K] float32
    """Attention probability of each selected entry, summed over heads: the indexer's teacher."""
    return xla.selected_mass(q, entries, indices, log_denominator, scale=scale)


def _choose(implementation: str | None) -> str:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=}: expected one of {IMPLEMENTATIONS} or None.")
    return implementation or "xla"


def _check(q, window, entries, sink, positions):
    if q.ndim != 4 or window.ndim != 3 or entries.ndim != 3:
        raise ValueError(
            f"q {q.shape} must be [B, T, N, H], window {window.shape} [B, C + T, H] and entries "
            f"{entries.shape} [B, S, H]."
        )
    batch, num_queries, num_heads, width = q.shape
    if {window.shape[0], entries.shape[0]} != {batch} or {window.shape[2], entries.shape[2]} != {
        width
    }:
        raise ValueError(
            f"window {window.shape} and entries {entries.shape} must have q's batch {batch} and "
            f"width {width}."
        )
    if window.shape[1] <= num_queries:
        raise ValueError(
            f"window has {window.shape[1]} rows for {num_queries} queries: expected the window "
            "size more than that."
        )
    if sink.shape != (num_heads,):
        raise ValueError(f"sink {sink.shape} must be [N] with N={num_heads} heads of q.")
    if positions.shape != (batch, num_queries):
        raise ValueError(f"positions {positions.shape} must be {(batch, num_queries)}.")
