"""Kernels that issue their own copies, in the interpreter that models them: no race, same result.

Reading before a copy has arrived, or overwriting what is still read, gives right numbers in plain
interpret mode. Other kernels leave all copies to `pallas_call`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import (
    block_sizes,
    decode_attention,
    selected_attention,
    tpu,
    tpu_decode,
)
from pallas_kernels.formats import packed_append, tpu_rows
from pallas_kernels.formats.packed_rows import PackedKeys
from pallas_kernels.formats.pages import Pages
from pallas_kernels.formats.quantize import round_fp4
from pallas_kernels.grouped_matmul import tpu as experts
from pallas_kernels.grouped_matmul import visits, vjp
from pallas_kernels.indexer import block_sizes as indexer_sizes
from pallas_kernels.indexer import index_topk
from pallas_kernels.indexer import tpu_decode as indexer_decode
from pallas_kernels.selection import Selection
from tests.paged import paged
from tests.tolerances import FLOAT32, GRADIENT_FLOAT32, assert_close

RACES = pltpu.InterpretParams(detect_races=True)
FOUND = "RACE DETECTED"  # what the interpreter prints; it has no public flag
N, H, SIZE, SCALE = 8, 128, 16, 0.1


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of queries, and of entries for each."""
    for table in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(block_sizes, table, {"v6e": (128, 64, 128)})


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_prefill_and_its_gradients(small_blocks, capfd):
    num_queries, num_entries = 32, 300
    args = (
        normal(0, 1, num_queries, N, H),
        normal(1, 1, SIZE + num_queries, H),
        normal(2, 1, num_entries, H),
        jnp.linspace(-1.0, 1.0, N),
    )
    picked = np.random.default_rng(0).random((1, num_queries, num_entries)) < 0.1
    selection = Selection.of_mask(jnp.asarray(picked), num_entries)
    positions = 900 + jnp.arange(num_queries, dtype=jnp.int32)[None]

    def kernel(q, window, entries, sink):
        static = dict(ratio=1, scale=SCALE, interpret=RACES)
        return tpu.attention(q, window, entries, selection.bits, sink, positions, **static)[0]

    def xla(q, window, entries, sink):
        static = dict(scale=SCALE, implementation="xla")
        return selected_attention(q, window, entries, selection, sink, positions, **static)[0]

    out, grads = jax.value_and_grad(lambda a: jnp.sum(kernel(*a) ** 2))(args)
    assert FOUND not in capfd.readouterr().out
    expected, expected_grads = jax.value_and_grad(lambda a: jnp.sum(xla(*a) ** 2))(args)
    assert_close(out, expected, FLOAT32)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, GRADIENT_FLOAT32)


class AsFloat32:
    """A ref of words that passes for float32: this interpreter's copies know no `bitcast`."""

    dtype = jnp.float32

    def __init__(self, words):
        self.words = words

    def bitcast(self, dtype):
        assert dtype == self.words.dtype
        return self.words


def test_decoding_with_copies_one_by_one(monkeypatch, capfd):
    gather = tpu_decode._gather_kernel

    def on_words(*refs, **static):
        gather(*refs[:4], AsFloat32(refs[4]), *refs[5:], **static)

    monkeypatch.setattr(tpu_decode, "_gather_kernel", on_words)
    num_entries, num_picked = 512, 256
    rng = np.random.default_rng(0)
    indices = np.stack([rng.permutation(num_entries)[:num_picked] for _ in range(2)])
    pages = paged(normal(2, 2, num_entries, H))
    args = (
        *(normal(0, 2, N, H), normal(1, 2, SIZE, H), pages),
        *(jnp.asarray(indices, jnp.int32), jnp.linspace(-1.0, 1.0, N)),
        jnp.array([2000, 5000], jnp.int32),
    )
    static = dict(ratio=4, scale=SCALE)
    words = Pages(jax.lax.bitcast_convert_type(pages.pool, jnp.uint32), pages.table)
    out = tpu_decode.decode_attention(*args[:2], words, *args[3:], interpret=RACES, **static)
    assert FOUND not in capfd.readouterr().out
    assert_close(out, decode_attention(*args, implementation="xla", **static), FLOAT32)


