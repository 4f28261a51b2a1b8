"""Order of rows by expert, and what a TPU program does while rows travel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from sharding import TRAIN, collectives, make_mesh
from sharding.expert_parallel import COUNT_BLOCK, apply_experts, by_expert
from v4jax.planning.hlo import exchanges
from v4jax.planning.topologies import COMPILER_OPTIONS, topology_devices


@pytest.mark.parametrize("num_rows", [1, COUNT_BLOCK, COUNT_BLOCK + 1, 3 * COUNT_BLOCK - 7])
@pytest.mark.parametrize("num_experts", [1, 7])
def test_rows_are_ordered_as_a_stable_sort_orders_them(num_rows, num_experts):
    rng = np.random.default_rng(num_rows)
    expert = rng.integers(0, num_experts + 1, num_rows).astype(np.int32)  # the last: none

    order = jax.jit(by_expert, static_argnums=1)(expert, num_experts)

    want = np.argsort(expert, kind="stable")
    np.testing.assert_array_equal(order.row, want)
    np.testing.assert_array_equal(order.position, np.argsort(want))
    np.testing.assert_array_equal(order.sizes, np.bincount(expert, minlength=num_experts + 1)[:-1])


def test_rows_of_one_round_travel_while_those_of_another_are_computed(not_kept):
    pytest.importorskip("libtpu")
    devices, tokens, dim, k = 4, 1024, 1024, 2

    def experts_fn(weights, rows, sizes, row_weights):
        return jnp.matmul(rows * row_weights[:, None].astype(rows.dtype), weights[0])

    def fn(weights, x, experts, row_weights):
        return apply_experts(experts_fn, weights, x, experts, row_weights, 1)

    mesh = make_mesh(expert=devices, devices=topology_devices("v6e:2x2"))
    arrays = [
        ((devices, dim, dim), jnp.bfloat16),
        ((devices * tokens, dim), jnp.bfloat16),
        ((devices * tokens, k), jnp.int32),
        ((devices * tokens, k), jnp.float32),
    ]
    with jax.set_mesh(mesh):
        cut = jax.NamedSharding(mesh, P("expert"))
        shapes = [jax.ShapeDtypeStruct(*array, sharding=cut) for array in arrays]
        step = jax.jit(collectives.per_device(fn, TRAIN, (P("expert"),) * 4, P("expert")))
        compiled = step.lower(*shapes).compile(COMPILER_OPTIONS)

    found = exchanges(compiled.as_text())

    # Not all: a compiler may do one at once whose rows fit into a core's own memory.
    assert {one.kind for one in found} == {"ragged-all-to-all"}
    assert sum("dot_general" in one.work for one in found) >= 2, found
