"""Lightning indexer: which compressed entries each query attends to.

    score[t, s]  = sum_a weight[t, a] * relu(<q[t, a], key[s]>)        for visible entries s
    selection[t] = the `topk` visible entries of largest score, ties to the lowest index

Zeros of either sign are equal; NaN is not supported. Entry s of `ratio` tokens is visible to a
query at position p if s < (p + 1) // ratio. Where a row holds several documents, positions begin anew
with each, entries are counted from the first of the query's document, and the XLA form runs.

Source: report section 2.3.1 (eqs. 15-17); released `inference/model.py` (Indexer).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int32

from pallas_kernels import checks, dispatch, signatures
from pallas_kernels.formats.pages import Pages
from pallas_kernels.indexer import reference, tpu_decode, tpu_prefill, xla
from pallas_kernels.selection import Selection


@dispatch.operation
def index_topk(
    q: Float[jax.Array, "B T A I"],
    weights: Float32[jax.Array, "B T A"],  # may be negative
    keys: Float[jax.Array, "B S I"] | Pages,
    positions: Int32[jax.Array, "B T"],
    first: Int32[jax.Array, "B T"] | None = None,  # the first entry of each query's document
    *,
    topk: int,
    ratio: int,
    implementation: dispatch.Implementation = None,
) -> Selection:
    """The entries each query attends to. No gradient.

    A kernel selects as bits, and as indices for one query per sequence in pages (decoding); the others as
    indices. Pages are read where they lie by "xla" and by the kernel that decodes; before the kernel of
    many queries, another puts the visible keys side by side as floats (`formats/tpu_rows.py`).

    Args:
      topk: most entries of a query, no more than there are; all that are visible are selected where
        these are no more.
      ratio: tokens per entry.
      implementation: see `dispatch.choose`.

    Raises:
      ValueError: shapes do not agree, `topk` is not in 1 .. S, or `implementation` is unknown or
        cannot run.
    """
    if q.ndim != 4 or weights.shape != q.shape[:3] or positions.shape != q.shape[:2]:
        raise ValueError(
            f"q {q.shape} must be [B, T, A, I], weights {weights.shape} [B, T, A] and positions "
            f"{positions.shape} [B, T]."
        )
    if keys.ndim != 3 or keys.shape[0] != q.shape[0] or keys.shape[2] != q.shape[3]:
        raise ValueError(f"keys {keys.shape} must be [B, S, I] with B and I of q {q.shape}.")
    num_entries, num_queries = keys.shape[1], q.shape[1]
    if not min(1, num_entries) <= topk <= num_entries:
        raise ValueError(
            f"{topk=}: expected 1 to {num_entries}, as there are {num_entries} entries in keys "
            f"{keys.shape}. To select all of few entries, pass min(topk, {num_entries})."
        )
    if ratio < 1:
        raise ValueError(f"{ratio=} must be positive.")
    checks.check_positions(positions, are_consecutive=False)
    if first is not None and first.shape != positions.shape:
        raise ValueError(f"first {first.shape} must be {positions.shape}, as positions.")
    implementation = dispatch.choose(implementation, unsupported=_unsupported(q, keys, first))
    lists = implementation in ("tpu", "interpret") and num_queries == 1
    q, weights = jax.lax.stop_gradient(q), jax.lax.stop_gradient(weights)
    keys = jax.lax.stop_gradient(keys)
    end = (positions + 1) // ratio + (0 if first is None else first)
    num_visible = jnp.minimum(end, num_entries)  # if the first entry is 0
    if not num_entries or (num_entries == topk and num_queries == 1):
        indices = xla.all_visible(num_visible, num_entries, first)
        return Selection.of_indices(indices, num_entries)
    match implementation:
        case "reference":
            keys = keys.floats(q.dtype) if isinstance(keys, Pages) else keys
            indices = reference.index_topk(q, weights, keys, num_visible, topk, first)
        case "xla":
            indices = xla.index_topk(q, weights, keys, num_visible, topk, first)
        case _ if lists and isinstance(keys, Pages):
            indices = tpu_decode.index_list(
                *(q[:, 0], weights[:, 0], keys, num_visible[:, 0]),
                topk=topk,
                interpret=implementation == "interpret",
            )[:, None]
        case _:
            bits = tpu_prefill.index_bits(
                *(q, weights, keys, num_visible),
                topk=topk,
                interpret=implementation == "interpret",
            )
            return Selection(None, bits, num_entries, topk)
    return Selection.of_indices(indices, num_entries)


@signatures.shaped
def selected_scores(
    q: Float[jax.Array, "B T A I"],
    weights: Float32[jax.Array, "B T A"],
    keys: Float[jax.Array, "B S I"],
    indices: Int32[jax.Array, "B T K"],  # -1: none
) -> Float32[jax.Array, "B T K"]:  # -inf where the index is -1
    """Scores of the selected entries, differentiable: what the indexer is trained through."""
    checks.check_indices(indices, keys.shape[1])
    return xla.selected_scores(q, weights, keys, indices)


@signatures.shaped
def visible_scores(
    q: Float[jax.Array, "B T A I"],
    weights: Float32[jax.Array, "B T A"],
    keys: Float[jax.Array, "B S I"],
    visible: Bool[jax.Array, "B T S"],
) -> Float32[jax.Array, "B T S"]:  # -inf where an entry is not visible
    """Scores of all visible entries, differentiable: what the indexer is trained through in a dense stage.

    Holds [B, T, A, S] float32: give it a block of queries.
    """
    return jnp.where(visible, xla.scores_of(q, weights, keys, "bsi"), -jnp.inf)


def _unsupported(q, keys, first) -> str | None:
    if first is not None:
        return "the kernel takes rows of one document, without `first`"
    held = keys.pool if isinstance(keys, Pages) else keys
    dtype = held.dtype if isinstance(held, jax.Array) else q.dtype
    if q.dtype != dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernel takes q {q.dtype} and keys {dtype} both in bfloat16 or float32"
    if q.shape[1] == 1 and isinstance(keys, Pages):
        return tpu_decode.unsupported(keys)
    return tpu_prefill.unsupported(q.shape[2], keys.shape[1])
