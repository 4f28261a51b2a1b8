"""Quantised matrices as files hold them, in NumPy: decoded, rounded, and FP4 made FP8.

| format | data                                          | scale                           |
|--------|-----------------------------------------------|---------------------------------|
| fp8    | float8_e4m3fn [out, in]                       | [ceil(out / 128), ceil(in / 128)] |
| fp4    | uint8 [out, in / 2], inputs 2r and 2r + 1 in byte r, low nibble first | [out, in / 32] |

The rules are those of `pallas_kernels.formats.quantize`, which has them for arrays in memory. Conversions
use NumPy so that they need no accelerator, compile nothing, and keep subnormal numbers.
"""

import dataclasses

import ml_dtypes
import numpy as np

from pallas_kernels.formats.quantize import (
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    FP4_AMAX_FLOOR,
    FP4_WEIGHT_BLOCK,
    FP8_AMAX_FLOOR,
    FP8_WEIGHT_BLOCK,
)

E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_GROUP = FP4_WEIGHT_BLOCK[0]  # inputs of an FP4 scale
TILE = FP8_WEIGHT_BLOCK[0]  # inputs, and outputs, of an FP8 scale

_BYTES = np.arange(256, dtype=np.uint8)
_E4M3_VALUES = _BYTES.view(E4M3).astype(np.float32)
_E2M1_VALUES = np.array([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], np.float32)
# Both values of a byte, as one element of eight bytes.
_E2M1_PAIRS = _E2M1_VALUES[np.stack([_BYTES & 15, _BYTES >> 4], axis=-1)].view(np.uint64)[:, 0]
# Where e2m1 codes change, and whether the boundary itself (a tie) goes up, to the even code.
_E2M1_BOUNDARIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_TIE_GOES_UP = (False, True, False, True, False, True, False)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix [out, in] as stored."""

    data: np.ndarray
    scale: np.ndarray | None = None  # of a quantised one

    @property
    def is_fp4(self) -> bool:
        """Two values per byte."""
        return self.data.dtype == np.uint8

    def decode(self) -> np.ndarray:
        """The values, float32 [out, in]."""
        if self.scale is None:
            return self.data.astype(np.float32)
        scale = self.scale.astype(np.float32)
        if self.is_fp4:
            values = (
                np.take(_E2M1_PAIRS, self.data).view(np.float32).reshape(len(scale), -1, _GROUP)
            )
            values *= scale[:, :, None]
            return values.reshape(len(scale), -1)
        values = np.take(_E4M3_VALUES, self.data.view(np.uint8))
        for i, row in enumerate(scale):  # of tiles
            rows = values[i * TILE : (i + 1) * TILE]
            rows *= np.repeat(row, TILE)[: values.shape[1]]
        return values


def quantize(values: np.ndarray, fmt: str) -> tuple[Matrix, int]:
    """Rounds float32 [out, in] to nearest, with the released power-of-two scales.

    Returns:
      the matrix, and how many values lay beyond the largest of the format and were clipped to it.

    Raises:
      ValueError: fp4 and a number of inputs that is not a multiple of 32.
    """
    rows, cols = values.shape
    if fmt == "fp8":
        tiles = _in_tiles(values)
        amax = np.abs(tiles).max(axis=(1, 3))
        scale = _scale(amax, E4M3_MAX, FP8_AMAX_FLOOR)
        tiles = tiles / scale[:, None, :, None]
        saturated = int(np.count_nonzero(np.abs(tiles) > E4M3_MAX))
        tiles = np.clip(tiles, -E4M3_MAX, E4M3_MAX).astype(E4M3)
        data = tiles.reshape(tiles.shape[0] * TILE, -1)[:rows, :cols]
        return Matrix(np.ascontiguousarray(data), scale.astype(E8M0)), saturated
    if cols % _GROUP:
        raise ValueError(f"{cols} inputs: fp4 needs a multiple of {_GROUP}.")
    groups = values.reshape(rows, -1, _GROUP)
    scale = _scale(np.abs(groups).max(axis=-1), E2M1_MAX, FP4_AMAX_FLOOR)
    scaled = groups / scale[:, :, None]
    magnitude = np.abs(scaled)
    code = np.zeros(scaled.shape, np.uint8)
    for boundary, tie_goes_up in zip(_E2M1_BOUNDARIES, _TIE_GOES_UP):
        code += magnitude >= boundary if tie_goes_up else magnitude > boundary
    code |= ((scaled < 0) & (code > 0)).view(np.uint8) << 3  # zero has one code
    code = code.reshape(rows, cols)
    packed = code[:, 0::2] | code[:, 1::2] << 4
    return Matrix(packed, scale.astype(E8M0)), int(np.count_nonzero(magnitude > E2M1_MAX))


def _scale(amax: np.ndarray, largest: float, floor: float) -> np.ndarray:
    """Smallest power of two >= amax / largest, in float32."""
    wanted = np.maximum(amax, np.float32(floor)) * np.float32(1 / largest)
    bits = wanted.view(np.int32)
    return ((bits >> 23) + ((bits & 0x7FFFFF) != 0) << 23).astype(np.int32).view(np.float32)


def _in_tiles(array: np.ndarray, tile: tuple[int, int] = FP8_WEIGHT_BLOCK) -> np.ndarray:
    """[rows, cols] -> [n, tile rows, m, tile cols], padded with zeros."""
    padding = [(0, -size % t) for size, t in zip(array.shape, tile)]
    padded = np.pad(array, padding)
    n, m = (size // t for size, t in zip(padded.shape, tile))
    return padded.reshape(n, tile[0], m, tile[1])


# A group of FP4 values whose scale is 2**(6 - d) times that of its tile: the e4m3 code of each e2m1
# code, and whether it stands for the same value. From d = 25 on everything rounds to zero.
_LARGEST_SHIFT = 6  # 6 * 2**6 <= 448 < 6 * 2**7
_SAFE_DISTANCE = 14  # 0.5 * 2**(6 - 14) is the smallest subnormal
_DISTANCES = 26
_EXACT_VALUES = np.ldexp(_E2M1_VALUES, _LARGEST_SHIFT - np.arange(_DISTANCES)[:, None])
_EXPANDED = _EXACT_VALUES.astype(E4M3)  # [distance, code]
_IS_EXACT = _EXPANDED.astype(np.float32) == _EXACT_VALUES
# Two codes at a time: [distance * 256 + byte].
_EXPANDED_PAIRS = np.ascontiguousarray(
    np.stack([_EXPANDED[:, _BYTES & 15], _EXPANDED[:, _BYTES >> 4]], axis=-1)
).view(np.uint16)
_PAIR_IS_EXACT = _IS_EXACT[:, _BYTES & 15] & _IS_EXACT[:, _BYTES >> 4]


def expand_fp4(matrix: Matrix) -> tuple[Matrix, int]:
    """FP4 as FP8: the same values where the scales of a tile are within 2**14 of each other.

    A tile of 128 x 128 gets the largest of its group scales divided by 2**6, as in the released
    `inference/convert.py`; the values of a group are multiplied by the rest, a power of two.

    Returns:
      the matrix, and the number of tiles that have values e4m3 cannot hold and were rounded.

    Raises:
      ValueError: the scales are not E8M0.
    """
    if matrix.scale is None or matrix.scale.dtype != E8M0:
        found = None if matrix.scale is None else matrix.scale.dtype
        raise ValueError(f"scales are {found}: expected {E8M0}.")
    rows = len(matrix.data)
    exponent = matrix.scale.view(np.uint8).astype(np.int16)  # [out, in / 32]
    groups = (TILE, TILE // _GROUP)
    largest = _in_tiles(exponent, groups).max(axis=(1, 3))  # [out / 128, in / 128]
    scale = np.maximum(largest - _LARGEST_SHIFT, 0)
    per_group = np.repeat(np.repeat(scale, groups[0], axis=0), groups[1], axis=1)
    distance = _LARGEST_SHIFT - (exponent - per_group[:rows, : exponent.shape[1]])
    table = np.minimum(distance, _DISTANCES - 1)[:, :, None] * 256
    index = (table + matrix.data.reshape(rows, -1, _GROUP // 2)).reshape(rows, -1)
    data = np.take(_EXPANDED_PAIRS, index).view(E4M3)
    is_exact = np.ones(exponent.shape, bool)
    if (distance > _SAFE_DISTANCE).any():
        is_exact = np.take(_PAIR_IS_EXACT, index).reshape(rows, -1, _GROUP // 2).all(axis=-1)
    rounded = _in_tiles(~is_exact, groups).any(axis=(1, 3))
    return Matrix(data, scale.astype(np.uint8).view(E8M0)), int(np.count_nonzero(rounded))


def count_tiles(mask: np.ndarray) -> int:
    """Number of tiles of 128 x 128 with a true element of `mask` [out, in]."""
    return int(np.count_nonzero(_in_tiles(mask).any(axis=(1, 3))))
