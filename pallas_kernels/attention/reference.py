"""The specification: one dense softmax over window, compressed entries and sink.

Quadratic in memory; for tests and for reading.
"""

import jax
import jax.numpy as jnp


def attention_reference(
    q: jax.Array,  # [B, T, N, H]
    window: jax.Array,  # [B, C + T, H]: row C + i belongs to query i, C rows precede the first
    entries: jax.Array,  # [B, S, H]
    selected: jax.Array,  # [B, T, S] bool: entries each query attends to
    sink: jax.Array,  # [N] float32
    positions: jax.Array,  # [B, T] int32: position of each query in its sequence
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention of T queries; keys double as values.

    A query attends to itself, to the C - 1 tokens before it that exist (position >= 0), and to its
    selected entries. The sink takes part in the denominator only.

    Returns:
      out [B, T, N, H] in the dtype of q, and the log of the denominator [B, T, N] in float32.
    """
    num_queries, size = q.shape[1], window.shape[1] - q.shape[1]
    age = jnp.arange(num_queries)[:, None] + size - jnp.arange(window.shape[1])[None, :]
    near = (age >= 0) & (age < size) & (age <= positions[..., None])  # [B, T, C + T]
    keys = jnp.concatenate([window, entries], axis=1).astype(jnp.float32)
    visible = jnp.concatenate([near, selected], axis=-1)
    scores = scale * jnp.einsum(
        "btnh,bsh->btns", q.astype(jnp.float32), keys, precision=jax.lax.Precision.HIGHEST
    )
    scores = jnp.where(visible[:, :, None], scores, -jnp.inf)
    sinks = jnp.broadcast_to(sink.astype(jnp.float32)[:, None], (*scores.shape[:-1], 1))
    scores = jnp.concatenate([scores, sinks], axis=-1)
    probs = jax.nn.softmax(scores, axis=-1)[..., :-1]
    out = jnp.einsum("btns,bsh->btnh", probs, keys, precision=jax.lax.Precision.HIGHEST)
    return out.astype(q.dtype), jax.nn.logsumexp(scores, axis=-1)


def visible_entries(
    positions: jax.Array, num_entries: int, ratio: int, first: jax.Array | None = None
) -> jax.Array:
    """[B, T] positions -> [B, T, S] bool: entry w covers tokens up to ratio * (w + 1) - 1.

    With `first` [B, T], entries are counted from there.
    """
    behind = jnp.arange(num_entries) - (0 if first is None else first[..., None])
    return (behind >= 0) & (behind < ((positions + 1) // ratio)[..., None])


def selection_mask(indices: jax.Array, num_entries: int) -> jax.Array:
    """[B, T, K] indices (-1: none) -> [B, T, S] bool."""
    return jnp.any(indices[..., None] == jnp.arange(num_entries), axis=-2)
