"""Decode attention on a TPU: one query per sequence over a ring, then over pages of entries.

The N heads of a query share their keys: they are the rows of a product [N, H] x [H, keys]. Keys are
values: a row fetched once serves both products. One running softmax (peak, denominator,
weighted sum) goes over the ring, over the entries and over the sink, which starts the denominator. The
ring and the first block of a stream are visited together: alone, the ring's few rows wait for each result.

Entries come in one of two ways:

    stream   every visible entry, in blocks of pages (`tpu_pages.PageStream`). Pages behind the last
             visible entry are neither fetched nor computed.
    gather   picked ones: one copy per index from HBM, all of them under way at once. A copy takes whole
             32-bit words, that is the pair of bfloat16 rows an entry lies in; the other row is masked.
             Issuing a copy takes about 8 cycles.

Packed rows are unpacked in VMEM (`tpu_packed.py`): `PackedRows` are gathered, and a copy takes the three
lines that a row lies in; `PackedColumns` are streamed.

What XLA does instead: it gathers rows to HBM and reads them back, writes the scores, and visits
every page up to the longest sequence's last.

Grid: (batch,), or that of `tpu_pages.py` for the stream. HBM traffic of a sequence: the ring, q, the
visited pages, or the picked entries (twice if bfloat16), out.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, dispatch
from pallas_kernels.attention import tpu_packed
from pallas_kernels.formats import pages, tpu_pages
from pallas_kernels.formats.packed_rows import PackedColumns, PackedRows
from pallas_kernels.formats.pages import PAGE, Pages
from pallas_kernels.grouped_matmul.order import turned

# Entries of a block. A block's work should take longer than waiting for the first of its copies.
BLOCK_ENTRIES = chips.table("decode_entries")
GATHER_UNROLL = 16  # copies issued by one turn of the loop
LANES = 128
_LOWEST = -1e30
_LOG2E = math.log2(math.e)


def decode_attention(
    q, window, entries: Pages | None, indices, sink, positions, *, ratio, scale, interpret
):
    """See `ops.py`."""
    if not (isinstance(window, jax.Array) or _are_columns_it_reads(window)):
        window = window.unpack(q.dtype)
    ring_rows = jnp.minimum(positions + 1, window.shape[1])
    window = window.data if isinstance(window, PackedColumns) else window
    common = q, sink.astype(jnp.float32)[None], window
    static = dict(scale=scale * _LOG2E, interpret=interpret)
    if entries is None or (indices is not None and not indices.shape[1]):
        return _ring(ring_rows, *common, **static)
    if indices is not None:
        return _gather(ring_rows, *common, entries, indices, **static)
    wanted = jnp.minimum((positions + 1) // ratio, entries.shape[1])
    return _stream(ring_rows, wanted, *common, entries, **static)


def unsupported(q, window, entries: Pages | None, indices) -> str | None:
    """Why the kernel cannot take these arguments, None if it can."""
    pool = None if entries is None else entries.pool
    if isinstance(pool, PackedRows | PackedColumns):
        channels = pool.nope_dim, pool.rope_dim
        if channels != tpu_packed.CHANNELS:
            nope, rope = tpu_packed.CHANNELS
            return (
                f"packed rows of {channels[0]} + {channels[1]} channels: the kernel unpacks "
                f"{nope} + {rope}"
            )
        if isinstance(pool, PackedRows) != (indices is not None):
            return "the kernel picks rows from PackedRows, and reads all of PackedColumns"
    floats = [x for x in (q, window, pool) if isinstance(x, jax.Array)]
    dtypes = {jnp.dtype(x.dtype).name for x in floats}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        return f"q, window and entries are {sorted(dtypes)}: the kernel takes one of both floats"
    if isinstance(pool, jax.Array) and pool.shape[2] % LANES:
        return f"entries of {pool.shape[2]} channels: the kernel copies multiples of {LANES}"
    if entries is not None and indices is None:
        return pages.table_too_large(entries.table)
    return None


def _are_columns_it_reads(window) -> bool:
    channels = window.nope_dim, window.rope_dim
    return isinstance(window, PackedColumns) and channels == tpu_packed.CHANNELS


def _ring(ring_rows, q, sink, window, *, scale, interpret):
    """Without entries."""
    return _call(
        functools.partial(_ring_kernel, scale=scale),
        *("decode_ring", tpu_pages.grid_of(q.shape[0]), [ring_rows], [q, sink, window]),
        num_keys=window.shape[1],
        interpret=interpret,
    )


def _stream(ring_rows, wanted, q, sink, window, entries: Pages, *, scale, interpret):
    """Over every visible entry."""
    pool, lines = tpu_pages.pages_of(entries.pool, interpret)
    grid = tpu_pages.grid_of(q.shape[0])
    block = min(BLOCK_ENTRIES[dispatch.target_chip()] // PAGE, entries.table.shape[1])
    return _call(
        functools.partial(_stream_kernel, grid=grid, lines=lines, scale=scale),
        *("decode_stream", grid, [ring_rows, wanted, entries.table.reshape(-1)]),
        *([q, sink, window, pool], [pl.BlockSpec(memory_space=pl.ANY)]),
        tpu_pages.scratch(block, lines, pool, interpret),
        num_keys=window.shape[1] + entries.shape[1],
        interpret=interpret,
    )


def _gather(ring_rows, q, sink, window, entries: Pages, indices, *, scale, interpret):
    """Over the entries of `indices`."""
    batch, num_picked = indices.shape
    # What a block of a one-dimensional array may be: a power of two, or so many 1024s.
    size = max(LANES, min(1024, pl.next_power_of_2(num_picked)))
    indices = jnp.pad(indices, ((0, 0), (0, -num_picked % size)), constant_values=-1)
    num_picked = indices.shape[1]
    pool = tpu_pages.array_of(entries.pool, interpret)
    grid = tpu_pages.grid_of(batch)
    is_packed = isinstance(entries.pool, PackedRows)
    place = tpu_packed.where_rows_are if is_packed else None
    found = tpu_pages.pool_rows(entries.table, indices, place, interpret=interpret)
    if is_packed:
        group, lines = 1, tpu_packed.COPIED
        copies, held = found
        of_copies = [held[:, None]]
    else:
        (rows,), group, lines = found, 4 // pool.dtype.itemsize, 1
        picked = (indices[..., None] & (group - 1)) == jnp.arange(group)
        picked = jnp.where(picked & (indices[..., None] >= 0), 0.0, _LOWEST)
        # Which bits of a word are the row's.
        copies, held = rows // group, jnp.array([[-1], [0xFFFF, -0x10000]][group - 1])[rows % group]
        of_copies = [jnp.where(indices < 0, 0, held)[:, None], picked.reshape(batch, 1, -1)]
    shape = (num_picked // GATHER_UNROLL, GATHER_UNROLL * lines, pool.shape[2])
    return _call(
        functools.partial(_gather_kernel, is_packed=is_packed, scale=scale),
        *("decode_gather", grid, [ring_rows]),
        [q, sink, window, pool, copies.reshape(-1), *of_copies],
        [
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(
                (num_picked,), lambda *at: (grid.sequence(*at[:2]),), memory_space=pltpu.SMEM
            ),
            *(grid.block(*x.shape[1:]) for x in of_copies),
        ],
        [pltpu.VMEM(shape, jnp.uint32), pltpu.SemaphoreType.DMA((num_picked // LANES,))],
        num_keys=window.shape[1] + group * num_picked,
        interpret=interpret,
    )


def _call(
    kernel, name, grid: tpu_pages.Grid, scalars, args, specs=(), scratch=(), *, num_keys, interpret
):
    """A kernel over sequences whose first arguments are q, sink and window."""
    q, _, window = args[:3]
    batch, num_heads, width = q.shape
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid.shape,
            in_specs=[
                grid.block(num_heads, width),
                pl.BlockSpec((1, num_heads), lambda *_: (0, 0)),
                grid.block(*window.shape[1:]),
                *specs,
            ],
            out_specs=grid.block(num_heads, width),
            scratch_shapes=[
                pltpu.VMEM((num_heads, LANES), jnp.float32),
                pltpu.VMEM((num_heads, LANES), jnp.float32),
                pltpu.VMEM((num_heads, width), jnp.float32),
                *scratch,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,  # half of the cost of issuing a copy
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * num_heads * num_keys * width,
            transcendentals=batch * num_heads * num_keys,
            bytes_accessed=batch * num_keys * width * q.dtype.itemsize + 2 * q.nbytes,
        ),
        interpret=interpret,
        name=name,
    )(*scalars, *args)


class _Keys(NamedTuple):
    """Keys that are values, too."""

    keys: Any  # [S, H], or [H, S]
    bias: Any  # [1, S]: zero where wanted, else very low
    is_transposed: bool = False


class _Softmax:
    """The running softmax of a sequence's heads, in VMEM. Scores are in units of log 2."""

    def __init__(self, q_ref, sink_ref, peak_ref, weight_ref, total_ref, *, scale):
        self.q_ref, self.scale = q_ref, scale
        self.sink = turned(sink_ref[...] * _LOG2E)  # [N, 1]
        self.peak, self.weight, self.total = peak_ref, weight_ref, total_ref  # [N, 128], [N, H]

    def start(self, *keys: "_Keys"):
        """The sink, that is a key whose value is zero, and keys."""
        self._visit(self.sink, False, keys)

    def visit(self, *keys: "_Keys"):
        """More keys."""
        self._visit(self.peak[:, :1], True, keys)

    def _visit(self, old, has_sums: bool, parts):
        scores = [
            self.scale * _dot(self.q_ref[...], x.keys, 0 if x.is_transposed else 1) + x.bias
            for x in parts
        ]
        highest = [jnp.max(x, axis=1, keepdims=True) for x in scores]
        peak = functools.reduce(jnp.maximum, highest, old)
        p = [jnp.exp2(x - peak) for x in scores]
        weights = [_fold_lanes(x) for x in p]
        totals = [
            _dot(p.astype(x.keys.dtype), x.keys, 1 if x.is_transposed else 0)
            for p, x in zip(p, parts)
        ]
        if has_sums:
            decay = jnp.exp2(old - peak)
            weights.insert(0, decay * self.weight[...])
            totals.insert(0, decay * self.total[...])
        self.weight[...] = functools.reduce(jnp.add, weights)
        self.total[...] = functools.reduce(jnp.add, totals)
        self.peak[...] = jnp.broadcast_to(peak, self.peak.shape)

    def ring(self, ring_ref, num_written) -> "_Keys":
        """The keys of a ring, of which so many rows are written."""
        is_packed = ring_ref.dtype == jnp.uint32
        if is_packed:
            keys = tpu_packed.keys_of_columns(ring_ref, self.q_ref.dtype)
        else:
            keys = ring_ref[...]
        size = keys.shape[1 if is_packed else 0]
        return _Keys(keys, _below(num_written, size), is_packed)

    def finish(self, out_ref):
        """Divides by the denominator, the sink's share included."""
        weight = jnp.sum(self.weight[...], axis=1, keepdims=True)
        weight += jnp.exp2(self.sink - self.peak[:, :1])
        out_ref[...] = (self.total[...] / weight).astype(out_ref.dtype)


