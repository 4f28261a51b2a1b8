"""Key-value cache: what a layer remembers of the tokens it has seen.

One `LayerCache` per layer, each array with a leading batch axis; sequences of a batch may have
different lengths. For a capacity of S tokens and a layer of ratio r:

| field       | shape          | holds                                                             |
|-------------|----------------|-------------------------------------------------------------------|
| window      | [B, C, H]      | last C key-value rows, token t in row t mod C                     |
| entries     | [B, S / r, H]  | one compressed row per r tokens (r = 4 in CSA, 128 in HCA)        |
| pool        | see `OpenPool` | partial sums of the window that is not full yet, float32          |
| index_keys  | [B, S / r, I]  | the indexer's compressed keys (CSA only)                          |
| index_pool  | see `OpenPool` | as `pool`, of the indexer's compressor (CSA only)                 |

Rows and keys are float arrays, or packed in the formats that `released` numerics rounds them to
(`CacheFormat`). A cache is an argument and a result, never changed in place; jitted steps donate it.
"""

import dataclasses
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.packed_rows import PackedColumns, PackedKeys, PackedRows
from pallas_kernels.gated_pool import Pool
from sharding import collectives
from v4jax.config import LayerSpec, V4Config
from v4jax.nn.numerics import Numerics

# "packed": rows in e4m3 and bfloat16 (584 bytes for 512 channels), keys in e2m1. "float": both in the
# activations' dtype. None: packed where that changes no number, else float.
CacheFormat = Literal["packed", "float"] | None
Rows = jax.Array | PackedRows | PackedColumns | PackedKeys  # [B, S, W]
_Rows = TypeVar("_Rows", bound=Rows)
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
    """State of one layer. Fields that its kind of layer does not have are None."""

    window: jax.Array | PackedColumns
    entries: jax.Array | PackedRows | PackedColumns | None = None
    pool: OpenPool | None = None
    index_keys: jax.Array | PackedKeys | None = None
    index_pool: OpenPool | None = None


@_pytree(meta=("capacity",))
@dataclasses.dataclass(frozen=True)
class Cache:
    """State of all layers, and how many tokens each sequence has."""

    layers: tuple[LayerCache, ...]
    lengths: jax.Array  # [B] int32
    capacity: int  # tokens a sequence can have

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
    cfg: V4Config, numerics: Numerics, batch: int, capacity: int, format: CacheFormat = None
) -> Cache:
    """An empty cache for `batch` sequences of up to `capacity` tokens.

    Raises:
      ValueError: capacity is not in 1..cfg.max_length, an unknown format, or a packed cache for
        numerics that do not round to its formats.
    """
    if not 0 < capacity <= cfg.max_length:
        raise ValueError(f"capacity={capacity}: expected 1..{cfg.max_length} (max_length).")
    is_packed = _is_packed(format, numerics)

    def rows(length: int, packing: type[_Packing]) -> jax.Array | _Packing:
        shape = (batch, length, cfg.head_dim)
        if is_packed:
            return packing.zeros(shape, cfg.rope_head_dim)
        return jnp.zeros(shape, numerics.dtype)

    def keys(length: int, width: int) -> jax.Array | PackedKeys:
        shape = (batch, length, width)
        return PackedKeys.zeros(shape) if is_packed else jnp.zeros(shape, numerics.dtype)

    def layer(spec: LayerSpec) -> LayerCache:
        window = rows(cfg.window, PackedColumns)
        if spec.compressor is None:
            return LayerCache(window)
        count, overlap = -(-capacity // spec.ratio), spec.compressor.overlap
        pool = init_pool(batch, cfg.head_dim, overlap=overlap)
        if spec.indexer is None:
            return LayerCache(window, rows(count, PackedColumns), pool)  # all are read
        entries = rows(count, PackedRows)  # some are picked
        width = spec.indexer.head_dim
        index_pool = init_pool(batch, width, overlap=overlap)
        return LayerCache(window, entries, pool, keys(count, width), index_pool)

    return Cache(tuple(map(layer, cfg.layers)), jnp.zeros(batch, jnp.int32), capacity)


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


@jax.named_scope("cache/append")
def append_entries(
    entries: _Rows,  # [B, S, W]
    new: jax.Array,  # [B, n, W], of which the first `counts` are complete
    start: jax.Array,  # [B] int32 row of the first new entry
    counts: jax.Array,  # [B] int32
) -> _Rows:
    """Writes the complete new entries behind the old ones, all devices'; never past the end."""
    if not isinstance(entries, jax.Array):
        parts = jax.tree.map(
            lambda x: collectives.all_gather(x[None], "seq", axis=0),
            (entries.words_of(new), start, counts),
        )
        packed: Any = entries  # stays what it is
        for device in range(collectives.axis_size("seq")):
            packed = packed.append(*jax.tree.map(lambda x, d=device: x[d], parts))
        return packed
    index = jnp.arange(new.shape[1])
    rows = jnp.where(index < counts[:, None], start[:, None] + index, entries.shape[1])
    new, rows = (
        collectives.all_gather(x, "seq", axis=1) for x in (new.astype(entries.dtype), rows)
    )
    return jax.vmap(lambda e, i, n: e.at[i].set(n, mode="drop"))(entries, rows, new)


def unpacked(rows: Rows, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows as floats: themselves, or in `dtype` where they are packed."""
    return rows if isinstance(rows, jax.Array) else rows.unpack(dtype)


@jax.named_scope("cache/window")
def window_rows(ring: jax.Array | PackedColumns, kv: jax.Array, chunk: Chunk) -> jax.Array:
    """The C rows before a chunk, oldest first, then the chunk's own: [B, C + T, H]."""
    size = ring.shape[1]
    before = collectives.halo(kv, size, "seq")  # of other devices' parts of the chunk
    order = (chunk.start[:, None] + jnp.arange(size)) % size
    old = jnp.take_along_axis(unpacked(ring, kv.dtype), order[..., None], axis=1)
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
        return ring.append(ring.words_of(kv), start % size, chunk.counts)
    last = start + chunk.whole_counts - 1
    # Newest token of each row of the ring; before `start` means that the row keeps its content.
    token = last[:, None] - (last[:, None] - jnp.arange(size)) % size
    column = token - chunk.start[:, None]
    mine = ((column >= 0) & (column < num_columns))[..., None]
    column = jnp.clip(column, 0, num_columns - 1)[..., None]

    def put(ring, kv):
        new = jnp.where(mine, jnp.take_along_axis(kv, column, axis=1), 0)
        return jnp.where((token >= start[:, None])[..., None], collectives.psum(new, "seq"), ring)

    if isinstance(ring, PackedColumns):
        return ring.holding(put(ring.words(), ring.words_of(kv)))
    return put(ring, kv.astype(ring.dtype))
