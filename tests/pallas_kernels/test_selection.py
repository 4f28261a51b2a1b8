"""Selections as indices and as bits are the same sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selection import Selection, num_reached


def random_mask(num_queries: int, num_entries: int, topk: int) -> np.ndarray:
    """Up to `topk` of each row; the first row is empty, the last is full."""
    rng = np.random.default_rng(num_entries)
    mask = np.zeros((2, num_queries, num_entries), bool)
    for b, t in np.ndindex(2, num_queries):
        count = min(topk, num_entries) if t == num_queries - 1 else rng.integers(topk + 1) * (t > 0)
        mask[b, t, rng.permutation(num_entries)[:count]] = True
    return mask


SIZES = [(1, 1, 1), (3, 5, 8), (7, 128, 16), (130, 300, 9), (3, 4096, 20), (5, 4099, 70)]


@pytest.mark.parametrize("num_queries, num_entries, topk", SIZES)
def test_bits_and_indices_hold_the_same_entries(num_queries, num_entries, topk):
    mask = random_mask(num_queries, num_entries, topk)
    of_mask = Selection.of_mask(mask, topk)
    assert of_mask.shape == (2, num_queries)
    np.testing.assert_array_equal(of_mask.mask(), mask)

    indices = np.asarray(jax.jit(Selection.to_indices)(of_mask))
    assert indices.shape == (2, num_queries, min(topk, num_entries))
    for b, t in np.ndindex(2, num_queries):
        (expected,) = np.nonzero(mask[b, t])
        np.testing.assert_array_equal(indices[b, t, : len(expected)], expected)
        np.testing.assert_array_equal(indices[b, t, len(expected) :], -1)

    of_indices = Selection.of_indices(indices, num_entries)
    np.testing.assert_array_equal(of_indices.mask(), mask)
    np.testing.assert_array_equal(jax.jit(Selection.to_bits)(of_indices), of_mask.bits)


def test_a_bit_is_where_the_table_says():
    num_entries = 2 * 4096 + 300
    for entry in (0, 127, 128, 31 * 128 + 5, 4095, 4096, 8191, 8192 + 299):
        selection = Selection.of_indices(jnp.full((1, 1, 1), entry, jnp.int32), num_entries)
        bits = np.asarray(selection.to_bits())
        assert bits.shape == (1, 1, 3, 128) and bits.dtype == np.uint32
        expected = np.zeros_like(bits)
        expected[0, 0, entry // 4096, entry % 128] = np.uint32(1) << (entry // 128 % 32)
        np.testing.assert_array_equal(bits, expected)


def test_no_entries_and_no_picks():
    for num_entries, topk in ((0, 4), (9, 0)):
        selection = Selection.of_mask(jnp.zeros((2, 3, num_entries), bool), topk)
        assert selection.to_indices().shape == (2, 3, 0)
        again = Selection.of_indices(selection.to_indices(), num_entries)
        np.testing.assert_array_equal(again.to_bits(), selection.bits)
        assert again.mask().shape == (2, 3, num_entries) and not again.mask().any()


def test_indices_keep_their_order():
    indices = jnp.array([[[4, -1, 0]]], jnp.int32)
    np.testing.assert_array_equal(Selection.of_indices(indices, 5).to_indices(), indices)


@pytest.mark.parametrize("make", [Selection.of_indices, Selection.of_mask])
def test_other_shapes_are_refused(make):
    with pytest.raises(ValueError, match=r"must be \[B, T, [KS]\]"):
        make(jnp.zeros((2, 3), jnp.int32), 4)


def test_how_many_entries_are_reached():
    """The last selected is in any word row, bit and lane, or there is none."""
    mask = np.zeros((4, 3, 9000), bool)
    mask[0, 1, [5, 4095]] = mask[1, 2, [8999, 0]] = mask[2, 0, 4096 + 130] = True
    bits = Selection.of_mask(jnp.asarray(mask), 2).bits
    np.testing.assert_array_equal(num_reached(bits), [4096, 9000, 4227, 0])
