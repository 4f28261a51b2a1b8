"""Order of rows by expert."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import by_expert, pairs_by_expert
from pallas_kernels.grouped_matmul.order import COUNT_BLOCK


@pytest.mark.parametrize("implementation", ["xla", "interpret", "reference"])
@pytest.mark.parametrize("num_rows", [1, 48, COUNT_BLOCK, COUNT_BLOCK + 1, 3 * COUNT_BLOCK - 7])
@pytest.mark.parametrize("num_experts", [1, 7])
def test_rows_are_ordered_as_a_stable_sort_orders_them(num_rows, num_experts, implementation):
    rng = np.random.default_rng(num_rows)
    expert = rng.integers(0, num_experts + 1, num_rows).astype(np.int32)  # the last: none
    sort = functools.partial(by_expert, num_experts=num_experts, implementation=implementation)
    if implementation == "interpret" and num_rows > 512:
        with pytest.raises(ValueError, match="the kernel takes 512"):
            sort(expert)
        return

    order = jax.jit(sort)(expert)

    want = np.argsort(expert, kind="stable")
    np.testing.assert_array_equal(order.row, want)
    np.testing.assert_array_equal(order.position, np.argsort(want))
    np.testing.assert_array_equal(order.sizes, np.bincount(expert, minlength=num_experts + 1)[:-1])


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("shape", [(5, 3), (4, 1, 6), (3, 2, 2)], ids=str)
def test_pairs_of_tokens_are_ordered_with_their_weights(shape, implementation):
    """With an axis of devices, too, whose rows lie one after the other."""
    rng = np.random.default_rng(0)
    experts = rng.integers(0, 8, shape).astype(np.int32)
    weights = rng.random(shape).astype(np.float32)
    weights.flat[3] = np.nan  # stays with its pair
    d_out = rng.random(weights.size).astype(np.float32)

    @jax.jit
    def run(experts, weights, d_out):
        def sort(weights):
            order, ordered = pairs_by_expert(
                experts, weights, jnp.int32(2), 3, implementation=implementation
            )
            return ordered, order

        ordered, vjp, order = jax.vjp(sort, weights, has_aux=True)
        return order, ordered, vjp(d_out)[0]

    order, ordered, d_weights = run(experts, weights, d_out)

    local = np.where((experts >= 2) & (experts < 5), experts - 2, 3).reshape(-1)
    want = np.argsort(local, kind="stable")
    np.testing.assert_array_equal(order.row, want)
    np.testing.assert_array_equal(order.position, np.argsort(want))
    np.testing.assert_array_equal(order.sizes, np.bincount(local, minlength=4)[:3])
    np.testing.assert_array_equal(ordered, weights.reshape(-1)[want])
    np.testing.assert_array_equal(d_weights, d_out[np.argsort(want)].reshape(shape))


def test_no_rows_and_matrices_of_experts_are_refused():
    for shape in ((0,), (3, 2)):
        with pytest.raises(ValueError, match="the expert of each of R > 0 rows"):
            by_expert(np.zeros(shape, np.int32), 4)
