"""Prefill and training attention on TPU: layout of the kernels' arguments, and the gradient rule.

Queries are padded to whole blocks, heads to a power of two, entries to whole blocks. For each block
of queries a table says how many blocks of entries any of them attends to, for each block of keys
which blocks of queries may attend to it. Entries in pages are put side by side first.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import block_sizes, tpu_backward, tpu_packed, tpu_prefill
from pallas_kernels.formats import tpu_rows
from pallas_kernels.formats.pages import Pages
from pallas_kernels.residuals import ATTENDED
from pallas_kernels.selection import num_reached


def unsupported(q: jax.Array, window: jax.Array, entries_dtype) -> str | None:
    """Why the kernels cannot take these arguments, None if they can."""
    if not q.dtype == window.dtype == entries_dtype:
        return f"q, window and entries have dtypes {q.dtype}, {window.dtype} and {entries_dtype}"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernel takes bfloat16 and float32, not {q.dtype}"
    if not q.size:
        return f"q {q.shape} is empty"
    if q.shape[2] > 128:
        return f"the kernel takes up to 128 heads, not {q.shape[2]}"
    return None


def attention(q, window, entries, bits, sink, positions, written=None, *, ratio, scale, interpret):
    """See `ops.py`. `bits` (`selection.py`) select entries; None attends to every visible one."""
    num_heads = q.shape[2]
    padding = max(8, 1 << (num_heads - 1).bit_length()) - num_heads
    q = jnp.pad(q, [(0, 0), (0, 0), (0, padding), (0, 0)])
    sink = jnp.pad(sink, (0, padding))
    if not entries.shape[1]:
        entries = bits = None
    elif isinstance(entries, Pages):
        if bits is None:
            wanted = jnp.minimum((positions[:, -1] + 1) // ratio, entries.shape[1])
        else:
            wanted = num_reached(bits)
        wanted = wanted if written is None else jnp.minimum(wanted, written)
        unpack = tpu_packed.unpacker(entries.pool)
        entries = tpu_rows.float_rows(entries, wanted, unpack, q.dtype, interpret=interpret)
    out, lse = _attention(q, window, entries, sink, bits, positions[:, 0], ratio, scale, interpret)
    return out[:, :, :num_heads], lse[:, :, :num_heads]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(q, window, entries, sink, bits, start, ratio, scale, interpret):
    return _fwd(q, window, entries, sink, bits, start, ratio, scale, interpret)[0]


def _fwd(q, window, entries, sink, bits, start, ratio, scale, interpret):
    layout = _Layout(q, window, entries, ratio, block_sizes.forward)
    out, lse = tpu_prefill.forward(
        layout.rows(q),
        layout.band(window),
        layout.entries(entries),
        layout.bits(bits),
        sink,
        start,
        layout.counts(bits, start),
        **layout.static(scale, interpret),
    )
    out, lse = layout.unrows(out), lse[:, : layout.num_queries]
    out, lse = checkpoint_name(out, ATTENDED), checkpoint_name(lse, ATTENDED)
    return (out, lse), (q, window, entries, sink, bits, start, out, lse)


def _bwd(ratio, scale, interpret, residuals, cotangents):
    q, window, entries, sink, bits, start, out, lse = residuals
    d_out, d_lse = cotangents
    layout = _Layout(q, window, entries, ratio, block_sizes.backward)
    static = layout.static(scale, interpret)
    # d score = p * (d_out . key - delta), for scores in the denominator; the sink has no key.
    delta = jnp.einsum("btnh,btnh->btn", out, d_out, preferred_element_type=jnp.float32) - d_lse
    q, d_out = layout.rows(q), layout.rows(d_out)
    lse_p, delta_p = layout.pad(lse), layout.pad(delta)
    counts, band = layout.counts(bits, start), layout.band(window)
    padded = layout.entries(entries)
    d_q = tpu_backward.query_gradient(
        q, d_out, lse_p, delta_p, band, padded, layout.bits(bits), start, counts, **static
    )
    stats = jnp.stack([x.reshape(q.shape[0], counts.shape[1], -1) for x in (lse_p, delta_p)], 2)

    def key_gradient(keys, bits, ranges, size):
        options = static | dict(size=size)
        # Flat, since scalar memory holds the last axis in 128s: two numbers would take as much.
        return tpu_backward.key_gradient(
            q, d_out, stats, keys, bits, start, ranges.reshape(-1), **options
        )

    ranges = layout.window_ranges(q.shape[0], band.shape[1])
    d_window = key_gradient(band, None, ranges, layout.size)[:, : window.shape[1]]
    d_entries = None
    if entries is not None:
        d_entries = key_gradient(padded, layout.transposed(bits), layout.ranges(counts), None)
        d_entries = d_entries[:, : entries.shape[1]]
    d_sink = -jnp.sum(jnp.exp(sink - lse) * delta, axis=(0, 1)).astype(sink.dtype)
    return layout.unrows(d_q), d_window, d_entries, d_sink, None, None


_attention.defvjp(_fwd, _bwd)


class _Layout:
    """Arguments in whole blocks, and which blocks meet."""

    def __init__(self, q, window, entries, ratio, choose_blocks):
        self.batch, self.num_queries, self.num_heads, self.width = q.shape
        self.size, self.ratio = window.shape[1] - q.shape[1], ratio
        self.num_entries = 0 if entries is None else entries.shape[1]
        self.blocks = choose_blocks(self.num_queries, self.num_heads, self.num_entries)
        self.num_blocks = -(-self.num_queries // self.blocks.queries)
        self.num_entry_blocks = -(-self.num_entries // self.blocks.entries)

    def static(self, scale, interpret):
        return dict(
            num_heads=self.num_heads,
            size=self.size,
            num_entries=self.num_entries,
            ratio=self.ratio,
            scale=scale,
            blocks=self.blocks,
            interpret=interpret,
        )

    def pad(self, x, rows: int | None = None):
        """x [B, T, ...] with zeros up to `rows`, by default whole blocks of queries."""
        rows = self.num_blocks * self.blocks.queries if rows is None else rows
        padding = rows - x.shape[1]
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) if padding else x

    def rows(self, x):  # [B, T, N, H] -> [B, T * N, H]
        return self.pad(x).reshape(self.batch, -1, self.width)

    def unrows(self, x):
        x = x.reshape(self.batch, -1, self.num_heads, self.width)
        return x[:, : self.num_queries]

    def band(self, window):
        """As far as the last block of queries reaches, in whole blocks of the gradient."""
        last = (self.num_blocks - 1) * self.blocks.queries
        rows = last + tpu_prefill.band_size(self.size, self.blocks)
        return self.pad(window, -(-rows // block_sizes.WINDOW_ROWS) * block_sizes.WINDOW_ROWS)

    def entries(self, entries):
        if entries is None:
            return None
        return self.pad(entries, self.num_entry_blocks * self.blocks.entries)

    def bits(self, bits):  # [B, T, W, 128] -> [B, T, W * 128]
        return None if bits is None else self.pad(bits).reshape(self.batch, -1, bits.shape[2] * 128)

    def transposed(self, bits):
        """[B, T, W, 128] -> [B, T / 32, 1, W * 4096] int32: bit t % 32 of word [t // 32, s]."""
        if bits is None:
            return None
        rows = -(-self.num_blocks * self.blocks.queries // 32) * 32
        words = self.pad(bits, rows).reshape(self.batch, rows // 32, 32, -1, 1, 128)
        entry_bit = jnp.arange(32, dtype=jnp.uint32)[:, None]
        query_bit = jnp.arange(32, dtype=jnp.uint32)[:, None, None, None]
        planes = ((words >> entry_bit) & 1) << query_bit  # [B, T / 32, 32, W, 32, 128]
        turned = jnp.sum(planes, axis=2, dtype=jnp.uint32)
        turned = jax.lax.bitcast_convert_type(turned, jnp.int32)
        return turned.reshape(self.batch, rows // 32, 1, -1)

    def counts(self, bits, start):
        """[B, num_blocks] blocks of entries up to the last one that a block of queries visits."""
        if not self.num_entries:
            return jnp.zeros((self.batch, self.num_blocks), jnp.int32)
        if bits is None:
            last = (jnp.arange(self.num_blocks, dtype=jnp.int32) + 1) * self.blocks.queries
            last = start[:, None] + jnp.minimum(last, self.num_queries)
            needed = jnp.minimum(last // self.ratio, self.num_entries)
        else:
            blocks = self.pad(bits).reshape(self.batch, self.num_blocks, -1, bits.shape[2], 128)
            used = jax.lax.reduce(blocks, jnp.uint32(0), jax.lax.bitwise_or, (2, 4))
            last = 32 - jax.lax.clz(used).astype(jnp.int32)  # of the 32 groups of 128
            group = jnp.arange(bits.shape[2], dtype=jnp.int32) * 32 + last
            needed = 128 * jnp.max(jnp.where(last > 0, group, 0), axis=-1)
        return -(-needed // self.blocks.entries)

    def ranges(self, counts):
        """[B, entry blocks, 2]: from the first to the last block of queries that visits one."""
        block = jnp.arange(self.num_entry_blocks, dtype=jnp.int32)
        visits = counts[:, None, :] > block[:, None]  # [B, entry blocks, num_blocks]
        index = jnp.arange(self.num_blocks, dtype=jnp.int32)
        first = jnp.min(jnp.where(visits, index, self.num_blocks), axis=-1)
        end = jnp.max(jnp.where(visits, index + 1, 0), axis=-1)
        return jnp.stack([first, end], axis=-1)

    def window_ranges(self, batch, num_rows):
        """[B, row blocks, 2]: queries r - size ... r - 1 see row r."""
        first = jnp.arange(0, num_rows, block_sizes.WINDOW_ROWS, dtype=jnp.int32)
        end = first + block_sizes.WINDOW_ROWS - 1  # one past the last query
        first = jnp.maximum(first - self.size, 0) // self.blocks.queries
        end = jnp.minimum(-(-end // self.blocks.queries), self.num_blocks)
        return jnp.broadcast_to(jnp.stack([first, end], axis=-1), (batch, len(end), 2))
