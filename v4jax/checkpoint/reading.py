"""From tensors in files to arrays on devices, some rows at a time, by several threads.

A process reads what its own devices hold, and a row once, however many of them hold a part of it.
"""

import concurrent.futures
import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from pallas_kernels.formats.quantize import (
    FP4_WEIGHT_BLOCK,
    FP8_WEIGHT_BLOCK,
    QuantizedArray,
    expand_to_fp8,
    fp4_block,
    pack_planes,
)
from sharding import fitting
from v4jax import stores
from v4jax.checkpoint import names
from v4jax.checkpoint.errors import CheckpointError
from v4jax.checkpoint.folders import Checkpoint, Tensor, readers
from v4jax.checkpoint.leaves import Leaf
from v4jax.config import V4Config

PIECE = 2048  # rows of a matrix in a mapped file that a thread copies
STRIP = 64  # rows of a matrix that are turned together

# Columns of some rows in the file (none if the tensor is a vector), and where they go.
_Target = tuple[tuple[slice, ...], np.ndarray]


class Reading:
    """A parameter that is being read: `start` sets the threads to work, `finish` waits for them."""

    def __init__(self, checkpoint: Checkpoint, leaf: Leaf, table: np.ndarray, tags: list[str]):
        sharding = leaf.variable.get_value().sharding
        self._leaf, tables, self._block = leaf, [table], None
        if tags[0] in ("I8", "F8_E4M3"):
            self._block = FP4_WEIGHT_BLOCK if tags[0] == "I8" else FP8_WEIGHT_BLOCK
            tables.append(np.vectorize(names.scale_name, otypes=[object])(table))
        self._buffers = [_Buffers(checkpoint, leaf, sharding, table) for table in tables]

    def start(self) -> int:
        """Returns the bytes that the parameter takes on this host until it is finished."""
        return sum(buffers.start() for buffers in self._buffers)

    def finish(self) -> jax.Array | QuantizedArray:
        """The parameter, placed.

        Raises:
          CheckpointError: a tensor is damaged, cannot be read, or not be held as asked.
        """
        arrays = [buffers.finish() for buffers in self._buffers]
        if self._block is None:
            return arrays[0]
        values, scale = arrays
        weight = QuantizedArray(values, scale, self._block)
        is_expanded = weight.is_fp4 and self._leaf.stored == "fp8"
        return _expand(self._leaf, weight) if is_expanded else weight

    def cancel(self) -> None:
        """Gives up what has not begun."""
        for buffers in self._buffers:
            buffers.cancel()


def _expand(leaf: Leaf, weight: QuantizedArray) -> QuantizedArray:
    """FP4 experts as FP8, placed as FP8 ones would have been."""
    try:
        expanded = expand_to_fp8(weight)
    except ValueError as error:
        first = leaf.released_names().flat[0]
        raise CheckpointError(f"{first} and its likes: {error}") from error
    sharding = leaf.variable.get_value().sharding
    if sharding is None:
        return expanded
    place = lambda array: jax.device_put(array, _fitting(sharding, array.shape))
    return dataclasses.replace(expanded, values=place(expanded.values), scale=place(expanded.scale))


class _Buffers:
    """Host memory of an array [layers?, experts?, ...], filled from one tensor per element of `table`.

    There is one buffer for each part that devices of this process hold.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        leaf: Leaf,
        sharding: jax.sharding.Sharding | None,
        table: np.ndarray,
    ):
        sample = checkpoint.tensors[table.flat[0]]
        matrix = sample.shape[::-1] if leaf.slot.transposed else sample.shape
        dtypes = {checkpoint.tensors[name].dtype for name in table.flat}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        self._dtype = np.dtype(np.int32) if leaf.stored == "int" else dtype
        self._shape = (*table.shape, *matrix)
        self._sharding = None if sharding is None else _fitting(sharding, self._shape)
        self._checkpoint, self._table = checkpoint, table
        self._is_transposed = leaf.slot.transposed
        self._parts: dict[tuple, np.ndarray] = {}
        self._futures: list[concurrent.futures.Future] = []

    def start(self) -> int:
        """Makes the buffers and lets threads fill them; returns their bytes."""
        whole = tuple(slice(None) for _ in self._shape)
        indices: list[tuple[slice, ...] | None] = [whole]
        if self._sharding is not None:
            indices = list(self._sharding.addressable_devices_indices_map(self._shape).values())
        bounds = {self._bounds(index): None for index in indices if index is not None}  # each once
        self._parts = {
            key: _aligned([stop - start for start, stop in key], self._dtype) for key in bounds
        }
        for tensor, first, last, targets in self._pieces():
            pool = readers(tensor.file.is_remote)
            copying = pool.submit(_copy, self._checkpoint, tensor, first, last, targets)
            self._futures.append(copying)
        return sum(part.nbytes for part in self._parts.values())

    def finish(self) -> jax.Array:
        """The array, once all is read."""
        for future in self._futures:
            future.result()  # raises what a thread has raised
        if self._sharding is None:
            (part,) = self._parts.values()
            return jax.device_put(part, may_alias=True)  # nothing is written to it from now on
        held = self._sharding.addressable_devices_indices_map(self._shape)
        places = {device: index for device, index in held.items() if index is not None}
        parts = [self._parts[self._bounds(index)] for index in places.values()]
        arrays = jax.device_put(parts, list(places), may_alias=True)
        return jax.make_array_from_single_device_arrays(
            self._shape, self._sharding, arrays, dtype=self._dtype
        )

    def cancel(self) -> None:
        """Gives up what has not begun, and waits for the rest."""
        for future in self._futures:
            future.cancel()
        concurrent.futures.wait(self._futures)

    def _bounds(self, index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
        return tuple(s.indices(n)[:2] for s, n in zip(index, self._shape))

    def _pieces(self) -> Iterator[tuple[Tensor, int, int, list[_Target]]]:
        """Rows of a tensor and where their columns go, in the file's orientation."""
        outer = self._table.ndim
        for position in np.ndindex(*self._table.shape):
            by_rows: dict[tuple[int, int], list[_Target]] = {}
            for bounds, part in self._parts.items():
                if all(start <= i < stop for i, (start, stop) in zip(position, bounds)):
                    out = part[tuple(i - start for i, (start, _) in zip(position, bounds))]
                    inner = bounds[outer:]
                    if self._is_transposed:
                        out, inner = out.T, inner[::-1]
                    cols = tuple(slice(*limits) for limits in inner[1:])
                    by_rows.setdefault(inner[0], []).append((cols, out))
            tensor = self._checkpoint.tensors[self._table.item(position)]
            for (start, stop), targets in by_rows.items():
                step = _rows_at_once(tensor)
                for first in range(start, stop, step):
                    last = min(first + step, stop)
                    some = [(cols, out[first - start : last - start]) for cols, out in targets]
                    yield tensor, first, last, some


