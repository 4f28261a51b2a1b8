"""Prefill and training on TPU: attention to the window, then to blocks of entries under a mask.

All heads share one key-value row, so a block of queries and its heads are the rows of one matrix:
[queries * N, H] against [entries, H], and the same tile of entries serves both products. A program
owns one block of queries. It takes the band of window rows its queries see, then streams the
blocks of entries any of them attends to (double-buffered copies from HBM; blocks after the last
such one are never read), under one running softmax in base 2:

    x = scale * log2(e) * <q, key>,  masked
    m' = max(m, max x);  p = 2^(x - m');  l' = 2^(m - m') l + sum p;  acc' = 2^(m - m') acc + p keys

What is saved over XLA: scores and probabilities never leave VMEM, and the two products of one
chunk of rows run beside the softmax of the next.

Grid: (batch, blocks of queries). Layout: q and out [B, T * N, H]; window rows as they are, block i
sees rows [i * queries, i * queries + band); bits [B, T, W * 128] as in `selection.py`; the sum of
p is kept lane by lane and reduced at the end. The log of the denominator leaves as [B, T, N].
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.block_sizes import Blocks
from pallas_kernels.selection import ENTRIES_PER_WORD_ROW

LOG2_E = 1.4426950408889634
MASKED = -1e30  # added to a score; far below any, and finite


def forward(
    q: jax.Array,  # [B, T * N, H]
    window: jax.Array,  # [B, C + T (+ padding), H]
    entries: jax.Array | None,  # [B, S, H]
    bits: jax.Array | None,  # [B, T, W * 128]
    sink: jax.Array,  # [N] float32
    start: jax.Array,  # [B] int32 position of the first query
    counts: jax.Array,  # [B, T / queries] int32 blocks of entries to visit
    *,
    num_heads: int,
    size: int,  # C
    num_entries: int,  # without padding
    ratio: int,
    scale: float,
    blocks: Blocks,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """out [B, T * N, H] and log of the denominator [B, T, N]. T is a multiple of the block."""
    batch, num_rows, width = q.shape
    num_queries, rows = num_rows // num_heads, blocks.queries * num_heads
    band = band_size(size, blocks)
    mine = pl.BlockSpec((1, rows, width), lambda b, i, *_: (b, i, 0))
    in_specs = [mine, band_spec(band, width, blocks)]
    args = [q, window]
    is_streamed = entries is not None and entries.shape[1] > blocks.entries
    if entries is not None:
        in_specs.append(pl.BlockSpec((1, blocks.entries, width), lambda b, i, *_: (b, 0, 0)))
        args.append(entries)
    if is_streamed:
        in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
        assert entries is not None
        args.append(in_hbm(entries, interpret))
    if bits is not None:
        in_specs.append(bits_spec(bits, blocks))
        args.append(bits)
    in_specs.append(pl.BlockSpec((num_heads, 128), lambda b, i, *_: (0, 0)))
    args.append(jnp.broadcast_to(LOG2_E * sink.astype(jnp.float32)[:, None], (num_heads, 128)))
    kernel = functools.partial(
        _kernel,
        mask=Mask(num_heads, size, band, num_entries, ratio, blocks),
        scale=scale,
        has_entries=entries is not None,
        is_streamed=is_streamed,
        has_bits=bits is not None,
    )
    keys_per_query = band + (0 if entries is None else entries.shape[1])
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_queries // blocks.queries),
            in_specs=in_specs,
            out_specs=[
                mine,
                pl.BlockSpec((1, blocks.queries, num_heads), lambda b, i, *_: (b, i, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((rows, 128), jnp.float32),
                pltpu.VMEM((rows, 128), jnp.float32),
                pltpu.VMEM((rows, width), jnp.float32),
                *stream_scratch(entries if is_streamed else None, blocks),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_queries, num_heads), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=blocks.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * num_rows * keys_per_query * width,
            bytes_accessed=2 * q.size * q.dtype.itemsize,
            transcendentals=batch * num_rows * keys_per_query,
        ),
        interpret=interpret,
        name="attention_forward",
    )(start, counts, *args)


def _kernel(
    start_ref,
    counts_ref,
    q_ref,
    window_ref,
    *all_refs,
    mask,
    scale,
    has_entries,
    is_streamed,
    has_bits,
):
    refs = list(all_refs)
    first_entries_ref: Any = refs.pop(0) if has_entries else None
    entries_ref = refs.pop(0) if is_streamed else None
    bits_ref = refs.pop(0) if has_bits else None
    sink_ref, out_ref, lse_ref, peak, weight, total, *stream = refs
    b, i = pl.program_id(0), pl.program_id(1)
    first = start_ref[b] + i * mask.blocks.queries
    num_chunks, rows = mask.blocks.queries // mask.blocks.chunk, mask.chunk_rows

    def visit(parts, *, is_first: bool):
        """Parts (keys, bias): the scores of chunk r + 1 are formed beside the softmax of r."""

        def scores(r):
            q = q_ref[0, r * rows : (r + 1) * rows]
            return [dot(q, keys, "nt") for keys, _ in parts]

        following = scores(0)
        for r in range(num_chunks):
            formed, following = following, scores(r + 1) if r + 1 < num_chunks else None
            mine = slice(r * rows, (r + 1) * rows)
            added = [mask.add(scale * LOG2_E * x, bias(r)) for x, (_, bias) in zip(formed, parts)]
            s = added[0] if len(added) == 1 else jnp.concatenate(added, axis=1)
            old = mask.per_head(sink_ref[...]) if is_first else peak[mine]
            new = jnp.maximum(old, jnp.max(fold_lanes(s, jnp.maximum), axis=1, keepdims=True))
            p = jnp.exp2(s - repeat_lanes(new, s.shape[1]))
            product: Any = 0.0
            at = 0
            for keys, _ in parts:
                product += dot(p[:, at : at + keys.shape[0]].astype(keys.dtype), keys, "nn")
                at += keys.shape[0]
            if is_first:
                weight[mine] = fold_lanes(p, jnp.add)
                total[mine] = product
            else:
                fade = jnp.exp2(old - new)
                weight[mine] = fade * weight[mine] + fold_lanes(p, jnp.add)
                total[mine] = repeat_lanes(fade, product.shape[1]) * total[mine] + product
            peak[mine] = new

    def entries(k, keys):
        return keys, lambda r: mask.entries(r, k, first, bits_ref)

    def visit_first():
        window = window_ref[0], lambda r: mask.window(r, first)
        visit(
            [window, *([entries(jnp.int32(0), first_entries_ref[0])] if has_entries else [])],
            is_first=True,
        )

    if is_streamed:

        def visit_entries(k, keys):
            visit([entries(k, keys)], is_first=False)

        stream_entries(entries_ref, b, 1, counts_ref[b, i], stream, visit_first, visit_entries)
    else:
        visit_first()

    for r in range(num_chunks):
        mine = slice(r * rows, (r + 1) * rows)
        denominator = jnp.sum(weight[mine], axis=1, keepdims=True)
        denominator += jnp.exp2(mask.per_head(sink_ref[...]) - peak[mine])  # in all lanes
        inverse = repeat_lanes(1.0 / denominator, total.shape[1])
        out_ref[0, mine] = (inverse * total[mine]).astype(out_ref.dtype)
        lse = (peak[mine] + jnp.log2(denominator)) / LOG2_E
        queries = slice(r * mask.blocks.chunk, (r + 1) * mask.blocks.chunk)
        lse_ref[0, queries] = mask.heads_to_lanes(lse)


class Mask:
    """What a chunk of queries sees, as a bias [chunk, keys] of 0 and `MASKED`."""

    def __init__(self, num_heads, size, band, num_entries, ratio, blocks):
        self.num_heads, self.size, self.band = num_heads, size, band
        self.num_entries, self.ratio, self.blocks = num_entries, ratio, blocks

    @property
    def chunk_rows(self) -> int:
        """Rows of query and head of a chunk."""
        return self.blocks.chunk * self.num_heads

    def window(self, r, first):
        """The query's own row and the size - 1 before it, as far as there are any."""
        query, column = self._iotas(r, self.band)
        age = query + self.size - column
        return _bias((age >= 0) & (age < self.size) & (age <= first + query))

    def entries(self, r, k, first, bits_ref):
        """Those whose bit is set, or those whose last token is not after the query."""
        entries = self.blocks.entries
        if bits_ref is None:
            query, column = self._iotas(r, entries)
            visible = jnp.minimum((first + query + 1) // self.ratio, self.num_entries)
            return _bias(column + k * entries < visible)
        chunk = self.blocks.chunk
        words = entry_words(bits_ref, slice(r * chunk, (r + 1) * chunk), k, entries)
        return _bias(jnp.concatenate([(w & 1) != 0 for w in words], axis=1))

    def add(self, s, bias):
        """s [chunk * N, keys] + bias [chunk, keys]."""
        split = s.reshape(self.blocks.chunk, self.num_heads, -1)
        return (split + bias[:, None, :]).reshape(s.shape)

    def per_head(self, x):
        """[N, 128] -> [chunk * N, 128]."""
        return jnp.broadcast_to(x[None], (self.blocks.chunk, *x.shape)).reshape(-1, x.shape[1])

    def heads_to_lanes(self, x):
        """[chunk * N, 128], all lanes alike -> [chunk, N]: head n from lane n of its row."""
        split = x.reshape(self.blocks.chunk, self.num_heads, 128)
        head, lane = (jax.lax.broadcasted_iota(jnp.int32, split.shape, axis) for axis in (1, 2))
        return jnp.sum(jnp.where(head == lane, split, 0.0), axis=1)[:, : self.num_heads]

    def _iotas(self, r, keys):
        query = jax.lax.broadcasted_iota(jnp.int32, (self.blocks.chunk, keys), 0)
        column = jax.lax.broadcasted_iota(jnp.int32, (self.blocks.chunk, keys), 1)
        return query + r * self.blocks.chunk, column


def _bias(visible):
    return jnp.where(visible, 0.0, MASKED)


def entry_words(bits_ref, queries: slice, k, entries: int):
    """Words [queries, 128] whose lowest bits are the mask of 128 entries each, of block k."""
    lane = pl.multiple_of(k * entries // ENTRIES_PER_WORD_ROW * 128, 128)
    words = bits_ref[0, queries, pl.ds(lane, 128)]
    bit = (k * (entries // 128)) % 32
    return [words >> (bit + j).astype(jnp.uint32) for j in range(entries // 128)]


def band_size(size: int, blocks: Blocks) -> int:
    """Window rows that a block of queries sees, in whole tiles."""
    return -(-(size + blocks.queries) // 128) * 128


def band_spec(band: int, width: int, blocks: Blocks) -> pl.BlockSpec:
    """Overlapping blocks of the window: one begins where its first query's rows do."""
    shape = (pl.Element(1), pl.Element(band), pl.Element(width))
    return pl.BlockSpec(shape, lambda b, i, *_: (b, i * blocks.queries, 0))


def bits_spec(bits: jax.Array, blocks: Blocks) -> pl.BlockSpec:
    """All words of a block of queries."""
    return pl.BlockSpec((1, blocks.queries, bits.shape[2]), lambda b, i, *_: (b, i, 0))


def stream_scratch(entries: jax.Array | None, blocks: Blocks) -> list:
    """Two buffers and their semaphores for `stream_entries`."""
    if entries is None:
        return []
    shape = (2, blocks.entries, entries.shape[2])
    return [pltpu.VMEM(shape, entries.dtype), pltpu.SemaphoreType.DMA((2,))]


def in_hbm(entries: jax.Array, interpret: bool) -> jax.Array:
    """Keeps XLA from moving entries to VMEM: copies from there would take the vector unit."""
    return entries if interpret else pltpu.with_memory_space_constraint(entries, pltpu.HBM)


def stream_entries(entries_ref, b, begin, end, scratch, before, visit):
    """`before()`, then `visit(k, keys)` for blocks `begin` to `end`, each copied in time."""
    buffer, semaphore = scratch
    size = buffer.shape[1]

    def copy(k):
        rows = entries_ref.at[b, pl.ds(k * size, size)]
        return pltpu.make_async_copy(rows, buffer.at[k % 2], semaphore.at[k % 2])

    pl.when(begin < end)(lambda: copy(begin).start())
    before()

    def body(k, _):
        copy(k).wait()
        pl.when(k + 1 < end)(lambda: copy(k + 1).start())
        visit(k, buffer[k % 2])

    jax.lax.fori_loop(begin, end, body, None)


def dot(a, b, form: str):
    """a @ b ("nn") or a @ b.T ("nt"), accumulated in float32."""
    contract = {"nn": ((1,), (0,)), "nt": ((1,), (1,))}[form]
    return jax.lax.dot_general(
        *(a, b, (contract, ((), ()))),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def fold_lanes(x, op):
    """[rows, keys] -> [rows, 128] by `op` over blocks of 128 lanes."""
    return functools.reduce(op, [x[:, j : j + 128] for j in range(0, x.shape[1], 128)])


def repeat_lanes(x, width: int):
    """[rows, 128], all lanes alike -> [rows, width]."""
    return jnp.concatenate([x] * -(-width // 128), axis=1)[:, :width]
