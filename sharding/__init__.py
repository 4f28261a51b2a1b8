"""Device meshes, the rules that place arrays on them, and programs over them."""

from sharding.mesh import AXES, make_mesh
from sharding.rules import (
    DECODE,
    PREFILL,
    TRAIN,
    AxisRules,
    ambient,
    fitting,
    kept_axis,
    summed_axis,
)

__all__ = [
    "AXES",
    "DECODE",
    "PREFILL",
    "TRAIN",
    "AxisRules",
    "ambient",
    "fitting",
    "kept_axis",
    "make_mesh",
    "summed_axis",
]
