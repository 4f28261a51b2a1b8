"""Decode attention on a TPU: one query per sequence over a ring, then over a cache of entries.

The N heads of a query share their keys: they are the rows of a product [N, H] x [H, keys]. Keys are
values: a row fetched once serves both products. One running softmax (peak, denominator,
weighted sum) goes over the ring, over the entries and over the sink, which starts the denominator.

Entries come in one of two ways:

    stream   blocks of consecutive entries, those past the last wanted one being neither fetched nor
             computed. With indices, a mask of the wanted entries is made of them in the kernel:
             entry s is element [s // 128, s % 128] of the product of two one-hot matrices
             [S / 128, K] x [K, 128].
    gather   one copy per index from HBM, all of them under way at once. A copy takes whole 32-bit
             words, that is the pair of bfloat16 rows an entry lies in; the other row is masked.
             Issuing a copy takes about 8 cycles, so the gather is worth it from `GATHER_RATIO`
             entries per index on.

Packed rows are unpacked in VMEM (`tpu_packed.py`): `PackedRows` are gathered, whatever their number,
and a copy takes the three lines that a row lies in; `PackedColumns` are streamed.

What XLA does instead: it gathers rows to HBM and reads them back, writes the scores, and visits
every entry of the cache, be it written or not.

Grid: (batch, blocks of entries). The ring is visited in the first step of a sequence, and the sum
divided in its last. HBM traffic of a sequence: the ring, q, the visited entries (twice the picked
ones when gathered), out.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, dispatch
from pallas_kernels.attention import tpu_packed
from pallas_kernels.formats.packed_rows import PackedColumns, PackedRows

# Entries of a block. A block's copy should take longer than the 0.35 us a grid step costs.
BLOCK_ENTRIES = chips.table("decode_entries")
# Entries per index from which on fetching the picked ones takes less time than fetching all.
GATHER_RATIO = chips.table("gather_ratio")
GATHER_UNROLL = 16  # copies issued by one turn of the loop
LANES = 128
_LOWEST = -1e30
_LOG2E = math.log2(math.e)


def decode_attention(q, window, entries, indices, sink, positions, *, ratio, scale, interpret):
    """See `ops.py`."""
    chip = dispatch.target_chip()
    if indices is not None and not indices.shape[1]:
        entries, indices = jnp.zeros((q.shape[0], 0, q.shape[2]), q.dtype), None
    ring_rows = jnp.minimum(positions + 1, window.shape[1])
    if not (isinstance(window, jax.Array) or _are_columns_it_reads(window)):
        window = window.unpack(q.dtype)
    call = functools.partial(_call, q, window, sink, scale=scale, interpret=interpret)
    num_entries = entries.shape[1]
    if not num_entries:
        return call(None, None, [ring_rows], block=0)
    if indices is None:
        wanted = jnp.minimum((positions + 1) // ratio, num_entries)
    else:
        if gathers(entries, indices.shape[1], chip):
            # What a block of a one-dimensional array may be: a power of two, or so many 1024s.
            size = max(LANES, min(1024, pl.next_power_of_2(indices.shape[1])))
            missing = -indices.shape[1] % size
            indices = jnp.pad(indices, ((0, 0), (0, missing)), constant_values=-1)
            return call(entries, indices, [ring_rows], block=0)
        wanted = jnp.minimum(jnp.max(indices, axis=1) + 1, num_entries)
    block = min(BLOCK_ENTRIES[chip], -(-num_entries // LANES) * LANES)
    return call(entries, indices, [ring_rows, wanted], block=block)


def unsupported(q, window, entries, indices) -> str | None:
    """Why the kernel cannot take these arguments, None if it can."""
    if isinstance(entries, PackedRows | PackedColumns):
        channels = entries.nope_dim, entries.rope_dim
        if channels != tpu_packed.CHANNELS:
            nope, rope = tpu_packed.CHANNELS
            return (
                f"packed rows of {channels[0]} + {channels[1]} channels: the kernel unpacks "
                f"{nope} + {rope}"
            )
        if isinstance(entries, PackedRows) != (indices is not None):
            return "the kernel picks rows from PackedRows, and reads all of PackedColumns"
        if isinstance(entries, PackedRows) and entries.data.shape[1] < tpu_packed.COPIED:
            return f"{entries.length} packed rows are fewer than the kernel copies at once"
    floats = [x for x in (q, window, entries) if isinstance(x, jax.Array)]
    dtypes = {jnp.dtype(x.dtype).name for x in floats}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        return f"q, window and entries are {sorted(dtypes)}: the kernel takes one of both floats"
    return None


def _are_columns_it_reads(window) -> bool:
    channels = window.nope_dim, window.rope_dim
    return isinstance(window, PackedColumns) and channels == tpu_packed.CHANNELS


def gathers(entries: jax.Array | PackedRows, num_picked: int, chip: str) -> bool:
    """Whether picked rows are copied one by one."""
    if isinstance(entries, PackedRows):
        return True
    _, num_entries, width = entries.shape
    whole_words = num_entries % (4 // entries.dtype.itemsize) == 0
    fits = width % LANES == 0 and whole_words and num_picked % LANES == 0
    return fits and num_entries > GATHER_RATIO[chip] * num_picked


def _call(q, window, sink, entries, indices, lengths, *, block, scale, interpret):
    """Entries are streamed in blocks of `block`; 0: gathered by `indices`, or there are none."""
    batch, num_heads, width = q.shape
    ring = window.shape[1]
    window = window.data if isinstance(window, PackedColumns) else window
    is_packed = isinstance(entries, PackedRows | PackedColumns)
    rows = entries.data if is_packed else entries
    if is_packed and not interpret:  # or XLA moves a short cache to VMEM, and all of it back
        rows = pltpu.with_memory_space_constraint(rows, pltpu.HBM)
    num_blocks = pl.cdiv(entries.shape[1], block) if block else 1

    def row(b, k, *_):
        return b, 0, 0

    def visited(b, k, ring_rows, wanted=None):  # blocks past the last wanted one are not fetched
        return b, jnp.minimum(k, jnp.maximum(pl.cdiv(wanted[b], block) - 1, 0)), 0

    in_specs = [
        pl.BlockSpec((None, num_heads, width), row),
        pl.BlockSpec((num_heads, 1), lambda b, k, *_: (0, 0)),
        pl.BlockSpec((None, *window.shape[1:]), row),
    ]
    args = [q, sink.astype(jnp.float32)[:, None] * _LOG2E, window]
    scratch = [
        pltpu.VMEM((num_heads, LANES), jnp.float32),
        pltpu.VMEM((num_heads, LANES), jnp.float32),
        pltpu.VMEM((num_heads, width), jnp.float32),
    ]
    num_keys = ring
    if entries is None:
        kernel, name = _ring_kernel, "decode_ring"
    elif block:
        kernel = functools.partial(
            _stream_kernel, num_entries=entries.shape[1], is_packed=is_packed
        )
        name = "decode_stream"
        lines = block
        if is_packed:  # those of 128 columns are no multiple of 8: one block has all lines
            lines = block // LANES * tpu_packed.WORDS if num_blocks > 1 else rows.shape[1]
        in_specs.append(pl.BlockSpec((None, lines, rows.shape[2]), visited))
        args.append(rows)
        num_keys += entries.shape[1]
        if indices is not None:
            kernel, name = functools.partial(kernel, masked=True), "decode_masked"
            in_specs.append(pl.BlockSpec((None, 1, indices.shape[1]), row))
            args.append(indices[:, None])
            scratch.append(pltpu.VMEM((num_blocks * block // LANES, LANES), jnp.float32))
    else:
        kernel, name = functools.partial(_gather_kernel, is_packed=is_packed), "decode_gather"
        num_picked = indices.shape[1]
        group, lines = (1, tpu_packed.COPIED) if is_packed else (4 // rows.dtype.itemsize, 1)
        picked = (indices[..., None] & (group - 1)) == jnp.arange(group)
        picked = jnp.where(picked & (indices[..., None] >= 0), 0.0, _LOWEST)
        found = jnp.clip(indices, 0, entries.shape[1] - 1)
        if is_packed:
            copies, offset = tpu_packed.where_rows_are(found, rows.shape[1])
        else:
            copies = found // group
        in_specs += [
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec((num_picked,), lambda b, k, *_: (b,), memory_space=pltpu.SMEM),
            pl.BlockSpec((None, 1, group * num_picked), row),
        ]
        args += [rows, copies.reshape(-1), picked.reshape(batch, 1, -1)]
        if is_packed:
            in_specs.append(pl.BlockSpec((None, 1, num_picked), row))
            args.append(offset[:, None])
        shape = (num_picked // GATHER_UNROLL, GATHER_UNROLL * lines, rows.shape[2])
        scratch += [
            pltpu.VMEM(shape, jnp.uint32),
            pltpu.SemaphoreType.DMA((num_picked // LANES,)),
        ]
        num_keys += num_picked * group
    fetched = batch * num_keys * width * q.dtype.itemsize
    return pl.pallas_call(
        functools.partial(kernel, scale=scale * _LOG2E),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(lengths),
            grid=(batch, num_blocks),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((None, num_heads, width), row),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,  # half of the cost of issuing a copy
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * num_heads * num_keys * width,
            transcendentals=batch * num_heads * num_keys,
            bytes_accessed=fetched + 2 * q.size * q.dtype.itemsize,
        ),
        interpret=interpret,
        name=name,
    )(*lengths, *args)


class _Softmax:
    """The running softmax of a sequence's heads, in VMEM. Scores are in units of log 2."""

    def __init__(self, q_ref, sink_ref, peak_ref, weight_ref, total_ref, *, scale):
        self.q_ref, self.sink_ref, self.scale = q_ref, sink_ref, scale
        self.peak, self.weight, self.total = peak_ref, weight_ref, total_ref  # [N, 128], [N, H]

    def start(self):
        """Only the sink: a key whose value is zero."""
        self.peak[...] = jnp.broadcast_to(self.sink_ref[...], self.peak.shape)
        self.weight[...] = jnp.zeros_like(self.weight)
        self.total[...] = jnp.zeros_like(self.total)

    def visit(self, keys, bias, *, is_transposed: bool = False):
        """Keys [S, H], or [H, S], with bias [1, S]: zero where wanted, else very low."""
        channels = 0 if is_transposed else 1
        scores = self.scale * _dot(self.q_ref[...], keys, channels) + bias
        old = self.peak[:, :1]
        peak = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
        p = jnp.exp2(scores - peak)
        decay = jnp.exp2(old - peak)
        self.weight[...] = decay * self.weight[...] + _fold_lanes(p)
        self.total[...] = decay * self.total[...] + _dot(p.astype(keys.dtype), keys, 1 - channels)
        self.peak[...] = jnp.broadcast_to(peak, self.peak.shape)

    def visit_ring(self, ring_ref, num_written):
        """The ring, of which so many rows are written."""
        is_packed = ring_ref.dtype == jnp.uint32
        if is_packed:
            keys = tpu_packed.keys_of_columns(ring_ref, self.q_ref.dtype)
        else:
            keys = ring_ref[...]
        size = keys.shape[1 if is_packed else 0]
        self.visit(keys, _below(num_written, size), is_transposed=is_packed)

    def finish(self, out_ref):
        """Divides by the denominator, the sink's share included."""
        weight = jnp.sum(self.weight[...], axis=1, keepdims=True)
        weight += jnp.exp2(self.sink_ref[...] - self.peak[:, :1])
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


