"""Rows to the experts of other devices, and results back, without dropping any.

Every device holds E / n experts and some tokens. `apply_experts` runs each token's K experts where
they are:

* "gather": all devices see all rows, run those of their own experts, and the results are summed
  where the rows came from. Fixed shapes, no exchange of counts; for a few rows per device.
* "all_to_all": each row travels to its expert's device. Shapes must not depend on the routing, so
  rows travel in rounds of `capacity` rows between any two devices; a round more is made for as long
  as any pair has rows left (none are dropped, and memory does not grow with an uneven load).
  With an even load two rounds are enough; on TPU and GPU one's rows can travel while the other's are
  computed (docs/sharding.md has what the compiler makes of that), and only rows that exist travel
  (`ragged_all_to_all`). XLA's CPU backend has no such operation, so there whole buffers do.

Backward, rows travel again and experts are computed again: nothing of the size of the exchanged rows
is kept.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32

from sharding import collectives

CAPACITY_SLACK = 1.25  # of rounds, over an even load
ROW_MULTIPLE = 8
EVEN_ROUNDS = 2  # that an even load takes
UNEVEN_ROUNDS = "uneven_rounds"  # scope of the loop over the others


class Order(Protocol):
    """Rows sorted by expert."""

    @property
    def row(self) -> jax.Array:
        """[R] the row at each position."""

    @property
    def position(self) -> jax.Array:
        """[R] the position of each row."""

    @property
    def sizes(self) -> jax.Array:
        """[E] rows of each expert."""


# (experts [R] int32, E) -> the stable order by expert; rows of E, which is none of them, come last
Sort = Callable[[jax.Array, int], Order]

# (experts [.., T, K], weights [.., T, K], first, E) -> the same order of the T * K pairs of a token and an
# expert, of which `first` .. `first + E - 1` are here, and the weights [T * K] in that order
SortPairs = Callable[[jax.Array, jax.Array, jax.Array, int], tuple[Order, jax.Array]]

# (params, x [.., T, D], order of the pairs, weights [T * K] in that order, labels [T] or None) -> [T, D]
# float32, sums over the pairs that are of an expert here
Experts = Callable[[object, jax.Array, Order, jax.Array, jax.Array | None], jax.Array]


def apply_experts(
    experts_fn: Experts,
    sort: Sort,
    sort_pairs: SortPairs,
    params,  # of this device's experts, leading axis E_local
    x: Float[jax.Array, "T D"],  # this device's tokens
    experts: Int32[jax.Array, "T K"],  # of all E
    weights: Float32[jax.Array, "T K"],
    num_local: int,
    *,
    labels: Int32[jax.Array, " T"] | None = None,
) -> Float32[jax.Array, "T D"]:
    """The weighted sum of each token's experts. Differentiable in params, x and weights.

    Tokens are cut over the logical axes "batch" and "seq", experts over "expert". Where an axis cuts
    experts but not tokens, each device adds what its own experts give.

    Args:
      labels: a number of each token that goes where it goes, for `experts_fn`; 0 where no token is.
    """
    token_axes = collectives.mesh_axes("batch", "seq")
    expert_axes = collectives.mesh_axes("expert")
    exchanged = tuple(axis for axis in expert_axes if axis in token_axes)
    shared = tuple(axis for axis in expert_axes if axis not in token_axes)
    if collectives.dispatch_method() == "all_to_all" and exchanged:
        if shared:
            raise ValueError(
                f'dispatch="all_to_all" with experts over {expert_axes} and tokens over '
                f"{token_axes}: expected experts over axes of tokens only, or "
                'dispatch="gather".'
            )
        return _all_to_all(
            experts_fn, sort, exchanged, num_local, params, x, experts, weights, labels
        )
    args = params, x, experts, weights, labels
    return _gathered(experts_fn, sort_pairs, exchanged, shared, num_local, *args)


def _gathered(
    experts_fn, sort_pairs, exchanged, shared, num_local, params, x, experts, weights, labels
):
    x = collectives.copy_to_over(x, shared)
    if exchanged:
        x = collectives.all_gather_over(x[None], exchanged, 0)
        weights, experts = collectives.all_gather_together(weights, experts, exchanged)
    if labels is not None:
        labels = collectives.all_gather_over(labels, exchanged, 0)
    weights = collectives.copy_to_over(weights, shared)
    axes = collectives.mesh_axes("expert")
    first = (jax.lax.axis_index(axes) if axes else jnp.zeros((), jnp.int32)) * num_local
    order, ordered = sort_pairs(experts, weights, first, num_local)
    out = experts_fn(params, x, order, ordered, labels)
    return collectives.psum_scatter_over(collectives.reduce_from_over(out, shared), exchanged, 0)


# All-to-all ---------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """Who sends what to whom. Rows are (token, choice) pairs, sorted by expert."""

    order: Order  # of the pairs
    counts: jax.Array  # [n, n, E_local] rows from a device to an expert of a device
    rounds: jax.Array  # []


def _plan(
    sort: Sort, experts: jax.Array, axes: tuple[str, ...], num_local: int, capacity: int
) -> _Plan:
    devices = collectives.size_of_axes(axes)
    order = sort(experts.reshape(-1), devices * num_local)
    counts = jax.lax.all_gather(order.sizes.reshape(devices, num_local), axes)
    most = jnp.max(jnp.sum(counts, axis=-1))
    return _Plan(order, counts, -(-most // capacity))


class _Exchange:
    """Round `number` of a plan: rows go to the experts' devices with `send`, back with `back`."""

    def __init__(self, plan: _Plan, axes: tuple[str, ...], capacity: int, number: jax.Array):
        self.axes, self.capacity = axes, capacity
        me = jax.lax.axis_index(axes)
        totals = jnp.sum(plan.counts, axis=-1)  # [source, destination]
        starts = jnp.cumsum(totals, axis=1) - totals  # of a destination among a source's rows
        done = number * capacity

        def left(total):
            return jnp.clip(total - done, 0, capacity)

        self.start = starts[me] + done  # of my rows for each device
        self.sizes = left(totals[me])
        self.remote_start = starts[:, me] + done  # of the rows for me, at their sources
        self.received = left(totals[:, me])
        self.slot = jnp.full(totals.shape[0], me * capacity)
        # Experts of the received rows [n * capacity], `num_local` where there is none.
        ends = jnp.cumsum(plan.counts[:, me], axis=-1)  # [source, E_local]
        row = done + jnp.arange(capacity)
        expert = jnp.sum(ends[:, None, :] <= row[None, :, None], axis=-1)
        self.expert = expert.reshape(-1)

    def send(self, rows: jax.Array) -> jax.Array:
        """Sorted rows [R, ...] -> those for this device, [n * capacity, ...], zeros between."""
        num_slots = self.sizes.shape[0] * self.capacity
        if _ragged(self.axes):
            out = jnp.zeros((num_slots, *rows.shape[1:]), rows.dtype)
            return jax.lax.ragged_all_to_all(
                *(rows, out, self.start, self.sizes, self.slot, self.received),
                axis_name=self.axes[0],
            )
        index = self.start[:, None] + jnp.arange(self.capacity)
        valid = jnp.arange(self.capacity) < self.sizes[:, None]
        buffer = jnp.where(_like(valid, rows), rows[jnp.minimum(index, rows.shape[0] - 1)], 0)
        return _swap(buffer, self.axes).reshape(num_slots, *rows.shape[1:])

    def back(self, out: jax.Array, received: jax.Array) -> jax.Array:
        """Puts results [n * capacity, ...] into `out` [R, ...], at the rows they belong to."""
        if _ragged(self.axes):
            sources = jnp.arange(self.sizes.shape[0]) * self.capacity
            return jax.lax.ragged_all_to_all(
                *(received, out, sources, self.received, self.remote_start, self.sizes),
                axis_name=self.axes[0],
            )
        buffer = received.reshape(-1, self.capacity, *received.shape[1:])
        buffer = _swap(buffer, self.axes)
        index = self.start[:, None] + jnp.arange(self.capacity)
        valid = jnp.arange(self.capacity) < self.sizes[:, None]
        index = jnp.where(valid, index, out.shape[0])
        return out.at[index.reshape(-1)].set(
            buffer.reshape(-1, *received.shape[1:]).astype(out.dtype), mode="drop"
        )


