"""Rows and keys of a few tokens as words, as `packed_rows.py` lays them out: a kernel for decoding.

| layout    | of               | takes                                        |
|-----------|------------------|----------------------------------------------|
| "rows"    | `PackedRows`     | 448 channels in e4m3 and 64 in bfloat16      |
| "columns" | `PackedColumns`  | the same                                     |
| "keys"    | `PackedKeys`     | 128 channels in e2m1                         |

Why a kernel: XLA makes ten to twenty operations of a row, as bytes that become a word lie in other
channels. Where these are side by side, a product with a matrix of zeros and ones brings every fourth
channel together; bytes are whole numbers that bfloat16 has, so it is exact.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import UInt32

from pallas_kernels import dispatch
from pallas_kernels.formats.quantize import join_codes, rounded_to
from pallas_kernels.formats.quantize_rows import e2m1_codes, round_to_grid, scale_bits
from pallas_kernels.formats.records import INDEX_KEYS, KV_ROWS

LANES = 128
MOST_ROWS = 256
BLOCK_ROWS = 32
ROW, ROPE, KEY = 512, 64, 128  # channels that the kernel takes
_WORDS = {"rows": 146, "columns": 146, "keys": 17}


@dataclasses.dataclass(frozen=True)
class Packing:
    """How rows or keys, which are in their format already, become words."""

    layout: str  # "rows", "columns" or "keys"
    rope_dim: int
    otherwise: Callable[[jax.Array], jax.Array]  # makes them by XLA, of any widths

    def words(
        self, x: jax.Array, implementation: dispatch.Implementation = None
    ) -> UInt32[jax.Array, "*rows words"]:
        """The words of rows or keys x [.., W], float32 or bfloat16.

        Raises:
          ValueError: an implementation that cannot run (see `dispatch.choose`).
        """
        chosen = dispatch.choose(implementation, unsupported=self._unsupported(x))
        if chosen in ("tpu", "interpret"):
            return _call(x, self.layout, chosen == "interpret")
        return self.otherwise(x)

    def in_kernel(self, x: jax.Array) -> Callable | None:
        """Writes the words of rows in one reference to another, of whole lines; None: not of these."""
        return None if self._unsupported(x) else _KERNELS[self.layout]

    def _unsupported(self, x: jax.Array) -> str | None:
        return _unsupported(x, self.layout, self.rope_dim)


def _unsupported(x: jax.Array, layout: str, rope_dim: int) -> str | None:
    width, num_rows = x.shape[-1], x.size // max(x.shape[-1], 1)
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x is {x.dtype}: the kernel takes float32 or bfloat16"
    if (width, rope_dim) != ((KEY, 0) if layout == "keys" else (ROW, ROPE)):
        return f"{layout} of {width} channels, {rope_dim} of them rotated: the kernel takes V4's"
    if not 0 < num_rows <= MOST_ROWS:
        return f"{num_rows} rows: the kernel takes 1 to {MOST_ROWS}"
    return None


def _call(x: jax.Array, layout: str, interpret: bool) -> jax.Array:
    *batch, width = x.shape
    rows, count = x.reshape(-1, width), _WORDS[layout]
    own = min(BLOCK_ROWS, rows.shape[0])
    out = pl.pallas_call(
        _KERNELS[layout],
        grid=(pl.cdiv(rows.shape[0], own),),
        in_specs=[pl.BlockSpec((own, width), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((own, count), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], count), jnp.uint32),
        interpret=interpret,
        name=f"words_of_{layout}",
    )(rows)
    return out.reshape(*batch, count)


def _rows_kernel(x_ref, out_ref) -> None:
    """Channels of a word are 128 apart: registers are put together as they are."""
    tiles, lane = _tiles(x_ref)
    codes, scales = _coded(tiles, lane)
    bits = _bfloat16_bits(tiles[-1])
    codes[-1] = jnp.where(lane < LANES - ROPE, codes[-1], bits >> 8)
    low = bits & 0xFF
    quarter = ROPE // 4
    shifts = [LANES - (LANES - ROPE + quarter * part) for part in range(4)]
    lows = _joined([low if not shift else _roll(low, shift) for shift in shifts])
    second = jnp.where(lane < quarter, lows, 0)
    second = jnp.where(lane == quarter, _joined(scales[0::2]), second)
    second = jnp.where(lane == quarter + 1, _joined(scales[1::2]), second)
    _store(out_ref, [_joined(codes), second])


def _columns_kernel(x_ref, out_ref) -> None:
    """Channels of a word are side by side: products bring together those of its first byte, and so on."""
    tiles, lane = _tiles(x_ref)
    codes, scales = _coded(tiles, lane)
    count = x_ref.shape[0]
    codes[-1] = jnp.where(lane < LANES - ROPE, codes[-1], 0)
    channel, word = _iotas()
    stacked = jnp.concatenate(codes)
    of_tiles = _joined([_moved(stacked, channel == 4 * word + byte) for byte in range(4)])
    first = jnp.zeros(lane.shape, jnp.int32)
    for tile in range(len(codes)):
        own = of_tiles[tile * count : (tile + 1) * count]
        first |= own if tile == 0 else _roll(own, tile * LANES // 4)
    bits = _bfloat16_bits(tiles[-1])
    stacked = jnp.concatenate([bits & 0xFF, bits >> 8])
    moved = [_moved(stacked, (channel == LANES - ROPE + 2 * word + i)) for i in range(2)]
    rope = _joined([part for pair in moved for part in (pair[:count], pair[count:])])
    begin = (ROW - ROPE) // 4  # of 32 words, which reach into the second line
    rope = _roll(jnp.where(lane < ROPE // 2, rope, 0), begin)
    end = begin + ROPE // 2 - LANES
    second = jnp.where(lane < end, rope, 0)
    second = jnp.where(lane == end, _joined(scales[:4]), second)
    second = jnp.where(lane == end + 1, _joined(scales[4:]), second)
    _store(out_ref, [jnp.where(lane < begin, first, rope), second])


def _keys_kernel(x_ref, out_ref) -> None:
    (tile,), lane = _tiles(x_ref)
    bits, scales = _scales(tile, lane, INDEX_KEYS.block, INDEX_KEYS.values)
    codes = e2m1_codes(round_to_grid(tile, bits, INDEX_KEYS.values))
    half = INDEX_KEYS.block  # a byte has a channel, and the one so far behind it
    joined = join_codes(codes, _roll(codes, LANES - half))
    channel, word = _iotas()
    is_first = channel % (2 * half) < half
    place = channel // (2 * half) * half + channel % (2 * half)
    found = _joined([_moved(joined, is_first & (place == 4 * word + byte)) for byte in range(4)])
    used = KEY // 8
    _store(out_ref, [jnp.where(lane < used, found, _joined(scales))])


def _tiles(x_ref) -> tuple[list[jax.Array], jax.Array]:
    """float32 registers of 128 channels, and the lanes of one."""
    x = x_ref[...].astype(jnp.float32)
    tiles = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
    return tiles, jax.lax.broadcasted_iota(jnp.int32, tiles[0].shape, 1)


def _coded(tiles: Sequence[jax.Array], lane) -> tuple[list[jax.Array], list[jax.Array]]:
    """Codes of e4m3 of all channels, and scale bytes [n, 1] of those that are not rotated."""
    codes, scales = [], []
    for tile in tiles:
        bits, own = _scales(tile, lane, KV_ROWS.block, KV_ROWS.values)
        codes.append(_e4m3_codes(round_to_grid(tile, bits, KV_ROWS.values)))
        scales += own
    return codes, scales[: (ROW - ROPE) // KV_ROWS.block]


def _scales(tile, lane, block: int, fmt: str) -> tuple[jax.Array, list[jax.Array]]:
    """Bits of each channel's scale, and the scales' bytes [n, 1], block by block."""
    bits, own = jnp.zeros(tile.shape, jnp.int32), []
    for first in range(0, LANES, block):
        mine = (lane >= first) & (lane < first + block)
        amax = jnp.max(jnp.where(mine, jnp.abs(tile), 0.0), axis=1, keepdims=True)
        of_block = scale_bits(amax, fmt)
        bits = jnp.where(mine, of_block, bits)
        own.append(of_block >> 23)
    return bits, own


def _e4m3_codes(values: jax.Array) -> jax.Array:
    """float32 values of e4m3 -> codes 0..255; zero of either sign is code 0."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    subnormal = (jnp.abs(values) * 2.0**9).astype(jnp.int32)
    code = jnp.where(magnitude < 121 << 23, subnormal, (magnitude >> 20) - (120 << 3))
    code = jnp.minimum(code, 0x7F)  # NaN
    return jnp.where(code == 0, 0, code | (bits >> 24) & 0x80)


