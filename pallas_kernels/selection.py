"""The compressed entries that each query attends to: as indices, or as bits.

Decoding, and CPU and GPU always, gather the rows of K entries: a query has a list of indices.
Prefill and training on a TPU go over all entries under a mask: a query has one bit per entry.

| field   | shape                      | entry s of a query is selected if                        |
|---------|----------------------------|----------------------------------------------------------|
| indices | [B, T, K] int32            | s is among its K indices (distinct; -1 stands for none)  |
| bits    | [B, T, ceil(S / 4096), 128] uint32 | bit (s // 128) % 32 of word [s // 4096, s % 128] is set |

So 128 consecutive entries are one bit of a row of 128 words, and a row shifted by a block number is
their mask, lane by lane. Bits of entries past S are 0.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

ENTRIES_PER_WORD_ROW = 32 * 128
BLOCK_QUERIES = 128  # queries whose masks are in memory at once


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["indices", "bits"],
    meta_fields=["num_entries", "topk"],
)
@dataclasses.dataclass(frozen=True)
class Selection:
    """Exactly one of `indices` and `bits` is set."""

    indices: jax.Array | None
    bits: jax.Array | None
    num_entries: int  # S
    topk: int  # no query selects more

    @staticmethod
    def of_indices(indices: jax.Array, num_entries: int) -> "Selection":
        """indices [B, T, K] int32, distinct; -1 selects nothing.

        Raises:
          ValueError: not [B, T, K].
        """
        if indices.ndim != 3:
            raise ValueError(f"indices {indices.shape} must be [B, T, K].")
        return Selection(indices, None, num_entries, indices.shape[2])

    @staticmethod
    def of_mask(mask: jax.Array, topk: int) -> "Selection":
        """mask [B, T, S] bool, at most `topk` of a query true. For small shapes.

        Raises:
          ValueError: not [B, T, S].
        """
        if mask.ndim != 3:
            raise ValueError(f"mask {mask.shape} must be [B, T, S].")
        num_entries = mask.shape[2]
        padded = jnp.pad(mask, [(0, 0), (0, 0), (0, -num_entries % ENTRIES_PER_WORD_ROW)])
        planes = padded.reshape(*mask.shape[:2], -1, 32, 128).astype(jnp.uint32)
        bits = jnp.sum(planes << _bit_numbers(), axis=-2, dtype=jnp.uint32)
        return Selection(None, bits, num_entries, topk)

    @property
    def shape(self) -> tuple[int, int]:
        """B and T."""
        batch, num_queries = self._array.shape[:2]
        return batch, num_queries

    @property
    def _array(self) -> jax.Array:
        """The one that is set."""
        array = self.bits if self.indices is None else self.indices
        assert array is not None
        return array

    def mask(self) -> jax.Array:
        """[B, T, S] bool. For small shapes."""
        if self.bits is not None:
            return _expand(self.bits, self.num_entries)
        return jnp.any(self._array[..., None] == jnp.arange(self.num_entries), axis=-2)

    def to_indices(self) -> jax.Array:
        """[B, T, K] int32, as given, or from bits K = min(topk, S) in ascending order, then -1."""
        if self.indices is not None:
            return self.indices
        (batch, num_queries), topk = self.shape, min(self.topk, self.num_entries)
        if not topk:
            return jnp.zeros((batch, num_queries, 0), jnp.int32)
        block = min(BLOCK_QUERIES, num_queries)
        num_blocks = -(-num_queries // block)
        padding = num_blocks * block - num_queries
        bits = jnp.pad(self._array, [(0, 0), (0, padding), (0, 0), (0, 0)])

        def first(i):
            words = jax.lax.dynamic_slice_in_dim(bits, i * block, block, axis=1)
            entry = jnp.arange(self.num_entries, dtype=jnp.int32)
            entry = jnp.where(_expand(words, self.num_entries), entry, self.num_entries)
            entry = jnp.sort(entry, axis=-1)[..., :topk]
            return jnp.where(entry < self.num_entries, entry, -1)

        indices = jnp.moveaxis(jax.lax.map(first, jnp.arange(num_blocks)), 0, 1)
        return indices.reshape(batch, -1, topk)[:, :num_queries]

    def to_bits(self) -> jax.Array:
        """[B, T, ceil(S / 4096), 128] uint32."""
        if self.bits is not None:
            return self.bits
        num_rows = -(-self.num_entries // ENTRIES_PER_WORD_ROW)

        def words(indices):  # [K] -> [W, 128]; sums of distinct bits
            row = jnp.where(indices < 0, num_rows, indices // ENTRIES_PER_WORD_ROW)
            bit = jnp.uint32(1) << (indices // 128 % 32).astype(jnp.uint32)
            empty = jnp.zeros((num_rows, 128), jnp.uint32)
            return empty.at[row, indices % 128].add(bit, mode="drop")

        return jax.vmap(jax.vmap(words))(self.indices)


def num_reached(bits: jax.Array) -> jax.Array:
    """Entries up to the last that a query selects: bits [B, T, W, 128] -> [B] int32."""
    used = jax.lax.reduce(bits, jnp.uint32(0), jax.lax.bitwise_or, (1,))
    highest = 31 - jax.lax.clz(used).astype(jnp.int32)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, used.shape, axis) for axis in (1, 2))
    entry = (row * 32 + highest) * 128 + lane
    return jnp.max(jnp.where(used > 0, entry + 1, 0), axis=(1, 2))


def _bit_numbers():
    return jnp.arange(32, dtype=jnp.uint32)[:, None]


def _expand(bits, num_entries):
    """[B, t, W, 128] words -> [B, t, S] bool."""
    planes = (bits[..., None, :] >> _bit_numbers()) & 1  # [B, t, W, 32, 128]
    return planes.reshape(*bits.shape[:2], -1)[..., :num_entries] != 0
