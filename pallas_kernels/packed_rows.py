"""Key-value rows and indexer keys in the formats they are rounded to, as a cache holds them.

`PackedRows`: H channels, of which the last `rope_dim` are bfloat16 and the others e4m3 with one
E8M0 scale per 64. A row is one run of bytes, so that a kernel fetches it with one copy, and is padded
to 8 of them. For 448 + 64 channels, 584 bytes (bfloat16: 1024):

| bytes    | meaning                                                      |
|----------|--------------------------------------------------------------|
| 0..63    | high bytes of the bfloat16 channels 448..511 (sign, exponent)|
| 64..127  | low bytes                                                    |
| 128..575 | e4m3 values of channels 0..447                               |
| 576..582 | E8M0 scales of their blocks of 64                            |
| 583      | 0                                                            |

The rotated channels come first so that both parts begin at a multiple of 128, a TPU's lanes. Packing
is exact for rows that `quantize.round_fp8` has rounded in blocks of 64.

`PackedKeys`: I channels of e2m1 with one E8M0 scale per 32; 68 bytes for 128 channels:

| bytes  | meaning                                              |
|--------|------------------------------------------------------|
| 0..63  | codes: channel j in the low half, j + 64 in the high |
| 64..67 | scales                                               |

Exact for keys that `quantize.round_fp4` has rounded in blocks of 32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_rows import dequantize_rows, quantize_rows

ROW_BLOCK = 64  # channels per scale of a row
KEY_BLOCK = 32  # of a key
_ALIGNMENT = 8  # bytes a row is padded to


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["nope_dim", "rope_dim"]
)
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows [..., S, H] in e4m3 and bfloat16."""

    data: jax.Array  # uint8 [..., S, row_bytes(nope_dim, rope_dim)]
    nope_dim: int  # channels in e4m3
    rope_dim: int  # channels in bfloat16, the last ones

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the rows: [..., S, H]."""
        return (*self.data.shape[:-1], self.nope_dim + self.rope_dim)

    @property
    def ndim(self) -> int:
        """Number of axes of the rows."""
        return self.data.ndim

    @staticmethod
    def pack(rows: jax.Array, rope_dim: int) -> "PackedRows":
        """Rows [..., S, H], float32 or bfloat16.

        Raises:
          ValueError: rope_dim is not in 0..H.
        """
        width = rows.shape[-1]
        if not 0 <= rope_dim <= width:
            raise ValueError(f"{rope_dim=}: expected 0..{width}, the width of the rows.")
        nope_dim = width - rope_dim
        values, scale = quantize_rows(rows[..., :nope_dim], "fp8", ROW_BLOCK)
        rope = _bitcast(rows[..., nope_dim:].astype(jnp.bfloat16), jnp.uint16)
        halves = [(rope >> 8).astype(jnp.uint8), (rope & 0xFF).astype(jnp.uint8)]
        data = jnp.concatenate([*halves, _bitcast(values, jnp.uint8), scale], axis=-1)
        padding = row_bytes(nope_dim, rope_dim) - data.shape[-1]
        data = jnp.pad(data, [(0, 0)] * (data.ndim - 1) + [(0, padding)])
        return PackedRows(data, nope_dim, rope_dim)

    @staticmethod
    def zeros(shape: tuple[int, ...], rope_dim: int) -> "PackedRows":
        """Rows [..., S, H] of zeros."""
        nope_dim = shape[-1] - rope_dim
        data = jnp.zeros((*shape[:-1], row_bytes(nope_dim, rope_dim)), jnp.uint8)
        return PackedRows(data, nope_dim, rope_dim)

    def unpack(self, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
        """Rows [..., S, H]."""
        ends = [self.rope_dim, 2 * self.rope_dim, 2 * self.rope_dim + self.nope_dim]
        high, low, values, scale = jnp.split(self.data, ends, axis=-1)
        scale = scale[..., : -(-self.nope_dim // ROW_BLOCK)]
        nope = dequantize_rows(_bitcast(values, jnp.float8_e4m3fn), scale, "fp8", ROW_BLOCK, dtype)
        rope = high.astype(jnp.uint16) << 8 | low.astype(jnp.uint16)
        return jnp.concatenate([nope, _bitcast(rope, jnp.bfloat16).astype(dtype)], axis=-1)


def row_bytes(nope_dim: int, rope_dim: int) -> int:
    """Bytes of a packed row."""
    used = nope_dim + 2 * rope_dim + -(-nope_dim // ROW_BLOCK)
    return -(-used // _ALIGNMENT) * _ALIGNMENT


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["width"])
@dataclasses.dataclass(frozen=True)
class PackedKeys:
    """Keys [..., S, I] in e2m1."""

    data: jax.Array  # uint8 [..., S, I / 2 + ceil(I / 32)]
    width: int  # I

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the keys: [..., S, I]."""
        return (*self.data.shape[:-1], self.width)

    @property
    def ndim(self) -> int:
        """Number of axes of the keys."""
        return self.data.ndim

    @staticmethod
    def pack(keys: jax.Array) -> "PackedKeys":
        """Keys [..., S, I], float32 or bfloat16.

        Raises:
          ValueError: I is odd.
        """
        parts = quantize_rows(keys, "fp4", KEY_BLOCK)
        return PackedKeys(jnp.concatenate(parts, axis=-1), keys.shape[-1])

    @staticmethod
    def zeros(shape: tuple[int, ...]) -> "PackedKeys":
        """Keys [..., S, I] of zeros."""
        width = shape[-1]
        data = jnp.zeros((*shape[:-1], width // 2 + -(-width // KEY_BLOCK)), jnp.uint8)
        return PackedKeys(data, width)

    def unpack(self, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
        """Keys [..., S, I]."""
        codes, scale = jnp.split(self.data, [self.width // 2], axis=-1)
        return dequantize_rows(codes, scale, "fp4", KEY_BLOCK, dtype)


def _bitcast(x, dtype):
    return jax.lax.bitcast_convert_type(x, dtype)
