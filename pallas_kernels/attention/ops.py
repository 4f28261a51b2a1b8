"""Attention over a sliding window and compressed entries, in one softmax with a sink.

    scores = scale * <q, key> for the window's and the visited entries' keys, which are the values
    out    = sum exp(score) * key / (sum exp(score) + exp(sink))

`window_attention` visits every visible entry (HCA) or none (window-only layers),
`selected_attention` the entries an indexer picked (CSA). An entry of `ratio` tokens is visible from
its last token on. All of them take one KV head shared by all query heads.

A row may hold several documents, one behind the other: `positions` then begin anew with each, and
`first` has the first entry of every query's document. Nothing of another document is visible. The
kernels take rows of one document; with `first` the XLA forms run.

Entries may lie in pages, in floats or packed: those of a cache, which carry no gradient. The XLA forms
read there what a block of queries needs; before the kernel of many queries, another puts the visible ones
side by side as floats (`formats/tpu_rows.py`). Of pages, `written` says how many entries are written (None:
all that a query sees): what lies behind may be another sequence's, and no number, and is taken as zeros.

Source: report section 2.3; visibility and sink as in the released `inference/model.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int32

from pallas_kernels import checks, dispatch, signatures
from pallas_kernels.attention import reference, tpu, tpu_decode, xla, xla_decode
from pallas_kernels.formats.packed_rows import PackedColumns
from pallas_kernels.formats.pages import Pages
from pallas_kernels.selection import Selection


@dispatch.operation
def window_attention(
    q: Float[jax.Array, "B T N H"],
    window: Float[jax.Array, "B CT H"],  # the C rows before the first query, then those of the T
    entries: Float[jax.Array, "B S H"] | Pages,  # S may be 0
    sink: Float[jax.Array, " N"],
    positions: Int32[jax.Array, "B T"],  # consecutive in each row, which begins anywhere
    first: Int32[jax.Array, "B T"] | None = None,  # see above
    written: Int32[jax.Array, " B"] | None = None,  # see above
    *,
    ratio: int,
    scale: float,
    implementation: dispatch.Implementation = None,
) -> tuple[Float[jax.Array, "B T N H"], Float32[jax.Array, "B T N"]]:
    """Attends to the last C tokens (the query's own included) and all visible entries.

    Differentiable in q, window, entries (not in pages) and sink.

    Args:
      ratio: tokens per entry (any positive number when there are no entries).
      implementation: see `dispatch.choose`.

    Returns:
      out [B, T, N, H] in the dtype of q, and the log of the softmax's denominator [B, T, N].

    Raises:
      ValueError: shapes do not agree, or an implementation that cannot run.
    """
    _check(q, window, entries, sink, positions, first, written)
    chosen = dispatch.choose(implementation, unsupported=_unsupported(q, window, entries, first))
    static: dict[str, Any] = dict(ratio=max(ratio, 1), scale=scale)
    if chosen in ("tpu", "interpret"):
        static["interpret"] = chosen == "interpret"
        return tpu.attention(q, window, entries, None, sink, positions, written, **static)
    if chosen == "reference":
        entries = entries.floats(q.dtype) if isinstance(entries, Pages) else entries
        visible = reference.visible_entries(positions, entries.shape[1], max(ratio, 1), first)
        return reference.attention_reference(q, window, entries, visible, sink, positions, scale)
    return xla.attention(q, window, entries, None, sink, positions, first, written, **static)


@dispatch.operation
def selected_attention(
    q: Float[jax.Array, "B T N H"],
    window: Float[jax.Array, "B CT H"],
    entries: Float[jax.Array, "B S H"] | Pages,
    selection: Selection,  # of S entries, for [B, T] queries
    sink: Float[jax.Array, " N"],
    positions: Int32[jax.Array, "B T"],  # consecutive in each row, which begins anywhere
    first: Int32[jax.Array, "B T"] | None = None,  # see above; entries are those of `selection`
    written: Int32[jax.Array, " B"] | None = None,  # see above
    *,
    scale: float,
    implementation: dispatch.Implementation = None,
) -> tuple[Float[jax.Array, "B T N H"], Float32[jax.Array, "B T N"]]:
    """Attends to the last C tokens and to the selected entries of each query.

    Differentiable in q, window, entries (not in pages) and sink.

    Returns:
      out [B, T, N, H] in the dtype of q, and the log of the softmax's denominator [B, T, N].

    Raises:
      ValueError: shapes do not agree, or an implementation that cannot run.
    """
    _check(q, window, entries, sink, positions, first, written)
    if (selection.shape, selection.num_entries) != (q.shape[:2], entries.shape[1]):
        raise ValueError(
            f"selection, for {selection.shape} queries of {selection.num_entries} entries, must "
            f"be for [B, T] of q {q.shape} and S of entries {entries.shape}."
        )
    if selection.indices is not None:
        checks.check_indices(selection.indices, entries.shape[1])
    chosen = dispatch.choose(implementation, unsupported=_unsupported(q, window, entries, first))
    static: dict[str, Any] = dict(ratio=1, scale=scale)
    if chosen in ("tpu", "interpret"):
        bits, interpret = selection.to_bits(), chosen == "interpret"
        args = (q, window, entries, bits, sink, positions, written)
        return tpu.attention(*args, interpret=interpret, **static)
    if chosen == "reference":
        entries = entries.floats(q.dtype) if isinstance(entries, Pages) else entries
        mask = selection.mask()
        return reference.attention_reference(q, window, entries, mask, sink, positions, scale)
    indices = selection.to_indices()
    return xla.attention(q, window, entries, indices, sink, positions, None, written, **static)


@dispatch.operation
def decode_attention(
    q: Float[jax.Array, "B N H"],  # one query per sequence
    window: Float[jax.Array, "B C H"]
    | PackedColumns,  # ring: token t in row t mod C, the query's too
    entries: Pages | None,  # [B, S, H]
    indices: Int32[jax.Array, "B K"] | None,  # distinct (-1: none); None: every visible entry
    sink: Float[jax.Array, " N"],
    positions: Int32[jax.Array, " B"],
    *,
    ratio: int,
    scale: float,
    implementation: dispatch.Implementation = None,
) -> Float[jax.Array, "B N H"]:
    """One decoding step over a ring of window rows and pages of entries. Not differentiable.

    Args:
      ratio: tokens per entry (with indices, or without entries, it does not matter).
      implementation: see `dispatch.choose`.

    Raises:
      ValueError: shapes do not agree, or an implementation that cannot run.
    """
    _check_decode(q, window, entries, indices, sink, positions)
    unsupported = tpu_decode.unsupported(q, window, entries, indices)
    chosen = dispatch.choose(implementation, unsupported=unsupported)
    static = dict(ratio=max(ratio, 1), scale=scale)
    if chosen in ("tpu", "interpret"):
        static["interpret"] = chosen == "interpret"
        return tpu_decode.decode_attention(q, window, entries, indices, sink, positions, **static)
    decode = xla_decode.decode_reference if chosen == "reference" else xla_decode.decode_attention
    return decode(q, window, entries, indices, sink, positions, **static)


def _check_decode(q, window, entries, indices, sink, positions):
    if q.ndim != 3 or window.ndim != 3:
        raise ValueError(f"q {q.shape} must be [B, N, H] and window {window.shape} [B, C, H].")
    batch, num_heads, width = q.shape
    for name, x in (("window", window), ("entries", entries)):
        if x is not None and (x.shape[0], x.shape[2]) != (batch, width):
            raise ValueError(f"{name} {x.shape} must have q's batch {batch} and width {width}.")
    if indices is not None and (indices.ndim != 2 or indices.shape[0] != batch):
        raise ValueError(f"indices {indices.shape} must be [B, K] with B={batch}.")
    if indices is not None and entries is None:
        raise ValueError(f"indices {indices.shape} of no entries.")
    if sink.shape != (num_heads,):
        raise ValueError(f"sink {sink.shape} must be [N] with N={num_heads} heads of q.")
    if positions.shape != (batch,):
        raise ValueError(f"positions {positions.shape} must be {(batch,)}.")
    checks.check_positions(positions, are_consecutive=False)
    if indices is not None:
        checks.check_indices(indices, entries.shape[1])


@signatures.shaped
def selected_mass(
    q: Float[jax.Array, "B T N H"],
    entries: Float[jax.Array, "B S H"],
    indices: Int32[jax.Array, "B T K"],  # -1: none
    log_denominator: Float[jax.Array, "B T N"],  # as returned by selected_attention
    *,
    scale: float,
) -> Float32[jax.Array, "B T K"]:
    """Attention probability of each selected entry, summed over heads: the indexer's teacher."""
    checks.check_indices(indices, entries.shape[1])
    return xla.selected_mass(q, entries, indices, log_denominator, scale=scale)


@signatures.shaped
def visible_mass(
    q: Float[jax.Array, "B T N H"],
    entries: Float[jax.Array, "B S H"],
    visible: Bool[jax.Array, "B T S"],  # as `visible_entries` says
    log_denominator: Float[jax.Array, "B T N"],  # as returned by window_attention
    *,
    scale: float,
) -> Float32[jax.Array, "B T S"]:
    """Attention probability of each visible entry, summed over heads: the teacher of a dense stage.

    Holds [B, T, N, S] float32: give it a block of queries.
    """
    scores = scale * xla.einsum_f32("btnh,bsh->btns", q, entries)
    p = jnp.exp(scores - log_denominator[..., None])
    return jnp.sum(jnp.where(visible[:, :, None], p, 0.0), axis=2)


def _unsupported(q, window, entries: jax.Array | Pages, first) -> str | None:
    if first is not None:
        return "the kernel takes rows of one document, without `first`"
    held = entries.pool if isinstance(entries, Pages) else entries
    return tpu.unsupported(q, window, getattr(held, "dtype", q.dtype))  # packed ones have none


def _check(q, window, entries, sink, positions, first, written):
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
    if first is not None and first.shape != positions.shape:
        raise ValueError(f"first {first.shape} must be {positions.shape}, as positions.")
    if written is not None and (not isinstance(entries, Pages) or written.shape != (batch,)):
        raise ValueError(
            f"written {written.shape} of entries {type(entries).__name__}: expected {(batch,)}, for "
            "entries in Pages."
        )
    checks.check_positions(positions, are_consecutive=first is None)
