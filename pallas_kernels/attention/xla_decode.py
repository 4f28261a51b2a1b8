"""Decode attention in jax.numpy: one query per sequence, for any backend; and its specification."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention import reference
from pallas_kernels.formats.pages import PAGE, Pages
from pallas_kernels.formats.quantize import cast


def decode_attention(q, window, entries: Pages | None, indices, sink, positions, *, ratio, scale):
    """See `ops.py`. Ring and entries share the softmax's sums; their keys are not joined."""
    if entries is not None and indices is None:
        return _over_pages(q, window, entries, sink, positions, ratio=ratio, scale=scale)
    window = _unpacked(window, q.dtype)
    written = jnp.arange(window.shape[1]) <= positions[:, None]
    parts = [(window, written)]
    if entries is not None and indices.shape[1]:
        is_picked = indices >= 0
        keys = entries.take(indices, q.dtype)
        parts.append((jnp.where(is_picked[..., None], keys, 0), is_picked))
    scores = [
        jnp.where(mask[:, None], scale * _einsum("bnh,bsh->bns", q, keys), -jnp.inf)
        for keys, mask in parts
    ]
    # Not of the sink: p is rounded to the keys' dtype below, and the released code divides by the
    # largest score. The query's own row is always there, so the peak is finite.
    peak = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1) for s in scores])
    weight, total = jnp.exp(sink - peak), 0.0
    for s, (keys, _) in zip(scores, parts):
        p = jnp.exp(s - peak[..., None])
        weight += jnp.sum(p, axis=-1)
        total += _einsum("bns,bsh->bnh", p.astype(keys.dtype), keys)
    return cast(total / weight[..., None], q.dtype)


def _over_pages(q, window, entries: Pages, sink, positions, *, ratio, scale):
    """Every visible entry, page by page: those behind the longest sequence's last are not touched.

    Two passes, since the largest score has to be known before the first sum (see above). Sums go over
    the pages in order, so they have the same bits whatever the number of pages in the table.
    """
    batch, num_heads, width = q.shape
    window = _unpacked(window, q.dtype)
    num_visible = jnp.minimum((positions + 1) // ratio, entries.shape[1])[:, None]
    count = -(-jnp.max(num_visible) // PAGE)
    written = (jnp.arange(window.shape[1]) <= positions[:, None])[:, None]
    near = jnp.where(written, scale * _einsum("bnh,bsh->bns", q, window), -jnp.inf)

    def score(page, scores):
        keys = entries.part(page, 1, q.dtype)
        visible = (page * PAGE + jnp.arange(PAGE) < num_visible)[:, None]
        new = jnp.where(visible, scale * _einsum("bnh,bsh->bns", q, keys), -jnp.inf)
        return jax.lax.dynamic_update_slice_in_dim(scores, new, page * PAGE, axis=2)

    scores = jnp.full((batch, num_heads, entries.shape[1]), -jnp.inf, jnp.float32)
    scores = jax.lax.fori_loop(0, count, score, scores)
    peak = jnp.maximum(jnp.max(near, axis=-1), jnp.max(scores, axis=-1))

    def add(state, scores, keys):
        weight, total = state
        p = jnp.exp(scores - peak[..., None])
        total += _einsum("bns,bsh->bnh", p.astype(keys.dtype), keys)
        return weight + jnp.sum(p, axis=-1), total

    def add_page(page, state):
        keys = entries.part(page, 1, q.dtype)
        visible = page * PAGE + jnp.arange(PAGE) < num_visible
        keys = jnp.where(visible[..., None], keys, 0)  # another sequence's rows may be no numbers
        return add(state, jax.lax.dynamic_slice_in_dim(scores, page * PAGE, PAGE, axis=2), keys)

    state = add((jnp.exp(sink - peak), jnp.zeros((batch, num_heads, width))), near, window)
    weight, total = jax.lax.fori_loop(0, count, add_page, state)
    return cast(total / weight[..., None], q.dtype)


def decode_reference(q, window, entries: Pages | None, indices, sink, positions, *, ratio, scale):
    """See `ops.py`: the ring in the order of time, and one dense softmax."""
    rows = q[:, :0] if entries is None else entries.floats(q.dtype)
    window = _unpacked(window, q.dtype)
    size = window.shape[1]
    order = (positions[:, None] - size + jnp.arange(size + 1)) % size
    history = jnp.take_along_axis(window, order[..., None], axis=1, mode="clip")
    if indices is None:
        mask = reference.visible_entries(positions[:, None], rows.shape[1], ratio)
    else:
        mask = reference.selection_mask(indices[:, None], rows.shape[1])
    out, _ = reference.attention_reference(
        q[:, None], history, rows, mask, sink, positions[:, None], scale
    )
    return out[:, 0]


def _unpacked(rows, dtype):
    return rows if isinstance(rows, jax.Array) else rows.unpack(dtype)


def _einsum(subscripts, a, b):
    wide = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=wide, preferred_element_type=jnp.float32)
