"""The device mesh: axis names and how to make one."""

import math

import jax

AXES = ("fsdp", "expert", "tensor")


def make_mesh(*, fsdp: int = 1, expert: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """A mesh over the first `fsdp * expert * tensor` devices, axis types Explicit.

    Use it with `with jax.set_mesh(mesh):`.

    Raises:
      ValueError: there are not enough devices.
    """
    shape = (fsdp, expert, tensor)
    needed, devices = math.prod(shape), jax.devices()
    if needed > len(devices):
        raise ValueError(
            f"a mesh of fsdp={fsdp}, expert={expert}, tensor={tensor} needs {needed} devices, but "
            f"there are {len(devices)} ({devices[0].platform})."
        )
    return jax.make_mesh(shape, AXES, devices=devices[:needed])
