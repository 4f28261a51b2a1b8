"""Key-value rows and indexer keys in the formats they are rounded to, as a cache holds them.

All are 32-bit words in lines of 128, a TPU's lanes, so that the array of a cache has no padding
there, is what the kernels take, and is written to in place (`append`). Arrays of bytes are none of
these: XLA holds u8[B, S, 584] with rows on lanes, where a kernel wants them on sublanes.

| what          | of                 | W for V4 | item s is                                   |
|---------------|--------------------|----------|---------------------------------------------|
| PackedRows    | rows to pick from  | 146      | words s * W .. s * W + W - 1 of all lines   |
| PackedColumns | rows to read whole | 146      | lane s % 128 of W lines from W * (s // 128) |
| PackedKeys    | the indexer's keys | 17       | the same                                    |

A row has H channels, of which the last `rope_dim` are bfloat16 and the others e4m3 with one E8M0
scale per 64, and is padded to 8 bytes: 584 bytes for 448 + 64 channels (bfloat16: 1024). Packing is
exact for rows that `quantize.round_fp8` has rounded in blocks of 64, but for the sign of zeros: no
e4m3 value is minus zero, which the format that kernels read it as does not have (`tpu_formats.py`). A
key has I channels of e2m1 with one E8M0 scale per 32, and is padded to 4 bytes: 68 for 128 channels.
Exact for keys that `quantize.round_fp4` has rounded in blocks of 32.

`PackedRows`: a section of n bytes is n / 4 words, byte i being byte i // (n / 4) of word
i % (n / 4). So the bytes of a word are of channels far apart, and the channels of all words' first
bytes are 128 consecutive ones, in the lanes they are wanted in.

| section | words    | bytes                                                              |
|---------|----------|--------------------------------------------------------------------|
| 512     | 0..127   | e4m3 values, then the high bytes of the bfloat16 channels          |
| 64      | 128..143 | their low bytes                                                    |
| 8       | 144..145 | E8M0 scales of the blocks of 64 e4m3 channels, and a 0             |

`PackedColumns`: bytes in order, as registers of 8-bit and 16-bit values have them on sublanes.

| words    | meaning                            |
|----------|------------------------------------|
| 0..111   | e4m3 values, 4 in a word           |
| 112..143 | bfloat16 channels, 2 in a word     |
| 144..145 | scales, and a 0                    |

`PackedKeys`:

| words  | meaning                                                                          |
|--------|----------------------------------------------------------------------------------|
| 0..15  | codes: byte i % 32 of 32 holds channels i and i + 32 of 64 (`join_codes`)        |
| 16     | scales: that of block b is byte b                                                |
"""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.formats import packed_append
from pallas_kernels.formats.packed_append import LINE
from pallas_kernels.formats.packed_words import Packing
from pallas_kernels.formats.quantize import (
    cast_exactly,
    join_codes,
    scale_of_exponent,
    unpack_codes,
)
from pallas_kernels.formats.quantize_rows import dequantize_rows, quantize_rows
from pallas_kernels.formats.records import INDEX_KEYS, KV_ROWS

ROW_BLOCK, KEY_BLOCK = KV_ROWS.block, INDEX_KEYS.block  # channels per scale
_ALIGNMENT = 8  # bytes a row is padded to
_TILE = 8  # lines


