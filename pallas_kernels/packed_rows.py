"""Key-value rows and indexer keys in the formats they are rounded to, as a cache holds them.

`PackedRows`: H channels, of which the last `rope_dim` are bfloat16 and the others e4m3 with one
E8M0 scale per 64. All of a row is in one array of bytes, so that a kernel fetches it with one copy
and nothing is lost to the padding of narrow arrays. For 448 + 64 channels, 640 bytes, 584 of them
used (bfloat16: 1024):

| bytes    | meaning                                                      |
|----------|--------------------------------------------------------------|
| 0..447   | e4m3 values of channels 0..447                               |
| 448..454 | E8M0 scales of their blocks of 64                            |
| 455..511 | 0                                                            |
| 512..575 | high bytes of the bfloat16 channels 448..511 (sign, exponent)|
| 576..639 | low bytes                                                    |

In general the first part is padded to a multiple of 128 bytes, and each half of the second to a
multiple of 64. Packing is exact for rows that `quantize.round_fp8` has rounded in blocks of 64.

`PackedKeys`: I channels of e2m1 with one E8M0 scale per 32; 68 bytes for 128 channels. Exact for
keys that `quantize.round_fp4` has rounded in blocks of 32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_rows import dequantize_rows, quantize_rows

ROW_BLOCK = 64  # channels per scale of a row
KEY_BLOCK = 32  # of a key
_LINE = 128  # bytes


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["nope_dim", "rope_dim"]
)
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows [..., S, H] in e4m3 and bfloat16."""

    data: jax.Array  # uint8 [..., S, row bytes]
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
        first = jnp.concatenate([_bitcast(values, jnp.uint8), scale], axis=-1)
        rope = _bitcast(rows[..., nope_dim:].astype(jnp.bfloat16), jnp.uint16)
        halves = [(rope >> 8).astype(jnp.uint8), (rope & 0xFF).astype(jnp.uint8)]
        parts = [_pad(first, _LINE), *(_pad(half, _LINE // 2) for half in halves)]
        return PackedRows(jnp.concatenate(parts, axis=-1), nope_dim, rope_dim)

    def unpack(self, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
        """Rows [..., S, H]."""
        num_scales = -(-self.nope_dim // ROW_BLOCK)
        values = _bitcast(self.data[..., : self.nope_dim], jnp.float8_e4m3fn)
        scale = self.data[..., self.nope_dim : self.nope_dim + num_scales]
        nope = dequantize_rows(values, scale, "fp8", ROW_BLOCK, dtype)
        start = _up(self.nope_dim + num_scales, _LINE)
        high, low = (
            self.data[..., at : at + self.rope_dim].astype(jnp.uint16)
            for at in (start, start + _up(self.rope_dim, _LINE // 2))
        )
        rope = _bitcast(high << 8 | low, jnp.bfloat16).astype(dtype)
        return jnp.concatenate([nope, rope], axis=-1)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PackedKeys:
    """Keys [..., S, I] in e2m1."""

    codes: jax.Array  # uint8 [..., S, I / 2]: channel j low, channel j + I / 2 high
    scale: jax.Array  # uint8 [..., S, I / 32]: E8M0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the keys: [..., S, I]."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    @property
    def ndim(self) -> int:
        """Number of axes of the keys."""
        return self.codes.ndim

    @staticmethod
    def pack(keys: jax.Array) -> "PackedKeys":
        """Keys [..., S, I], float32 or bfloat16.

        Raises:
          ValueError: I is odd.
        """
        return PackedKeys(*quantize_rows(keys, "fp4", KEY_BLOCK))

    def unpack(self, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
        """Keys [..., S, I]."""
        return dequantize_rows(self.codes, self.scale, "fp4", KEY_BLOCK, dtype)


def _bitcast(x, dtype):
    return jax.lax.bitcast_convert_type(x, dtype)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _pad(x, multiple: int):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, _up(x.shape[-1], multiple) - x.shape[-1])])
