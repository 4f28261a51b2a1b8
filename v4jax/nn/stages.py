"""Which layers are stacked and scanned: the repeating patterns of a list of layers."""

import dataclasses
from collections.abc import Sequence

from v4jax.config import LayerSpec, sources


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """`pattern` repeated `repeats` times; the unit of `jax.lax.scan`."""

    pattern: tuple[LayerSpec, ...]
    repeats: int


def plan_stages(layers: Sequence[LayerSpec], max_period: int = 2) -> tuple[StagePlan, ...]:
    """Cuts a heterogeneous list of layers into the fewest repeating patterns, greedily.

    Ratios [0, 0, 4, 128, 4, 128, 4] give 2 x (0), 2 x (4, 128), 1 x (4). Layers that share, those that
    make and those that use, are repeated in no pattern: each is a stage of its own, which has what it
    makes as a result and what it uses as an argument.
    """
    used = sources(layers)
    # By its number a layer that shares is told from all others.
    kinds = [
        (spec, index if index in used or spec.entries_from is not None else -1)
        for index, spec in enumerate(layers)
    ]
    stages, start = [], 0
    while start < len(layers):
        best = StagePlan((layers[start],), 1)
        for period in range(1, max_period + 1):
            pattern = kinds[start : start + period]
            repeats = 1
            while kinds[start + repeats * period :][:period] == pattern:
                repeats += 1
            if repeats > 1 and repeats * period > len(best.pattern) * best.repeats:
                best = StagePlan(tuple(layers[start : start + period]), repeats)
        stages.append(best)
        start += len(best.pattern) * best.repeats
    return tuple(stages)
