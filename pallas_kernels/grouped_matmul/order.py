"""Rows in the order of their experts: where each goes, and how many an expert has.

Rows of an expert keep their order; rows that go to none of the experts come last.

By counting, not by sorting: a row's position is the number of rows of earlier experts, and of the same
expert before it. A sort takes the TPU compiler longer than the rest of a layer.

Why a kernel for few rows: XLA makes twelve operations of it, which of 48 numbers take longer to start
than to run. Here all rows are compared with all in registers; what is needed along both axes is turned
by a sum over a diagonal.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Int32

from pallas_kernels import dispatch

COUNT_BLOCK = 256  # rows that XLA compares with each other at once
MOST = 512  # rows, and experts, of the kernel


class Order(NamedTuple):
    """Rows sorted by expert."""

    row: jax.Array  # [R] the row at each position
    position: jax.Array  # [R] the position of each row
    sizes: jax.Array  # [E] rows of each expert


@dispatch.operation
def by_expert(
    expert: Int32[jax.Array, " R"],  # in 0 .. E
    num_experts: int,  # E, which as an expert stands for none
    *,
    implementation: dispatch.Implementation = None,
) -> Order:
    """The stable order of rows by expert.

    Args:
      implementation: see `dispatch.choose`.

    Raises:
      ValueError: not a list of experts, or an implementation that cannot run.
    """
    if expert.ndim != 1 or not expert.size:
        raise ValueError(f"expert {expert.shape}: expected [R], the expert of each of R > 0 rows.")
    reason = None
    if max(expert.shape[0], num_experts) > MOST:
        reason = (
            f"{expert.shape[0]} rows and {num_experts} experts: the kernel takes {MOST} of each"
        )
    chosen = dispatch.choose(implementation, unsupported=reason)
    if chosen in ("tpu", "interpret"):
        return _call(expert, num_experts, chosen == "interpret")
    if chosen == "reference":
        row = jnp.argsort(expert, stable=True).astype(jnp.int32)
        sizes = jnp.bincount(expert, length=num_experts + 1)[:num_experts]
        return Order(row, jnp.argsort(row).astype(jnp.int32), sizes.astype(jnp.int32))
    return _xla(expert, num_experts)


def of_pairs(
    x: jax.Array,  # [T, D] of tokens
    weights: jax.Array,  # [P] of pairs, P / T of each token
    pair: jax.Array,  # [P] which is at each place, `Order.row`
) -> tuple[jax.Array, jax.Array]:
    """Rows [P, D] and weights [P] in the order of places."""
    return taken(x, pair // (pair.shape[0] // x.shape[0])), taken(weights, pair)


def summed(
    out: jax.Array,  # [P, D] by place
    position: jax.Array,  # [T, K] the place of each of a token's pairs
) -> jax.Array:
    """float32 [T, D]: the sum over a token's pairs."""
    rows = taken(out, position.reshape(-1)).reshape(*position.shape, -1)
    return jnp.sum(rows.astype(jnp.float32), axis=1)


def taken(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows that there are: XLA has nothing to check."""
    return x.at[rows].get(mode="promise_in_bounds")


def _xla(expert: jax.Array, num_experts: int) -> Order:
    """In blocks of rows: those of the same expert in earlier blocks come before a block's, too."""
    num_rows, num = expert.shape[0], num_experts + 1
    block = min(COUNT_BLOCK, num_rows)
    padded = jnp.pad(expert, (0, -num_rows % block), constant_values=num)
    blocks = padded.reshape(-1, block)
    before = jnp.arange(block)[:, None] > jnp.arange(block)
    same = blocks[:, :, None] == blocks[:, None, :]
    within = jnp.sum(same & before, axis=-1, dtype=jnp.int32)
    chosen = blocks[:, :, None] == jnp.arange(num)
    counts = jnp.sum(chosen, axis=1, dtype=jnp.int32)  # [blocks, experts]
    sizes = jnp.sum(counts, axis=0)
    first = jnp.cumsum(counts, axis=0) - counts + jnp.cumsum(sizes) - sizes
    position = within + jnp.sum(jnp.where(chosen, first[:, None], 0), axis=-1)
    position = position.reshape(-1)[:num_rows]
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    row = jnp.zeros(num_rows, jnp.int32).at[position].set(rows, unique_indices=True)
    return Order(row, position, sizes[:num_experts])


def _call(expert: jax.Array, num_experts: int, interpret: bool) -> Order:
    num_rows = expert.shape[0]
    shapes = [(1, n) for n in (num_rows, num_rows, num_experts)]
    found = pl.pallas_call(
        _kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes],
        interpret=interpret,
        name="by_expert",
    )(expert.reshape(1, -1).astype(jnp.int32))
    return Order(*(x.reshape(-1) for x in found))


def _kernel(expert_ref, row_ref, position_ref, sizes_ref) -> None:
    along = expert_ref[...]  # [1, R]
    down = turned(along)
    one, other = places(along.shape[1], along.shape[1])
    before = (down < along) | ((down == along) & (one < other))  # row `one` before row `other`
    position_ref[...] = count(before, 0)
    after = (along < down) | ((along == down) & (other < one))
    position = count(after, 1)  # of row `one`
    row_ref[...] = jnp.sum(jnp.where(position == other, one, 0), axis=0, keepdims=True)
    _, expert = places(along.shape[1], sizes_ref.shape[1])
    sizes_ref[...] = count(down == expert, 0)


def places(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """The row and the column of each entry of a matrix."""
    shape = (rows, columns)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return row, jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def turned(x: jax.Array) -> jax.Array:
    """Numbers [1, R] of a kernel as a column [R, 1]."""
    one, other = places(x.shape[1], x.shape[1])
    return jnp.sum(jnp.where(one == other, x, 0), axis=1, keepdims=True)


def count(x: jax.Array, axis: int) -> jax.Array:
    """How often it is true along an axis, which stays."""
    return jnp.sum(x.astype(jnp.int32), axis=axis, keepdims=True)
