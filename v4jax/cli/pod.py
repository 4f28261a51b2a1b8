"""Options of a program that runs as several processes, one per host, over one mesh.

On a TPU pod the same command runs on every host; jax finds the other hosts by itself:

    gcloud compute tpus tpu-vm ssh NAME --worker=all --command \
        'cd v4jax && v4jax finetune --distributed --mesh fsdp=8,expert=8 ...'

Elsewhere every process is told where process 0 is:

    v4jax finetune --coordinator HOST:PORT --num-processes 4 --process-id 0 ...
"""

import argparse
import contextlib
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from sharding import AXES, make_mesh


def add_pod_arguments(
    parser: argparse.ArgumentParser, *, auto: bool = False
) -> argparse._ArgumentGroup:
    """How devices are arranged, and which process this is, of how many; gives the latter's group.

    Args:
      auto: the command chooses a mesh for the devices of its host where none is given.
    """
    default = "auto: for the devices of this host, and said" if auto else "one device"
    parser.add_argument(
        "--mesh",
        type=(lambda text: text if text == "auto" else parse_mesh(text)) if auto else parse_mesh,
        default="auto" if auto else {},
        metavar="AXIS=SIZE,...",
        help=f'such as "fsdp=4,expert=2" (default: {default})',
    )
    group = parser.add_argument_group("several processes")
    group.add_argument("--distributed", action="store_true", help="jax finds the others")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--num-processes", type=int, help="how many there are")
    group.add_argument("--process-id", type=int, help="which this is, from 0")
    return group


def parse_pod_args(
    parser: argparse.ArgumentParser, words: Sequence[str] | None = None
) -> argparse.Namespace:
    """The command line; ends the program if the options of several processes do not go together.

    Args:
      words: of it; default those that the program was called with.
    """
    args = parser.parse_args(words)
    if (args.num_processes is None) != (args.process_id is None):
        parser.error("--num-processes and --process-id go together: give both, or neither.")
    if args.coordinator and args.num_processes is None:
        parser.error("--coordinator needs --num-processes and --process-id.")
    if not 0 <= (args.process_id or 0) < (args.num_processes or 1):
        parser.error(f"--process-id {args.process_id}: expected less than --num-processes.")
    return args


def parse_mesh(text: str) -> dict[str, int]:
    """ "fsdp=4,expert=2" -> sizes by axis.

    Raises:
      argparse.ArgumentTypeError: an unknown axis, or a size that is not a positive integer.
    """
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.isdecimal() or int(size) < 1 or axis in sizes:
            raise argparse.ArgumentTypeError(
                f"{part!r}: expected axis=size with an axis of {', '.join(AXES)}, each once."
            )
        sizes[axis] = int(size)
    return sizes


def start_processes(args: argparse.Namespace) -> tuple[int, int]:
    """Finds the other processes, if there are any. Call before anything uses a device.

    Returns:
      the number of this process, and how many there are.
    """
    if args.distributed or args.coordinator:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
        # Asks every process for its devices, also one that will find nothing to do.
        return jax.process_index(), jax.process_count()
    return args.process_id or 0, args.num_processes or 1


def spans_processes(sizes: dict[str, int] | str) -> bool:
    """Whether a mesh is one of all processes' devices, rather than of a host's own.

    Raises:
      ValueError: more devices than this host has, but not all there are.
    """
    if isinstance(sizes, str):  # "auto"
        return False
    devices, own, found = math.prod(sizes.values()), jax.local_device_count(), jax.device_count()
    if devices > own and devices != found:
        raise ValueError(
            f"a mesh of {devices} devices: expected at most the {own} of this host, which then has a "
            f"model of its own, or all {found} of the job."
        )
    return devices > own


def from_first(array: np.ndarray) -> np.ndarray:
    """Process 0's array, on all processes. They have to call it together."""
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def on_mesh(
    sizes: dict[str, int], devices: Sequence[jax.Device] | None = None
) -> contextlib.AbstractContextManager:
    """`with on_mesh(args.mesh):` programs run over that mesh; without sizes, on one device.

    Args:
      devices: in place of all processes' devices.
    """
    return jax.set_mesh(make_mesh(**sizes, devices=devices)) if sizes else contextlib.nullcontext()
