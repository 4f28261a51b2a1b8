"""Figures that others published of V4-Flash on slices, and this project's bound for the same work.

A share says how far a measured run of another program is from a bound of this one. It is no measurement
of this project. The programs differ: in formats of weights and caches, in how prompts are cut and
experts spread, and in what a request costs beside the model.
"""

import dataclasses
from typing import Literal

from v4jax.config import V4Config
from v4jax.planning.capacity import Full, Workload, fullest
from v4jax.planning.topologies import Slice

PRIMATRIX = "primatrix/sglang-jax, V4 baseline"
DEPLOYMENT = "jawadaminGOOG/DSV4-Flash-Deployment"
K = 1024


@dataclasses.dataclass(frozen=True)
class Published:
    """One figure. `batch`: requests that run together."""

    model: str
    topology: str
    workload: Workload
    batch: int
    value: float
    unit: Literal["ms a token", "ms a prompt", "tokens/s", "generated tokens/s"]
    source: str

    @property
    def is_time(self) -> bool:
        """Whether less is better."""
        return self.unit.startswith("ms")

    @property
    def name(self) -> str:
        """The work, for a table."""
        work = self.workload.name
        if self.unit == "ms a prompt":
            work = f"prompt of {dataclasses.replace(self.workload, answer=0).name.split()[-1]}"
        return f"{work}, {self.batch} at once"


# Contexts of single streams and the 512 requests of the last two figures are not stated: assumed.
FIGURES = (
    Published("flash", "tpu7x:2x2x1", Workload(8 * K), 1, 7.61, "ms a token", PRIMATRIX),
    Published("flash", "tpu7x:2x2x1", Workload(8 * K, K), 1, 263, "ms a prompt", PRIMATRIX),
    Published("flash", "tpu7x:2x2x1", Workload(32 * K, K), 1, 1100, "ms a prompt", PRIMATRIX),
    Published("flash", "tpu7x:2x2x1", Workload(8 * K, K), 160, 13_929, "tokens/s", PRIMATRIX),
    Published("flash", "tpu7x:2x2x1", Workload(8 * K, K), 64, 13_088, "tokens/s", PRIMATRIX),
    Published("flash", "v6e:4x4", Workload(K), 1, 27.7, "ms a token", DEPLOYMENT),
    Published("flash", "v6e:4x4", Workload(K, K), 512, 8464, "generated tokens/s", DEPLOYMENT),
    Published("flash", "v6e:4x4", Workload(K, 8 * K), 512, 8068, "generated tokens/s", DEPLOYMENT),
    Published("flash", "v6e:4x4", Workload(8 * K, K), 512, 1758, "generated tokens/s", DEPLOYMENT),
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A figure beside the bound of the mesh that is fastest at it."""

    figure: Published
    bound: float  # in the figure's unit
    mesh: str

    @property
    def share(self) -> float:
        """Published speed of the bound's: 1 would be as fast."""
        figure = self.figure
        return self.bound / figure.value if figure.is_time else figure.value / self.bound


def compare(cfg: V4Config, figure: Published) -> Comparison:
    """The bound of a figure's work.

    Raises:
      ValueError: so many requests fit under no mesh.
    """

    def value(full: Full) -> float:
        match figure.unit:
            case "ms a token":
                return full.step.seconds * 1e3
            case "ms a prompt":
                assert full.prompt is not None  # such work has answers
                return full.prompt.seconds * 1e3
            case "tokens/s":
                return full.tokens_per_second
            case _:
                return full.generated_per_second

    choice = fullest(cfg, Slice.of(figure.topology), figure.workload, batch=figure.batch)
    best = (min if figure.is_time else max)([choice.full, *choice.others], key=value)
    return Comparison(figure, value(best), best.mesh)
