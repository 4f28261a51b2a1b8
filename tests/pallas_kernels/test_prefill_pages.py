"""A chunk of a prompt over a history in pages: out of order, partly filled, among pages of others.

All that is not a sequence's own is no number (`tests/paged.py`). The truth is float64 NumPy; of the XLA
forms also themselves on the same rows side by side, to the last bit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.attention import (
    block_sizes,
    selected_attention,
    tpu_packed,
    window_attention,
    xla,
)
from pallas_kernels.formats import pages as formats_pages
from pallas_kernels.formats import quantize, tpu_rows
from pallas_kernels.formats.packed_rows import PackedColumns, PackedKeys, PackedRows
from pallas_kernels.formats.pages import PAGE, Pages
from pallas_kernels.indexer import index_topk, tpu_decode, tpu_prefill
from pallas_kernels.selection import Selection
from tests.paged import paged
from tests.tolerances import BFLOAT16, FLOAT32, assert_close

N, SIZE, T = 2, 16, 21
SCALE = 0.2
UNPACKERS = {
    PackedRows: tpu_packed.unpacker,
    PackedColumns: tpu_packed.unpacker,
    PackedKeys: tpu_decode.unpacker,
    jnp.bfloat16: lambda pool: None,
}


def rows_of(length: int, width: int = 512) -> jax.Array:
    """Rows [2, length, width] that every format holds exactly."""
    x = jax.random.normal(jax.random.key(length), (2, length, width), jnp.bfloat16)
    return jnp.concatenate([quantize.round_fp8(x[..., :-64], 64), x[..., -64:]], axis=-1)


def keys_of(length: int) -> jax.Array:
    """Keys [2, length, 128] of the indexer that it holds exactly when packed."""
    return quantize.round_fp4(jax.random.normal(jax.random.key(length), (2, length, 128)), 32)


def chunk(rows: jax.Array, starts, dtype):
    """q, window, sink and positions of T queries a sequence that follow `starts`."""
    rng = np.random.default_rng(3)
    width = rows.shape[2]
    q = rng.standard_normal((2, T, N, width)) / width**0.5
    window = rng.standard_normal((2, SIZE + T, width))
    positions = np.asarray(starts, np.int32)[:, None] + np.arange(T, dtype=np.int32)
    sink = jnp.asarray([0.5, -1.0], jnp.float32)
    return jnp.asarray(q, dtype), jnp.asarray(window, dtype), sink, jnp.asarray(positions)


def attend(q, window, rows, sink, positions, visible):
    """[B, T, N, H] in float64; `visible` [B, T, S] of the entries."""
    q, window, rows, sink = (np.float64(x) for x in (q, window, rows, sink))
    age = np.arange(T)[:, None] + SIZE - np.arange(SIZE + T)
    near = (age >= 0) & (age < SIZE) & (age <= np.asarray(positions)[..., None])
    keys = np.concatenate([window, rows], axis=1)
    mask = np.concatenate([near, visible], axis=2)[:, :, None]
    scores = np.where(mask, SCALE * np.einsum("btnh,bsh->btns", q, keys), -np.inf)
    peak = np.maximum(scores.max(axis=-1), sink)[..., None]
    p = np.exp(scores - peak)
    p /= p.sum(axis=-1, keepdims=True) + np.exp(sink[:, None] - peak)
    return np.einsum("btns,bsh->btnh", p, keys)


def visible_of(positions, ratio: int, length: int) -> np.ndarray:
    """[B, T, S] bool."""
    return np.arange(length) < ((np.asarray(positions) + 1) // ratio)[..., None]


def picked_of(visible: np.ndarray) -> np.ndarray:
    """A third of what is visible."""
    return visible & (np.random.default_rng(5).random(visible.shape) < 0.3)


def indices_of(mask: np.ndarray) -> Selection:
    most = int(mask.sum(axis=-1).max())
    order = np.argsort(~mask, axis=-1, kind="stable")[..., :most].astype(np.int32)
    order = np.where(np.take_along_axis(mask, order, axis=-1), order, -1)
    return Selection.of_indices(jnp.asarray(order), mask.shape[-1])


@pytest.mark.parametrize(
    "kind, block",  # 16 queries pick more rows than there are, 4 fewer
    [(jnp.float32, 16), (PackedRows, 16), (PackedRows, 4), (PackedColumns, 16)],
)
def test_xla_over_pages_is_as_over_rows_side_by_side(kind, block, monkeypatch):
    """Chunks of two pages, of which the last has one; nothing is written that only queries of padding see."""
    monkeypatch.setattr(xla, "BLOCK_ENTRIES", 256)
    monkeypatch.setattr(xla, "BLOCK_QUERIES", block)
    dtype = jnp.float32 if kind is jnp.float32 else jnp.bfloat16
    rows, starts, counts = rows_of(299, width=128), (1180, 0), (17, 3)
    q, window, sink, positions = chunk(rows, starts, dtype)
    written = jnp.array([(start + count) // 4 for start, count in zip(starts, counts)])
    rows = jnp.where((jnp.arange(299) < written[:, None])[..., None], rows, jnp.nan)
    history = paged(rows, kind, wider=2)
    length = history.shape[1]
    side_by_side = jnp.pad(jnp.nan_to_num(rows), ((0, 0), (0, length - 299), (0, 0))).astype(dtype)
    visible = visible_of(positions, 4, length)
    picked = picked_of(visible)
    options = dict(scale=SCALE, implementation="xla")

    @jax.jit
    def run(entries):
        held = written if isinstance(entries, Pages) else None
        args = q, window, entries
        out = [window_attention(*args, sink, positions, written=held, ratio=4, **options)]
        if kind is not PackedColumns:  # which are not for picking
            selection = indices_of(picked)
            out.append(selected_attention(*args, selection, sink, positions, **options))
        return out

    found, expected = run(history), run(side_by_side)
    truths = [attend(q, window, side_by_side, sink, positions, x) for x in (visible, picked)]
    for one, other, truth in zip(found, expected, truths):
        for b, count in enumerate(counts):
            for x, y in zip(one, other, strict=True):
                np.testing.assert_array_equal(x[b, :count], y[b, :count])
            tolerance = FLOAT32 if dtype == jnp.float32 else BFLOAT16
            assert_close(one[0][b, :count], truth[b, :count], tolerance)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("kind", [PackedRows, PackedColumns])
def test_memory_of_xla_over_pages_is_that_of_a_block(kind):
    """Of the queries' blocks: not of what the table has room for."""

    def temporary(num_pages: int) -> int:
        shape = jax.ShapeDtypeStruct
        pool = jax.eval_shape(lambda: kind.zeros((1, num_pages * PAGE, 128), 64))
        history = Pages(pool, shape((1, num_pages), jnp.int32))
        selection = shape((1, 256, 8), jnp.int32)

        def run(q, window, history, sink, positions, indices):
            options = dict(scale=SCALE, implementation="xla")
            args = q, window, history
            if kind is PackedColumns:
                return window_attention(*args, sink, positions, ratio=4, **options)
            picked = Selection.of_indices(indices, num_pages * PAGE)
            return selected_attention(*args, picked, sink, positions, **options)

        q, window = shape((1, 256, N, 128), jnp.bfloat16), shape((1, 272, 128), jnp.bfloat16)
        sink, positions = shape((N,), jnp.float32), shape((1, 256), jnp.int32)
        compiled = jax.jit(run).lower(q, window, history, sink, positions, selection).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary(16), temporary(512)
    assert many - few < 512 * 64  # a few numbers a page; its rows in bfloat16 are 32 kB


