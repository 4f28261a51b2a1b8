"""Ahead-of-time compilation for TPU topologies, on any machine.

    with jax.set_mesh(topology_mesh("v6e")):
        compiled = jax.jit(fn).lower(*arguments).compile()

Needs the `libtpu` package (`pip install 'v4jax[tpu]'`), no TPU. Executables cannot run; their
memory analysis, HLO and schedule can be read.
"""

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import topologies

from pallas_kernels.chips import CHIPS, Chip

# Rows travel to experts while others are computed, which libtpu does not do by itself; and bfloat16 lies in
# tiles of 8 rows on v7x too, as kernels read it: libtpu would bring every such weight to tiles of 16 rows, and
# for the kernels back, in every step. Where a TPU is, the commands set the same in LIBTPU_INIT_ARGS
# (`v4jax.cli.LIBTPU_FLAGS`).
COMPILER_OPTIONS: dict[str, str | bool] = {
    "xla_tpu_enable_async_ragged_all_to_all": True,
    "xla_tpu_control_large_2nd_minor_layout_for_x16": False,
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


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice by its name alone, which no libtpu is asked for."""

    topology: str
    chip: Chip
    shape: tuple[int, ...]  # chips along each dimension of the torus

    @staticmethod
    def of(topology: str) -> "Slice":
        """ "v6e:2x4" -> eight chips of v6e.

        Raises:
          ValueError: an unknown generation, or no such shape.
        """
        chip, sizes = chip_of(topology), topology.partition(":")[2].split("x")
        if not all(size.isdigit() and int(size) > 0 for size in sizes):
            raise ValueError(
                f"no TPU topology {topology!r}: expected a name such as {chip.host!r}."
            )
        return Slice(topology, chip, tuple(map(int, sizes)))

    @staticmethod
    def holding(chip: Chip, devices: int) -> "Slice | None":
        """The slice of a generation that has so many devices; None if one cannot rent such a one."""
        slices = map(Slice.of, chip.slices)
        return next((place for place in slices if place.devices == devices), None)

    @property
    def chips(self) -> int:
        """The number of chips."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """The number of JAX devices."""
        return self.chips * self.chip.devices_per_chip

    def hops(self, devices: int) -> float:
        """Links on the longest way between so many devices that lie together, half of each ring."""
        rings = [size for size in self.shape if size > 1]
        whole = sum(rings) / 2
        return max(1.0, whole * (devices / self.devices) ** (1 / max(len(rings), 1)))


def topology_devices(topology: str) -> list:
    """Devices of a topology such as "v6e:4x4" or "tpu7x:2x2x1"; abstract, they cannot run.

    Raises:
      ValueError: libtpu is not installed, or it does not know the topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no wait for a metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile
    try:
        with _silent():
            return list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:  # jax raises several types here
        raise ValueError(
            f"no TPU topology {topology!r}: expected a name such as 'v5e:4x4', 'v5p:2x2x1', "
            f"'v6e:2x2' or 'tpu7x:2x2x1', and the libtpu package ({error})."
        ) from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What libtpu says on the terminal, on a machine without a TPU: errors about the machine it is not on."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def topology_mesh(
    chip: str, shape: tuple[int, ...] = (1,), axes: tuple[str, ...] = ("d",)
) -> jax.sharding.Mesh:
    """A mesh over the first devices of one host of a generation: "v5e", "v5p", "v6e" or "v7x"."""
    devices = topology_devices(CHIPS[chip].host)
    return jax.sharding.Mesh(np.array(devices[: np.prod(shape)]).reshape(shape), axes)


def trace_on(chip: str, fn, *args) -> jax.stages.Traced:
    """Traces `fn(*args)` for one device. `args` are pytrees of shapes (`jax.ShapeDtypeStruct`)."""
    mesh = topology_mesh(chip)
    replicated = jax.NamedSharding(mesh, jax.P())

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    with jax.set_mesh(mesh):
        return jax.jit(fn).trace(*jax.tree.map(place, args))


def compile_on(chip: str, fn, *args) -> jax.stages.Compiled:
    """Compiles `fn(*args)` for one device, see `trace_on`."""
    return trace_on(chip, fn, *args).lower().compile()