def test_decoding_over_blocks_of_pages(monkeypatch, capfd):
    """Of two pages: more than are held, one, none and a part of one."""
    monkeypatch.setattr(tpu_decode, "BLOCK_ENTRIES", {"v6e": 256})
    pages = paged(normal(2, 4, 1200, H))
    args = normal(0, 4, N, H), normal(1, 4, SIZE, H), pages, None, jnp.linspace(-1.0, 1.0, N)
    positions, static = jnp.array([4799, 1023, 1, 700], jnp.int32), dict(ratio=4, scale=SCALE)
    out = tpu_decode.decode_attention(*args, positions, interpret=RACES, **static)
    assert FOUND not in capfd.readouterr().out
    expected = decode_attention(*args, positions, implementation="xla", **static)
    assert_close(out, expected, FLOAT32)


def test_pages_side_by_side(monkeypatch, capfd):
    """Blocks of two pages: more than are held, none, and a part of one."""
    monkeypatch.setattr(tpu_rows, "BLOCK", 256)
    pages, wanted = paged(normal(2, 3, 1200, H)), jnp.array([1190, 0, 130], jnp.int32)
    found = tpu_rows.float_rows(pages, wanted, None, jnp.float32, interpret=RACES)
    assert FOUND not in capfd.readouterr().out
    rows = pages.floats(jnp.float32)
    for b, count in enumerate([1190, 0, 130]):
        np.testing.assert_array_equal(found[b, :count], rows[b, :count])


def test_the_decoding_indexer(monkeypatch, capfd):
    monkeypatch.setattr(indexer_sizes, "MAX_DECODE_BLOCK", 1024)
    keys = paged(round_fp4(normal(2, 3, 4500, 128), 32), PackedKeys)
    q = round_fp4(normal(0, 3, 8, 128), 32).astype(jnp.bfloat16)
    weights, visible = jnp.round(normal(1, 3, 8)), jnp.array([4500, 0, 1100], jnp.int32)
    monkeypatch.setattr(indexer_sizes, "MAX_DECODE_KEYS", 1024)
    found = indexer_decode.index_list(q, weights, keys, visible, topk=64, interpret=RACES)
    assert FOUND not in capfd.readouterr().out
    args = q[:, None], weights[:, None], keys, 4 * visible[:, None]
    expected = index_topk(*args, topk=64, ratio=4, implementation="xla").indices[:, 0]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("on_lanes, words", [(False, 146), (True, 17)])
def test_appending(on_lanes, words, capfd):
    """Three sequences of one program, of which two are written to."""
    data = jax.random.bits(jax.random.key(0), (1, 6 * words, 128), jnp.uint32)
    new = jax.random.bits(jax.random.key(1), (3, 1, words), jnp.uint32)
    args = data, new, jnp.array([0, 200, 255]), jnp.array([1, 0, 1])
    table = jnp.array([[3, 1], [0, 2], [5, 4]])
    num_lines = words if on_lanes else 3
    changed = packed_append._call(
        *args[:1], new[:, 0], *args[2:], table, words, num_lines, on_lanes, None, RACES
    )
    assert FOUND not in capfd.readouterr().out
    expected = packed_append.append(*args, on_lanes=on_lanes, table=table, implementation="xla")
    np.testing.assert_array_equal(changed, expected)


@pytest.mark.parametrize("sizes", [(33, 5, 58), (0, 90, 0), (47, 1, 1)], ids=str)
def test_experts_whose_rows_begin_anywhere(sizes, capfd):
    """Three visits and more, of which two are under way while the next is computed."""
    num_rows, tile = 96, 32
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (num_rows, 128)).astype(np.float32)
    w = rng.integers(-3, 4, (len(sizes), 128, 256)).astype(np.float32)
    plan = visits.tiled(jnp.asarray(sizes, jnp.int32), num_rows, tile)
    product = vjp.matmul_product(jnp.float32)
    (out,) = experts.grouped_product(
        product, [jnp.asarray(x)], [jnp.asarray(w)], plan, tile, "v6e", interpret=RACES
    )
    assert FOUND not in capfd.readouterr().out
    assert int(plan.count) >= 3
    expected = np.zeros((num_rows, 256), np.float32)
    for expert, end in enumerate(np.cumsum(sizes)):
        rows = slice(end - sizes[expert], end)
        expected[rows] = x[rows] @ w[expert]
    np.testing.assert_array_equal(out, expected)
