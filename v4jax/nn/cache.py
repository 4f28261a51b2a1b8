"""Key-value cache: what the layers remember of the tokens they have seen.

What grows with a sequence lies in pages (`pallas_kernels/formats/pages.py`): a page is 128 compressed
rows, and layers of one ratio share a table that says which pages are a sequence's. What does not grow
has a row a sequence. Sequences of a batch may have different lengths. For a layer of ratio r:

| field       | shape             | holds                                                          |
|-------------|-------------------|----------------------------------------------------------------|
| window      | [B, C, H]         | last C key-value rows, token t in row t mod C                  |
| entries     | [G, P * 128, H]   | one compressed row per r tokens (r = 4 in CSA, 128 in HCA)     |
| pool        | see `OpenPool`    | partial sums of the window that is not full yet, float32       |
| index_keys  | [G, P * 128, I]   | the indexer's compressed keys (CSA only)                       |
| index_pool  | see `OpenPool`    | as `pool`, of the indexer's compressor (CSA only)              |
| tables[r]   | [B, n]            | pages of each sequence, int32                                  |

A layer that uses rows or picks of another (`shared`) has neither rows nor keys of those itself.

G is the number of parts that a mesh cuts the sequences into (1 without one): each has a pool of its own,
and its sequences' tables point into that.

Rows and keys are float arrays, or packed in the formats that `released` numerics rounds them to
(`CacheFormat`). A cache is an argument and a result, never changed in place; jitted steps donate it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.packed_rows import PackedColumns, PackedKeys, PackedRows
from pallas_kernels.formats.pages import PAGE, Pages, Rows, num_pages
from pallas_kernels.gated_pool import Pool
from sharding import collectives
from v4jax.config import LayerSpec, V4Config
from v4jax.nn.numerics import Numerics

# "packed": rows in e4m3 and bfloat16 (584 bytes for 512 channels), keys in e2m1. "float": both in the
# activations' dtype. None: packed where that changes no number, else float.
CacheFormat = Literal["packed", "float"] | None
_Packing = TypeVar("_Packing", PackedRows, PackedColumns)


class CacheFullError(ValueError):
    """More tokens than a cache has room for."""


def _pytree(*, meta: tuple[str, ...] = ()):
    def register(cls):
        names = [f.name for f in dataclasses.fields(cls) if f.name not in meta]
        return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=list(meta))

    return register


@_pytree()
@dataclasses.dataclass(frozen=True)
class OpenPool:
    """Partial sums of one compressor's window that is being filled.

    A CSA compressor pools F = 2 * width channels: the first half of a window goes into the next
    window's entry (`previous` keeps it), the second half into its own. HCA has F = width and no
    `previous`.
    """

    current: Pool  # [B, F]
    previous: Pool | None  # [B, width]


@_pytree()
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """State of one layer. Fields that its kind of layer does not have are None.

    So are those of what another layer makes for it (`shared`): rows and keys are kept by who makes them.
    """

    window: jax.Array | PackedColumns
    entries: Pages | None = None
    pool: OpenPool | None = None
    index_keys: Pages | None = None
    index_pool: OpenPool | None = None


@_pytree()
@dataclasses.dataclass(frozen=True)
class PagePool:
    """A layer's pages, without the table: rows [G, P * 128, ...]. None where it has none."""

    entries: Rows | None = None
    index_keys: Rows | None = None


