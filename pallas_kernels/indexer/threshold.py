"""The k-th largest of many float32 values that lie in VMEM, without sorting them.

A float32 is mapped to an int32 of the same order (`ordered`; both zeros become 0), and the
threshold of each query is found by halving an interval: a pass over the values counts how many are
at least `middle`. The middle is that of the floats at first, for which scores that lie far from
zero take fewer passes, then that of the integers, so that no interval needs more than
`FLOAT_PASSES + 32`. A query is done when exactly k values reach the middle, so ties at the
threshold are the slow case, and the only one in which values are looked at again.

Layout: `values` [rows, 128] int32. The 128 lanes are F groups of 128 / F queries; a query's values
are those of its lane in all rows and groups. State of the search is [1, 128], the same in all
groups.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
FLOAT_PASSES = 24
MISSING = -(2**31)  # less than any score: an entry that is not to be selected
LOWEST = MISSING + 1


def ordered(scores: jax.Array) -> jax.Array:
    """int32 in the order of finite float32 `scores`."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    bits = jnp.where(scores == 0.0, 0, bits)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def across_groups(x: jax.Array, combine: Callable, num_groups: int) -> jax.Array:
    """[r, 128] -> the same shape, each query's lanes of all groups combined."""
    shift = LANES // 2
    while shift >= LANES // num_groups:
        x = combine(x, pltpu.roll(x, shift, 1))
        shift //= 2
    return x


def across_rows(x: jax.Array, combine: Callable) -> jax.Array:
    """[r, 128] -> [8, 128], vector register by vector register (r a multiple of 8)."""
    parts = [x[i : i + 8] for i in range(0, x.shape[0], 8)]
    while len(parts) > 1:
        pairs = [combine(a, b) for a, b in zip(parts[::2], parts[1::2])]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]


def select(
    values,  # ref [rows, 128] int32
    num_pairs: jax.Array,  # pairs of chunks (of `chunk` rows) that hold values
    low: jax.Array,  # [1, 128] least value of a query
    high: jax.Array,  # [1, 128] greatest
    num_values: jax.Array,  # [1, 128] values of a query that are not MISSING
    entry_of: Callable,  # first row -> [chunk, 128] int32: which entries a chunk's values are of
    *,
    topk: int,
    num_groups: int,
    num_entries: int,
    chunk: int,
) -> jax.Array:  # [1, 128] int32
    """Threshold of each query: its `topk` greatest values are those that reach it.

    Of the values equal to the threshold, those of the highest entries become MISSING until `topk`
    are left.
    """

    def count(chosen):
        """[1, 128]: values for which chosen(values, first row) holds."""

        def add(pair, total):
            for c in (2 * pair, 2 * pair + 1):
                row = pl.multiple_of(c * chunk, chunk)
                found = chosen(values[pl.ds(row, chunk)], row)
                total += across_rows(jnp.where(found, 1, 0), jnp.add)
            return total

        total = jax.lax.fori_loop(0, num_pairs, add, jnp.zeros((8, LANES), jnp.int32))
        total = jnp.sum(total, axis=0, keepdims=True)
        return across_groups(total, jnp.add, num_groups)

    def halve(state):
        passes, low, high, num_low = state
        half = 0.5 * (_float(low) + _float(high))
        middle = jnp.where(
            passes < FLOAT_PASSES,
            ordered(half),
            (low >> 1) + (high >> 1) + (low & high & 1),
        )
        middle = jnp.clip(middle, low + 1, jnp.maximum(high - 1, low + 1))
        reach = count(lambda x, _: x >= middle)
        live = low + 1 < high
        enough = live & (reach >= topk)
        low = jnp.where(enough, middle, low)
        num_low = jnp.where(enough, reach, num_low)
        high = jnp.where(live & ~enough, middle, jnp.where(num_low == topk, low + 1, high))
        return passes + 1, low, high, num_low

    few = num_values <= topk
    low = jnp.where(few, LOWEST, low)
    high = jnp.where(few, LOWEST, high) + 1
    found = jax.lax.while_loop(
        lambda state: jnp.max(jnp.where(state[1] + 1 < state[2], 1.0, 0.0)) > 0,
        halve,
        (jnp.int32(0), low, high, num_values),
    )
    low, num_low = found[1], found[3]

    @pl.when(jnp.max(jnp.where(num_low > topk, 1.0, 0.0)) > 0)
    def _():
        keep = topk - count(lambda x, _: x > low)  # of the values equal to the threshold

        def halve_entries(_, state):  # fewer than `keep` lie before `first`, enough before `last`
            first, last = state
            middle = (first + last) >> 1
            enough = count(lambda x, row: (x == low) & (entry_of(row) < middle)) >= keep
            return jnp.where(enough, first, middle), jnp.where(enough, middle, last)

        ends = jnp.zeros((1, LANES), jnp.int32), jnp.full((1, LANES), num_entries, jnp.int32)
        _, end = jax.lax.fori_loop(0, num_entries.bit_length(), halve_entries, ends)

        def drop(c, _):
            row = pl.multiple_of(c * chunk, chunk)
            x = values[pl.ds(row, chunk)]
            dropped = (x == low) & (entry_of(row) >= end)
            values[pl.ds(row, chunk)] = jnp.where(dropped, MISSING, x)
            return 0

        jax.lax.fori_loop(0, 2 * num_pairs, drop, 0)

    return low


def _float(x):
    """Inverse of `ordered`."""
    return jax.lax.bitcast_convert_type(jnp.where(x < 0, x ^ 0x7FFFFFFF, x), jnp.float32)