@pytest.mark.parametrize(
    "kind, chip",  # which convert in different ways
    [
        (PackedRows, "v6e"),
        (PackedColumns, "v6e"),
        (PackedColumns, "v7x"),
        (PackedKeys, "v6e"),
        (PackedKeys, "v7x"),
        (jnp.bfloat16, "v6e"),
    ],
)
def test_the_kernel_puts_rows_side_by_side(kind, chip, monkeypatch):
    """Blocks of two pages: more than are held, and none; a last page of which a part is wanted."""
    monkeypatch.setattr(tpu_rows, "BLOCK", 2 * PAGE)
    monkeypatch.setattr(dispatch, "target_chip", lambda: chip)
    rows = keys_of(1100) if kind is PackedKeys else rows_of(1100)
    history, wanted = paged(rows, kind, wider=2), jnp.array([1090, 0])

    @jax.jit
    def side_by_side(history, wanted):
        unpack = UNPACKERS[kind](history.pool)
        return tpu_rows.float_rows(history, wanted, unpack, jnp.bfloat16, interpret=True)

    found = np.asarray(side_by_side(history, wanted).astype(jnp.float32))
    assert found.shape == history.shape
    np.testing.assert_array_equal(found[0, :1090], np.float32(rows)[0, :1090])
    np.testing.assert_array_equal(found[0, 1090:1280], 0)
    np.testing.assert_array_equal(found[1, : 2 * PAGE], 0)


