"""Indexer of one query per sequence on a TPU: each key is read once, K indices come out.

Scores of all visible entries are kept in VMEM (4 bytes each), the threshold is found there
(`threshold.py`), and the entries that reach it are listed in ascending order.

XLA instead writes the scores to HBM and sorts all S of them.

Packed keys are unpacked in VMEM. They lie on lanes, where scores do: [I, 128 n] is what a product
takes.

Scores: heads are rows of the product q [A, I] x keys [256 n, I]^T; the weighted sum over heads is
over rows. Entry s lies in row s // 128, lane s % 128 of the scores.

Listing without a scatter: `slot` i of the list belongs to the row of scores in which the running
count of selected entries passes i. For 128 rows at once, with sums of zeros and ones by products:

    counts[r]   selected entries of row r,  end = running sum of counts,  start = end - counts
    prefix[l,r] selected entries of row r in lanes 0 .. l
    taken[r,i]  start[r] <= i < end[r]                        one row per slot
    row(i)      sum_r r taken[r,i]
    lane(i)     number of lanes l with (prefix taken)[l,i] <= i - start(row(i))

Keys come in blocks of pages (`tpu_pages.PageStream`, whose grid this is), a sequence's first while the
sequence before it searches and lists. Pages past the last visible entry are neither fetched nor scored.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.formats import pages, tpu_formats, tpu_pages
from pallas_kernels.formats.packed_rows import KEY_BLOCK, PackedKeys, key_words
from pallas_kernels.formats.pages import PAGE, Pages
from pallas_kernels.grouped_matmul.order import turned
from pallas_kernels.indexer import block_sizes, threshold
from pallas_kernels.indexer.threshold import LANES, MISSING

PACKED_WIDTH = 128  # channels of packed keys
PACKED_WORDS = key_words(PACKED_WIDTH)


def unsupported(keys: Pages) -> str | None:
    """Why the kernel cannot take these arguments, None if it can."""
    num_entries, width = keys.shape[1:]
    if num_entries > block_sizes.MAX_DECODE_ENTRIES:
        return f"the kernel takes {block_sizes.MAX_DECODE_ENTRIES} entries, not {num_entries}"
    if isinstance(keys.pool, PackedKeys) and width != PACKED_WIDTH:
        return f"packed keys of {width} channels: the kernel unpacks {PACKED_WIDTH}"
    if width % LANES:
        return f"keys of {width} channels: the kernel copies multiples of {LANES}"
    return pages.table_too_large(keys.table)


def index_list(
    q: jax.Array,  # [B, A, I]
    weights: jax.Array,  # [B, A] float32
    keys: Pages,  # [B, S, I]
    num_visible: jax.Array,  # [B] int32, at most S
    *,
    topk: int,
    interpret: bool,
) -> jax.Array:  # [B, topk] int32
    """The `topk` visible entries of largest score, ascending; then -1."""
    batch, num_heads, width = q.shape
    num_entries = keys.shape[1]
    num_slots = -(-topk // LANES) * LANES
    pair = 2 * block_sizes.decode_chunk(num_entries)
    num_rows = -(-num_entries // (pair * LANES)) * pair
    pool, lines = tpu_pages.pages_of(keys.pool, interpret)
    grid = tpu_pages.grid_of(batch)
    static = dict(topk=topk, num_entries=num_entries, lines=lines)
    indices = pl.pallas_call(
        functools.partial(_kernel, grid=grid, **static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid.shape,
            in_specs=[
                grid.block(num_heads, width),
                grid.block(1, num_heads),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=grid.block(1, num_slots),
            scratch_shapes=[
                pltpu.VMEM((num_rows, LANES), jnp.int32),
                pltpu.VMEM((num_rows, LANES), jnp.float32),
                pltpu.VMEM((num_rows, LANES), jnp.float32),
                pltpu.VMEM((num_rows, LANES), jnp.bfloat16),
                *tpu_pages.scratch(
                    block_sizes.decode_block(num_entries) // PAGE,
                    *(lines, pool, interpret, block_sizes.decode_held(num_entries)),
                ),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, 1, num_slots), jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,  # half of the cost of issuing a copy
            vmem_limit_bytes=block_sizes.VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * num_entries * num_heads * width,
            bytes_accessed=batch * num_entries // PAGE * lines * pool.shape[2] * pool.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="index_list",
    )(num_visible, keys.table.reshape(-1), q, weights.astype(jnp.float32)[:, None], pool)
    return indices[:, 0, :topk]


def _kernel(
    visible_ref,  # [B] int32
    table_ref,  # [B * n] int32
    q_ref,  # [A, I]
    weights_ref,  # [1, A] float32
    pool_ref,  # [P, 16, 8, I] in HBM, or lines of words
    indices_ref,  # [1, slots] int32
    scores,  # [rows, 128] int32
    starts,  # [rows, 128] float32: `start` of each row, in all lanes
    ends,  # [rows, 128] float32: `end`
    prefixes,  # [rows, 128] bfloat16: `prefix` of 128 rows each
    *stream,  # see `tpu_pages.scratch`
    grid: tpu_pages.Grid,
    topk: int,
    num_entries: int,
    lines: int,
):
    visible = visible_ref[grid.sequence(pl.program_id(0), pl.program_id(1))]
    is_packed = pool_ref.dtype == jnp.uint32
    block = tpu_pages.pages_held(stream, lines) * PAGE
    some = block_sizes.decode_keys(num_entries)
    weights = jnp.broadcast_to(turned(weights_ref[...]), (weights_ref.shape[1], LANES))

    def score(keys_ref, first, c):
        if is_packed:
            keys = _unpack(keys_ref, c * (some // LANES), some // LANES, q_ref.dtype)
        else:
            keys = keys_ref[pl.ds(c * (some // PAGE), some // PAGE)].reshape(some, -1)
        dots = jax.lax.dot_general(
            q_ref[...],
            keys,
            (((1,), (0 if is_packed else 1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if keys.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        rows = []
        for lanes in range(0, some, LANES):
            part = jnp.maximum(dots[:, lanes : lanes + LANES], 0.0) * weights
            rows.append(jnp.sum(part, axis=0, keepdims=True))
        first += c * some
        row = pl.multiple_of(first // LANES, some // LANES)
        found = threshold.ordered(jnp.concatenate(rows, axis=0))
        scores[pl.ds(row, some // LANES)] = jnp.where(
            first + _entry(some // LANES) < visible, found, MISSING
        )

    def visit(keys_ref, k, start):
        first = k * block
        parts = pl.cdiv(jnp.clip(visible - first, 0, block), some)

        @pl.loop(0, parts)
        def _(c):
            start(c * (some // PAGE), some // PAGE)
            score(keys_ref, first, c)

        return parts * (some // PAGE)

    tpu_pages.PageStream(grid, lines, visible_ref, table_ref, pool_ref, stream).visit(visit)
    tau = _threshold(visible, scores, topk=topk, num_entries=num_entries)
    num_blocks = pl.cdiv(visible, LANES * LANES)
    _list(tau, num_blocks, scores, starts, ends, prefixes, indices_ref, topk=topk)


def unpacker(pool) -> Callable | None:
    """What unpacks a page of a pool for `tpu_rows.float_rows`; None if nothing here does."""
    if not isinstance(pool, PackedKeys) or pool.width != PACKED_WIDTH:
        return None
    return lambda keys_ref, page: _unpack(keys_ref, page, 1, jnp.bfloat16).T


def _unpack(keys_ref, first, count: int, dtype):
    """[I, 128 count]: packed keys of groups `first` .. first + count - 1."""
    product = tpu_formats.product_dtype(dispatch.target_chip())
    exponents = keys_ref[pl.ds((first + 1) * PACKED_WORDS - 1, count, PACKED_WORDS)]
    scales = []  # of each block of channels: words [count, 128]
    for block in range(PACKED_WIDTH // KEY_BLOCK):
        bits = (exponents >> 8 * block & 0xFF) << 23
        scales.append(tpu_formats.scale_words(bits, tpu_formats.E5M2, product))
    groups = []
    for group in range(count):
        line = (first + group) * PACKED_WORDS
        blocks = []
        for pair in range(PACKED_WIDTH // (2 * KEY_BLOCK)):
            codes = keys_ref[pl.ds(line + pair * KEY_BLOCK // 4, KEY_BLOCK // 4)]
            for half, values in enumerate(tpu_formats.e5m2_of_codes(codes)):
                scale = scales[2 * pair + half][group : group + 1]
                blocks.append(tpu_formats.scaled(values, scale, product).astype(jnp.bfloat16))
        groups.append(jnp.concatenate(blocks, axis=0))
    return jnp.concatenate(groups, axis=1).astype(dtype)


def _threshold(visible, scores, *, topk: int, num_entries: int):
    """[1, 128], all lanes equal."""
    chunk = block_sizes.decode_chunk(num_entries)
    num_pairs = pl.cdiv(visible, 2 * chunk * LANES)
    tile = block_sizes.decode_keys(num_entries) // LANES

    def clear(i, _):
        row = pl.multiple_of(i * tile, tile)
        scores[pl.ds(row, tile)] = jnp.full((tile, LANES), MISSING, jnp.int32)
        return 0

    written = pl.cdiv(visible, tile * LANES)
    jax.lax.fori_loop(written, num_pairs * (2 * chunk // tile), clear, 0)

    def extremes(i, state):
        low, high = state
        x = scores[pl.ds(pl.multiple_of(i * LANES, LANES), LANES)]
        low = jnp.minimum(
            low, threshold.across_rows(jnp.where(x == MISSING, 2**31 - 1, x), jnp.minimum)
        )
        return low, jnp.maximum(high, threshold.across_rows(x, jnp.maximum))

    start = jnp.full((8, LANES), 2**31 - 1, jnp.int32), jnp.full((8, LANES), MISSING, jnp.int32)
    low, high = jax.lax.fori_loop(0, num_pairs * (2 * chunk // LANES), extremes, start)
    low = threshold.across_groups(jnp.min(low, axis=0, keepdims=True), jnp.minimum, LANES)
    high = threshold.across_groups(jnp.max(high, axis=0, keepdims=True), jnp.maximum, LANES)
    return threshold.select(
        scores,
        num_pairs,
        low,
        high,
        jnp.full((1, LANES), visible, jnp.int32),
        lambda row: row * LANES + _entry(chunk),
        topk=topk,
        num_groups=LANES,
        num_entries=num_entries,
        chunk=chunk,
    )


def _list(tau, num_blocks, scores, starts, ends, prefixes, indices_ref, *, topk: int):
    """Writes the entries that reach tau."""
    row_of = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
    lane_of = jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
    lower = jnp.where(row_of >= lane_of, 1.0, 0.0).astype(jnp.bfloat16)
    ones = jnp.ones((LANES, LANES), jnp.bfloat16)

    def count(i, total):
        rows = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        chosen = jnp.where(scores[rows] >= tau, 1.0, 0.0).astype(jnp.bfloat16)
        counts = _dot(chosen, ones)
        end = total + _dot(lower, counts.astype(jnp.bfloat16))
        starts[rows] = end - counts
        ends[rows] = end
        prefix = jax.lax.dot_general(
            lower, chosen, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        prefixes[rows] = prefix.astype(jnp.bfloat16)
        return end[LANES - 1 :]

    total = jax.lax.fori_loop(0, num_blocks, count, jnp.zeros((1, LANES), jnp.float32))

    for first in range(0, indices_ref.shape[1], LANES):
        slot = first + jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        slot_f32 = slot.astype(jnp.float32)

        def visit(i, state, slot=slot_f32):
            row, start, prefix = state
            rows = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
            taken = (starts[rows] <= slot) & (slot < ends[rows])
            row += threshold.across_rows(jnp.where(taken, i * LANES + row_of, 0), jnp.add)
            start += threshold.across_rows(jnp.where(taken, starts[rows], 0.0), jnp.add)
            taken = jnp.where(taken, 1.0, 0.0).astype(jnp.bfloat16)
            return row, start, prefix + _dot(prefixes[rows], taken)

        zero = jnp.zeros((8, LANES), jnp.float32)
        row, start, prefix = jax.lax.fori_loop(
            0,
            num_blocks,
            visit,
            (zero.astype(jnp.int32), zero, jnp.zeros((LANES, LANES), jnp.float32)),
        )
        row = jnp.sum(row, axis=0, keepdims=True)
        rank = slot_f32 - jnp.sum(start, axis=0, keepdims=True)
        lane = jnp.sum(jnp.where(prefix <= rank, 1, 0), axis=0, keepdims=True)
        listed = (slot_f32 < total) & (slot < topk)
        indices_ref[:, first : first + LANES] = jnp.where(listed, row * LANES + lane, -1)


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _entry(num_rows: int):
    """[rows, 128]: 128 r + lane."""
    shape = (num_rows, LANES)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return row * LANES + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
