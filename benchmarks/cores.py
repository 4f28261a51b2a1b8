"""Which part of a kernel one of a device's cores runs: on v5p a device has two."""

import math
from collections.abc import Iterator

from jax.extend.core import Jaxpr, jaxprs_in_params


def busiest(jaxpr: Jaxpr, cores: int) -> dict[str, float]:
    """Of each Pallas kernel of a program, by its name, the part that its busiest core runs.

    The compiler cuts one axis of a grid over the cores, of those that are `parallel`; here the one that
    leaves least to the busiest. A kernel without such an axis, or with one step along it, runs on one core.
    """
    found: dict[str, float] = {}
    for params in _kernels(jaxpr):
        compiler_params = params["compiler_params"]  # None where the kernel gives none
        semantics = compiler_params.dimension_semantics or () if compiler_params else ()
        sizes = [
            size
            for size, kind in zip(params["grid_mapping"].grid, semantics)
            if kind == "parallel" and isinstance(size, int)
        ]
        part = min((math.ceil(size / cores) / size for size in sizes), default=1.0)
        found[params["name"]] = max(part, found.get(params["name"], 0.0))
    return found


def part_of(parts: dict[str, float], kernel: str) -> float:
    """Of the kernel that a schedule is of, which jax may have named after a transformation, too.

    Raises:
      ValueError: no kernel has this name.
    """
    names = [name for name in parts if name in kernel]
    if not names:
        raise ValueError(f"{kernel} is none of the kernels {sorted(parts)}.")
    return parts[max(names, key=len)]


def _kernels(jaxpr: Jaxpr) -> Iterator[dict]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params
        for inner in jaxprs_in_params(equation.params):
            yield from _kernels(inner)