def test_what_the_kernel_does_not_take_xla_puts_side_by_side(monkeypatch):
    rows = rows_of(300, width=96)
    history, wanted = paged(rows, PackedRows, wider=1), jnp.array([290, 3])
    monkeypatch.setattr(formats_pages, "table_limit", lambda chip: 1)

    @jax.jit
    def side_by_side(history):
        found = tpu_rows.float_rows(history, wanted, None, jnp.bfloat16, interpret=True)
        return found.astype(jnp.float32)

    def check(history, rows):
        assert "pallas_call" not in str(jax.make_jaxpr(side_by_side)(history))
        found, rows = np.asarray(side_by_side(history)), np.float32(rows)
        for b, count in enumerate([290, 3]):
            np.testing.assert_array_equal(found[b, :count], rows[b, :count])
            np.testing.assert_array_equal(found[b, count:], 0)

    check(history, rows)  # of other channels
    rows = rows_of(300)
    check(paged(rows, jnp.bfloat16), rows)  # through a table too large


@pytest.mark.parametrize("kind", [PackedColumns, PackedRows])
def test_kernels_over_pages(kind, monkeypatch):
    """The history of one sequence ends in a second block of pages, the other has one entry or none."""
    monkeypatch.setattr(block_sizes, "FORWARD", {"v6e": (128, 64, 128)})
    monkeypatch.setattr(tpu_rows, "BLOCK", 2 * PAGE)
    rows, starts, counts = rows_of(299), (1180, 0), (17, 9)
    q, window, sink, positions = chunk(rows, starts, jnp.bfloat16)
    written = jnp.array([(start + count) // 4 for start, count in zip(starts, counts)])
    rows = jnp.where((jnp.arange(299) < written[:, None])[..., None], rows, jnp.nan)
    history = paged(rows, kind, wider=1)
    visible = visible_of(positions, 4, history.shape[1])
    mask = visible if kind is PackedColumns else picked_of(visible)
    selection = indices_of(mask)

    @functools.partial(jax.jit, static_argnums=1)
    def run(history, implementation):
        options = dict(scale=SCALE, implementation=implementation, written=written)
        args = q, window, history
        if kind is PackedColumns:
            return window_attention(*args, sink, positions, ratio=4, **options)
        return selected_attention(*args, selection, sink, positions, **options)

    found, expected = run(history, "interpret"), run(history, "xla")
    rows = jnp.pad(jnp.nan_to_num(rows), ((0, 0), (0, history.shape[1] - 299), (0, 0)))
    truth = attend(q, window, rows, sink, positions, mask)
    for b, count in enumerate(counts):
        assert_close(found[0][b, :count], truth[b, :count], BFLOAT16)
        for x, y in zip(found, expected, strict=True):
            assert_close(x[b, :count], y[b, :count], BFLOAT16)


def test_the_indexer_over_pages_of_packed_keys(monkeypatch):
    """On v7x it multiplies FP8 where all visible keys allow it, whatever lies behind them."""
    monkeypatch.setattr(dispatch, "target_chip", lambda: "v7x")
    monkeypatch.setattr(tpu_rows, "BLOCK", 2 * PAGE)
    keys = keys_of(600)
    rng = np.random.default_rng(2)
    q = jnp.asarray(rng.integers(-2, 3, (2, T, 4, 128)), jnp.bfloat16)
    weights = jnp.asarray(rng.integers(-2, 3, (2, T, 4)), jnp.float32)
    positions = jnp.array([[20], [1195]]) + jnp.arange(T)
    are_e5m2, in_fp8 = tpu_prefill._are_e5m2, []

    def note(*args):
        in_fp8.append(are_e5m2(*args))
        return in_fp8[-1]

    monkeypatch.setattr(tpu_prefill, "_are_e5m2", note)

    @jax.jit
    def select(keys):
        options = dict(topk=30, ratio=4, implementation="interpret")
        return index_topk(q, weights, keys, positions, **options).mask(), in_fp8

    scores = np.einsum("btai,bsi->btas", np.float64(q), np.float64(keys))
    scores = np.einsum("btas,bta->bts", np.maximum(scores, 0), np.float64(weights))
    scores = np.where(visible_of(positions, 4, 600), scores, -np.inf)
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :30]
    expected = np.zeros(scores.shape, bool)
    np.put_along_axis(expected, order, True, axis=-1)
    expected &= np.isfinite(scores)

    found, [are_exact] = select(paged(keys, PackedKeys, wider=1))
    np.testing.assert_array_equal(found[..., :600], expected)
    assert not found[..., 600:].any()
    assert np.asarray(are_exact).all()
