"""Blockwise attention in plain XLA: memory linear in the number of queries.

Queries are taken in blocks of `BLOCK_QUERIES`. A block sees a band of `C + block` window rows, and
then either its selected entries (gathered, [block, K, H]) or all visible entries in chunks of
`BLOCK_ENTRIES` under a running softmax; chunks no query of the block can see are not visited.
Queries of several documents in a row see entries from the `first` of their own on.

Entries in pages stay there: what a step of these loops takes is looked up and, if packed, unpacked in
it. So memory is that of a block, whatever the table has room for. Packed rows to pick from are unpacked
beforehand where they are no more than the rows that one block picks, which takes no more memory.

The backward pass saves only `out` and the log-sum-exp, and recomputes probabilities block by block
(FlashAttention, arXiv 2205.14135). Keys are values, so both gradients of a row go to one buffer.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.formats.pages import PAGE, Pages
from pallas_kernels.formats.quantize import cast
from pallas_kernels.residuals import ATTENDED

BLOCK_QUERIES = 128
BLOCK_ENTRIES = 512
_LOWEST = -1e30


def attention(
    q, window, entries, indices, sink, positions, first, written=None, *, ratio: int, scale: float
):
    """See `ops.py`. `indices` [B, T, K] selects entries; None attends to every visible one."""
    if indices is not None and not indices.shape[2]:  # nothing to gather
        entries, indices = window[:, :0], None
    if isinstance(entries, Pages):  # which have no gradient
        is_packed = not isinstance(entries.pool, jax.Array)
        picked = 0 if indices is None else min(BLOCK_QUERIES, q.shape[1]) * indices.shape[2]
        if is_packed and entries.shape[1] <= picked:
            entries = Pages.of(entries.floats(window.dtype))
        args = (q, window, entries, sink, indices, positions, first, ratio, scale)
        return _forward(*args, written)
    return _attention(q, window, entries, sink, indices, positions, first, ratio, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attention(q, window, entries, sink, indices, positions, first, ratio, scale):
    return _forward(q, window, entries, sink, indices, positions, first, ratio, scale)


def _forward(q, window, entries, sink, indices, positions, first, ratio, scale, written=None):
    grid = _Grid(q, window)
    q_p, positions_p, indices_p = map(grid.pad_queries, (q, positions, indices))
    first_p = grid.pad_queries(first)
    window_p = grid.pad_rows(window)

    def block(i):
        q_i, pos_i = grid.queries(q_p, i), grid.queries(positions_p, i)
        rows = grid.band(window_p, i)
        scores = scale * einsum_f32("btnh,bsh->btns", q_i, rows)
        near = _Part(jnp.where(grid.near(pos_i)[:, :, None], scores, _LOWEST), rows, "bsh")
        if indices is not None:
            indices_i = grid.queries(indices_p, i)
            rows = _picked(entries, indices_i, window.dtype)  # [B, t, K, H]
            scores = scale * einsum_f32("btnh,btsh->btns", q_i, rows)
            scores = jnp.where(indices_i[:, :, None] >= 0, scores, _LOWEST)
            state = _Softmax.of(near, _Part(scores, rows, "btsh"))
        elif entries.shape[1]:
            chunks = _Chunks(entries.shape[1], pos_i, ratio, grid.queries(first_p, i), written)
            state = _visible(near, q_i, entries, chunks, scale, window.dtype)
        else:
            state = _Softmax.of(near)
        return state.finish(sink, q.dtype)

    out, lse = jax.lax.map(block, jnp.arange(grid.num_blocks))
    return grid.join(out), grid.join(lse)


def _visible(near, q_i, entries, chunks, scale, dtype):
    """The window with the first chunk of entries, then the other chunks one by one."""
    begin = chunks.begin
    if isinstance(entries, Pages):
        read = functools.partial(chunks.rows_of_pages, chunks.pad_table(entries), dtype)
    else:
        read = functools.partial(chunks.rows, chunks.pad(entries))

    def part(c):
        rows = read(c)
        scores = scale * einsum_f32("btnh,bsh->btns", q_i, rows)
        return _Part(jnp.where(chunks.visible(c)[:, :, None], scores, _LOWEST), rows, "bsh")

    def chunk(c, state):
        return state.join(_Softmax.of(part(c)))

    return jax.lax.fori_loop(begin + 1, chunks.count, chunk, _Softmax.of(near, part(begin)))


def _fwd(q, window, entries, sink, indices, positions, first, ratio, scale):
    out, lse = _forward(q, window, entries, sink, indices, positions, first, ratio, scale)
    out, lse = checkpoint_name(out, ATTENDED), checkpoint_name(lse, ATTENDED)
    return (out, lse), (q, window, entries, sink, indices, positions, first, out, lse)


def _bwd(ratio, scale, residuals, cotangents):
    q, window, entries, sink, indices, positions, first, out, lse = residuals
    d_out, d_lse = cotangents
    grid = _Grid(q, window)
    # d score = p * (d_out . key - delta), for scores in the denominator; the sink has no key.
    delta = jnp.einsum(
        "btnh,btnh->btn", out, d_out, preferred_element_type=jnp.float32
    ) - d_lse.astype(jnp.float32)
    q_p, positions_p, indices_p, d_out_p, lse_p, delta_p = map(
        grid.pad_queries, (q, positions, indices, d_out, lse, delta)
    )
    window_p, first_p = grid.pad_rows(window), grid.pad_queries(first)

    def block(carry, i):
        d_window, d_entries = carry
        q_i, pos_i, d_out_i, lse_i, delta_i = (
            grid.queries(x, i) for x in (q_p, positions_p, d_out_p, lse_p, delta_p)
        )

        def grads(rows, visible, keys: str):
            """d_q and d_rows through the scores against `rows`, indexed `keys` in einsums."""
            scores = scale * einsum_f32(f"btnh,{keys}->btns", q_i, rows)
            p = jnp.where(visible, jnp.exp(scores - lse_i[..., None]), 0.0)
            dp = einsum_f32(f"btnh,{keys}->btns", d_out_i, rows)
            ds = (scale * p * (dp - delta_i[..., None])).astype(q.dtype)
            d_q = einsum_f32(f"btns,{keys}->btnh", ds, rows)
            d_rows = einsum_f32(f"btns,btnh->{keys}", ds, q_i)
            return d_q, d_rows + einsum_f32(f"btns,btnh->{keys}", p.astype(q.dtype), d_out_i)

        d_q, d_band = grads(grid.band(window_p, i), grid.near(pos_i)[:, :, None], "bsh")
        d_window = grid.add_to_band(d_window, d_band, i)
        if indices is not None:
            indices_i = grid.queries(indices_p, i)
            rows = gather_rows(entries, indices_i)
            d_q_c, d_rows = grads(rows, indices_i[:, :, None] >= 0, "btsh")
            d_q += d_q_c
            d_entries = _scatter_add(d_entries, indices_i, d_rows)
        elif entries.shape[1]:
            chunks = _Chunks(entries.shape[1], pos_i, ratio, grid.queries(first_p, i))
            padded = chunks.pad(entries)

            def chunk(c, carry):
                d_q, d_entries = carry
                rows = chunks.rows(padded, c)
                d_q_c, d_rows = grads(rows, chunks.visible(c)[:, :, None], "bsh")
                return d_q + d_q_c, chunks.add(d_entries, d_rows, c)

            d_q, d_entries = jax.lax.fori_loop(chunks.begin, chunks.count, chunk, (d_q, d_entries))
        return (d_window, d_entries), d_q.astype(q.dtype)

    num_entries = entries.shape[1]
    if indices is None and num_entries:
        num_entries = _Chunks.padded_size(num_entries)
    carry = (
        jnp.zeros(window_p.shape, jnp.float32),
        jnp.zeros((entries.shape[0], num_entries, entries.shape[2]), jnp.float32),
    )
    (d_window, d_entries), d_q = jax.lax.scan(block, carry, jnp.arange(grid.num_blocks))
    return (
        grid.join(d_q),
        d_window[:, : window.shape[1]].astype(window.dtype),
        d_entries[:, : entries.shape[1]].astype(entries.dtype),
        -jnp.sum(jnp.exp(sink - lse) * delta, axis=(0, 1)).astype(sink.dtype),
        None,
        None,
        None,
    )


_attention.defvjp(_fwd, _bwd)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some of the rows a block attends to: scores [B, t, N, S] and the rows, as keys and values."""

    scores: jax.Array
    rows: jax.Array
    axes: str  # of rows, in einsums


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["peak", "weight", "total"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class _Softmax:
    """A softmax over some rows: sums relative to their largest score."""

    peak: jax.Array  # [B, t, N]
    weight: jax.Array  # [B, t, N]
    total: jax.Array  # [B, t, N, H]

    @staticmethod
    def of(*parts: _Part) -> "_Softmax":
        peak = functools.reduce(jnp.maximum, [jnp.max(p.scores, axis=-1) for p in parts])
        weight: Any = 0.0
        total: Any = 0.0
        for part in parts:
            p = jnp.exp(part.scores - peak[..., None])
            weight += jnp.sum(p, axis=-1)
            total += einsum_f32(f"btns,{part.axes}->btnh", p.astype(part.rows.dtype), part.rows)
        return _Softmax(peak, weight, total)

    def join(self, other: "_Softmax") -> "_Softmax":
        peak = jnp.maximum(self.peak, other.peak)
        mine, theirs = jnp.exp(self.peak - peak), jnp.exp(other.peak - peak)
        return _Softmax(
            peak,
            mine * self.weight + theirs * other.weight,
            mine[..., None] * self.total + theirs[..., None] * other.total,
        )

    def finish(self, sink, dtype):
        """Output and log of the denominator, the sink (a key without a value) included."""
        sink = sink.astype(jnp.float32)
        weight = self.weight + jnp.exp(sink - self.peak)
        lse = jnp.logaddexp(self.peak + jnp.log(self.weight), sink)
        return cast(self.total / weight[..., None], dtype), lse


class _Grid:
    """Blocks of queries, and the band of window rows each of them sees."""

    def __init__(self, q, window):
        self.num_queries = q.shape[1]
        self.size = window.shape[1] - q.shape[1]
        self.block = min(BLOCK_QUERIES, self.num_queries)
        self.num_blocks = -(-self.num_queries // self.block)
        self.padding = self.num_blocks * self.block - self.num_queries

    def pad_queries(self, x):
        return None if x is None else _pad_axis1(x, self.padding)

    pad_rows = pad_queries

    def queries(self, x, i):
        return (
            None
            if x is None
            else jax.lax.dynamic_slice_in_dim(x, i * self.block, self.block, axis=1)
        )

    def band(self, window, i):
        size = self.size + self.block
        return jax.lax.dynamic_slice_in_dim(window, i * self.block, size, axis=1)

    def add_to_band(self, d_window, d_band, i):
        total = self.band(d_window, i) + d_band
        return jax.lax.dynamic_update_slice_in_dim(d_window, total, i * self.block, axis=1)

    def near(self, positions_i):  # [B, t] -> [B, t, C + t]
        age = jnp.arange(self.block)[:, None] + self.size - jnp.arange(self.size + self.block)
        return (age >= 0) & (age < self.size) & (age <= positions_i[..., None])

    def join(self, blocks):  # [num_blocks, B, block, ...] -> [B, T, ...]
        x = jnp.moveaxis(blocks, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.num_queries]


class _Chunks:
    """Chunks of compressed entries: `begin` .. `count` - 1 are those a query of a block can see."""

    def __init__(self, num_entries, positions_i, ratio, first_i, written=None):
        self.size = min(BLOCK_ENTRIES, num_entries)
        self.padding = -num_entries % self.size
        self.first, behind = first_i, (positions_i + 1) // ratio  # [B, t]
        self.begin: int | jax.Array = 0
        if first_i is not None:
            last_chunk = -(-num_entries // self.size) - 1
            self.begin = jnp.minimum(jnp.min(first_i) // self.size, last_chunk)
            behind += first_i
        self.end = jnp.minimum(behind, num_entries)
        if written is not None:
            self.end = jnp.minimum(self.end, written[:, None])
        self.count = -(-jnp.max(self.end) // self.size)

    @staticmethod
    def padded_size(num_entries):
        return num_entries + -num_entries % min(BLOCK_ENTRIES, num_entries)

    def pad(self, entries):
        return _pad_axis1(entries, self.padding)

    def rows(self, entries, c):
        return jax.lax.dynamic_slice_in_dim(entries, c * self.size, self.size, axis=1)

    def pad_table(self, entries: Pages) -> Pages:
        table = jnp.pad(entries.table, ((0, 0), (0, self.padding // PAGE)))
        return dataclasses.replace(entries, table=table)

    def rows_of_pages(self, entries: Pages, dtype, c):
        """Zeros behind the last that a query sees: a page may be another sequence's, and no number."""
        rows = entries.part(c * (self.size // PAGE), self.size // PAGE, dtype)
        index = c * self.size + jnp.arange(self.size)
        return jnp.where((index < jnp.max(self.end, axis=1)[:, None])[..., None], rows, 0)

    def add(self, d_entries, d_rows, c):
        total = self.rows(d_entries, c) + d_rows
        return jax.lax.dynamic_update_slice_in_dim(d_entries, total, c * self.size, axis=1)

    def visible(self, c):  # [B, t, size]
        index = c * self.size + jnp.arange(self.size)
        seen = index < self.end[..., None]
        return seen if self.first is None else seen & (index >= self.first[..., None])


def _pad_axis1(x, padding):
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) if padding else x


def gather_rows(entries, indices):
    """entries [B, S, H], indices [B, t, K] -> [B, t, K, H]; index -1 gives row 0."""
    return jax.vmap(lambda e, i: jnp.take(e, i, axis=0, mode="clip"))(entries, indices)


def _picked(entries, indices, dtype):
    """As `gather_rows`, of pages too: of these index -1 gives zeros, since row 0 may be no number."""
    if isinstance(entries, Pages):
        return jnp.where((indices >= 0)[..., None], entries.take(indices, dtype), 0)
    return gather_rows(entries, indices)


def _scatter_add(d_entries, indices, d_rows):
    """Adds rows to the entries they were gathered from; index -1 is dropped."""
    index = jnp.where(indices < 0, d_entries.shape[1], indices)
    return jax.vmap(lambda d, i, r: d.at[i].add(r, mode="drop"))(d_entries, index, d_rows)


def einsum_f32(subscripts, a, b):
    """A product accumulated in float32; exact-width multiplies when the operands are float32."""
    wide = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=wide, preferred_element_type=jnp.float32)


def selected_mass(q, entries, indices, log_denominator, *, scale: float):
    """See `ops.py`."""
    if not indices.shape[2]:
        return jnp.zeros(indices.shape, jnp.float32)
    grid = _Grid(q, q)
    padded = [grid.pad_queries(x) for x in (q, indices, log_denominator)]

    def block(i):
        q_i, indices_i, lse_i = (grid.queries(x, i) for x in padded)
        scores = scale * einsum_f32("btnh,btkh->btnk", q_i, gather_rows(entries, indices_i))
        p = jnp.exp(scores - lse_i[..., None])
        return jnp.sum(jnp.where(indices_i[:, :, None] >= 0, p, 0.0), axis=2)

    return grid.join(jax.lax.map(block, jnp.arange(grid.num_blocks)))
