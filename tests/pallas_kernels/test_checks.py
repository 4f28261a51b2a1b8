"""Checked mode: bad values are refused by name, good ones change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, checks, grouped_matmul, indexer
from pallas_kernels.formats.pages import Pages
from pallas_kernels.selection import Selection

B, T, N, H, C, S = 1, 3, 2, 8, 4, 5


def array(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


def ints(*values) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


def selected(indices, positions=(19, 20, 21)):
    selection = Selection.of_indices(ints(*[indices] * T)[None], S)
    window = array(B, C + T, H)
    return attention.selected_attention(
        *(array(B, T, N, H), window, array(B, S, H), selection, array(N), ints(positions)),
        scale=1.0,
    )


def window(positions):
    return attention.window_attention(
        *(array(B, T, N, H), array(B, C + T, H), array(B, S, H), array(N), ints(positions)),
        ratio=4,
        scale=1.0,
    )


def decode(indices, position=20):
    return attention.decode_attention(
        *(array(B, N, H), array(B, C, H), Pages.of(array(B, S, H))),
        *(ints(indices), array(N), ints(position)),
        ratio=4,
        scale=1.0,
    )


def select(positions):
    args = array(B, T, N, H), array(B, T, N), array(B, S, H), ints(positions)
    return indexer.index_topk(*args, topk=2, ratio=4).to_indices()


def scores(indices):
    args = array(B, T, N, H), array(B, T, N), array(B, S, H), ints(*[indices] * T)[None]
    return indexer.selected_scores(*args)


def mass(indices):
    args = array(B, T, N, H), array(B, S, H), ints(*[indices] * T)[None], array(B, T, N)
    return attention.selected_mass(*args, scale=1.0)


def matmul(sizes):
    return grouped_matmul.grouped_matmul(array(6, H), array(2, H, H), ints(*sizes))


def swiglu(sizes):
    args = array(6, H), array(2, H, H), array(2, H, H), ints(*sizes), array(6)
    return grouped_matmul.grouped_swiglu(*args, limit=1.0)


GOOD = [
    *((f, ((0, -1, 4),)) for f in (selected, decode, scores, mass)),
    *((f, ((4, 5, 6),)) for f in (window, select)),
    (select, ((9, 2, 30),)),  # the indexer takes queries in any order
    *((f, (sizes,)) for f in (matmul, swiglu) for sizes in ((2, 4), (6, 0), (1, 2))),
]
OUT_OF_RANGE, TWICE = "indices has 5: expected -1 .none. or 0..4", "indices has 3 twice"
BAD = [
    *((f, ((0, 5, -1),), OUT_OF_RANGE) for f in (selected, scores, mass)),
    (decode, ((0, 128, -1),), r"indices has 128: expected -1 .none. or 0\.\.127"),  # one page
    (decode, ((-2, 1, 3),), "indices has -2"),
    *((f, ((3, -1, 3),), TWICE) for f in (selected, decode, scores, mass)),
    *((f, ((-1, 0, 1),), "positions has -1: expected 0 or more") for f in (window, select)),
    (decode, ((0, 1, 2), -3), "positions has -3"),
    (window, ((4, 5, 7),), "must be consecutive"),
    (selected, ((0, 1, 2), (4, 4, 5)), "must be consecutive"),
    *((f, ((5, 2),), "at most the 6 rows of x, not 7") for f in (matmul, swiglu)),
    *((f, ((7, -1),), r"group_sizes \[7, -1\]: expected none negative") for f in (matmul, swiglu)),
]


@pytest.mark.parametrize("op, args", GOOD)
def test_good_values_change_nothing(op, args):
    with checks.checked():
        out = op(*args)
    jax.tree.map(np.testing.assert_array_equal, out, op(*args))


@pytest.mark.parametrize("op, args, message", BAD)
def test_bad_values_are_refused_by_name(op, args, message):
    op(*args)  # taken for granted otherwise
    with checks.checked(), pytest.raises(ValueError, match=message):
        op(*args)


def test_what_is_traced_cannot_be_checked():
    check = jax.jit(lambda sizes: grouped_matmul.grouped_matmul(array(6, H), array(2, H, H), sizes))
    with checks.checked():
        with pytest.raises(ValueError, match=r"group_sizes \(2,\) is traced"):
            check(ints(2, 4))
        with jax.disable_jit():
            check(ints(2, 4))