@_pytree(meta=("ratios", "capacity"))
@dataclasses.dataclass(frozen=True)
class Cache:
    """State of all layers, and how many tokens each sequence has."""

    states: tuple[LayerCache, ...]  # what has a row a sequence; pages are in `pools`
    pools: tuple[PagePool, ...]
    tables: dict[int, jax.Array]  # by ratio: [B, n] int32
    lengths: jax.Array  # [B] int32
    ratios: tuple[int, ...]  # of the layers; 0: no compressed rows
    capacity: int  # tokens a sequence can have

    @property
    def layers(self) -> tuple[LayerCache, ...]:
        """The layers, each with its pages."""
        return tuple(
            dataclasses.replace(
                state,
                entries=None if pool.entries is None else Pages(pool.entries, self.tables[ratio]),
                index_keys=None
                if pool.index_keys is None
                else Pages(pool.index_keys, self.tables[ratio]),
            )
            for state, pool, ratio in zip(self.states, self.pools, self.ratios, strict=True)
        )

    def of_layers(self, layers: Sequence[LayerCache], lengths: jax.Array) -> "Cache":
        """This cache with other contents of its layers."""

        def pool(pages: Pages | None) -> Rows | None:
            return None if pages is None else pages.pool

        return dataclasses.replace(
            self,
            states=tuple(dataclasses.replace(x, entries=None, index_keys=None) for x in layers),
            pools=tuple(PagePool(pool(x.entries), pool(x.index_keys)) for x in layers),
            lengths=lengths,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def require_room(self, counts) -> None:
        """Raises `CacheFullError` if `counts` [B] more tokens do not fit.

        Reads the lengths; of several processes, each those that its devices hold.
        """
        counts = np.asarray(counts)
        for shard in self.lengths.addressable_shards:
            (rows,) = shard.index
            needed = np.asarray(shard.data) + counts[rows]
            if (needed > self.capacity).any():
                row = int(np.argmax(needed))
                raise CacheFullError(
                    f"sequence {row + (rows.start or 0)} would have {needed[row]} tokens, but the "
                    f"cache holds {self.capacity}: make one with a larger capacity. Nothing was "
                    "written."
                )


@_pytree()
@dataclasses.dataclass(frozen=True)
class Chunk:
    """New tokens of each sequence: `counts` of the T columns are real, the rest padding.

    If a chunk's columns are cut over devices ("seq"), this is one device's part of it.
    """

    start: jax.Array  # [B] int32 tokens before it
    counts: jax.Array  # [B] int32
    positions: jax.Array  # [B, T] int32

    @staticmethod
    def make(start: jax.Array, counts: jax.Array, num_columns: int) -> "Chunk":
        """`counts` tokens that continue from `start`, this device's `num_columns` columns of them."""
        before = collectives.axis_index("seq") * num_columns
        start, counts = start + before, jnp.clip(counts - before, 0, num_columns)
        positions = start[:, None] + jnp.arange(num_columns, dtype=jnp.int32)
        return Chunk(start, counts, positions)

    @property
    def whole_start(self) -> jax.Array:
        """[B] tokens before the whole chunk."""
        return self.start - collectives.axis_index("seq") * self.positions.shape[1]

    @property
    def whole_counts(self) -> jax.Array:
        """[B] tokens of the whole chunk."""
        return collectives.psum(self.counts, "seq")

    @property
    def valid(self) -> jax.Array:
        """[B, T] bool: columns that hold a token."""
        return jnp.arange(self.positions.shape[1]) < self.counts[:, None]


def init_cache(
    cfg: V4Config,
    numerics: Numerics,
    batch: int,
    capacity: int,
    format: CacheFormat = None,
    *,
    parts: int = 1,
) -> Cache:
    """An empty cache for `batch` sequences of up to `capacity` tokens, each with all its pages.

    Args:
      parts: that a mesh cuts the batch into.

    Raises:
      ValueError: capacity is not in 1..cfg.max_length, an unknown format, or a packed cache for
        numerics that do not round to its formats.
    """
    if not 0 < capacity <= cfg.max_length:
        raise ValueError(f"capacity={capacity}: expected 1..{cfg.max_length} (max_length).")
    pages = {ratio: pages_of(capacity, ratio) for ratio in ratios_of(cfg)}
    rows = batch // parts
    tables = {
        ratio: jnp.tile(jnp.arange(rows * count, dtype=jnp.int32).reshape(rows, count), (parts, 1))
        for ratio, count in pages.items()
    }
    pages = {ratio: rows * count for ratio, count in pages.items()}
    return empty_cache(cfg, numerics, batch, pages, tables, capacity, format, parts=parts)


def ratios_of(cfg: V4Config) -> list[int]:
    """The ratios that layers compress at, increasing."""
    return sorted({spec.ratio for spec in cfg.layers if spec.compressor})


def pages_of(tokens: int, ratio: int) -> int:
    """Pages of a sequence of so many tokens, at least one."""
    return max(1, num_pages(-(-tokens // ratio)))


def pool_pages(cfg: V4Config, tokens: int, sequences: int) -> dict[int, int]:
    """Pages by ratio that hold `tokens` of so many sequences, whose last pages are partly filled.

    Kept prefixes count as sequences: they have a last page of their own. Page 0, which is nobody's, is
    among the pages.
    """
    return {ratio: 1 + sequences + tokens // (ratio * PAGE) for ratio in ratios_of(cfg)}


def empty_cache(
    cfg: V4Config,
    numerics: Numerics,
    batch: int,
    pages: dict[int, int],
    tables: dict[int, jax.Array],
    capacity: int,
    format: CacheFormat = None,
    *,
    parts: int = 1,
) -> Cache:
    """A cache with `pages[ratio]` pages in each part's pool, whoever they belong to."""
    is_packed = _is_packed(format, numerics)

    def rows(shape: tuple[int, ...], packing: type[_Packing]) -> jax.Array | _Packing:
        if is_packed:
            return packing.zeros(shape, cfg.rope_head_dim)
        return jnp.zeros(shape, numerics.dtype)

    def keys(shape: tuple[int, ...]) -> jax.Array | PackedKeys:
        return PackedKeys.zeros(shape) if is_packed else jnp.zeros(shape, numerics.dtype)

    def state(spec: LayerSpec) -> LayerCache:
        window = rows((batch, cfg.window, cfg.head_dim), PackedColumns)
        if spec.compressor is None:
            return LayerCache(window)
        overlap, index, pool, index_pool = spec.compressor.overlap, spec.own_indexer, None, None
        if spec.own_compressor:
            pool = init_pool(batch, cfg.head_dim, overlap=overlap)
        if index:
            index_pool = init_pool(batch, index.head_dim, overlap=overlap)
        return LayerCache(window, pool=pool, index_pool=index_pool)

    def pool(spec: LayerSpec) -> PagePool:
        if spec.compressor is None:
            return PagePool()
        space, index = (parts, pages[spec.ratio] * PAGE), spec.own_indexer
        entries: Rows | None = None
        if spec.own_compressor and spec.indexer:
            entries = rows((*space, cfg.head_dim), PackedRows)  # some are read
        elif spec.own_compressor:
            entries = rows((*space, cfg.head_dim), PackedColumns)  # all are
        return PagePool(entries, keys((*space, index.head_dim)) if index else None)

    return Cache(
        tuple(map(state, cfg.layers)),
        tuple(map(pool, cfg.layers)),
        tables,
        jnp.zeros(batch, jnp.int32),
        tuple(spec.ratio if spec.compressor else 0 for spec in cfg.layers),
        capacity,
    )


def _is_packed(format: CacheFormat, numerics: Numerics) -> bool:
    exact = numerics.is_released and numerics.dtype == jnp.bfloat16
    if format not in ("packed", "float", None):
        raise ValueError(f'cache format={format!r}: expected "packed", "float" or None.')
    if format == "packed" and not exact:
        raise ValueError(
            f'cache format="packed" with {numerics.name} numerics in {numerics.dtype}: packed rows '
            "hold e4m3 and bfloat16, which only released bfloat16 numerics round to; anything else "
            'would lose digits. Use "float", or v4jax.released("bfloat16").'
        )
    return exact if format is None else format == "packed"


def init_pool(batch: int, width: int, *, overlap: bool) -> OpenPool:
    """The partial sums of no token."""
    if overlap:
        return OpenPool(Pool.empty((batch, 2 * width)), Pool.empty((batch, width)))
    return OpenPool(Pool.empty((batch, width)), None)


def append_entries(
    entries: Pages,  # [B, S, W]
    new: jax.Array,  # [B, n, W], of which the first `counts` are complete
    start: jax.Array,  # [B] int32 row of the first new entry
    counts: jax.Array,  # [B] int32
) -> Pages:
    """Writes the complete new entries behind the old ones, all devices'; never past the end."""
    if collectives.axis_size("seq") == 1:
        return entries.append(new, start, counts)
    if not isinstance(entries.pool, jax.Array):
        new = entries.pool.words_of(new)  # which travel
    parts = jax.tree.map(
        lambda x: collectives.all_gather(x[None], "seq", axis=0), (new, start, counts)
    )
    for device in range(collectives.axis_size("seq")):
        entries = entries.append(*jax.tree.map(lambda x, d=device: x[d], parts))
    return entries


@jax.named_scope("cache/window")
def window_rows(ring: jax.Array | PackedColumns, kv: jax.Array, chunk: Chunk) -> jax.Array:
    """The C rows before a chunk, oldest first, then the chunk's own: [B, C + T, H]."""
    size = ring.shape[1]
    before = collectives.halo(kv, size, "seq")  # of other devices' parts of the chunk
    order = (chunk.start[:, None] + jnp.arange(size)) % size
    rows = ring if isinstance(ring, jax.Array) else ring.unpack(kv.dtype)
    old = jnp.take_along_axis(rows, order[..., None], axis=1, mode="clip")
    in_ring = jnp.arange(size) < size - collectives.axis_index("seq") * kv.shape[1]
    return jnp.concatenate([jnp.where(in_ring[:, None], old, before), kv], axis=1)


@jax.named_scope("cache/append")
def write_window(
    ring: jax.Array | PackedColumns, kv: jax.Array, chunk: Chunk
) -> jax.Array | PackedColumns:
    """The ring after the chunk's valid tokens, kv [B, T, H] of this device, have been written."""
    size, num_columns = ring.shape[1], kv.shape[1]
    start = chunk.whole_start
    if isinstance(ring, PackedColumns) and num_columns * collectives.axis_size("seq") == 1:
        return ring.append(kv, start % size, chunk.counts)
    last = start + chunk.whole_counts - 1
    # Newest token of each row of the ring; before `start` means that the row keeps its content.
    token = last[:, None] - (last[:, None] - jnp.arange(size)) % size
    column = token - chunk.start[:, None]
    mine = ((column >= 0) & (column < num_columns))[..., None]

    def put(ring, kv):
        new = jnp.where(mine, jnp.take_along_axis(kv, column[..., None], axis=1, mode="clip"), 0)
        return jnp.where((token >= start[:, None])[..., None], collectives.psum(new, "seq"), ring)

    if isinstance(ring, PackedColumns):
        return ring.holding(put(ring.words(), ring.words_of(kv)))
    return put(ring, kv.astype(ring.dtype))
