"""A decoding step on a TPU writes to a packed cache and moves nothing of it: from the compiled HLO.

Compiled for TPUs that are not there, which needs libtpu: Flash, 8 sequences of 128k tokens and 64 of 1M.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks.hlo import largest_of_xla
from pallas_kernels.attention import decode_attention, selected_attention, window_attention
from pallas_kernels.chips import CHIPS
from pallas_kernels.formats.packed_rows import PackedColumns, PackedRows
from pallas_kernels.indexer import index_topk
from v4jax import flash, released
from v4jax.nn.cache import Chunk, LayerCache, append_entries, init_cache, write_window
from v4jax.planning.topologies import topology_mesh

pytest.importorskip("libtpu")
pytestmark = pytest.mark.usefixtures("not_kept")

CFG = flash()
BATCH, CAPACITY = 8, 1 << 17


def compiled_step(chip: str, fn, *shapes) -> jax.stages.Compiled:
    """`fn` for one device of a chip; its first argument is given up."""
    mesh = topology_mesh(chip)
    here = jax.NamedSharding(mesh, jax.P())
    with jax.set_mesh(mesh):
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
        return jax.jit(fn, donate_argnums=0).lower(*args).compile()


def layer_of(kind: str, batch: int = BATCH, capacity: int = CAPACITY) -> LayerCache:
    cache = jax.eval_shape(lambda: init_cache(CFG, released(), batch, capacity))
    found = next(c for c in cache.layers[2:] if (c.index_keys is not None) == (kind == "CSA"))
    return dataclasses.replace(found, pool=None, index_pool=None)


def step(cache: LayerCache, q, row, index_q, key, start):
    """What decoding does with a layer's cache: writes to it, then reads it."""
    positions, counts = start[:, None], jnp.ones_like(start)
    is_csa = cache.index_keys is not None
    ratio = 4 if is_csa else 128
    place = start // ratio, (start + 1) % ratio == 0
    window = write_window(cache.window, row, Chunk.make(start, counts, 1))
    entries = append_entries(cache.entries, row, *place)
    cache, indices = dataclasses.replace(cache, window=window, entries=entries), None
    if is_csa:
        keys = append_entries(cache.index_keys, key, *place)
        weights = jnp.ones(index_q.shape[:3])
        topk = min(CFG.indexer.topk, keys.shape[1])
        picked = index_topk(index_q, weights, keys, positions, topk=topk, ratio=ratio)
        cache, indices = dataclasses.replace(cache, index_keys=keys), picked.to_indices()[:, 0]
    sink = jnp.zeros(CFG.num_heads)
    out = decode_attention(q, window, entries, indices, sink, start, ratio=ratio, scale=0.1)
    return cache, out


def compiled_decoding(chip: str, cache: LayerCache) -> jax.stages.Compiled:
    batch, indexer = cache.window.shape[0], CFG.indexer

    def shape(*sizes):
        return jax.ShapeDtypeStruct((batch, *sizes), jnp.bfloat16)

    return compiled_step(
        *(chip, step, cache, shape(CFG.num_heads, CFG.head_dim), shape(1, CFG.head_dim)),
        *(shape(1, indexer.num_heads, indexer.head_dim), shape(1, indexer.head_dim)),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )


@pytest.mark.parametrize("kind", ["CSA", "HCA"])
@pytest.mark.parametrize(
    "chip, batch, capacity",
    [*((chip, BATCH, CAPACITY) for chip in CHIPS), ("v6e", 64, 1 << 20), ("v7x", 64, 1 << 20)],
)
def test_a_decoding_step_moves_nothing_of_the_cache(chip, batch, capacity, kind):
    cache = layer_of(kind, batch, capacity)
    rings = batch * CFG.window * CFG.head_dim * 2  # bytes of all windows in bfloat16
    assert isinstance(cache.entries.pool, PackedRows if kind == "CSA" else PackedColumns)
    compiled = compiled_decoding(chip, cache)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text.count("tpu_custom_call") >= (2 if kind == "CSA" else 1)  # the kernels read it
    held = sum(x.size * 4 for x in jax.tree.leaves(cache))
    assert held <= memory.alias_size_in_bytes < held + 512 * batch  # a table's lines are padded
    assert memory.temp_size_in_bytes < rings
    assert largest_of_xla(text) < rings / 2
    for array in (cache.window, cache.entries.pool, cache.index_keys and cache.index_keys.pool):
        assert array is None or moves(text, array.data.shape) == []


