"""Figures of TPU generations, and ahead-of-time compilation for their topologies on any machine.

    with jax.set_mesh(topology_mesh("v6e")):
        compiled = jax.jit(fn).lower(*arguments).compile()

Needs the `libtpu` package (`pip install 'v4jax[tpu]'`), no TPU. Executables cannot run; their
memory analysis, HLO and schedule can be read.

Figures: Cloud TPU documentation; `jax.experimental.pallas.tpu.get_tpu_info_for_chip`. Clocks of
v6e and v7x are what the peak rates imply. The documentation gives both directions of the
inter-chip links together; `ici` is one of them.
"""

import dataclasses
import os

import jax
import numpy as np
from jax.experimental import topologies

GiB = 2**30
# Rows travel to experts while others are computed; libtpu does not do that by itself. Where a TPU is,
# the commands set the same in LIBTPU_INIT_ARGS (`v4jax.cli.LIBTPU_FLAGS`).
COMPILER_OPTIONS = {"xla_tpu_enable_async_ragged_all_to_all": True}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device of a TPU generation can do (on v7x half a chip: one TensorCore)."""

    name: str
    host: str  # topology of one host
    flops: float  # bfloat16 matrix multiply-adds, FLOP/s
    fp8_flops: float  # FLOP/s with both factors in FP8
    bandwidth: float  # HBM, bytes/s
    clock: float  # Hz
    hbm: float  # bytes the compiler can use
    vmem: int  # bytes of one core
    ici: float  # bytes/s that a device can send over all its links together
    slices: tuple[str, ...]  # topologies one can rent, smallest first
    cores: int = 1  # TensorCores of a device; a kernel's parallel grid axes are split over them
    devices_per_chip: int = 1


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")


def _slices(prefix: str, shapes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{prefix}:{shape}" for shape in shapes)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            *("v5e", "v5e:2x2", 197e12, 197e12, 819e9, 1.5e9, 15.75 * GiB, 128 << 20, 200e9),
            _slices("v5e", _FLAT),
        ),
        Chip(
            *("v5p", "v5p:2x2x1", 459e12, 459e12, 2765e9, 1.75e9, 95.74 * GiB, 64 << 20, 600e9),
            _slices("v5p", _CUBES),
            cores=2,
        ),
        Chip(
            *("v6e", "v6e:2x2", 918e12, 918e12, 1640e9, 1.75e9, 31.25 * GiB, 128 << 20, 400e9),
            _slices("v6e", _FLAT),
        ),
        Chip(
            *("v7x", "tpu7x:2x2x1", 1153.5e12, 2307e12, 3690e9, 2.2e9, 94.75 * GiB, 64 << 20),
            *(300e9, _slices("tpu7x", _CUBES)),
            devices_per_chip=2,
        ),
    )
}


def chip_of(topology: str) -> Chip:
    """The generation of a topology: "v5p:4x4x4" -> `CHIPS["v5p"]`.

    Raises:
      ValueError: no generation that is known here.
    """
    prefix = topology.split(":")[0]
    for chip in CHIPS.values():
        if prefix == chip.host.split(":")[0]:
            return chip
    known = ", ".join(f"{chip.slices[0]} .. {chip.slices[-1]}" for chip in CHIPS.values())
    raise ValueError(f"no TPU topology {topology!r}: expected one of {known}.")


def topology_devices(topology: str) -> list:
    """Devices of a topology such as "v6e:4x4" or "tpu7x:2x2x1"; abstract, they cannot run.

    Raises:
      ValueError: libtpu is not installed, or it does not know the topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no wait for a metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:  # jax raises several types here
        raise ValueError(
            f"no TPU topology {topology!r}: expected a name such as 'v5e:4x4', 'v5p:2x2x1', "
            f"'v6e:2x2' or 'tpu7x:2x2x1', and the libtpu package ({error})."
        ) from error


def topology_mesh(
    chip: str, shape: tuple[int, ...] = (1,), axes: tuple[str, ...] = ("d",)
) -> jax.sharding.Mesh:
    """A mesh over the first devices of one host of a generation: "v5e", "v5p", "v6e" or "v7x"."""
    devices = topology_devices(CHIPS[chip].host)
    return jax.sharding.Mesh(np.array(devices[: np.prod(shape)]).reshape(shape), axes)


def compile_on(chip: str, fn, *args) -> jax.stages.Compiled:
    """Compiles `fn(*args)` for one device. `args` are pytrees of shapes (`jax.ShapeDtypeStruct`)."""
    mesh = topology_mesh(chip)
    replicated = jax.NamedSharding(mesh, jax.P())

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    with jax.set_mesh(mesh):
        return jax.jit(fn).lower(*jax.tree.map(place, args)).compile()