def _rows_at_once(tensor: Tensor) -> int:
    """Rows that one thread reads: of a store, those of one request."""
    if not tensor.file.is_remote:
        return PIECE
    return max(1, stores.PIECE_BYTES * tensor.shape[0] // max(1, tensor.nbytes))


def _copy(
    checkpoint: Checkpoint, tensor: Tensor, first: int, last: int, targets: list[_Target]
) -> None:
    """Rows of a tensor into buffers, few enough at a time that they stay in the processor's cache.

    A whole matrix is turned several times more slowly.
    """
    rows = tensor.rows(first, last)
    for start in range(0, len(rows), STRIP):
        strip = rows[start : start + STRIP]
        for cols, out in targets:
            data = _planes(strip, *cols) if tensor.tag == "I8" else strip[:, *cols]
            refuse_damage(checkpoint.config, tensor.stored_name, data)
            out[start : start + len(data)] = data


def _planes(data: np.ndarray, cols: slice) -> np.ndarray:
    """Columns of rows [n, in / 2] of packed FP4, in the order they have in memory, where they lie turned."""
    width = data.shape[1]
    half = fp4_block(2 * width) // 2
    start, stop, _ = cols.indices(width)
    first, last = start - start % half, stop + -stop % half  # whole blocks
    turned = np.ascontiguousarray(data[:, first:last].T)
    return pack_planes(turned)[start - first : stop - first].T


ALIGNMENT = 64  # bytes, so that a CPU device takes the memory as it is


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Memory that `jax.device_put(..., may_alias=True)` does not copy on a CPU."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _fitting(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The sharding on real devices, replicated along axes it does not divide (block scales)."""
    if not isinstance(sharding, jax.NamedSharding):
        return sharding
    mesh = jax.sharding.get_mesh()  # the sharding of an abstract model has an abstract one
    return jax.NamedSharding(mesh, fitting(sharding.spec, shape, dict(mesh.shape)))


# Codes that no weight has: NaN in e4m3 (either sign) and in E8M0.
_NAN_CODES = {"float8_e4m3fn": (0x7F, 0x7F), "float8_e8m0fnu": (0xFF, 0xFF)}


def refuse_damage(config: V4Config, name: str, data: np.ndarray) -> None:
    """Raises for values that no checkpoint has: NaN codes, and experts that do not exist."""
    if data.dtype.name in _NAN_CODES:
        mask, code = _NAN_CODES[data.dtype.name]
        if np.any((data.view(np.uint8) & mask) == code):
            raise CheckpointError(f"{name} has NaN codes ({data.dtype.name}): it is damaged.")
    elif data.dtype.kind == "i":
        experts = config.moe.num_experts
        if data.size and not (0 <= data.min() and data.max() < experts):
            raise CheckpointError(
                f"{name} has values in {data.min()}..{data.max()}: expected experts 0..{experts - 1}."
            )
    elif data.size and _has_nan_or_infinity(data):
        raise CheckpointError(f"{name} has NaN or infinite values: it is damaged.")


# Where a float's exponent is all ones, it is NaN or infinite.
_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F80_0000}


def _has_nan_or_infinity(data: np.ndarray) -> bool:
    """By the bits: NumPy's own test of bfloat16 takes longer than reading the file."""
    if data.dtype.name not in _EXPONENTS:
        return not np.isfinite(data).all()
    bits = data.view(f"u{data.dtype.itemsize}")
    mask = bits.dtype.type(_EXPONENTS[data.dtype.name])
    return bool(np.max(bits & mask) == mask)
