"""States of layers whose small arrays lie in one."""

import dataclasses

import jax
import numpy as np
import pytest

from v4jax import flash, plain, released, tiny
from v4jax.config import window_layer
from v4jax.inference.packing import PackedStates
from v4jax.nn.cache import LayerCache, empty_cache, ratios_of


def random_states(cfg, numerics, batch: int) -> tuple[LayerCache, ...]:
    """Of a cache that holds random bits."""
    rng = np.random.default_rng(0)
    pages = dict.fromkeys(ratios_of(cfg), 2)
    states = empty_cache(cfg, numerics, batch, pages, {}, 512).states
    return jax.tree.map(lambda x: rng.integers(0, 9, x.shape).astype(x.dtype), states)


def check(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("numerics", [plain(), released("bfloat16")], ids=["float", "packed"])
def test_states_come_apart_as_they_were(numerics):
    """All rows, and one of them: rows are what snapshots and requests that leave are made of."""
    states = random_states(tiny(), numerics, 3)
    packed = PackedStates.of(states)
    check(packed.apart(), states)
    row = jax.tree.map(lambda x: x[1:2], packed)
    check(row.apart(), jax.tree.map(lambda x: x[1:2], states))


def test_a_window_alone_has_no_sums():
    cfg = dataclasses.replace(tiny(), layers=(window_layer(),) * 2, mtp_layers=())
    states = random_states(cfg, plain(), 2)
    packed = PackedStates.of(states)
    assert packed.sums is None
    check(packed.apart(), states)


def test_how_many_arrays_a_call_hands_over():
    """Of Flash: a ring a layer, and one for all open windows of CSA (12 sums) and HCA (3)."""
    pages = dict.fromkeys(ratios_of(flash()), 2)
    states = jax.eval_shape(
        lambda: empty_cache(flash(), released("bfloat16"), 1, pages, {}, 512).states
    )
    packed = jax.eval_shape(PackedStates.of, states)
    assert len(jax.tree.leaves(states)) == 43 + 21 * 12 + 20 * 3
    assert len(jax.tree.leaves(packed)) == 43 + 1
