"""Rows of one part of a batch: from the devices to host memory, and back.

Steps give arrays [G, ...] with a row a part, each on the devices of its part. What leaves the devices is one
row, and where several processes run the steps every one of them gets it: all schedulers decide alike, and
the row can go back into any part.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Bytes that go from one process to the others at once: one program for rows of all shapes.
PIECE = 2**22


def fetch_row(arrays: Any, part: int) -> Any:
    """Row `part` of arrays [G, ...] that are cut by it, as NumPy arrays [1, ...] on every process.

    Args:
      arrays: a tree of them; all lie on devices of the same processes, which call this together.
    """
    leaves, tree = jax.tree.flatten(arrays)
    rows: Sequence[np.ndarray | None] = [_own_row(leaf, part) for leaf in leaves]
    if not all(leaf.is_fully_addressable for leaf in leaves):
        rows = _from_owner(leaves, rows, part)
    return jax.tree.unflatten(tree, rows)


def spread(arrays: Any, parts: int, rows: jax.sharding.Sharding | None) -> Any:
    """The inverse, for steps that take the row of whichever part they write to: it is that of all.

    Args:
      arrays: a tree of NumPy arrays [1, ...], the same on all processes.
      parts: G.
      rows: how arrays with a row a part lie; None: on one device.
    """

    def everywhere(x: np.ndarray) -> jax.Array:
        if rows is None:
            return jax.device_put(x)
        return jax.make_array_from_callback((parts, *x.shape[1:]), rows, lambda _: x)

    return jax.tree.map(everywhere, arrays)


def place(array: np.ndarray, rows: jax.sharding.Sharding | None) -> jax.Array:
    """An array with a row a slot on the devices; the same on all processes.

    A copy: on a CPU jax may read an array itself, which its owner goes on to change.
    """
    if rows is None:
        return jax.device_put(array.copy())
    return jax.make_array_from_callback(array.shape, rows, lambda at: array[at].copy())


def _own_row(array: jax.Array, part: int) -> np.ndarray | None:
    """The row, if a device of this process has it."""
    for shard in array.addressable_shards:
        if (shard.index[0].start or 0) == part:
            return np.asarray(shard.data)
    return None


def _from_owner(
    leaves: Sequence[jax.Array], own: Sequence[np.ndarray | None], part: int
) -> list[np.ndarray]:
    """The rows, from the process of the first device that has them."""
    described = [((1, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
    is_owner = _owner(leaves[0], part) == jax.process_index()
    return shared(own if is_owner else None, described)


def shared(
    own: Sequence[np.ndarray | None] | None, described: Sequence[tuple[Sequence[int], Any]]
) -> list[np.ndarray]:
    """Arrays of one process, on all of them, which call this together.

    Args:
      own: the arrays; None on all processes but one.
      described: shape and dtype of each.
    """
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in described]
    buffer = np.zeros(-(-sum(sizes) // PIECE) * PIECE, np.uint8)
    ends = np.cumsum([0, *sizes])
    for row, begin, end in zip(own or (), ends, ends[1:]):
        assert row is not None
        buffer[begin:end] = np.ascontiguousarray(row).reshape(-1).view(np.uint8)
    for piece in buffer.reshape(-1, PIECE):
        piece[:] = multihost_utils.broadcast_one_to_all(piece, is_source=own is not None)
    return [
        buffer[begin:end].view(dtype).reshape(shape)
        for (shape, dtype), begin, end in zip(described, ends, ends[1:])
    ]


def _owner(array: jax.Array, part: int) -> int:
    """The process whose row it is: the same answer on all of them."""
    places: dict[Any, Any] = dict(array.sharding.devices_indices_map(array.shape))
    return next(device.process_index for device, at in places.items() if (at[0].start or 0) == part)
