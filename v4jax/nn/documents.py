"""Rows of a batch that hold documents: where each begins, and what is padding.

A row may hold several documents, one behind the other, and each computes what it would alone: positions
begin anew with it, and its sliding window, compressed rows, indexer and balance loss end at its first
token.

A compressed row is pooled from `ratio` tokens counted from the document's first one. Documents therefore
begin at multiples of `alignment(cfg)` tokens of their row, the least common multiple of the ratios (128 in
V4), with padding in between: pools of a row are then pools of its documents, and none crosses a border.
Attention needs only one comparison more, with the first row of the query's document.

Padding belongs to the document before it. It comes after that document's tokens, which cannot see it; it
takes no part in any loss or count.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from sharding import collectives
from v4jax.config import V4Config


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["valid", "starts"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents in rows of T tokens.

    With `starts` None a row is one document from its first token on; then the kernels of a TPU run, and
    otherwise the XLA forms.
    """

    valid: jax.Array  # [B, T] bool: a token, not padding
    starts: jax.Array | None = None  # [B, T] int32: where in its row a token's document begins


def alignment(cfg: V4Config) -> int:
    """Documents of a row begin at multiples of so many tokens."""
    return math.lcm(*(spec.ratio for spec in cfg.layers if spec.compressor))


def positions_of(documents: Documents | None, batch: int, length: int) -> jax.Array:
    """[B, T] int32: position of each token of this device's part of the rows in its document."""
    at = collectives.axis_index("seq") * length + jnp.arange(length, dtype=jnp.int32)
    at = jnp.broadcast_to(at, (batch, length))
    return at if documents is None or documents.starts is None else at - documents.starts


def first_rows(documents: Documents | None, ratio: int) -> jax.Array | None:
    """[B, T] int32: the first compressed row of each token's document; None where that is row 0."""
    if documents is None or documents.starts is None:
        return None
    return documents.starts // max(ratio, 1)


def sums(values: jax.Array, documents: Documents, align: int) -> jax.Array:
    """Sums of values [B, T, F] over the tokens of each document, of this device's part: [B, n, F].

    Documents begin at multiples of `align`: that of tokens `align * d` .. is number d of its row.
    """
    batch, length, width = values.shape
    values = jnp.where(documents.valid[..., None], values, 0)
    if documents.starts is None:
        return jnp.sum(values, axis=1, keepdims=True)
    blocks = -(-length // align)
    values = jnp.pad(values, [(0, 0), (0, blocks * align - length), (0, 0)])
    values = jnp.sum(values.reshape(batch, blocks, align, width), axis=2)
    number = documents.starts[:, ::align] // align  # of the document that a block belongs to
    count = -(-length * collectives.axis_size("seq") // align)
    return jax.vmap(lambda v, n: jax.ops.segment_sum(v, n, count))(values, number)