@pytest.mark.parametrize("batch", [1, 3])
def test_nor_does_a_cpu(batch, optimized):
    """Where what is written and what is read next might be joined, and need the cache of before."""
    cache, indexer = layer_of("CSA", batch, 1 << 14), CFG.indexer

    def shape(*sizes):
        return jax.ShapeDtypeStruct((batch, *sizes), jnp.bfloat16)

    shapes = shape(CFG.num_heads, CFG.head_dim), shape(1, CFG.head_dim)
    shapes += shape(1, indexer.num_heads, indexer.head_dim), shape(1, indexer.head_dim)
    start = jax.ShapeDtypeStruct((batch,), jnp.int32)
    text = jax.jit(step, donate_argnums=0).lower(cache, *shapes, start).compile().as_text()
    for array in (cache.entries.pool, cache.index_keys.pool):
        assert moves(text, array.data.shape) == []


@pytest.mark.parametrize("capacity", [40, 2600])
@pytest.mark.parametrize("kind", ["CSA", "HCA"])
def test_caches_of_any_size_are_read_by_the_kernels(kind, capacity):
    text = compiled_decoding("v6e", layer_of(kind, 3, capacity)).as_text()
    assert "decode_gather" in text if kind == "CSA" else "decode_stream" in text
    assert "append" in text


def moves(text: str, shape: tuple[int, ...]) -> list[str]:
    """Operations, in loops too, that copy an array of words of that shape."""
    made = rf"= \(?u32\[{','.join(map(str, shape))}\]\S* (copy|copy-start|transpose|convert|pad)\("
    return re.findall(made, text)


def test_copies_are_found():
    text = "%c = u32[8,4352,128]{2,1,0:T(8,128)S(1)} copy(%x)\n%d = u32[8,4352]{1,0} copy(%y)"
    assert moves(text, (8, 4352, 128)) == ["copy"] and moves(text, (8, 37376, 128)) == []


@pytest.mark.parametrize("kind", ["CSA", "HCA"])
def test_a_chunk_of_a_prompt_unpacks_its_history_in_kernels(kind):
    """XLA makes no array of its size."""
    cache, num_queries = layer_of(kind, 1), 16

    def attend(cache: LayerCache, q, window, index_q, start):
        positions, entries = start[:, None] + jnp.arange(num_queries), cache.entries
        sink = jnp.zeros(CFG.num_heads)
        if kind == "HCA":
            out = window_attention(q, window, entries, sink, positions, ratio=128, scale=0.1)
            return cache, out
        weights = jnp.ones(index_q.shape[:3])
        topk = CFG.indexer.topk
        picked = index_topk(index_q, weights, cache.index_keys, positions, topk=topk, ratio=4)
        return cache, selected_attention(q, window, entries, picked, sink, positions, scale=0.1)

    def shape(*sizes):
        return jax.ShapeDtypeStruct((1, *sizes), jnp.bfloat16)

    rows = shape(CFG.window + num_queries, CFG.head_dim)
    queries = shape(num_queries, CFG.num_heads, CFG.head_dim)
    index_queries = shape(num_queries, CFG.indexer.num_heads, CFG.indexer.head_dim)
    start = jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = compiled_step("v6e", attend, cache, queries, rows, index_queries, start)
    text = compiled.as_text()
    assert len(re.findall(r"%float_rows\S* =", text)) == (2 if kind == "CSA" else 1)
    assert largest_of_xla(text) < 2**15  # an HCA layer's 1,024 rows are 598,016 bytes


@pytest.mark.parametrize("kind", ["CSA", "HCA"])
def test_a_prompt_moves_what_it_adds(kind):
    entries = layer_of(kind).entries
    data = entries.pool.data
    num_new = entries.shape[1] // 16
    new = jax.ShapeDtypeStruct((BATCH, num_new, CFG.head_dim), jnp.bfloat16)
    place = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    compiled = compiled_step("v6e", append_entries, entries, new, place, place)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= data.size * 4
    assert memory.temp_size_in_bytes < 4 * BATCH * num_new * CFG.head_dim * 2
    assert moves(compiled.as_text(), data.shape) == []
