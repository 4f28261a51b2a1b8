"""Rows of many sequences in one pool of pages, each sequence finding its own through a table.

A page is 128 rows: the lanes of a TPU, in groups of which `PackedColumns` and `PackedKeys` come, so in
every format a page is whole lines (W of packed columns or keys, 128 W / 128 = W of packed rows too).

    row s of sequence b   is   row  table[b, s // 128] * 128 + s % 128   of the pool

Pages are held by who makes the table; here nothing is known of which are free. A table may point to a
page that is nobody's where a sequence has no rows yet: rows past its length are not looked at.

The pool has a leading axis of 1, so that it is an ordinary array of rows [1, S, W], or a packed one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import chips, dispatch
from pallas_kernels.formats import packed_append
from pallas_kernels.formats.packed_rows import PackedColumns, PackedKeys, PackedRows

PAGE = 128  # rows
SMEM_KEPT = 64 << 10  # bytes of a TPU's memory of scalars that are not the table's
Rows = jax.Array | PackedRows | PackedColumns | PackedKeys  # [B, S, W]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["pool", "table"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Pages:
    """Rows [B, n * 128, W] of B sequences."""

    pool: Rows  # [1, P * 128, W]
    table: jax.Array  # [B, n] int32: page of the pool

    @staticmethod
    def of(rows: jax.Array) -> "Pages":
        """Float rows [B, S, W] as pages, each sequence's side by side, with zeros behind S."""
        rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % PAGE), (0, 0)))
        batch, length, width = rows.shape
        table = jnp.arange(batch * length // PAGE, dtype=jnp.int32).reshape(batch, -1)
        return Pages(rows.reshape(1, -1, width), table)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the rows: [B, n * 128, W]."""
        batch, pages = self.table.shape
        return batch, pages * PAGE, self.pool.shape[-1]

    @property
    def ndim(self) -> int:
        """3."""
        return len(self.shape)

    @property
    def num_pages(self) -> int:
        """P, of the pool."""
        return self.pool.shape[1] // PAGE

    def rows_of(self, indices: jax.Array) -> jax.Array:
        """Rows of the pool that rows [B, ...] of the sequences are; of -1 any."""
        indices = jnp.maximum(indices, 0)
        flat = indices.reshape(indices.shape[0], -1)
        page = jnp.take_along_axis(self.table, flat // PAGE, axis=1, mode="clip")
        return (page * PAGE + flat % PAGE).reshape(indices.shape)

    def take(self, indices: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Rows [B, K, W] by their indices [B, K] (-1: any), floats as they are, packed in `dtype`."""
        rows = self.rows_of(indices)
        if isinstance(self.pool, jax.Array):
            return jnp.take(self.pool[0], rows, axis=0, mode="clip")
        assert isinstance(self.pool, PackedRows)  # which are for picking
        return self.pool.take(rows.reshape(1, -1), dtype).reshape(*rows.shape, -1)

    def part(self, first: jax.Array, count: int, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Rows [B, count * 128, W] of pages `first` .. first + count - 1 of each sequence."""
        rows = self.rows_from(first, count)
        return rows if isinstance(rows, jax.Array) else rows.unpack(dtype)

    def rows_from(self, first: jax.Array, count: int) -> Rows:
        """The same in the format of the pool."""
        return self._gather(jax.lax.dynamic_slice_in_dim(self.table, first, count, axis=1))

    def contiguous(self) -> Rows:
        """All rows [B, n * 128, W] side by side, in the format of the pool."""
        return self._gather(self.table)

    def floats(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """All rows [B, n * 128, W] side by side: floats as they are, packed in `dtype`."""
        rows = self.contiguous()
        return rows if isinstance(rows, jax.Array) else rows.unpack(dtype)

    def replaced(self, content: Any) -> Rows:
        """The pool with other contents of all pages in the table, as `contiguous` gives them.

        Page 0 keeps what it has: tables point there for pages that are nobody's.
        """
        target = jnp.where(self.table > 0, self.table, self.num_pages).reshape(-1)
        pool: Any = self.pool
        if isinstance(pool, jax.Array):
            paged = pool.reshape(-1, PAGE, pool.shape[-1])
            new = content.reshape(-1, PAGE, pool.shape[-1])
            return paged.at[target].set(new, mode="drop").reshape(pool.shape)
        lines = content.data.reshape(-1, pool.num_words, content.data.shape[-1])
        new = self._lines().at[target].set(lines, mode="drop")
        used = jax.lax.dynamic_update_slice(pool.data, new.reshape(1, -1, new.shape[-1]), (0, 0, 0))
        return dataclasses.replace(pool, data=used)

    def _gather(self, table: jax.Array) -> Rows:
        batch, count = table.shape
        pool = self.pool
        if isinstance(pool, jax.Array):
            paged = pool.reshape(-1, PAGE, pool.shape[-1])
            return jnp.take(paged, table, axis=0, mode="clip").reshape(batch, count * PAGE, -1)
        lines = jnp.take(self._lines(), table, axis=0, mode="clip")  # [B, count, W, 128]
        data = lines.reshape(batch, count * pool.num_words, -1)
        return dataclasses.replace(pool, data=data, length=count * PAGE)

    def _lines(self) -> jax.Array:
        """Lines [P, W, 128] of a packed pool."""
        pool: Any = self.pool
        used = self.num_pages * pool.num_words
        return pool.data[0, :used].reshape(self.num_pages, pool.num_words, -1)

    @jax.named_scope("cache/append")
    def append(self, new: jax.Array, start: jax.Array, counts: jax.Array) -> "Pages":
        """The first `counts` [B] of rows [B, n, W] put at `start` [B]; none past the table's end.

        Packed rows come as words, `pool.words_of(rows)`, or as rows.
        """
        counts = jnp.clip(counts, 0, self.shape[1] - start)
        if isinstance(self.pool, jax.Array):
            index = jnp.arange(new.shape[1])
            last = self.shape[1] - 1
            rows = self.rows_of(jnp.minimum(start[:, None] + index, last))
            rows = jnp.where(index < counts[:, None], rows, self.pool.shape[1])
            flat = new.astype(self.pool.dtype).reshape(-1, new.shape[-1])
            pool: Rows = self.pool.at[0, rows.reshape(-1)].set(flat, mode="drop")
        else:
            on_lanes = not isinstance(self.pool, PackedRows)
            packing = None if new.dtype == jnp.uint32 else self.pool.packing
            data = packed_append.append(
                self.pool.data,
                new,
                start,
                counts,
                on_lanes=on_lanes,
                table=self.table,
                packing=packing,
            )
            pool = dataclasses.replace(self.pool, data=data)
        return dataclasses.replace(self, pool=pool)


def num_pages(rows: int) -> int:
    """Pages that hold so many rows."""
    return -(-rows // PAGE)


def table_limit(chip: str) -> int:
    """Pages in a table [B, n] that the kernels which read all pages take: B * n at most.

    They hold it as scalars, beside what else they and the compiler hold as such.
    """
    return (chips.CHIPS[chip].smem - SMEM_KEPT) // 4


def table_too_large(table: jax.Array) -> str | None:
    """Why the kernels that read all pages cannot take a table, None if they can."""
    limit = table_limit(dispatch.target_chip())
    if table.size <= limit:
        return None
    return (
        f"a table of {table.shape[0]} x {table.shape[1]} pages: the kernel holds {limit} in the "
        "memory of scalars"
    )
