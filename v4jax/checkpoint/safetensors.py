"""Reading and writing the safetensors container, without torch.

    8 bytes   little-endian length n of the header
    n bytes   JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__"
    rest      row-major little-endian data, offsets counted from here

The safetensors package cannot hand FP8 and E8M0 tensors to NumPy (checked with 0.8.0), hence this
reader. Local files are mapped, not read: a view costs nothing until it is copied. Of those in object
stores the header is read, and then what is asked for.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np

from v4jax import stores
from v4jax.checkpoint.errors import CheckpointError

# Tag in the file -> NumPy dtype. I8 holds packed FP4 in V4's files; readers view it as uint8.
DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}
_MAX_HEADER = 100_000_000
_MAX_DIMENSIONS, _MAX_SIZE = 8, 2**48  # of a shape that is no nonsense


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file."""

    tag: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


class SafetensorsFile:
    """One file, here or in a store.

    Raises:
      FileNotFoundError: there is none.
      CheckpointError: the header is not valid, or does not fit the file (say, a broken download).
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._file = stores.open_file(path)
        size = self.size
        head = self._file.read(0, min(size, 8))
        (length,) = struct.unpack("<Q", head) if len(head) == 8 else (None,)
        if length is None or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(
                f"{self.path}: header length {length} does not fit a file of {size} bytes: "
                "truncated, or not a safetensors file."
            )
        self.header = bytes(self._file.read(8, 8 + length))
        try:
            raw = json.loads(self.header)
            self.metadata: dict[str, str] = raw.pop("__metadata__", {})
            if not isinstance(self.metadata, dict):
                raise TypeError(f"__metadata__ is a {type(self.metadata).__name__}")
            self.tensors = {name: _tensor_info(entry, 8 + length) for name, entry in raw.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"{type(error).__name__}: {str(error)[:400]}"  # may quote all of it
            raise CheckpointError(f"{self.path}: the header is not valid: {what}.") from error
        problems, position = [], 8 + length
        for name, info in sorted(
            self.tensors.items(), key=lambda item: (item[1].begin, item[1].end)
        ):
            expected = math.prod(info.shape) * DTYPES[info.tag].itemsize
            if info.end - info.begin != expected:
                problems.append(
                    f"{name}: {info.end - info.begin} bytes, its shape needs {expected}"
                )
            elif info.begin < position:
                problems.append(f"{name}: overlaps the tensor before it")
            elif info.end > size:
                problems.append(f"{name}: ends at byte {info.end} of {size}, the file is truncated")
            position = max(position, info.end)
        if problems:
            raise CheckpointError(f"{self.path}:\n  " + "\n  ".join(problems))

    @property
    def size(self) -> int:
        """Of the whole file, in bytes."""
        return self._file.size

    @property
    def is_remote(self) -> bool:
        """Every view is a request to a store."""
        return self._file.is_remote

    def drop_pages(self) -> None:
        """Gives the memory of pages read so far back to the system; views stay valid."""
        self._file.drop_pages()

    def view(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """The tensor as a read-only array (bytes may be unaligned): over the mapping, or read.

        Args:
          first: with `count`, the first of so many elements, which come without the tensor's shape.
        """
        info = self.tensors[name]
        dtype, whole = DTYPES[info.tag], count is None
        count = math.prod(info.shape) if count is None else count
        begin = info.begin + first * dtype.itemsize
        data = self._file.read(begin, begin + count * dtype.itemsize)
        flat = np.frombuffer(data, dtype, count)
        return flat.reshape(info.shape) if whole else flat


def _tensor_info(entry: Mapping, data_start: int) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        shown = str(entry["dtype"])[:40]
        raise ValueError(f"dtype {shown!r} is unknown (known: {', '.join(DTYPES)})")
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    whole = len(shape) <= _MAX_DIMENSIONS and all(
        type(n) is int and 0 <= n < _MAX_SIZE for n in (begin, end, *shape)
    )
    if not whole or end < begin:
        raise ValueError(f"impossible offsets or shape in {str(entry)[:200]}")
    return TensorInfo(entry["dtype"], shape, data_start + begin, data_start + end)


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to write. `read` is called when its turn comes and may be expensive."""

    name: str
    tag: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPES[self.tag].itemsize


def write_safetensors(
    path: str | os.PathLike,
    tensors: Iterable[NewTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file, one tensor in memory at a time. It appears whole or not at all.

    Raises:
      ValueError: two tensors of one name, or data that has not the dtype or shape that it was
        announced with.
    """
    tensors = list(tensors)
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("two tensors have the same name.")
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.tag,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    path = os.fspath(path)
    temporary = f"{path}.{os.getpid()}.new"
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(encoded)))
            file.write(encoded)
            for tensor in tensors:
                data = tensor.read()
                if data.dtype != DTYPES[tensor.tag] or data.shape != tensor.shape:
                    raise ValueError(
                        f"{tensor.name} is {data.dtype}{list(data.shape)}: expected "
                        f"{tensor.tag}{list(tensor.shape)}."
                    )
                file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
