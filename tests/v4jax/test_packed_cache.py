"""A packed cache: the same logits bit for bit, in the bytes of the released layout."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import decode_attention
from pallas_kernels.formats.packed_rows import PackedColumns, PackedKeys, PackedRows
from pallas_kernels.formats.pages import Pages
from pallas_kernels.indexer import index_topk
from sharding import collectives, make_mesh
from sharding.rules import PREFILL
from tests import models
from tests.paged import paged
from v4jax import Transformer, flash, nano, plain, pro, released, tiny
from v4jax.inference.engine import Engine
from v4jax.inference.score import Scorer
from v4jax.nn.cache import Chunk, append_entries, init_cache, window_rows, write_window
from v4jax.planning import costs

CAPACITY = 320  # 80 entries of CSA layers: more than top-k (16)
MILLION = 1 << 20


@pytest.fixture(scope="module")
def model() -> Transformer:
    return models.random_model(models.one_of_each(), released(), scan_layers=False)


@pytest.fixture(scope="module")
def extend(model):
    return models.extend(model)


def test_logits_are_those_of_a_float_cache_bit_for_bit(model, extend, optimized):
    """Rows of different length, an odd chunk, one that ends in padding, then decoding.

    As users compile it: otherwise XLA may round the sums of the two programs in different ways.
    """
    tokens = np.random.default_rng(0).integers(0, 256, (2, 280)).astype(np.int32)
    caches = [model.init_cache(2, CAPACITY, format) for format in ("packed", "float")]
    start = 0
    for counts in [(131, 77), (131, 131), *[(1, 1)] * 9]:
        chunk, counts = tokens[:, start : start + max(counts)], np.array(counts, np.int32)
        logits, caches = zip(*[extend(chunk, counts, cache) for cache in caches])
        for row, count in enumerate(counts):
            np.testing.assert_array_equal(logits[0][row, :count], logits[1][row, :count])
        start += max(counts)
    for packed, plainly in zip(caches[0].layers, caches[1].layers, strict=True):
        for name in ("window", "entries", "index_keys"):
            if getattr(plainly, name) is not None:
                rows = (_floats(getattr(x, name)) for x in (packed, plainly))
                np.testing.assert_array_equal(*rows)


def test_it_is_updated_in_place(model, extend):
    cache = model.init_cache(1, CAPACITY)
    assert isinstance(cache.layers[1].entries.pool, PackedRows)
    args = np.zeros((1, 1), np.int32), jnp.ones(1, jnp.int32), cache
    compiled = extend.func.lower(*extend.args, *args).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == cache.nbytes


@pytest.mark.parametrize("make", [flash, pro], ids=lambda f: f.__name__)
def test_bytes_of_the_released_models_at_a_million_tokens(make):
    cfg = make()
    cache = jax.eval_shape(lambda: init_cache(cfg, released(), 1, MILLION, "packed"))

    def nbytes(name: str) -> int:
        leaves = jax.tree.leaves([getattr(layer, name) for layer in cache.layers])
        return sum(x.size * x.dtype.itemsize for x in leaves)

    growing = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.pools))
    tables = sum(x.size * 4 for x in cache.tables.values())
    assert growing / MILLION == costs.cache_bytes_per_token(cfg)
    assert growing / MILLION == {"flash": 3514.25, "pro": 5031.4375}[cfg.name]
    assert cfg.window * 584 == 146 * 512  # lines, of which there are whole tiles of 8
    assert nbytes("window") == len(cfg.layers) * 152 * 512
    pools = nbytes("pool") + nbytes("index_pool")
    assert tables == 4 * (MILLION // (4 * 128) + MILLION // (128 * 128))
    assert cache.nbytes == growing + tables + nbytes("window") + pools + 4  # and the length


@pytest.mark.parametrize("cfg", [tiny(), nano()], ids=lambda c: c.name)
def test_small_models_grow_as_the_cost_model_says(cfg):
    sizes = (1 << 14, 1 << 15)  # whole pages, for HCA too; of 8, whole tiles of lines
    caches = [jax.eval_shape(lambda n=n: init_cache(cfg, released(), 8, n)) for n in sizes]
    held = [sum(x.size * 4 for x in jax.tree.leaves(cache.pools)) for cache in caches]
    growth = (held[1] - held[0]) / sizes[0]
    assert growth == 8 * costs.cache_bytes_per_token(cfg)


@functools.partial(jax.jit, static_argnums=0)
def _pack(kind, rows):
    return kind.pack(rows) if kind is PackedKeys else kind.pack(rows, 16)


_unpack = jax.jit(lambda packed: packed.unpack())


def _rows(pages):
    return np.array(_unpack(pages.contiguous()))


def _floats(rows):
    rows = rows.contiguous() if isinstance(rows, Pages) else rows
    return rows if isinstance(rows, jax.Array) else rows.unpack(jnp.bfloat16)


@pytest.mark.parametrize("kind", [PackedRows, PackedColumns, PackedKeys])
def test_nothing_is_written_past_the_end(kind):
    """Entries 125.. or 127.. of a page: 2 and 4 new ones, the rest of which are not complete."""
    rows = jax.random.normal(jax.random.key(0), (2, 128, 64), jnp.bfloat16)
    new = jax.random.normal(jax.random.key(1), (2, 4, 64), jnp.bfloat16)
    start, counts = jnp.array([125, 127]), jnp.array([2, 4])
    pages = paged(rows, kind, rope_dim=16)
    packed = jax.jit(append_entries)(pages, new, start, counts)
    expected, written = _rows(pages), np.array(_unpack(_pack(kind, new)))
    for row, count in enumerate(counts):
        first, stop = int(start[row]), min(int(start[row] + count), 128)
        expected[row, first:stop] = written[row, : stop - first]
    np.testing.assert_array_equal(_rows(packed), expected)


@pytest.mark.parametrize("kind", [PackedRows, PackedColumns, PackedKeys])
def test_entries_of_all_devices_are_written(kind):
    """A prompt cut over two devices, which complete different numbers of entries."""
    new = jax.random.normal(jax.random.key(0), (2, 8, 64), jnp.bfloat16)
    start, counts = jnp.array([[3, 9], [7, 11]]), jnp.array([[4, 2], [3, 4]])  # [device, B]

    def write(entries, new, start, counts):
        return append_entries(entries, new, start[0], counts[0])

    empty = paged(jnp.zeros((2, 128, 64)), kind, rope_dim=16)
    parts = jax.P(), jax.P(None, "context"), *[jax.P("context")] * 2
    with jax.set_mesh(make_mesh(context=2)):
        written = jax.jit(collectives.per_device(write, PREFILL, parts, jax.P()))
        written = _rows(written(empty, new, start, counts))
    expected, rows = np.zeros(written.shape, written.dtype), np.array(_unpack(_pack(kind, new)))
    for device, b in np.ndindex(2, 2):
        first, count = start[device, b], counts[device, b]
        expected[b, first : first + count] = rows[b, 4 * device :][:count]
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("length", [1, 5, 40])
def test_the_ring_holds_the_last_tokens(length):
    kv = jax.random.normal(jax.random.key(0), (2, length, 64), jnp.bfloat16)
    kv = _unpack(_pack(PackedColumns, kv))
    start, counts = jnp.array([30, 7]), jnp.array([length, length // 2])
    chunk = Chunk.make(start, counts, length)
    before = jax.random.normal(jax.random.key(1), (2, 16, 64), jnp.bfloat16)
    packed = _pack(PackedColumns, before)
    write, window = jax.jit(write_window), jax.jit(window_rows)
    ring, expected = write(packed, kv, chunk), write(_unpack(packed), kv, chunk)
    np.testing.assert_array_equal(_unpack(ring), expected)
    np.testing.assert_array_equal(window(ring, kv, chunk), window(expected, kv, chunk))


def test_decoding_does_not_unpack_the_cache():
    """A CSA layer of 65,536 entries: temporaries are far smaller than its rows in bfloat16."""
    cache = jax.eval_shape(lambda: init_cache(flash(), released(), 1, 1 << 18, "packed"))
    layer = next(x for x in cache.layers if x.index_keys is not None)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    position = jax.ShapeDtypeStruct((1,), jnp.int32)

    @jax.jit
    def attend(q, window, entries, indices, position):
        sink, static = jnp.zeros(4), dict(ratio=4, scale=0.1)
        return decode_attention(q, window, entries, indices, sink, position, **static)

    @jax.jit
    def select(q, keys, position):
        found = index_topk(q, jnp.ones((1, 1, 4)), keys, position[:, None], topk=512, ratio=4)
        return found.indices

    indices = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    attended = attend.lower(shape((1, 4, 512)), layer.window, layer.entries, indices, position)
    selected = select.lower(shape((1, 1, 4, 128)), layer.index_keys, position)
    for lowered, rows in ((attended, layer.entries), (selected, layer.index_keys)):
        temporaries = lowered.compile().memory_analysis().temp_size_in_bytes
        assert temporaries < math.prod(rows.shape) * 2 / 4, temporaries


def test_it_is_the_default_where_it_is_exact():
    for numerics, kind in [(released(), PackedColumns), (released("float32"), jax.Array)]:
        cache = init_cache(tiny(), numerics, 1, 64)
        assert all(isinstance(layer.window, kind) for layer in cache.layers)
    assert isinstance(init_cache(tiny(), released(), 1, 64, "float").layers[0].window, jax.Array)


@pytest.mark.parametrize("numerics", [plain(), plain("bfloat16"), released("float32")], ids=str)
def test_other_numerics_refuse_it(numerics):
    with pytest.raises(
        ValueError, match=rf'"packed" with {numerics.name} numerics in {numerics.dtype}'
    ):
        init_cache(tiny(), numerics, 1, 64, "packed")


def test_the_format_reaches_generation_and_scoring(model):
    with pytest.raises(ValueError, match="format='fp8': expected \"packed\""):
        Engine(model, cache="fp8").init_cache(1, 64)
    with pytest.raises(ValueError, match="format='fp8': expected \"packed\""):
        Scorer(model, cache="fp8").logits(np.zeros((1, 4), int), decode_from=2)