def _below(limit, size: int, start=0):
    """[1, size] bias: zero for positions `start` + i below `limit`."""
    index = start + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
    return jnp.where(index < limit, 0.0, _LOWEST)


def _ring_kernel(ring_rows, q_ref, sink_ref, ring_ref, out_ref, *state, scale):
    softmax = _Softmax(q_ref, sink_ref, *state, scale=scale)
    softmax.start()
    softmax.visit_ring(ring_ref, ring_rows[pl.program_id(0)])
    softmax.finish(out_ref)


def _stream_kernel(
    ring_rows,  # [B] rows of the ring that are written
    wanted,  # [B] no wanted entry is beyond
    q_ref,  # [N, H]
    sink_ref,  # [N, 1]
    ring_ref,  # [C, H], or lines of words
    entries_ref,  # [block, H], or lines of words
    *refs,  # [1, K] indices if masked; out [N, H]; peak, weight, total; [S / 128, 128] if masked
    num_entries: int,
    scale: float,
    is_packed: bool,
    masked: bool = False,
):
    indices_ref: Any = refs[0] if masked else None
    out_ref, *state = refs[1:] if masked else refs
    mask_ref: Any = state.pop() if masked else None
    b, k = pl.program_id(0), pl.program_id(1)
    block = entries_ref.shape[0]
    if is_packed:
        block = block // tpu_packed.WORDS * LANES
    softmax = _Softmax(q_ref, sink_ref, *state, scale=scale)

    @pl.when(k == 0)
    def _():
        softmax.start()
        softmax.visit_ring(ring_ref, ring_rows[b])
        if masked:
            mask_ref[...] = _mask_of(indices_ref[...], mask_ref.shape[0])

    @pl.when(k * block < wanted[b])
    def _():
        if is_packed:
            keys = tpu_packed.keys_of_columns(entries_ref, q_ref.dtype)
        else:
            keys = entries_ref[...]
        if num_entries % block:  # what lies behind the last entry is no number
            row = k * block + jax.lax.broadcasted_iota(jnp.int32, keys.shape, int(is_packed))
            keys = jnp.where(row < num_entries, keys, jnp.zeros_like(keys))
        if masked:
            rows = mask_ref[pl.ds(pl.multiple_of(k * (block // LANES), 8), block // LANES)]
            bias = jnp.concatenate([rows[j : j + 1] for j in range(block // LANES)], axis=1)
        else:
            bias = _below(wanted[b], block, k * block)
        softmax.visit(keys, bias, is_transposed=is_packed)

    @pl.when(k == pl.num_programs(1) - 1)
    def _():
        softmax.finish(out_ref)


def _mask_of(indices, num_words: int):
    """[1, K] indices -> bias [S / 128, 128]: zero for the entries among them."""
    word = jax.lax.broadcasted_iota(jnp.int32, (num_words, indices.shape[1]), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (LANES, indices.shape[1]), 0)
    words, lanes = (
        jnp.where(place == index, 1.0, 0.0).astype(jnp.bfloat16)
        for place, index in ((word, indices >> 7), (lane, indices & (LANES - 1)))
    )
    return jnp.where(_dot(words, lanes, 1) > 0, 0.0, _LOWEST)


def _gather_kernel(
    ring_rows,  # [B]
    q_ref,  # [N, H]
    sink_ref,  # [N, 1]
    ring_ref,  # [C, H], or lines of words
    entries_ref,  # [B, S, H] in HBM, or lines of words
    copies_ref,  # [K] in SMEM: the group of rows, or the line, that each copy begins with
    picked_ref,  # [1, group * K] bias: zero for the row of each copy that was picked
    *refs,  # [1, K] the first word of each row if packed; out [N, H]; peak, weight, total;
    #         [K / unroll, unroll * lines, H] 32-bit words; a semaphore per 128 copies
    scale: float,
    is_packed: bool,
):
    offset_ref: Any = refs[0] if is_packed else None
    out_ref, *state, rows_ref, arrived = refs[1:] if is_packed else refs
    b = pl.program_id(0)
    source = (entries_ref if is_packed else entries_ref.bitcast(jnp.uint32)).at[b]
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

    softmax = _Softmax(q_ref, sink_ref, *state, scale=scale)
    softmax.start()
    softmax.visit_ring(ring_ref, ring_rows[b])
    group = picked_ref.shape[1] // copies_ref.shape[0]
    for c in range(arrived.shape[0]):
        part = rows_ref.at[pl.ds(c * turns, turns)]
        pltpu.make_async_copy(part, part, arrived.at[c]).wait()
        if is_packed:
            found = [
                part[:, pl.ds(line, GATHER_UNROLL, stride=lines)].reshape(LANES, LANES)
                for line in range(lines)
            ]
            offset = offset_ref[:, pl.ds(c * LANES, LANES)]
            offset = jnp.transpose(jnp.broadcast_to(offset, (LANES, LANES)))
            keys = tpu_packed.keys_of_copies(found, offset, q_ref.dtype)
        else:
            words = part[...].reshape(LANES, rows_ref.shape[2])
            keys = pltpu.bitcast(words, entries_ref.dtype)
        softmax.visit(keys, picked_ref[:, pl.ds(c * LANES * group, LANES * group)])
    softmax.finish(out_ref)
