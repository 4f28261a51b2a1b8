"""Gradients of prefill attention on TPU: one kernel for queries, one for window rows and entries.

With p the probabilities (recomputed from the log of the denominator; none are stored) and
delta = <out, d_out> - d_log_denominator of each row of query and head:

    ds = scale * p * (<d_out, key> - delta);  d_q = sum ds key;  d_key = sum ds q + sum p d_out

Keys are values, so `d_key` is one sum. `query_gradient` goes over the forward kernel's grid.
`key_gradient` owns a block of keys and goes over the blocks of queries that may attend to it, so
nothing is scattered and no gradient is held more than once. It forms scores transposed,
[keys, queries * N]: then log-denominators and deltas are rows of lanes, as they lie in memory, and
both products that sum over queries are plain ones, done as one: [ds, p] @ [q; d_out].

Grid of `key_gradient`: (batch, blocks of keys, blocks of queries). Steps whose queries do not
attend to the keys compute nothing and, as their index is clamped, read nothing.

Transposed bits: of entry s and query t bit t % 32 of word [t // 32, s], so that one word turned
into a row of equal lanes, shifted by each lane's query, is the mask of 32 queries.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import block_sizes
from pallas_kernels.attention.block_sizes import Blocks
from pallas_kernels.attention.tpu_prefill import (
    LOG2_E,
    Mask,
    band_size,
    band_spec,
    bits_spec,
    dot,
    in_hbm,
    repeat_lanes,
    stream_entries,
    stream_scratch,
)


def query_gradient(
    q: jax.Array,  # [B, T * N, H]
    d_out: jax.Array,  # [B, T * N, H]
    lse: jax.Array,  # [B, T, N] float32
    delta: jax.Array,  # [B, T, N] float32
    window: jax.Array,  # [B, C + T (+ padding), H]
    entries: jax.Array | None,  # [B, S, H]
    bits: jax.Array | None,  # [B, T, W * 128]
    start: jax.Array,  # [B] int32
    counts: jax.Array,  # [B, T / queries] int32
    *,
    num_heads: int,
    size: int,
    num_entries: int,
    ratio: int,
    scale: float,
    blocks: Blocks,
    interpret: bool,
) -> jax.Array:  # [B, T * N, H]
    """Arguments as those of the forward kernel."""
    batch, num_rows, width = q.shape
    rows, band = blocks.queries * num_heads, band_size(size, blocks)
    mine = pl.BlockSpec((1, rows, width), lambda b, i, *_: (b, i, 0))
    of_row = pl.BlockSpec((1, blocks.queries, num_heads), lambda b, i, *_: (b, i, 0))
    in_specs = [mine, mine, of_row, of_row, band_spec(band, width, blocks)]
    args = [q, d_out, lse, delta, window]
    if entries is not None:
        in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
        args.append(in_hbm(entries, interpret))
    if bits is not None:
        in_specs.append(bits_spec(bits, blocks))
        args.append(bits)
    kernel = functools.partial(
        _query_kernel,
        mask=Mask(num_heads, size, band, num_entries, ratio, blocks),
        scale=scale,
        has_entries=entries is not None,
        has_bits=bits is not None,
    )
    keys_per_query = band + (0 if entries is None else entries.shape[1])
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_rows // rows),
            in_specs=in_specs,
            out_specs=mine,
            scratch_shapes=[
                pltpu.VMEM((rows, 128), jnp.float32),
                pltpu.VMEM((rows, 128), jnp.float32),
                pltpu.VMEM((rows, width), jnp.float32),
                *stream_scratch(entries, blocks),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=blocks.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * batch * num_rows * keys_per_query * width,
            bytes_accessed=3 * q.size * q.dtype.itemsize,
            transcendentals=batch * num_rows * keys_per_query,
        ),
        interpret=interpret,
        name="attention_query_gradient",
    )(start, counts, *args)


def _query_kernel(
    start_ref,
    counts_ref,
    q_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    window_ref,
    *all_refs,
    mask,
    scale,
    has_entries,
    has_bits,
):
    refs = list(all_refs)
    entries_ref = refs.pop(0) if has_entries else None
    bits_ref = refs.pop(0) if has_bits else None
    d_q_ref, lse, delta, total, *stream = refs
    b, i = pl.program_id(0), pl.program_id(1)
    first = start_ref[b] + i * mask.blocks.queries
    num_chunks, rows = mask.blocks.queries // mask.blocks.chunk, mask.chunk_rows

    def as_columns(x):  # [chunk, N] -> [chunk * N, 128]
        x = jnp.broadcast_to(x[:, :, None], (*x.shape, 128))
        return x.reshape(rows, 128)

    for r in range(num_chunks):
        queries = slice(r * mask.blocks.chunk, (r + 1) * mask.blocks.chunk)
        lse[r * rows : (r + 1) * rows] = as_columns(LOG2_E * lse_ref[0, queries])
        delta[r * rows : (r + 1) * rows] = as_columns(delta_ref[0, queries])

    def visit(keys, bias, *, is_first: bool):
        def products(r):
            mine = slice(r * rows, (r + 1) * rows)
            return dot(q_ref[0, mine], keys, "nt"), dot(d_out_ref[0, mine], keys, "nt")

        following = products(0)
        for r in range(num_chunks):
            (s, dp), following = following, products(r + 1) if r + 1 < num_chunks else None
            mine, width = slice(r * rows, (r + 1) * rows), s.shape[1]
            s = mask.add(scale * LOG2_E * s, bias(r))
            p = jnp.exp2(s - repeat_lanes(lse[mine], width))
            ds = scale * p * (dp - repeat_lanes(delta[mine], width))
            product = dot(ds.astype(keys.dtype), keys, "nn")
            total[mine] = product if is_first else total[mine] + product

    def visit_window():
        visit(window_ref[0], lambda r: mask.window(r, first), is_first=True)

    if has_entries:

        def visit_entries(k, keys):
            visit(keys, lambda r: mask.entries(r, k, first, bits_ref), is_first=False)

        stream_entries(entries_ref, b, 0, counts_ref[b, i], stream, visit_window, visit_entries)
    else:
        visit_window()
    d_q_ref[0] = total[...].astype(d_q_ref.dtype)


def key_gradient(
    q: jax.Array,  # [B, T * N, H]
    d_out: jax.Array,  # [B, T * N, H]
    stats: jax.Array,  # [B, T / queries, 2, queries * N] float32: log-denominators and deltas
    keys: jax.Array,  # [B, S, H] entries, or [B, C + T (+ padding), H] window rows
    bits: jax.Array | None,  # [B, T / 32, 1, S] transposed
    start: jax.Array,  # [B] int32
    ranges: jax.Array,  # [B * S / block * 2] int32: first block of queries, and one past the last
    *,
    num_heads: int,
    size: int | None,  # C: keys are window rows
    num_entries: int,
    ratio: int,
    scale: float,
    blocks: Blocks,
    interpret: bool,
) -> jax.Array:  # like keys
    """Gradient of entries (`size` None) or of window rows."""
    batch, num_rows, width = q.shape
    rows = blocks.queries * num_heads
    num_blocks, longest = num_rows // rows, num_rows // rows
    block = blocks.entries
    if size is not None:  # a block of rows is seen by this many blocks of queries
        block = block_sizes.WINDOW_ROWS
        longest = min(longest, -(-(size + block - 1) // blocks.queries) + 1)

    def query_block(b, k, n, ranges):
        first, end = _range(ranges, b, k, keys.shape[1] // block)
        return jnp.clip(first + n, 0, jnp.maximum(end - 1, 0))

    def mine(b, k, n, start, ranges):
        return b, query_block(b, k, n, ranges), 0

    in_specs = [
        pl.BlockSpec((1, rows, width), mine),
        pl.BlockSpec((1, rows, width), mine),
        pl.BlockSpec((1, 1, 2, rows), lambda *a: (*mine(*a), 0)),
        pl.BlockSpec((1, block, width), lambda b, k, n, *_: (b, k, 0)),
    ]
    args = [q, d_out, stats, keys]
    if bits is not None:

        def words(b, k, n, start, ranges):
            return b, query_block(b, k, n, ranges) * blocks.queries // 32, 0, k

        in_specs.append(pl.BlockSpec((1, 1, 1, block), words))
        args.append(bits)
    static = dict(
        num_heads=num_heads,
        size=size,
        num_entries=num_entries,
        ratio=ratio,
        scale=scale,
        blocks=blocks,
        has_bits=bits is not None,
    )
    steps = min(longest, num_blocks)
    return pl.pallas_call(
        functools.partial(_key_kernel, **static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, keys.shape[1] // block, steps),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((1, block, width), lambda b, k, n, *_: (b, k, 0)),
            scratch_shapes=[pltpu.VMEM((block, width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(keys.shape, keys.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_limit,
        ),
        cost_estimate=pl.CostEstimate(
            flops=8 * batch * keys.shape[1] * steps * rows * width,
            bytes_accessed=2 * q.size * q.dtype.itemsize * keys.shape[1] // block,
            transcendentals=batch * keys.shape[1] * steps * rows,
        ),
        interpret=interpret,
        name="attention_entry_gradient" if size is None else "attention_window_gradient",
    )(start, ranges, *args)


def _range(ranges, b, k, num_blocks):
    """First block of queries, and one past the last, that may attend to block k of the keys."""
    at = 2 * (b * num_blocks + k)
    return ranges[at], ranges[at + 1]


def _key_kernel(
    start_ref,
    ranges_ref,
    q_ref,
    d_out_ref,
    stats_ref,
    keys_ref,
    *refs,
    num_heads,
    size,
    num_entries,
    ratio,
    scale,
    blocks,
    has_bits,
):
    bits_ref: Any = refs[0] if has_bits else None
    d_keys_ref, total = refs[-2:]
    b, k, n = (pl.program_id(axis) for axis in range(3))
    first, end = _range(ranges_ref, b, k, pl.num_programs(1))
    i = first + n
    num_keys, rows = keys_ref.shape[1], blocks.chunk * num_heads

    @pl.when(n == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(i < end)
    def _():
        keys = keys_ref[0]
        key = jax.lax.broadcasted_iota(jnp.int32, (num_keys, rows), 0) + k * num_keys
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, rows), 1)
        words: Any = None
        if has_bits:  # word of each key, in all lanes
            words = jnp.broadcast_to(bits_ref[0, 0], (128, num_keys)).T
            words = repeat_lanes(words, rows)

        def visible(r):  # [keys, rows]
            query = lane // num_heads + r * blocks.chunk  # in its block
            if has_bits:
                return words << (31 - (query + i * blocks.queries % 32)) < 0
            query += i * blocks.queries
            if size is None:
                seen = jnp.minimum((start_ref[b] + query + 1) // ratio, num_entries)
                return key < seen
            oldest = jnp.maximum(query + 1, size - start_ref[b])
            return (key >= oldest) & (key <= query + size)

        def products(r):
            mine = slice(r * rows, (r + 1) * rows)
            return dot(keys, q_ref[0, mine], "nt"), dot(keys, d_out_ref[0, mine], "nt")

        num_chunks = blocks.queries // blocks.chunk
        following = products(0)
        for r in range(num_chunks):
            (s, dp), following = following, products(r + 1) if r + 1 < num_chunks else None
            mine = slice(r * rows, (r + 1) * rows)
            s = scale * LOG2_E * s - LOG2_E * stats_ref[0, 0, 0:1, mine]
            p = jnp.where(visible(r), jnp.exp2(s), 0.0)
            ds = scale * p * (dp - stats_ref[0, 0, 1:2, mine])
            factors = jnp.concatenate([ds, p], axis=1).astype(keys.dtype)
            rows_of_chunk = jnp.concatenate([q_ref[0, mine], d_out_ref[0, mine]], axis=0)
            total[...] += dot(factors, rows_of_chunk, "nn")

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        d_keys_ref[0] = total[...].astype(d_keys_ref.dtype)