def _dot(a, b, b_axis):
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (b_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _fold_lanes(p):
    """[N, S] -> [N, 128] whose lanes sum to those of `p`."""
    num_keys = p.shape[1]
    parts = [p[:, i : i + LANES] for i in range(0, num_keys, LANES)]
    if num_keys % LANES:
        pad = LANES - num_keys % LANES
        parts[-1] = jnp.pad(parts[-1], ((0, 0), (0, pad)))
    return functools.reduce(jnp.add, parts)


def _below(limit, size: int):
    """[1, size] bias: zero for positions below `limit`."""
    index = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
    return jnp.where(index < limit, 0.0, _LOWEST)


def _ring_kernel(ring_rows, q_ref, sink_ref, ring_ref, out_ref, *state, scale):
    softmax = _Softmax(q_ref, sink_ref, *state, scale=scale)
    softmax.start(softmax.ring(ring_ref, ring_rows[_sequence(ring_rows)]))
    softmax.finish(out_ref)


def _sequence(per_sequence):
    """Which of the batch this step is at."""
    grid = tpu_pages.grid_of(per_sequence.shape[0])
    return grid.sequence(pl.program_id(0), pl.program_id(1))


def _stream_kernel(
    ring_rows,  # [B] rows of the ring that are written
    wanted,  # [B] entries
    table,  # [B * n]
    q_ref,  # [N, H]
    sink_ref,  # [1, N]
    ring_ref,  # [C, H], or lines of words
    pool_ref,  # [P, 16, 8, H] in HBM, or lines of words
    out_ref,  # [N, H]
    peak_ref,
    weight_ref,
    total_ref,
    *stream,  # see `tpu_pages.scratch`
    grid: tpu_pages.Grid,
    lines: int,
    scale: float,
):
    b = grid.sequence(pl.program_id(0), pl.program_id(1))
    softmax = _Softmax(q_ref, sink_ref, peak_ref, weight_ref, total_ref, scale=scale)
    is_packed = pool_ref.dtype == jnp.uint32
    block = tpu_pages.pages_held(stream, lines) * PAGE
    num_pages = block // PAGE

    def entries(rows_ref, k):
        limit = wanted[b] - k * block
        if is_packed:
            keys = tpu_packed.keys_of_columns(rows_ref, q_ref.dtype)
        else:
            keys = rows_ref[...].reshape(block, -1)
        return _Keys(keys, _below(limit, block), is_packed)

    def clear(rows_ref, k):
        limit = wanted[b] - k * block
        pl.when(limit < block)(lambda: _clear(rows_ref, limit, lines, is_packed))

    def first(rows_ref, k, start):
        clear(rows_ref, k)
        start(0, num_pages)  # the ring's products leave the scalar unit idle
        softmax.start(softmax.ring(ring_ref, ring_rows[b]), entries(rows_ref, k))
        return num_pages

    def visit(rows_ref, k, start):
        clear(rows_ref, k)
        start(0, num_pages)
        softmax.visit(entries(rows_ref, k))
        return num_pages

    tpu_pages.PageStream(grid, lines, wanted, table, pool_ref, stream).visit(visit, first)
    softmax.finish(out_ref)


def _clear(rows_ref, limit, lines: int, is_packed: bool):
    """Zeros from row `limit` on: what is there may be no number."""

    @pl.loop(limit // PAGE, rows_ref.shape[0] // (lines if is_packed else 1))
    def _(page):
        at = pl.ds(page * lines, lines) if is_packed else page
        old = rows_ref[at]
        row = tpu_pages.row_of_page(old)
        rows_ref[at] = jnp.where(page * PAGE + row < limit, old, jnp.zeros_like(old))


def _gather_kernel(
    ring_rows,  # [B]
    q_ref,  # [N, H]
    sink_ref,  # [1, N]
    ring_ref,  # [C, H], or lines of words
    pool_ref,  # [1, P * 128, H] in HBM, or lines of words
    copies_ref,  # [K] in SMEM: the group of rows, or the line, that each copy begins with
    held_ref,  # [1, K] the first word of each row if packed, else the bits of each word that are its
    *refs,
    scale: float,
    is_packed: bool,
):
    # Of floats [1, group * K] bias: zero for the row of each copy that was picked. Of packed rows there is a
    # first word where one was.
    picked_ref: Any = None if is_packed else refs[0]
    out_ref, peak_ref, weight_ref, total_ref, rows_ref, arrived = refs[-6:]
    # rows_ref [K / unroll, unroll * lines, H] 32-bit words; arrived: a semaphore per 128 copies
    source = (pool_ref if is_packed else pool_ref.bitcast(jnp.uint32)).at[0]
    turns = LANES // GATHER_UNROLL
    lines = rows_ref.shape[1] // GATHER_UNROLL

    for c in range(arrived.shape[0]):

        @pl.loop(c * turns, (c + 1) * turns)
        def _(i, c=c):
            for j in range(GATHER_UNROLL):
                pltpu.make_async_copy(
                    source.at[pl.ds(copies_ref[i * GATHER_UNROLL + j], lines)],
                    rows_ref.at[i, pl.ds(j * lines, lines)],
                    arrived.at[c],
                ).start()

    softmax = _Softmax(q_ref, sink_ref, peak_ref, weight_ref, total_ref, scale=scale)
    softmax.start(softmax.ring(ring_ref, ring_rows[_sequence(ring_rows)]))
    group = 1 if is_packed else picked_ref.shape[1] // copies_ref.shape[0]
    for c in range(arrived.shape[0]):
        part = rows_ref.at[pl.ds(c * turns, turns)]
        pltpu.make_async_copy(part, part, arrived.at[c]).wait()
        held = held_ref[:, pl.ds(c * LANES, LANES)]
        if is_packed:
            bias = jnp.where(held < 0, _LOWEST, 0.0)
        else:
            bias = picked_ref[:, pl.ds(c * LANES * group, LANES * group)]
        held = jnp.transpose(jnp.broadcast_to(held, (LANES, LANES)))
        if is_packed:
            found = [
                part[:, pl.ds(line, GATHER_UNROLL, stride=lines)].reshape(LANES, LANES)
                for line in range(lines)
            ]
            keys = tpu_packed.keys_of_copies(found, held, q_ref.dtype)
        else:  # the other row of a pair may be another sequence's, and no number
            words = part[...].reshape(LANES, rows_ref.shape[2])
            bits = jax.lax.bitcast_convert_type(held, jnp.uint32)
            words &= jnp.concatenate([bits] * (words.shape[1] // LANES), axis=1)
            keys = pltpu.bitcast(words, pool_ref.dtype)
        softmax.visit(_Keys(keys, bias))
    softmax.finish(out_ref)