def _bfloat16_bits(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(rounded_to(x, jnp.bfloat16), jnp.int32)
    return (bits >> 16) & 0xFFFF


def _iotas() -> tuple[jax.Array, jax.Array]:
    """Rows and columns of a matrix that moves channels to words."""
    shape = (LANES, LANES)
    channel = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return channel, jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _moved(values: jax.Array, chosen: jax.Array) -> jax.Array:
    """Bytes [n, 128], each to the column that its row of `chosen` [128, 128] says, at most one each."""
    matrix = jnp.where(chosen, 1.0, 0.0).astype(jnp.bfloat16)
    whole = values.astype(jnp.float32).astype(jnp.bfloat16)
    return jnp.dot(whole, matrix, preferred_element_type=jnp.float32).astype(jnp.int32)


def _joined(values: Sequence[jax.Array]) -> jax.Array:
    """Words of up to four bytes, the first being the low one."""
    return functools.reduce(jnp.bitwise_or, [x << 8 * i for i, x in enumerate(values)])


def _roll(x: jax.Array, by: int) -> jax.Array:
    return pltpu.roll(x, by, 1)


def _store(out_ref, lines: Sequence[jax.Array]) -> None:
    for number, line in enumerate(lines):
        first = number * LANES
        last = min(first + LANES, out_ref.shape[1])
        out_ref[:, first:last] = jax.lax.bitcast_convert_type(line, jnp.uint32)[:, : last - first]


_KERNELS = {"rows": _rows_kernel, "columns": _columns_kernel, "keys": _keys_kernel}
