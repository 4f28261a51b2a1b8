"""What one layer makes and later layers use: rows of compressed KV, and each query's picks of them.

    layer 2   compressor, indexer               makes rows and picks       CSA
    layer 3   entries_from=2, selection_from=2  uses both                  CSA reuse
    layer 4   entries_from=2                    picks from them by itself  CSA reindex
    layer 5   entries_from=2, selection_from=4  uses rows and other picks  CSA reuse

A layer has queries, a sliding window and a sink of its own in any case; an indexer of its own has keys of
its own, made of its own input. Who makes something keeps it in the cache, and nobody else does.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax

from pallas_kernels.formats.pages import Pages
from pallas_kernels.selection import Selection
from v4jax.config import LayerSpec


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["entries", "selection"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Shared:
    """What a layer has made, or is given of what others have. None is nothing."""

    entries: jax.Array | Pages | None = None  # [B, S, H] compressed rows, of all devices' tokens
    selection: Selection | None = None  # of [B, T] queries, those of this device

    @staticmethod
    def of(spec: LayerSpec, made: Mapping[int, "Shared"]) -> "Shared":
        """What a layer is given of what earlier layers have made, by their index."""
        entries = selection = None
        if spec.entries_from is not None:
            entries = made[spec.entries_from].entries
        if spec.selection_from is not None:
            selection = made[spec.selection_from].selection
        return Shared(entries, selection)
