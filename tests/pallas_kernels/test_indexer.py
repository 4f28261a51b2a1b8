"""The indexer against scores and a stable sort in NumPy.

Most inputs are small integers, whose scores are exact in float32 (and full of ties), so selections
must be equal, not close.
"""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import dispatch, indexer
from pallas_kernels.formats import quantize
from pallas_kernels.formats.packed_rows import PackedKeys
from pallas_kernels.formats.pages import Pages, table_limit
from pallas_kernels.indexer import block_sizes, tpu_decode, tpu_prefill, xla
from pallas_kernels.selection import Selection
from tests.paged import paged
from tests.tolerances import FLOAT32, GRADIENT_FLOAT32, assert_close


def select(*args, topk: int, ratio: int, implementation: str) -> Selection:
    """Traced anew each time, so that patched block sizes count."""
    options = dict(topk=topk, ratio=ratio, implementation=implementation)
    return jax.jit(functools.partial(indexer.index_topk, **options))(*args)


def index_topk(*args, topk: int, ratio: int, implementation: str = "xla") -> np.ndarray:
    """Indices."""
    selection = select(*args, topk=topk, ratio=ratio, implementation=implementation)
    assert selection.num_entries == args[2].shape[1]
    return np.asarray(selection.to_indices())


def scores_of(q, weights, keys) -> np.ndarray:
    """[B, T, S] in float64."""
    q, weights, keys = (x.astype(np.float64) for x in (q, weights, keys))
    out = np.zeros((*q.shape[:2], keys.shape[1]))
    for b, t, s in np.ndindex(*out.shape):
        for a in range(q.shape[2]):
            out[b, t, s] += weights[b, t, a] * max(float(q[b, t, a] @ keys[b, s]), 0.0)
    return out


