"""Indexer of many queries on a TPU: scores stay in VMEM, bits come out.

For each block of queries: scores of all entries that any of them sees, then each query's threshold
(`threshold.py`), then one bit per entry (`selection.py`). A block whose queries see no more than
`topk` entries skips the scores.

XLA instead sorts [128, S] scores for every block, which it can neither keep in VMEM nor do in
fewer than log(S)^2 passes.

Layout: the product is keys [R, I] x queries [I, 128], so that entries are rows and queries are
lanes. A head's weights are then a row that is multiplied in, the sum over heads adds vector
registers, and counting adds registers too: nothing crosses lanes until bits are transposed. The
contraction is as deep as a head is wide (128), which fills half of a 256 x 256 matrix unit (v6e,
v7x): the products take twice the time that FLOPs suggest, whatever the layout.

v7x multiplies e5m2 twice as fast as bfloat16. Queries and keys that were rounded to FP4 (e2m1 times a
power of two for 32 channels) are e5m2 values if these powers lie between 2**-13 and 2**13, and both
kinds of products are exact in float32. So queries are converted once a block and compared, keys are
compared beforehand, and where all are equal the loop over FP8 runs, else that over bfloat16.

The 128 lanes are F groups of 128 / F queries. With F = 1 the scores of S entries take 512 S bytes;
for long contexts F grows (`block_sizes.lane_groups`): lane group f accumulates heads f mod F, the
groups are summed, and each keeps another part of the entries:

    entry s = 4096 w + (4096 / F) g + r  lies in row (4096 / F) w + r, lane group g.

Grid: (batch, query blocks, blocks of 4096 entries). Entries past the last that a block sees are
neither fetched nor scored. Keys in pages are put side by side first, as far as a query sees them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, dispatch
from pallas_kernels.formats import tpu_rows
from pallas_kernels.formats.pages import Pages
from pallas_kernels.indexer import block_sizes, threshold, tpu_decode
from pallas_kernels.indexer.block_sizes import CHUNK
from pallas_kernels.indexer.threshold import LANES, MISSING
from pallas_kernels.selection import ENTRIES_PER_WORD_ROW

QUERY_TILE = 16  # rows of a tile of bfloat16
CONVERTED_AT_ONCE = 2  # heads
FAST_E5M2 = chips.table("fast_e5m2")


def unsupported(num_heads: int, num_entries: int) -> str | None:
    """Why the kernel cannot take that many heads and entries, None if it can."""
    groups = block_sizes.lane_groups(num_entries)
    if groups > block_sizes.MAX_LANE_GROUPS:
        return f"the scores of {num_entries} entries do not fit in VMEM"
    if num_heads % groups:
        return f"{num_heads} heads are not a multiple of {groups}"
    return None


def index_bits(
    q: jax.Array,  # [B, T, A, I]
    weights: jax.Array,  # [B, T, A] float32
    keys: jax.Array | Pages,  # [B, S, I]
    num_visible: jax.Array,  # [B, T] int32, at most S
    *,
    topk: int,
    interpret: bool,
) -> jax.Array:  # [B, T, ceil(S / 4096), 128] uint32
    """Bits of the `topk` visible entries of largest score."""
    batch, num_queries, num_heads, width = q.shape
    num_entries, seen = keys.shape[1], jnp.max(num_visible, axis=1)
    if isinstance(keys, Pages):
        unpack = tpu_decode.unpacker(keys.pool)
        keys = tpu_rows.float_rows(keys, seen, unpack, q.dtype, interpret=interpret)
    num_words = -(-num_entries // ENTRIES_PER_WORD_ROW)
    groups = block_sizes.lane_groups(num_entries)
    block = LANES // groups
    num_blocks = -(-num_queries // block)
    q = jnp.pad(q, [(0, 0), (0, max(block - num_queries, 0)), (0, 0), (0, 0)])
    key_block = min(ENTRIES_PER_WORD_ROW, -(-num_entries // CHUNK) * CHUNK)

    def by_block(x):
        """[B, T, ...] -> [B, blocks, block, ...]"""
        tail = num_blocks * block - num_queries
        x = jnp.pad(x, [(0, 0), (0, tail)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, num_blocks, block, *x.shape[2:])

    weights = by_block(weights.astype(jnp.float32))
    weights = weights.reshape(batch, num_blocks, block, num_heads // groups, groups)
    weights = weights.transpose(0, 1, 3, 4, 2).reshape(batch, num_blocks, -1, LANES)
    visible = by_block(num_visible)
    last = jnp.max(visible, axis=2)
    visible = jnp.tile(visible, (1, 1, groups))[:, :, None]

    in_fp8 = keys.dtype == jnp.bfloat16 and FAST_E5M2[dispatch.target_chip()]
    exact = [_are_e5m2(keys, seen, key_block)] if in_fp8 else []
    columns = (num_heads // groups, LANES, width)

    def key_index(b, i, k, last, *_):
        return b, jnp.minimum(k, jnp.maximum(pl.cdiv(last[b, i], key_block) - 1, 0)), 0

    kernel = functools.partial(
        _kernel, in_fp8=in_fp8, topk=topk, groups=groups, num_entries=num_entries
    )
    scored = batch * num_queries * num_entries // 2
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(exact),
            grid=(batch, num_blocks, pl.cdiv(num_entries, key_block)),
            in_specs=[
                pl.BlockSpec((None, block, num_heads, width), lambda b, i, k, *_: (b, i, 0, 0)),
                pl.BlockSpec((None, None, *weights.shape[2:]), lambda b, i, k, *_: (b, i, 0, 0)),
                pl.BlockSpec((None, None, 1, LANES), lambda b, i, k, *_: (b, i, 0, 0)),
                pl.BlockSpec((None, key_block, width), key_index),
            ],
            out_specs=pl.BlockSpec(
                (None, block, num_words, LANES), lambda b, i, k, *_: (b, i, 0, 0)
            ),
            scratch_shapes=[
                pltpu.VMEM((num_words * ENTRIES_PER_WORD_ROW // groups, LANES), jnp.int32),
                pltpu.VMEM((2, 8, LANES), jnp.int32),
                pltpu.VMEM(columns, q.dtype),
                *([pltpu.VMEM(columns, jnp.float8_e5m2), pltpu.SMEM((1,), jnp.int32)] * in_fp8),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, num_queries, num_words, LANES), jnp.uint32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=block_sizes.VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * scored * num_heads * width,
            bytes_accessed=q.nbytes + num_blocks * keys.nbytes // 2,
            transcendentals=0,
        ),
        interpret=interpret,
        name="index_bits",
    )(last, *exact, q, weights, visible, keys)


def _are_e5m2(keys: jax.Array, seen: jax.Array, block: int) -> jax.Array:
    """[B, S, I] -> int32 [B, ceil(S / block)]: 1 where all of a block's keys below `seen` are e5m2 values.

    Normal ones or zero. XLA drops a conversion to e5m2 and back, but not `reduce_precision`.
    """
    exact = jax.lax.reduce_precision(keys, exponent_bits=5, mantissa_bits=2) == keys
    exact = jnp.all(exact, axis=-1) | (jnp.arange(keys.shape[1]) >= seen[:, None])
    exact = jnp.pad(exact, [(0, 0), (0, -exact.shape[1] % block)], constant_values=True)
    return jnp.all(exact.reshape(keys.shape[0], -1, block), axis=-1).astype(jnp.int32)


def _kernel(
    last_ref,  # [B, blocks] int32: entries that some query of a block sees
    *all_refs,
    in_fp8: bool,
    topk: int,
    groups: int,
    num_entries: int,
):
    refs = list(all_refs)
    if in_fp8:
        exact_keys = refs.pop(0)  # [B, key blocks] int32: 1 where they are e5m2 values
    (
        q_ref,  # [block, A, I]
        weights_ref,  # [A / F, 128] float32
        visible_ref,  # [1, 128] int32
        keys_ref,  # [key block, I]
        bits_ref,  # [block, W, 128] uint32
        scores,  # [4096 W / F, 128] int32, see the module
        range_ref,  # [2, 8, 128] int32: least and greatest score
        columns,  # [A / F, 128, I]: queries as columns of the product
        *fp8_refs,
    ) = refs
    last = last_ref[pl.program_id(0), pl.program_id(1)]
    step = pl.program_id(2)
    key_block = keys_ref.shape[0]
    part = key_block // groups  # entries of a lane group
    part_rows = ENTRIES_PER_WORD_ROW // groups
    group = _lane() // (LANES // groups)
    visible = visible_ref[...]

    def num_chunks(step):
        return pl.cdiv(jnp.clip(last - step * key_block, 0, part), CHUNK)

    @pl.when((step == 0) & (last > topk))
    def _():
        _gather_columns(q_ref, columns, groups)
        if in_fp8:
            _convert_columns(columns, *fp8_refs)
        range_ref[0] = jnp.full((8, LANES), 2**31 - 1, jnp.int32)
        range_ref[1] = jnp.full((8, LANES), MISSING, jnp.int32)

    def entry_of(row):
        """[CHUNK, 128]: entries of rows."""
        first = row // part_rows * ENTRIES_PER_WORD_ROW + row % part_rows
        return first + group * part_rows + jax.lax.broadcasted_iota(jnp.int32, (CHUNK, LANES), 0)

    def score(columns, c, _):
        row = pl.multiple_of(step * part + c * CHUNK, CHUNK)
        found = jnp.zeros((CHUNK, LANES), jnp.float32)
        for g in range(groups):
            keys = keys_ref[pl.ds(pl.multiple_of(g * part + c * CHUNK, CHUNK), CHUNK)]
            total = _scores(keys.astype(columns.dtype), columns, weights_ref)
            total = threshold.across_groups(total, jnp.add, groups)
            found = jnp.where(group == g, total, found)
        is_visible = entry_of(row) < visible
        found = threshold.ordered(found)
        least = jnp.where(is_visible, found, 2**31 - 1)
        found = jnp.where(is_visible, found, MISSING)
        scores[pl.ds(row, CHUNK)] = found
        range_ref[0] = jnp.minimum(range_ref[0], threshold.across_rows(least, jnp.minimum))
        range_ref[1] = jnp.maximum(range_ref[1], threshold.across_rows(found, jnp.maximum))
        return 0

    def fill(c, _):
        row = pl.multiple_of(step * part + c * CHUNK, CHUNK)
        scores[pl.ds(row, CHUNK)] = jnp.where(entry_of(row) < visible, 0, MISSING)
        return 0

    def score_all(columns, condition):
        """Two chunks at a time: products of the second hide what is left to do for the first."""
        one = functools.partial(score, columns)
        count = jnp.where(condition, num_chunks(step), 0)
        jax.lax.fori_loop(0, count // 2, lambda i, _: one(2 * i + 1, one(2 * i, 0)), 0)
        jax.lax.fori_loop(count // 2 * 2, count, one, 0)

    if in_fp8:
        columns_fp8, exact_queries = fp8_refs
        is_exact = exact_keys[pl.program_id(0), step] * exact_queries[0] == 1
        score_all(columns_fp8, (last > topk) & is_exact)
        score_all(columns, (last > topk) & ~is_exact)
    else:
        score_all(columns, last > topk)
    jax.lax.fori_loop(0, jnp.where(last > topk, 0, num_chunks(step)), fill, 0)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        full = last // key_block
        chunks = full * (part // CHUNK) + num_chunks(full)

        @pl.when(chunks % 2 == 1)
        def _():  # counting takes two chunks at once
            row = pl.multiple_of(chunks * CHUNK, CHUNK)
            scores[pl.ds(row, CHUNK)] = jnp.full((CHUNK, LANES), MISSING, jnp.int32)

        low, high = (
            threshold.across_groups(reduce(range_ref[i], axis=0, keepdims=True), combine, groups)
            for i, reduce, combine in ((0, jnp.min, jnp.minimum), (1, jnp.max, jnp.maximum))
        )
        tau = threshold.select(
            scores,
            pl.cdiv(chunks, 2),
            low,
            high,
            visible,
            entry_of,
            topk=topk,
            num_groups=groups,
            num_entries=num_entries,
            chunk=CHUNK,
        )

        def pack(w, _):
            def plane(j, words):
                row = pl.multiple_of(w * part_rows + j * LANES, LANES)
                bit = jnp.int32(1) << (j + group * (32 // groups))
                return words | jnp.where(scores[pl.ds(row, LANES)] >= tau, bit, 0)

            planes = jnp.clip(chunks * CHUNK - w * part_rows, 0, part_rows) // LANES
            words = jax.lax.fori_loop(0, planes, plane, jnp.zeros((LANES, LANES), jnp.int32))
            words = threshold.across_groups(words, jnp.bitwise_or, groups)
            words = jax.lax.bitcast_convert_type(words.T, jnp.uint32)
            bits_ref[:, w] = words[: bits_ref.shape[0]]
            return 0

        jax.lax.fori_loop(0, bits_ref.shape[1], pack, 0)


def _gather_columns(q_ref, columns, groups: int):
    """[block, A, I] -> [A / F, F block, I]"""
    block, num_heads, width = q_ref.shape

    def some(i, _):
        first = pl.multiple_of(i * QUERY_TILE, QUERY_TILE)
        heads = jnp.swapaxes(q_ref[pl.ds(first, QUERY_TILE)], 0, 1)
        heads = heads.reshape(num_heads // groups, groups, QUERY_TILE, width)
        for f in range(groups):
            columns[:, pl.ds(f * block + first, QUERY_TILE)] = heads[:, f]
        return 0

    jax.lax.fori_loop(0, block // QUERY_TILE, some, 0)


def _convert_columns(columns, columns_fp8, exact):
    """Columns as e5m2, and whether none changed."""

    def convert(a, changed):
        x = columns[a]
        converted = x.astype(columns_fp8.dtype)
        columns_fp8[a] = converted
        return jnp.where(converted.astype(x.dtype) == x, changed, jnp.ones_like(x))

    changed = jax.lax.fori_loop(
        0, columns.shape[0], convert, jnp.zeros_like(columns[0]), unroll=CONVERTED_AT_ONCE
    )
    exact[0] = (jnp.max(changed.astype(jnp.float32)) == 0).astype(jnp.int32)


def _scores(
    keys,  # [CHUNK, I]
    columns,  # ref [A / F, 128, I]
    weights,  # ref [A / F, 128]
):
    """[CHUNK, 128]: sum over the A / F heads of a lane. Fully unrolled, 256 columns at a time."""
    total = jnp.zeros((CHUNK, LANES), jnp.float32)
    num_heads, _, width = columns.shape
    for first in range(0, num_heads, 2):
        count = min(2, num_heads - first)
        dots = jax.lax.dot_general(
            keys,
            columns[first : first + count].reshape(count * LANES, width),
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if keys.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        for i in range(count):
            part = jnp.maximum(dots[:, i * LANES : (i + 1) * LANES], 0.0)
            total = total + part * weights[first + i : first + i + 1]
    return total


def _lane():
    return jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
