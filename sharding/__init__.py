"""Device meshes and the rules that place arrays on them."""

from sharding.mesh import AXES, make_mesh
from sharding.rules import AxisRules, ambient

__all__ = ["AXES", "AxisRules", "ambient", "make_mesh"]