@dataclasses.dataclass(frozen=True)
class _Packed:
    """Words of rows or keys."""

    data: jax.Array  # uint32 [..., lines, 128]
    length: int  # S

    @property
    def num_words(self) -> int:
        """W."""
        raise NotImplementedError

    def holding(self, words: jax.Array) -> Self:
        """Like these, of other words [..., S, W]."""
        raise NotImplementedError

    @property
    def packing(self) -> Packing:
        """How rows become words."""
        raise NotImplementedError

    def words_of(self, x: jax.Array, implementation: dispatch.Implementation = None) -> jax.Array:
        """Rows [..., n, H], or keys [..., n, I], in this format: [..., n, W] uint32."""
        return self.packing.words(x, implementation)

    def _from_words(self, words: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _KeyValueRows(_Packed):
    """Key-value rows: what `PackedRows` and `PackedColumns` have in common."""

    nope_dim: int  # channels in e4m3
    rope_dim: int  # channels in bfloat16, the last ones

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the rows: [..., S, H]."""
        return (*self.data.shape[:-2], self.length, self.nope_dim + self.rope_dim)

    @property
    def num_words(self) -> int:
        """W."""
        return row_bytes(self.nope_dim, self.rope_dim) // 4

    @classmethod
    def zeros(cls, shape: tuple[int, ...], rope_dim: int) -> Self:
        """Rows [..., S, H] of zeros."""
        raise NotImplementedError

    @classmethod
    def pack(cls, rows: jax.Array, rope_dim: int) -> Self:
        """Rows [..., S, H], float32 or bfloat16.

        Raises:
          ValueError: rope_dim is not in 0..H, or widths that are no multiples of 4.
        """
        empty = cls.zeros(rows.shape, rope_dim)
        return empty.holding(empty.words_of(rows))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data"],
    meta_fields=["length", "nope_dim", "rope_dim"],
)
@dataclasses.dataclass(frozen=True)
class PackedRows(_KeyValueRows):
    """Rows [..., S, H] in e4m3 and bfloat16, for picking some."""

    data: jax.Array  # uint32 [..., lines, 128]
    length: int  # S
    nope_dim: int  # channels in e4m3
    rope_dim: int  # channels in bfloat16, the last ones

    @property
    def ndim(self) -> int:
        """Number of axes of the rows."""
        return self.data.ndim

    @classmethod
    def zeros(cls, shape: tuple[int, ...], rope_dim: int) -> Self:
        """Rows [..., S, H] of zeros.

        Raises:
          ValueError: as `pack`.
        """
        *batch, length, width = shape
        nope_dim = _nope_dim(width, rope_dim)
        lines = -(-length * row_bytes(nope_dim, rope_dim) // (4 * LINE))
        return cls(_no_words(batch, lines), length, nope_dim, rope_dim)

    def unpack(self, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
        """Rows [..., S, H]."""
        return self._from_words(self.words(), dtype)

    def words(self) -> jax.Array:
        """[..., S, W] uint32."""
        flat = self.data.reshape(*self.data.shape[:-2], -1)
        words = flat[..., : self.length * self.num_words]
        return words.reshape(*words.shape[:-1], self.length, self.num_words)

    def holding(self, words: jax.Array) -> Self:
        """Like these, of other words [..., S, W]."""
        flat = words.reshape(*words.shape[:-2], -1)
        space = self.data.shape[-2] * LINE
        flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, space - flat.shape[-1])])
        return dataclasses.replace(self, data=flat.reshape(*flat.shape[:-1], -1, LINE))

    def take(self, indices: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Rows [B, K, H] of [B, S, H] by their indices [B, K]."""
        flat, size = self.data.reshape(self.data.shape[0], -1), self.num_words

        def pick(flat, index):
            return jax.lax.dynamic_slice_in_dim(flat, index * size, size)

        return self._from_words(jax.vmap(jax.vmap(pick, (None, 0)))(flat, indices), dtype)

    @property
    def packing(self) -> Packing:
        """How rows become words."""
        return Packing("rows", self.rope_dim, self._words_by_xla)

    def _words_by_xla(self, rows: jax.Array) -> jax.Array:
        values, rope, scale = _parts(rows, self.nope_dim, self.rope_dim)
        high, low = (rope >> 8).astype(jnp.uint8), (rope & 0xFF).astype(jnp.uint8)
        sections = (jnp.concatenate([values, high], axis=-1), low, scale)
        return jnp.concatenate([_join(x) for x in sections], axis=-1)

    def _from_words(self, words: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        first, second = (self.nope_dim + self.rope_dim) // 4, self.rope_dim // 4
        parts = jnp.split(words, [first, first + second], axis=-1)
        values, low, scale = (_split(part) for part in parts)
        values, high = jnp.split(values, [self.nope_dim], axis=-1)
        return _rows(values, high.astype(jnp.uint16) << 8 | low.astype(jnp.uint16), scale, dtype)


def row_bytes(nope_dim: int, rope_dim: int) -> int:
    """Bytes of a packed row."""
    used = nope_dim + 2 * rope_dim + -(-nope_dim // ROW_BLOCK)
    return -(-used // _ALIGNMENT) * _ALIGNMENT


@dataclasses.dataclass(frozen=True)
class _OnLanes(_Packed):
    """Items on lanes: what `PackedColumns` and `PackedKeys` have in common.

    Of the lines ceil(S / 128) * W are used.
    """

    @property
    def ndim(self) -> int:
        """Number of axes of what is held."""
        return self.data.ndim

    def holding(self, words: jax.Array) -> Self:
        """Like these, of other words [..., S, W]."""
        nothing = [(0, 0)] * (words.ndim - 2)
        words = jnp.pad(words, [*nothing, (0, -self.length % LINE), (0, 0)])
        data = packed_append.to_lanes(words)
        padding = self.data.shape[-2] - data.shape[-2]
        return dataclasses.replace(self, data=jnp.pad(data, [*nothing, (0, padding), (0, 0)]))

    def append(self, rows: jax.Array, start: jax.Array, counts: jax.Array) -> Self:
        """The first `counts` [B] of rows [B, n, H] put at `start` [B]; none past S."""
        counts = jnp.clip(counts, 0, self.length - start)
        data = packed_append.append(
            self.data, rows, start, counts, on_lanes=True, packing=self.packing
        )
        return dataclasses.replace(self, data=data)

    def unpack(self, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
        """Channels [..., S, H] or [..., S, I]."""
        return self._from_words(self.words(), dtype)

    def words(self) -> jax.Array:
        """[..., S, W] uint32."""
        return self._words_of(self.data)[..., : self.length, :]

    def _words_of(self, data: jax.Array) -> jax.Array:
        data = data[..., : data.shape[-2] // self.num_words * self.num_words, :]
        words = data.reshape(*data.shape[:-2], -1, self.num_words, LINE)
        words = jnp.swapaxes(words, -1, -2)
        return words.reshape(*words.shape[:-3], -1, self.num_words)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data"],
    meta_fields=["length", "nope_dim", "rope_dim"],
)
@dataclasses.dataclass(frozen=True)
class PackedColumns(_KeyValueRows, _OnLanes):
    """Rows [..., S, H] in e4m3 and bfloat16, for reading them all."""

    data: jax.Array  # uint32 [..., lines, 128], of which ceil(S / 128) * W are used
    length: int  # S
    nope_dim: int  # channels in e4m3
    rope_dim: int  # channels in bfloat16, the last ones

    @classmethod
    def zeros(cls, shape: tuple[int, ...], rope_dim: int) -> Self:
        """Rows [..., S, H] of zeros.

        Raises:
          ValueError: as `pack`.
        """
        *batch, length, width = shape
        nope_dim = _nope_dim(width, rope_dim)
        lines = -(-length // LINE) * row_bytes(nope_dim, rope_dim) // 4
        return cls(_no_words(batch, lines), length, nope_dim, rope_dim)

    @property
    def packing(self) -> Packing:
        """How rows become words."""
        return Packing("columns", self.rope_dim, self._words_by_xla)

    def _words_by_xla(self, rows: jax.Array) -> jax.Array:
        values, rope, scale = _parts(rows, self.nope_dim, self.rope_dim)
        rope = _bitcast(rope, jnp.uint8).reshape(*rope.shape[:-1], -1)
        return _words_of_bytes(jnp.concatenate([values, rope, scale], axis=-1))

    def _from_words(self, words: jax.Array, dtype) -> jax.Array:
        values = _bytes_of_words(words)
        ends = [self.nope_dim, self.nope_dim + 2 * self.rope_dim]
        values, rope, scale = jnp.split(values, ends, axis=-1)
        rope = _bitcast(rope.reshape(*rope.shape[:-1], -1, 2), jnp.uint16)
        return _rows(values, rope, scale, dtype)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["length", "width"]
)
@dataclasses.dataclass(frozen=True)
class PackedKeys(_OnLanes):
    """Keys [..., S, I] in e2m1."""

    data: jax.Array  # uint32 [..., lines, 128], of which ceil(S / 128) * W are used
    length: int  # S
    width: int  # I

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the keys: [..., S, I]."""
        return (*self.data.shape[:-2], self.length, self.width)

    @property
    def num_words(self) -> int:
        """W."""
        return key_words(self.width)

    @staticmethod
    def pack(keys: jax.Array) -> "PackedKeys":
        """Keys [..., S, I], float32 or bfloat16.

        Raises:
          ValueError: I is not 8, 16, 32 or a multiple of 64.
        """
        empty = PackedKeys.zeros(keys.shape)
        return empty.holding(empty.words_of(keys))

    @staticmethod
    def zeros(shape: tuple[int, ...]) -> "PackedKeys":
        """Keys [..., S, I] of zeros.

        Raises:
          ValueError: as `pack`.
        """
        *batch, length, width = shape
        if width not in (8, 16, 32) and width % (2 * KEY_BLOCK):
            raise ValueError(f"keys of {width} channels: expected 8, 16, 32 or a multiple of 64.")
        lines = -(-length // LINE) * key_words(width)
        return PackedKeys(_no_words(batch, lines), length, width)

    @property
    def packing(self) -> Packing:
        """How keys become words."""
        return Packing("keys", 0, self._words_by_xla)

    def _words_by_xla(self, keys: jax.Array) -> jax.Array:
        codes, scale = quantize_rows(keys, "fp4", KEY_BLOCK)
        codes = jnp.concatenate([codes & 0xF, codes >> 4], axis=-1)
        low, high = jnp.split(codes.reshape(*codes.shape[:-1], -1, 2 * self._half), 2, axis=-1)
        codes = join_codes(low, high).reshape(*codes.shape[:-1], -1)
        scale = jnp.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, -scale.shape[-1] % 4)])
        return _words_of_bytes(jnp.concatenate([codes, scale], axis=-1))

    def unpack(self, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
        """Keys [..., S, I]."""
        return jnp.swapaxes(self.columns(dtype), -1, -2)

    def columns(self, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
        """Keys as columns [..., I, S]: as they lie, so items stay side by side while they are unpacked."""
        batch = self.data.shape[:-2]
        used = self.data.shape[-2] // self.num_words * self.num_words
        lines = self.data[..., :used, :].reshape(*batch, -1, self.num_words, LINE)
        words = jnp.swapaxes(lines, -2, -3).reshape(*batch, self.num_words, -1)[..., : self.length]
        codes = _bytes_of_lanes(words[..., : self.width // 8, :])
        codes = codes.reshape(*batch, -1, 1, self._half, self.length)
        values = unpack_codes(codes, axis=-3)  # [..., of 64 channels, 2, half, S]
        scale = _bytes_of_lanes(words[..., self.width // 8 :, :])
        scale = scale[..., : -(-self.width // KEY_BLOCK), :]
        scale = scale.reshape(*values.shape[:-3], -1, 1, self.length)
        values = cast_exactly(values * scale_of_exponent(scale), dtype)
        return values.reshape(*batch, self.width, self.length)

    @property
    def _half(self) -> int:
        """Channels between the two of a byte."""
        return min(KEY_BLOCK, self.width // 2)


def key_words(width: int) -> int:
    """32-bit words of a packed key."""
    return width // 8 + -(-width // (4 * KEY_BLOCK))


def _nope_dim(width: int, rope_dim: int) -> int:
    if not 0 <= rope_dim <= width:
        raise ValueError(f"{rope_dim=}: expected 0..{width}, the width of the rows.")
    if width % 4 or rope_dim % 4:
        raise ValueError(f"rows of {width} channels, {rope_dim=}: expected multiples of 4.")
    return width - rope_dim


def _no_words(batch: list[int], lines: int) -> jax.Array:
    """If lines are many, whole tiles of them, or XLA would transpose the array on a TPU."""
    if lines > LINE:
        lines = -(-lines // _TILE) * _TILE
    return jnp.zeros((*batch, lines, LINE), jnp.uint32)


def _parts(rows: jax.Array, nope_dim: int, rope_dim: int) -> tuple[jax.Array, ...]:
    """Values uint8 [..., nope_dim], bfloat16 as uint16 [..., rope_dim], scales and padding uint8."""
    values, scale = quantize_rows(rows[..., :nope_dim], "fp8", ROW_BLOCK)
    padding = row_bytes(nope_dim, rope_dim) - nope_dim - 2 * rope_dim - scale.shape[-1]
    scale = jnp.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, padding)])
    rope = _bitcast(rows[..., nope_dim:].astype(jnp.bfloat16), jnp.uint16)
    values = _bitcast(values, jnp.uint8)
    return jnp.where(values == 0x80, 0, values), rope, scale  # no minus zero


def _rows(values, rope, scale, dtype) -> jax.Array:
    """Inverse of `_parts`."""
    scale = scale[..., : -(-values.shape[-1] // ROW_BLOCK)]
    nope = dequantize_rows(_bitcast(values, jnp.float8_e4m3fn), scale, "fp8", ROW_BLOCK, dtype)
    return jnp.concatenate([nope, _bitcast(rope, jnp.bfloat16).astype(dtype)], axis=-1)


def _join(values: jax.Array) -> jax.Array:
    """Bytes [..., n] of a section of `PackedRows` -> words [..., n / 4]."""
    planes = values.reshape(*values.shape[:-1], 4, values.shape[-1] // 4)
    return _words_of_bytes(jnp.swapaxes(planes, -1, -2).reshape(values.shape))


def _split(words: jax.Array) -> jax.Array:
    """Inverse of `_join`."""
    planes = _bitcast(words, jnp.uint8)  # [..., n / 4, 4]
    return jnp.swapaxes(planes, -1, -2).reshape(*words.shape[:-1], -1)


def _words_of_bytes(values: jax.Array) -> jax.Array:
    """uint8 [..., 4 n] -> uint32 [..., n], the first byte being the low one."""
    return _bitcast(values.reshape(*values.shape[:-1], -1, 4), jnp.uint32)


def _bytes_of_words(words: jax.Array) -> jax.Array:
    return _bitcast(words, jnp.uint8).reshape(*words.shape[:-1], -1)


def _bytes_of_lanes(words: jax.Array) -> jax.Array:
    """uint32 [..., n, S] -> their bytes, the low one first: uint32 [..., 4 n, S]."""
    shifts = jnp.arange(0, 32, 8, dtype=jnp.uint32)[:, None]
    values = words[..., None, :] >> shifts & 0xFF
    return values.reshape(*words.shape[:-2], -1, words.shape[-1])


def _bitcast(x, dtype):
    return jax.lax.bitcast_convert_type(x, dtype)
