"""The device mesh: axis names and how to make one."""

import math
from collections.abc import Sequence

import jax
import numpy as np

AXES = ("fsdp", "expert", "tensor", "context")


def make_mesh(
    *,
    fsdp: int = 1,
    expert: int = 1,
    tensor: int = 1,
    context: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
    """A mesh of `fsdp * expert * tensor * context` devices, axis types Explicit.

    Use it with `with jax.set_mesh(mesh):`.

    Args:
      devices: in place of `jax.devices()`, say those of a topology that is compiled for ahead of time.

    Raises:
      ValueError: there are not enough devices.
    """
    shape = (fsdp, expert, tensor, context)
    sizes = ", ".join(f"{axis}={n}" for axis, n in zip(AXES, shape))
    if min(shape) < 1:
        raise ValueError(f"a mesh of {sizes}: expected positive sizes.")
    found = jax.devices() if devices is None else list(devices)
    needed = math.prod(shape)
    if needed > len(found):
        raise ValueError(
            f"a mesh of {sizes} needs {needed} devices, but there are {len(found)} "
            f"({found[0].platform})."
        )
    if devices is None:
        return jax.make_mesh(shape, AXES, devices=found[:needed])
    types = (jax.sharding.AxisType.Explicit,) * len(AXES)
    return jax.sharding.Mesh(np.array(found[:needed]).reshape(shape), AXES, axis_types=types)