def _swap(buffer: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """[n, ...] by destination -> [n, ...] by source."""
    return jax.lax.all_to_all(buffer, axes, split_axis=0, concat_axis=0, tiled=True)


def _ragged(axes: tuple[str, ...]) -> bool:
    """Whether the platform compiled for has a ragged exchange, over one mesh axis."""
    return _platform() != "cpu" and len(axes) == 1


def rounds_overlap() -> bool:
    """Whether the platform compiled for moves rows of one round while it computes another's."""
    return _platform() != "cpu"


def _platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _like(mask, rows):
    return mask.reshape(*mask.shape, *[1] * (rows.ndim - 1))


def _capacity(num_rows: int, devices: int) -> int:
    even = CAPACITY_SLACK * num_rows / (devices * EVEN_ROUNDS)
    return min(-(-int(even) // ROW_MULTIPLE) * ROW_MULTIPLE + ROW_MULTIPLE, num_rows)


def _in_rounds(plan: _Plan, one: Callable, carry):
    """`carry = one(number, carry)` for each round.

    Those of an even load stand one after the other, so that the rows of one can travel while those
    of another are computed; what is left is a loop. On a CPU all rounds are: nothing would overlap,
    and the exchange would stand in the program three times.
    """
    if not rounds_overlap():
        return jax.lax.fori_loop(0, plan.rounds, one, carry)
    for number in range(EVEN_ROUNDS):
        carry = one(number, carry)
    with jax.named_scope(UNEVEN_ROUNDS):
        return jax.lax.fori_loop(EVEN_ROUNDS, plan.rounds, one, carry)


def _local(experts_fn, sort, num_local, expert, params, rows, weights, labels):
    """Received rows through this device's experts, in the order they came."""
    order = sort(expert, num_local)
    weights = weights.at[order.row].get(mode="promise_in_bounds")
    return experts_fn(params, rows, order, weights, labels).astype(rows.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _all_to_all(experts_fn, sort, axes, num_local, params, x, experts, weights, labels):
    k = experts.shape[1]
    capacity = _capacity(experts.size, collectives.size_of_axes(axes))
    plan = _plan(sort, experts, axes, num_local, capacity)
    token = plan.order.row // k
    sent = x[token], weights.reshape(-1)[plan.order.row], None if labels is None else labels[token]

    def one(number, out):
        exchange = _Exchange(plan, axes, capacity, number)
        received = jax.tree.map(exchange.send, sent)
        result = _local(experts_fn, sort, num_local, exchange.expert, params, *received)
        return exchange.back(out, result)

    out = _in_rounds(plan, one, jnp.zeros_like(sent[0]))
    out = out[plan.order.position].reshape(-1, k, x.shape[-1])
    return jnp.sum(out.astype(jnp.float32), axis=1)


def _all_to_all_fwd(experts_fn, sort, axes, num_local, params, x, experts, weights, labels):
    out = _all_to_all(experts_fn, sort, axes, num_local, params, x, experts, weights, labels)
    return out, (params, x, experts, weights, labels)


def _all_to_all_bwd(experts_fn, sort, axes, num_local, residuals, d_out):
    params, x, experts, weights, labels = residuals
    k = experts.shape[1]
    capacity = _capacity(experts.size, collectives.size_of_axes(axes))
    plan = _plan(sort, experts, axes, num_local, capacity)
    token = plan.order.row // k
    rows, row_weights = x[token], weights.reshape(-1)[plan.order.row]
    row_labels = None if labels is None else labels[token]
    d_rows = d_out.astype(x.dtype)[token]
    floats, rebuild = _split_floats(params)

    def one(number, carry):
        d_params, d_x, d_weights = carry
        exchange = _Exchange(plan, axes, capacity, number)
        through = functools.partial(_local, experts_fn, sort, num_local, exchange.expert)
        its_labels = jax.tree.map(exchange.send, row_labels)

        def local(floats, received, its_weights):
            return through(rebuild(floats), received, its_weights, its_labels)

        _, vjp = jax.vjp(local, floats, exchange.send(rows), exchange.send(row_weights))
        new, d_received, d_its_weights = vjp(exchange.send(d_rows))
        valid = exchange.expert < num_local
        d_received = jnp.where(valid[:, None], d_received, 0)
        d_params = [a + b.astype(a.dtype) for a, b in zip(d_params, new)]
        d_x = exchange.back(d_x, d_received)
        return d_params, d_x, exchange.back(d_weights, jnp.where(valid, d_its_weights, 0))

    zeros = [jnp.zeros(a.shape, jnp.float32) for a in floats]
    init = (zeros, jnp.zeros_like(rows), jnp.zeros_like(row_weights))
    d_params, d_x, d_weights = _in_rounds(plan, one, init)
    back = plan.order.position
    d_x = jnp.sum(d_x[back].reshape(-1, k, x.shape[-1]).astype(jnp.float32), axis=1)
    d_params = [d.astype(a.dtype) for d, a in zip(d_params, floats)]
    return (
        rebuild(d_params, zero=True),
        d_x.astype(x.dtype),
        None,
        d_weights[back].reshape(weights.shape),
        None,
    )


_all_to_all.defvjp(_all_to_all_fwd, _all_to_all_bwd)


def _split_floats(params):
    """Trainable leaves, and a function that puts others in their place again.

    Leaf by leaf: quantised weights are frozen and their gradient is None, while adapters beside them
    learn.
    """
    leaves, tree = jax.tree.flatten(params)
    trained = [leaf.dtype in (jnp.float32, jnp.bfloat16) for leaf in leaves]

    def rebuild(floats, zero: bool = False):
        others = iter(floats)
        frozen = [None if zero else leaf for leaf in leaves]
        parts = [next(others) if learns else leaf for learns, leaf in zip(trained, frozen)]
        return jax.tree.unflatten(tree, parts)

    return [leaf for leaf, learns in zip(leaves, trained) if learns], rebuild