def selection(scores: np.ndarray, positions: np.ndarray, topk: int, ratio: int) -> np.ndarray:
    """Best visible entries of each query, ties to the lowest index; sorted, with -1 in front."""
    out = np.full((*positions.shape, min(topk, scores.shape[-1])), -1)
    for b, t in np.ndindex(*positions.shape):
        visible = range(min((positions[b, t] + 1) // ratio, scores.shape[-1]))
        best = sorted(visible, key=lambda s: (-scores[b, t, s], s))[:topk]
        out[b, t, : len(best)] = best
    return np.sort(out, axis=-1)


def inputs(num_queries: int, num_entries: int, starts=(0, 37), *, integer=True, dtype=np.float32):
    """q [B, T, 3, 4], weights of both signs, keys, and positions that follow each row's start."""
    rng = np.random.default_rng(num_queries)
    shapes = ((num_queries, 3, 4), (num_queries, 3), (num_entries, 4))
    q, weights, keys = (
        rng.integers(-2, 3, (len(starts), *s)) if integer else rng.standard_normal((2, *s))
        for s in shapes
    )
    positions = np.asarray(starts, np.int32)[:, None] + np.arange(num_queries, dtype=np.int32)
    return q.astype(dtype), weights.astype(np.float32), keys.astype(dtype), positions


@pytest.fixture(params=[(128, 1024, 16_384), (16, 8, 12)], ids=["one block", "small blocks"])
def blocks(request, monkeypatch):
    """The module's block sizes, and sizes so small that several blocks and chunks are visited."""
    monkeypatch.setattr(xla, "BLOCK_QUERIES", request.param[0])
    monkeypatch.setattr(xla, "BLOCK_ENTRIES", request.param[1])
    monkeypatch.setattr(xla, "PIECE", request.param[2])


@pytest.mark.parametrize(
    "num_queries, num_entries, topk, ratio, starts",
    [
        (1, 30, 4, 4, (2, 77)),  # no visible entry, and a decoding step
        (50, 21, 6, 4, (0, 37)),  # T and S multiples of neither block
        (129, 60, 16, 4, (0, 200)),
        (64, 8, 3, 128, (100, 900)),
        (9, 8, 7, 4, (5, 40)),  # just one entry more than are selected
    ],
)
def test_selection_equals_stable_sort(num_queries, num_entries, topk, ratio, starts, blocks):
    q, weights, keys, positions = inputs(num_queries, num_entries, starts)
    expected = selection(scores_of(q, weights, keys), positions, topk, ratio)
    assert (expected == -1).any() and (expected >= 0).any()
    actual = index_topk(q, weights, keys, positions, topk=topk, ratio=ratio)
    np.testing.assert_array_equal(np.sort(actual, axis=-1), expected)


@pytest.mark.parametrize("topk, implementation", [(5, "xla"), (5, "reference"), (21, "xla")])
def test_documents_of_a_row_select_their_own_entries(topk, implementation, blocks):
    q, weights, keys, _ = inputs(84, 21)
    starts = np.repeat([0, 4, 40], [4, 36, 44])
    first = np.broadcast_to(starts // 4, (2, 84)).astype(np.int32)
    positions = np.broadcast_to(np.arange(84) - starts, (2, 84)).astype(np.int32)
    scores, expected = scores_of(q, weights, keys), np.full((2, 84, topk), -1)
    for start in (0, 4, 40):
        mine = starts == start
        found = selection(scores[:, mine, start // 4 :], positions[:, mine], topk, 4)
        expected[:, mine, -found.shape[2] :] = np.where(found < 0, -1, found + start // 4)
    options = dict(topk=topk, ratio=4, implementation=implementation)
    actual = index_topk(q, weights, keys, positions, first, **options)
    np.testing.assert_array_equal(np.sort(actual, axis=-1), np.sort(expected, axis=-1))


def test_more_entries_than_one_chunk_of_the_module():
    num_entries = xla.BLOCK_ENTRIES + 60
    q, weights, keys, positions = inputs(3, num_entries, (4 * num_entries - 10, 4 * 1024 - 3))
    expected = selection(scores_of(q, weights, keys), positions, 40, 4)
    assert (expected >= xla.BLOCK_ENTRIES).any()
    actual = index_topk(q, weights, keys, positions, topk=40, ratio=4)
    np.testing.assert_array_equal(np.sort(actual, axis=-1), expected)


def test_bfloat16_selects_the_same_where_products_are_exact(blocks):
    args = inputs(50, 21, dtype=ml_dtypes.bfloat16)
    expected = selection(scores_of(*args[:3]), args[3], 6, 4)
    np.testing.assert_array_equal(np.sort(index_topk(*args, topk=6, ratio=4), axis=-1), expected)


def test_selected_entries_of_real_scores_are_the_largest(blocks):
    q, weights, keys, positions = inputs(20, 40, (90, 130), integer=False)
    scores = scores_of(q, weights, keys)
    actual = index_topk(q, weights, keys, positions, topk=7, ratio=4)
    margin = FLOAT32 * np.abs(scores).max()
    for b, t in np.ndindex(*positions.shape):
        visible = (positions[b, t] + 1) // 4
        assert len(set(actual[b, t])) == 7 and 0 <= actual[b, t].min()
        rest = np.setdiff1d(np.arange(min(visible, 40)), actual[b, t])
        assert scores[b, t, actual[b, t]].min() >= scores[b, t, rest].max() - margin


@pytest.mark.parametrize("num_entries, topk", [(5, 5), (1, 1), (0, 0)])
def test_every_visible_entry_is_selected_when_there_are_no_more_than_topk(num_entries, topk):
    q, weights, keys, positions = inputs(12, num_entries, (0, 30))
    actual = index_topk(q, weights, keys, positions, topk=topk, ratio=4)
    expected = selection(np.zeros((2, 12, num_entries)), positions, topk, 4)
    np.testing.assert_array_equal(np.sort(actual, axis=-1), expected)


@pytest.mark.parametrize("num_entries, topk", [(5, 6), (5, 0), (5, -1), (0, 4)])
def test_more_picks_than_entries_are_refused(num_entries, topk):
    args = inputs(12, num_entries)
    with pytest.raises(ValueError, match=rf"topk={topk}: expected 1 to {num_entries}, as there"):
        index_topk(*args, topk=topk, ratio=4)


@pytest.mark.parametrize("kind", ["zero keys", "negative dots", "equal keys"])
def test_equal_scores_go_to_the_lowest_indices(kind, blocks):
    q, weights, keys, positions = inputs(40, 20)
    match kind:
        case "zero keys":
            keys[:] = 0
        case "negative dots":  # relu makes all of them zero, of either sign after the weights
            q, keys = np.abs(q) + 1, -np.abs(keys) - 1
        case "equal keys":
            keys[:] = keys[:, :1]
    actual = np.sort(index_topk(q, weights, keys, positions, topk=6, ratio=4), axis=-1)
    for b, t in np.ndindex(*positions.shape):
        chosen = min((positions[b, t] + 1) // 4, 6)
        expected = [-1] * (6 - chosen) + list(range(chosen))
        np.testing.assert_array_equal(actual[b, t], expected)


def test_entries_with_negative_scores_are_selected_before_none():
    q, weights, keys, positions = inputs(40, 20)
    q, keys, weights = np.abs(q) + 1, np.abs(keys) + 1, -np.abs(weights) - 1
    scores = scores_of(q, weights, keys)
    assert scores.max() < 0
    actual = np.sort(index_topk(q, weights, keys, positions, topk=6, ratio=4), axis=-1)
    np.testing.assert_array_equal(actual, selection(scores, positions, 6, 4))


@pytest.mark.parametrize("ratio", [4, 128])
def test_entries_of_the_future_are_never_selected_nor_seen(ratio, blocks):
    q, weights, keys, positions = inputs(40, 20, (2 * ratio - 8, 9 * ratio))
    q, weights = np.abs(q) + 1, np.abs(weights) + 1
    keys[:] = np.arange(20)[:, None] / 4  # the later the better

    def select(keys):
        return index_topk(q, weights, keys, positions, topk=6, ratio=ratio)

    actual = select(keys)
    visible = (positions + 1) // ratio
    assert (actual < visible[..., None]).all()
    np.testing.assert_array_equal(actual.max(axis=-1), np.minimum(visible, 20) - 1)
    last = visible[:, -1]
    for b in range(2):  # whatever lies beyond the last visible entry
        keys[b, last[b] :] = 1e30
    np.testing.assert_array_equal(select(keys), actual)


KERNEL_CASES = [  # queries, entries, topk, ratio, first positions
    (1, 30, 4, 4, (2, 77)),  # one query; no visible entry
    (50, 21, 6, 4, (0, 37)),  # fewer queries than a block, fewer entries than a chunk
    (150, 300, 16, 4, (0, 900)),  # two blocks, two chunks
    (70, 8, 3, 128, (100, 900)),
    (12, 5, 5, 4, (0, 30)),  # nothing is left out
]


@pytest.mark.parametrize("num_queries, num_entries, topk, ratio, starts", KERNEL_CASES)
def test_kernel_equals_stable_sort(num_queries, num_entries, topk, ratio, starts):
    q, weights, keys, positions = inputs(num_queries, num_entries, starts)
    expected = select(
        *(q, weights, keys, positions), topk=topk, ratio=ratio, implementation="reference"
    )
    actual = select(
        *(q, weights, keys, positions), topk=topk, ratio=ratio, implementation="interpret"
    )
    np.testing.assert_array_equal(actual.mask(), expected.mask())
    if num_entries > topk or num_queries > 1:
        assert actual.bits.dtype == np.uint32 and actual.topk == topk


@pytest.mark.parametrize(
    "num_queries, num_entries, topk, ratio, starts",
    [(1, 30, 4, 4, (2, 77)), (50, 21, 6, 4, (0, 37)), (12, 5, 5, 4, (0, 30))],
)
def test_reference_equals_stable_sort(num_queries, num_entries, topk, ratio, starts):
    args = inputs(num_queries, num_entries, starts)
    expected = selection(scores_of(*args[:3]), args[3], topk, ratio)
    actual = index_topk(*args, topk=topk, ratio=ratio, implementation="reference")
    np.testing.assert_array_equal(np.sort(actual, axis=-1), expected)


@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("kind", ["zero keys", "equal keys", "negative scores", "wide range"])
def test_kernel_breaks_ties_and_orders_scores_of_any_sign_and_size(num_queries, kind):
    q, weights, keys, positions = inputs(num_queries, 40, (90, 150))
    match kind:
        case "zero keys":
            keys[:] = 0
        case "equal keys":
            keys[:] = keys[:, :1]
        case "negative scores":
            q, keys, weights = np.abs(q) + 1, np.abs(keys) + 1, -np.abs(weights) - 1
        case "wide range":  # more halvings than a float32 has bits
            keys *= np.float32(2.0) ** np.linspace(-120, 110, 40, dtype=np.int32)[:, None]
            keys = np.ascontiguousarray(keys[:, ::-1])
    options = dict(topk=6, ratio=4)
    expected = select(q, weights, keys, positions, **options, implementation="reference")
    if num_queries == 1:  # over pages, whose keys have whole registers
        q, keys = (np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 124)]) for x in (q, keys))
        keys = paged(keys)
    actual = select(q, weights, keys, positions, **options, implementation="interpret")
    np.testing.assert_array_equal(actual.mask()[..., :40], expected.mask())


@pytest.mark.parametrize("num_queries", [1, 50])
def test_kernel_in_bfloat16_selects_the_same_where_products_are_exact(num_queries):
    args = inputs(num_queries, 21, (40, 70), dtype=ml_dtypes.bfloat16)
    expected = selection(scores_of(*args[:3]), args[3], 6, 4)
    actual = index_topk(*args, topk=6, ratio=4, implementation="interpret")
    np.testing.assert_array_equal(np.sort(actual, axis=-1), expected)


def fp4_inputs():
    """Two blocks of queries and two of keys, as the released rounding leaves them."""
    rng = np.random.default_rng(0)
    q, keys = (
        np.array(quantize.round_fp4(rng.standard_normal(shape).astype(ml_dtypes.bfloat16)))
        for shape in ((2, 150, 4, 64), (2, 4500, 64))
    )
    weights = rng.standard_normal((2, 150, 4)).astype(np.float32)
    positions = np.stack([np.arange(150), np.arange(17900, 18050)]).astype(np.int32)
    return q, weights, keys, positions


@pytest.mark.parametrize("inexact", [None, "query", "key", "small key", "large query"])
def test_kernel_in_fp8_selects_the_same(inexact, monkeypatch):
    monkeypatch.setattr(dispatch, "target_chip", lambda: "v7x")
    q, weights, keys, positions = fp4_inputs()
    match inexact:
        case "query":
            q[1, 40, 2, 5] = 1.125
        case "key":
            keys[1, 4400, 7] = 3.25
        case "small key":
            keys[0, 300, 7] = 2.0**-20
        case "large query":
            q[0, 149, 3, 0] = 2.0**17
    args, options = (q, weights, keys, positions), dict(topk=16, ratio=4)
    expected = select(*args, **options, implementation="reference")
    actual = select(*args, **options, implementation="interpret")
    np.testing.assert_array_equal(actual.mask(), expected.mask())


def test_products_in_fp8_are_taken_only_where_both_operands_are_exact(monkeypatch):
    monkeypatch.setattr(dispatch, "target_chip", lambda: "v7x")
    q, weights, keys, positions = fp4_inputs()
    keys = (keys * (1 + np.arange(64) % 4 / 16)).astype(keys.dtype)  # two bits more
    options = dict(topk=16, ratio=4)

    def is_right(q):
        expected = select(q, weights, keys, positions, **options, implementation="reference")
        actual = select(q, weights, keys, positions, **options, implementation="interpret")
        return (actual.mask() == expected.mask()).all()

    assert is_right(q)
    monkeypatch.setattr(tpu_prefill, "_are_e5m2", lambda *_: jnp.ones((2, 2), jnp.int32))
    assert not is_right(q)
    q[:, ::64, 0, 0] = 1.125  # one query of each block
    assert is_right(q)


@pytest.mark.parametrize("integer", [True, False])
def test_kernel_with_queries_in_groups_of_lanes(integer, monkeypatch):
    monkeypatch.setattr(block_sizes, "MAX_SCORE_BYTES", 1 << 21)
    assert block_sizes.lane_groups(4200) == 2
    rng = np.random.default_rng(0)
    shapes = (1, 70, 2, 4), (1, 70, 2), (1, 4200, 4)
    draw = functools.partial(rng.integers, -3, 4) if integer else rng.standard_normal
    q, weights, keys = (np.float32(draw(size=shape)) for shape in shapes)
    positions = np.arange(16400, 16470, dtype=np.int32)[None]
    options = dict(topk=50, ratio=4)
    expected = select(q, weights, keys, positions, **options, implementation="reference")
    actual = select(q, weights, keys, positions, **options, implementation="interpret")
    np.testing.assert_array_equal(actual.mask(), expected.mask())


def test_kernel_does_not_see_entries_of_the_future():
    q, weights, keys, positions = inputs(20, 40, (90, 130))
    keys[0, (positions[0, -1] + 1) // 4 :] = 1e30
    expected = select(*(q, weights, keys, positions), topk=6, ratio=4, implementation="reference")
    actual = select(*(q, weights, keys, positions), topk=6, ratio=4, implementation="interpret")
    np.testing.assert_array_equal(actual.mask(), expected.mask())


@pytest.mark.parametrize("kind", [jnp.float32, PackedKeys])
@pytest.mark.parametrize("implementation", ["xla", "interpret", "reference"])
def test_pages_of_many_queries_are_as_keys_side_by_side(kind, implementation):
    keys = quantize.round_fp4(jax.random.normal(jax.random.key(0), (2, 300, 64)), 32)
    rng = np.random.default_rng(3)
    q, weights = (np.float32(rng.integers(-2, 3, s)) for s in ((2, 5, 3, 64), (2, 5, 3)))
    positions = np.array([[20], [1195]]) + np.arange(5, dtype=np.int32)
    options = dict(topk=3, ratio=4)
    expected = select(q, weights, keys, positions, **options, implementation="reference")
    pages = Pages.of(keys)
    pages = Pages(kind.pack(pages.pool), pages.table) if kind is PackedKeys else pages
    actual = select(q, weights, pages, positions, **options, implementation=implementation)
    np.testing.assert_array_equal(actual.mask()[..., :300], expected.mask())


def decoding_inputs(batch: int, num_entries: int, dtype):
    """q, weights and keys [B, S, 128] whose scores are exact in float32, ties among them."""
    rng = np.random.default_rng(num_entries)
    shapes = (batch, 1, 8, 128), (batch, num_entries, 128)
    q, keys = (quantize.round_fp4(jnp.asarray(rng.standard_normal(s)), 32) for s in shapes)
    weights = np.float32(rng.integers(-4, 9, (batch, 1, 8)))
    return q.astype(dtype), weights, keys.astype(dtype)


def listed(selection, visible, topk: int):
    """Indices [B, topk] of a decoding step, ascending and then -1."""
    indices = np.asarray(selection.indices)[:, 0]
    for row, count in zip(indices, visible):
        count = min(count, topk)
        assert (np.diff(row[:count]) > 0).all() and (row[count:] == -1).all()
        assert (row[:count] >= 0).all()
    return indices


def ascending(selection):
    """Indices [B, topk] of a decoding step in order, -1 behind them."""
    indices = np.asarray(selection.indices)[:, 0]
    indices = np.sort(np.where(indices < 0, selection.num_entries, indices), axis=-1)
    return np.where(indices < selection.num_entries, indices, -1)


@pytest.fixture
def short_turns(monkeypatch):
    """Fewer keys in a turn of the loop and in a block, which interpreters compile sooner."""
    monkeypatch.setattr(block_sizes, "MAX_DECODE_KEYS", 1024)
    monkeypatch.setattr(block_sizes, "MAX_DECODE_BLOCK", 2048)


SHORT = 300, 40, (0, 127, 300, 128)  # none, a page less one, all, a page
LONG = 9000, 200, (8192, 9000, 5, 8193)  # four blocks, five


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize(
    "num_entries, topk, visible, kind",
    [(*SHORT, jnp.float32), (*SHORT, PackedKeys), (*LONG, jnp.bfloat16), (*LONG, PackedKeys)],
)
def test_decoding_over_pages(num_entries, topk, visible, implementation, kind, short_turns):
    """In a table that is wider than any sequence; what is behind each sequence is no number."""
    dtype = jnp.bfloat16 if kind is PackedKeys else kind
    q, weights, keys = decoding_inputs(4, num_entries, dtype)
    positions = 4 * np.array(visible, np.int32)[:, None] + 2
    expected = select(
        *(q, weights, keys, positions), topk=topk, ratio=4, implementation="reference"
    )
    is_held = (np.arange(num_entries) < np.array(visible)[:, None])[..., None]
    pages = paged(jnp.where(is_held, keys, jnp.nan), kind, wider=2)
    actual = select(
        *(q, weights, pages, positions), topk=topk, ratio=4, implementation=implementation
    )
    indices = listed(actual, visible, topk)
    np.testing.assert_array_equal(indices, ascending(expected))


@pytest.mark.parametrize("kind", [jnp.bfloat16, PackedKeys])
def test_decoding_over_more_blocks_than_are_held(kind):
    """70,000 entries, in pages that are used again and again: ties, of which the lowest count."""
    q, weights, keys = decoding_inputs(1, 12 * 128, jnp.bfloat16)
    order = np.random.default_rng(0).integers(0, 12, 547, np.int32)
    pool = PackedKeys.pack(keys) if kind is PackedKeys else keys
    pages = Pages(pool, jnp.asarray(order)[None])
    positions, options = np.array([[4 * 69990]], np.int32), dict(topk=512, ratio=4)
    actual = select(q, weights, pages, positions, **options, implementation="interpret")
    expected = select(q, weights, pages, positions, **options, implementation="reference")
    indices = listed(actual, [69990], 512)
    np.testing.assert_array_equal(indices, ascending(expected))


def test_a_chip_of_two_cores_selects_for_every_sequence(monkeypatch):
    q, weights, keys = decoding_inputs(3, 300, jnp.float32)
    args = q, weights, paged(keys), np.array([[700], [1199], [90]], np.int32)
    options = dict(topk=40, ratio=4, implementation="interpret")
    expected = select(*args, **options).indices
    monkeypatch.setattr(dispatch, "target_chip", lambda: "v5p")
    np.testing.assert_array_equal(select(*args, **options).indices, expected)


def chosen(num_queries: int, num_entries: int, topk: int) -> np.ndarray:
    """Random distinct indices with -1 here and there, and one row without any."""
    rng = np.random.default_rng(7)
    index = np.stack([rng.permutation(num_entries)[:topk] for _ in range(2 * num_queries)])
    index[rng.random(index.shape) < 0.3] = -1
    index[0] = -1
    return index.reshape(2, num_queries, topk).astype(np.int32)


def test_selected_scores_equal_numpy_and_are_minus_infinity_for_none():
    q, weights, keys, _ = inputs(9, 12, integer=False)
    index = chosen(9, 12, 5)
    scores = scores_of(q, weights, keys)
    expected = np.take_along_axis(scores, np.maximum(index, 0), axis=-1)
    actual = np.asarray(jax.jit(indexer.selected_scores)(q, weights, keys, index))
    np.testing.assert_array_equal(actual[index < 0], -np.inf)
    assert_close(actual[index >= 0], expected[index >= 0], FLOAT32)


def test_selected_scores_of_a_sequence_too_short_for_any_entry():
    q, weights, keys, _ = inputs(3, 0)
    index = np.zeros((2, 3, 0), np.int32)
    assert indexer.selected_scores(q, weights, keys, index).shape == (2, 3, 0)


def test_gradients_of_selected_scores_equal_central_differences():
    args = list(inputs(5, 12, integer=False)[:3])
    index = chosen(5, 12, 5)
    d_out = np.random.default_rng(1).standard_normal(index.shape)

    def loss(*args):
        scores = indexer.selected_scores(*args, index)
        return jnp.sum(jnp.where(index >= 0, scores * d_out, 0.0))

    def truth(*args):
        scores = np.take_along_axis(scores_of(*args), np.maximum(index, 0), axis=-1)
        return np.sum(scores * d_out * (index >= 0))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*args)
    rng = np.random.default_rng(2)
    step = 1e-6
    for which, grad in enumerate(grads):
        entries = [tuple(rng.integers(grad.shape)) for _ in range(6)]
        entries.append(np.unravel_index(np.argmax(np.abs(grad)), grad.shape))  # sets the measure
        expected = []
        for entry in entries:
            moved = [[x.astype(np.float64) for x in args] for _ in range(2)]
            moved[0][which][entry] += step
            moved[1][which][entry] -= step
            expected.append((truth(*moved[0]) - truth(*moved[1])) / (2 * step))
        assert_close([float(grad[entry]) for entry in entries], expected, GRADIENT_FLOAT32)


def test_gradients_of_keys_in_bfloat16_are_summed_in_float32():
    """A key that hundreds of queries picked: only the result is rounded, not the sum on its way."""
    rng = np.random.default_rng(0)
    q, keys = (
        rng.normal(size=(1, n, *s)).astype(jnp.bfloat16) for n, s in ((600, (2, 8)), (9, (8,)))
    )
    weights, d_out = rng.normal(size=(1, 600, 2)).astype(np.float32), rng.random((1, 600, 5))
    index = np.stack([rng.permutation(9)[:5] for _ in range(600)])[None].astype(np.int32)

    def loss(keys):
        return jnp.sum(indexer.selected_scores(q, weights, keys, index) * d_out)

    d_keys = jax.jit(jax.grad(loss))(keys)

    picked = np.zeros((1, 600, 9))
    np.put_along_axis(picked, index, d_out, axis=-1)
    wide_q, wide_keys = q.astype(np.float64), keys.astype(np.float64)
    is_positive = np.einsum("btai,bsi->btas", wide_q, wide_keys) > 0
    parts = (picked, weights.astype(np.float64), is_positive, wide_q)
    expected = np.einsum("bts,bta,btas,btai->bsi", *parts)
    assert d_keys.dtype == jnp.bfloat16
    assert_close(d_keys, expected, 2**-8)


@pytest.mark.usefixtures("optimized")
def test_gradients_of_selected_scores_hold_the_rows_of_a_block_of_queries():
    """Gathered rows of all queries would be 4 bytes each of T * K * I, and 8 blocks of them are."""
    num_queries, topk, width = 8 * xla.BLOCK_QUERIES, 64, 32
    shapes = [(1, num_queries, 2, width), (1, num_queries, 2), (1, 256, width)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    index = jax.ShapeDtypeStruct((1, num_queries, topk), jnp.int32)

    def loss(q, weights, keys, index):
        return jnp.sum(indexer.selected_scores(q, weights, keys, index))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args, index).compile()

    held = gradient.memory_analysis().temp_size_in_bytes
    assert held < 4 * num_queries * topk * width / 2


def test_a_softmax_over_selected_scores_has_finite_gradients_where_some_are_missing():
    q, weights, keys, _ = inputs(5, 12, integer=False)
    index = chosen(5, 12, 5)[:, 1:]  # without the row that selects nothing

    def loss(q, weights, keys):
        return jnp.sum(jax.nn.softmax(indexer.selected_scores(q, weights, keys, index)) ** 2)

    for grad in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q[:, 1:], weights[:, 1:], keys):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0


@pytest.mark.parametrize(
    "replace, message",
    [
        (dict(weights=(2, 5, 2)), r"must be \[B, T, A, I\]"),
        (dict(positions=(2, 4)), r"must be \[B, T, A, I\]"),
        (dict(q=(2, 5, 4)), r"must be \[B, T, A, I\]"),
        (dict(keys=(2, 7, 5)), r"keys \(2, 7, 5\) must be \[B, S, I\]"),
        (dict(keys=(1, 7, 4)), r"must be \[B, S, I\]"),
    ],
)
def test_shapes_that_do_not_agree_are_refused(replace, message):
    shapes = dict(q=(2, 5, 3, 4), weights=(2, 5, 3), keys=(2, 7, 4), positions=(2, 5)) | replace
    args = {name: jnp.zeros(shape, jnp.int32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        indexer.index_topk(**args, topk=3, ratio=4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(ratio=0), "ratio=0 must be positive"),
        (dict(implementation="mosaic"), "expected one of"),
        (dict(implementation="tpu"), "cannot run on cpu"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    args = inputs(5, 12)
    with pytest.raises(ValueError, match=message):
        indexer.index_topk(*args, **(dict(topk=3, ratio=4) | change))


def test_kernel_refuses_what_it_cannot_take():
    q, weights, keys, positions = (jnp.asarray(x) for x in inputs(5, 12))
    options = dict(topk=3, ratio=4, implementation="interpret")
    with pytest.raises(ValueError, match="both in bfloat16 or float32"):
        indexer.index_topk(q, weights, keys.astype(jnp.bfloat16), positions, **options)
    many = jax.ShapeDtypeStruct((2, 1 << 20, 4), jnp.float32)
    with pytest.raises(ValueError, match="do not fit in VMEM"):
        jax.eval_shape(lambda k: indexer.index_topk(q, weights, k, positions, **options), many)


def test_what_the_kernel_that_decodes_cannot_take_is_refused_by_name():
    limit = table_limit("v6e")

    def pages(width: int, *table: int):
        shape = jax.ShapeDtypeStruct((1, 128, width), jnp.float32)
        return Pages(shape, jax.ShapeDtypeStruct(table, jnp.int32))

    for keys, message in [
        (pages(64, 2, 3), "keys of 64 channels: the kernel copies multiples of 128"),
        (pages(128, 1, 1 << 14), "the kernel takes 1048576 entries, not 2097152"),
        (pages(128, limit, 2), rf"a table of {limit} x 2 pages: the kernel holds {limit} in"),
    ]:
        assert re.search(message, tpu_decode.unsupported(keys))
    narrow = Pages(PackedKeys.zeros((1, 128, 64)), jnp.zeros((2, 3), jnp.int32))
    assert "packed keys of 64 channels: the kernel unpacks 128" == tpu_decode.unsupported(narrow)
    assert tpu_decode.unsupported(pages(128, 64, 2048)) is None
