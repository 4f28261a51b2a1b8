"""Models for commands: on which devices, in which numerics, and what is said about it."""

import argparse
import sys
from collections.abc import Sequence

import jax

from sharding import DECODE, TRAIN, make_mesh
from v4jax import checkpoint
from v4jax.config import V4Config
from v4jax.nn.compilation import keep_programs
from v4jax.nn.model import Transformer
from v4jax.nn.numerics import Numerics
from v4jax.nn.placement import check_mesh


def choose_mesh(
    cfg: V4Config, count: int, platform: str, use: str = "serve"
) -> tuple[dict[str, int], str]:
    """Mesh axes for so many devices of this host, and why.

    Experts are spread over as many devices as divide them, since they are nearly all of a model;
    sequences over the rest.
    """
    if count == 1 or platform == "cpu":
        return {}, "one device"
    for expert in range(min(count, cfg.moe.num_experts), 1, -1):
        if count % expert or cfg.moe.num_experts % expert:
            continue
        sizes = {
            axis: n for axis, n in {"fsdp": count // expert, "expert": expert}.items() if n > 1
        }
        try:
            quantized = cfg.expert_format is not None
            check_mesh(cfg, TRAIN if use == "train" else DECODE, sizes=sizes, quantized=quantized)
        except ValueError:
            continue
        shown = ", ".join(f"{axis}={n}" for axis, n in sizes.items())
        return sizes, (
            f"{shown}: {count} {platform} devices, {cfg.moe.num_experts} experts spread over {expert}"
        )
    return {}, f"one of {count} devices: none of the meshes tried suits {cfg.name}, see --mesh"


def require_memory(opened: checkpoint.Checkpoint, sizes: dict[str, int], limit: int | None) -> int:
    """Bytes of weights that a device holds when the model serves, checked before they are read.

    Raises:
      ValueError: they are more than a device has.
    """
    tensors = opened.tensors.items()
    experts = sum(t.view().nbytes for name, t in tensors if ".experts." in name)
    rest = sum(t.view().nbytes for name, t in tensors if ".experts." not in name)
    parts = sizes.get("expert", 1) * sizes.get("context", 1) * sizes.get("tensor", 1)
    held = experts // parts + rest // sizes.get("tensor", 1)
    if limit is not None and held > limit:
        needed = next((n for n in (2**k for k in range(1, 12)) if experts / n + rest < limit), None)
        hint = f"--mesh expert={needed} would fit" if needed else "more memory a device is needed"
        raise ValueError(
            f"{opened.path}: {held / 2**30:.1f} GiB of weights on a device with "
            f"{limit / 2**30:.1f} GiB: {hint}. Nothing was loaded."
        )
    return held


def load_model(
    args: argparse.Namespace,
    numerics: Numerics,
    devices: Sequence[jax.Device] | None = None,
    *,
    says: bool = True,
) -> Transformer:
    """The model of `--checkpoint` on the mesh of `--mesh`, after a few lines on stderr."""
    keep_programs()
    found = jax.local_devices() if devices is None else list(devices)
    opened = checkpoint.Checkpoint(args.checkpoint)
    sizes, why = args.mesh, "as asked"
    if sizes is None:
        sizes, why = choose_mesh(opened.config, len(found), found[0].platform)
    memory = found[0].memory_stats() if found[0].platform != "cpu" else None
    held = require_memory(opened, sizes, (memory or {}).get("bytes_limit"))
    if says:
        print(
            f"{opened.config.name} on {found[0].device_kind}, mesh: {why}; {held / 1e9:.2f} GB of "
            f"weights a device, {numerics.name} {numerics.dtype}",
            file=sys.stderr,
        )
    mesh = make_mesh(**sizes, devices=found) if sizes else None
    return checkpoint.load(opened, numerics, mesh=mesh)
