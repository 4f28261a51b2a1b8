"""Rows in the order of their experts: where each goes, and how many an expert has.

Rows of an expert keep their order; rows that go to none of the experts come last.

By counting, not by sorting: a row's position is the number of rows of earlier experts, and of the same
expert before it. A sort takes the TPU compiler longer than the rest of a layer.

Why a kernel for few rows: XLA makes twelve operations of it, which of 48 numbers take longer to start
than to run. Here all rows are compared with all in registers; what is needed along both axes is turned
by a sum over a diagonal. Experts of tokens, and weights, come as devices told each other (`pairs_by_expert`):
XLA would make four operations of writing them in a row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float32, Int32

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


@dispatch.operation
def pairs_by_expert(
    experts: Int32[jax.Array, "*tokens K"],
    weights: Float32[jax.Array, "*tokens K"],
    first: Int32[jax.Array, ""],
    num_experts: int,
    *,
    implementation: dispatch.Implementation = None,
) -> tuple[Order, Float32[jax.Array, " P"]]:
    """`by_expert` of the pairs of a token and one of its K experts, and their weights in that order.

    Experts other than `first` .. `first + num_experts - 1` stand for none. Differentiable in weights.

    Args:
      implementation: see `dispatch.choose`.

    Raises:
      ValueError: an implementation that cannot run.
    """
    reason = None
    if not 0 < max(experts.size, num_experts) <= MOST or not 2 <= experts.ndim <= 3:
        reason = (
            f"experts {experts.shape}, and {num_experts} of them: the kernel takes [.., T, K] with {MOST} "
            f"pairs, and {MOST} experts"
        )
    chosen = dispatch.choose(implementation, unsupported=reason)
    if chosen in ("tpu", "interpret"):
        return _pairs(weights, experts, first, num_experts, chosen == "interpret")
    local = experts - first
    local = jnp.where((local >= 0) & (local < num_experts), local, num_experts)
    found = by_expert(local.reshape(-1), num_experts, implementation=implementation)
    return found, taken(weights.reshape(-1), found.row)


def of_pairs(
    x: jax.Array,  # [T, D] of tokens
    pair: jax.Array,  # [P] which pair is at each place, `Order.row`; P / T are of a token
) -> jax.Array:
    """Rows [P, D] in the order of places."""
    return taken(x, pair // (pair.shape[0] // x.shape[0]))


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
    put_in_order(expert_ref[...], row_ref, position_ref, sizes_ref)


def put_in_order(along: jax.Array, row_ref, position_ref, sizes_ref) -> jax.Array:
    """Writes the order by expert [1, R]. Returns the position of each row, as a column [R, 1]."""
    down = turned(along)
    one, other = places(along.shape[1], along.shape[1])
    before = (down < along) | ((down == along) & (one < other))  # row `one` before row `other`
    position_ref[...] = count(before, 0)
    after = (along < down) | ((along == down) & (other < one))
    position = count(after, 1)  # of row `one`
    row_ref[...] = jnp.sum(jnp.where(position == other, one, 0), axis=0, keepdims=True)
    _, expert = places(along.shape[1], sizes_ref.shape[1])
    sizes_ref[...] = count(down == expert, 0)
    return position


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _pairs(weights, experts, first, num_experts, interpret):
    # Together, as devices tell each other: XLA takes apart and joins nothing then.
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)
    both = jnp.concatenate([bits, experts], axis=-1)
    num_rows = experts.size
    shapes = [(1, n) for n in (num_rows, num_rows, num_experts, num_rows)]
    dtypes = [jnp.int32] * 3 + [jnp.float32]
    found = pl.pallas_call(
        _pairs_kernel,
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pltpu.VMEM),
        ],
        out_shape=[jax.ShapeDtypeStruct(*one) for one in zip(shapes, dtypes, strict=True)],
        interpret=interpret,
        name="pairs_by_expert",
    )(first.reshape(1), both.reshape(-1, *both.shape[-2:]))
    row, position, sizes, ordered = (x.reshape(-1) for x in found)
    return Order(row, position, sizes), ordered


def _pairs_fwd(weights, experts, first, num_experts, interpret):
    found = _pairs(weights, experts, first, num_experts, interpret)
    return found, (weights, found[0].position)


def _pairs_bwd(num_experts, interpret, residuals, cotangents):
    """Of weights alone."""
    weights, position = residuals
    return taken(cotangents[1], position).reshape(weights.shape), None, None


_pairs.defvjp(_pairs_fwd, _pairs_bwd)


def _pairs_kernel(first_ref, both_ref, row_ref, position_ref, sizes_ref, weights_ref) -> None:
    choices, num_experts = both_ref.shape[2] // 2, sizes_ref.shape[1]
    weights = jax.lax.bitcast_convert_type(in_a_row(both_ref, 0, choices), jnp.float32)
    expert = in_a_row(both_ref, choices, choices) - first_ref[0]
    expert = jnp.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    position = put_in_order(expert, row_ref, position_ref, sizes_ref)
    _, place = places(expert.shape[1], expert.shape[1])
    ordered = jnp.where(position == place, turned(weights), 0.0)
    weights_ref[...] = jnp.sum(ordered, axis=0, keepdims=True)


def in_a_row(ref, start: int, count: int) -> jax.Array:
    """Columns start .. start + count - 1 of each row of [N, T, C], one after the other: [1, N T count]."""
    devices, tokens, _ = ref.shape
    device, place = places(devices, devices * tokens * count)
    total = jnp.zeros(place.shape, ref.dtype)
    for token in range(tokens):
        rows = ref[:, token, :]
        for i in range(count):
            mine = place == (device * tokens + token) * count + i
            total = jnp.where(mine, rows[:, start + i : start + i + 1], total)
    return jnp.sum(total, axis=0, keepdims=True)


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
