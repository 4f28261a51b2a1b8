"""From one storage format to another: a matrix at a time, in parts that fit a cache."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from v4jax.checkpoint.codecs import E8M0, TILE, Matrix, count_tiles, expand_fp4, quantize
from v4jax.checkpoint.safetensors import DTYPES

_PART = 2**20  # values


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a tensor is stored: safetensors dtypes of its data and of its scale."""

    tag: str
    scale_tag: str | None = None

    def __str__(self) -> str:
        name = {"I8": "fp4", "F8_E4M3": "fp8"}.get(self.tag, self.tag.lower())
        return f"{name}, F32 scales" if self.scale_tag == "F32" else name

    def data_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Stored shape of a tensor of this many weights along each axis."""
        return (shape[0], shape[1] // 2) if self.tag == "I8" else shape

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Stored shape of the scale of a quantised matrix."""
        rows, cols = shape
        return (rows, cols // 32) if self.tag == "I8" else (-(-rows // TILE), -(-cols // TILE))


# A conversion to a format further left rounds: that is what was asked for. Others must be exact.
_BY_PRECISION = ("I8", "F8_E4M3", "BF16", "F16", "F32")


@dataclasses.dataclass(frozen=True)
class Recoded:
    """A matrix in another format, and what that did to its values."""

    matrix: Matrix
    max_error: float = 0.0  # largest |new - old|
    largest: float = 0.0  # largest |old|, where there is an error
    saturated: int = 0  # values clipped to the largest of their block
    rounded: int = 0  # values that changed although the formats promise an exact conversion
    rounded_tiles: int = 0  # blocks of 128 x 128 with such values


def recode(old: Matrix, source: Storage, target: Storage) -> Recoded:
    """`old` [out, in] (or a vector), stored as `source`, in the format `target`.

    Codes are kept, or moved to FP8, where that is exact. Else the values are rounded to nearest, by
    the rules of `quantize`.

    Raises:
      OverflowError: values that float32, or the target, cannot hold.
    """
    new: Matrix | None = None
    saturated, is_exact, scale = 0, False, None
    if old.scale is not None and source.scale_tag and target.scale_tag:
        scale = _as_e8m0(old.scale)
    if scale is not None and source.tag == target.tag:
        new, is_exact = Matrix(old.data, scale), True
    elif scale is not None and (source.tag, target.tag) == ("I8", "F8_E4M3"):
        new, lossy_tiles = expand_fp4(Matrix(old.data, scale))
        is_exact = lossy_tiles == 0
    if new is None or not is_exact:
        with np.errstate(over="ignore", invalid="ignore"):
            values = old.decode()
            if new is None and target.scale_tag:
                _require_finite(values, "float32")
                new, saturated = quantize(values, "fp4" if target.tag == "I8" else "fp8")
            elif new is None:
                new = Matrix(values.astype(DTYPES[target.tag]))
            decoded = new.decode()
        _require_finite(decoded, target.tag)
    if target.scale_tag == "F32" and new.scale is not None:
        new = dataclasses.replace(new, scale=new.scale.astype(np.float32))
    if is_exact:
        return Recoded(new)
    error = np.abs(decoded - values)
    result = Recoded(
        new,
        max_error=float(error.max(initial=0)),
        largest=float(np.abs(values).max(initial=0)),
        saturated=saturated,
    )
    may_round = _BY_PRECISION.index(target.tag) < _BY_PRECISION.index(source.tag)
    if may_round or not result.max_error:
        return result
    changed = error > 0
    return dataclasses.replace(
        result, rounded=int(np.count_nonzero(changed)), rounded_tiles=count_tiles(changed)
    )


def _require_finite(values: np.ndarray, what: str) -> None:
    if not np.isfinite(values).all():
        raise OverflowError(f"it has values that {what} cannot hold.")


def _as_e8m0(scale: np.ndarray) -> np.ndarray | None:
    """Scales as E8M0, or None if one is not a power of two."""
    if scale.dtype == E8M0:
        return scale
    exact = scale.astype(E8M0)
    return exact if np.array_equal(exact.astype(np.float32), scale) else None


def parts(matrix: Matrix) -> Iterator[Matrix]:
    """The matrix in parts of whole tiles of rows, which convert independently of each other."""
    data, scale = matrix.data, matrix.scale
    if data.ndim < 2:
        yield matrix
        return
    rows = TILE * max(1, _PART // (TILE * max(1, data.shape[1])))
    per_scale = 1 if scale is None or len(scale) == len(data) else TILE
    for start in range(0, len(data), rows):
        stop = min(start + rows, len(data))
        part = None if scale is None else scale[start // per_scale : -(-stop // per_scale)]
        yield Matrix(data[start:stop], part)


def join(results: Sequence[Recoded]) -> Recoded:
    """What the parts of a matrix became, as one."""

    def together(arrays: list[np.ndarray]) -> np.ndarray:
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    data = together([r.matrix.data for r in results])
    scales = [r.matrix.scale for r in results if r.matrix.scale is not None]
    return Recoded(
        Matrix(data, together(scales) if scales else None),
        max_error=max(r.max_error for r in results),
        largest=max(r.largest for r in results),
        saturated=sum(r.saturated for r in results),
        rounded=sum(r.rounded for r in results),
        rounded_tiles=sum(r.rounded_tiles for r in results),
    )
