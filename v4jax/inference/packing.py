"""Small arrays of all layers in one: what the host does for a call, it does for every array.

The partial sums of open windows are 12 arrays of a CSA layer and 3 of an HCA layer, a few kB of a sequence
each: 312 of the 435 arrays of Flash's slots. Here they lie side by side in one. Steps take them apart for the
model and put them together again, once a call.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.side_by_side import apart, side_by_side
from v4jax.nn.cache import LayerCache


@dataclasses.dataclass(frozen=True)
class PackedStates:
    """What the layers of S sequences hold beside pages."""

    layers: tuple[LayerCache, ...]  # without the sums
    sums: jax.Array | None  # [S, W] float32 of open windows, by layer; None: no layer has any
    tree: Any  # how they belong to the layers
    widths: tuple[int, ...]  # of each of them

    @staticmethod
    def of(states: Sequence[LayerCache]) -> "PackedStates":
        """From the layers' states."""
        leaves, tree = jax.tree.flatten([(state.pool, state.index_pool) for state in states])
        layers = tuple(dataclasses.replace(x, pool=None, index_pool=None) for x in states)
        sums = side_by_side(leaves) if leaves else None
        return PackedStates(layers, sums, tree, tuple(leaf.shape[1] for leaf in leaves))

    def apart(self) -> tuple[LayerCache, ...]:
        """The layers' states again."""
        leaves = [] if self.sums is None else apart(self.sums, self.widths)
        pools = jax.tree.unflatten(self.tree, leaves)
        return tuple(
            dataclasses.replace(layer, pool=pool, index_pool=index_pool)
            for layer, (pool, index_pool) in zip(self.layers, pools, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


jax.tree_util.register_dataclass(
    PackedStates, data_fields=["layers", "sums"], meta_fields=["tree", "widths"]
)
