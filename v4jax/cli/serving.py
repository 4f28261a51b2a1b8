"""A model on the devices that are there: which mesh, whether it fits, and what is said at the start."""

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Sequence

import jax

from sharding import make_mesh
from v4jax import checkpoint
from v4jax.nn.cache import CacheFormat
from v4jax.nn.compilation import jax_folder, keep_programs
from v4jax.nn.model import Transformer
from v4jax.nn.numerics import Numerics
from v4jax.planning.devices import serving_mesh

BAR_BYTES = 1e9  # of weights, from which on a bar shows how far loading is


def load_for_serving(
    args: argparse.Namespace,
    numerics: Numerics,
    *,
    context: int,
    batch: int = 1,
    devices: Sequence[jax.Device] | None = None,
    adapter: str | os.PathLike | None = None,
) -> Transformer:
    """Loads --checkpoint over --mesh, with an adapter if there is one, and says so on stderr.

    Args:
      args: has `checkpoint`, `mesh` ("auto" or sizes by axis) and `cache`.
      context: tokens a sequence, prompt and answer.
      batch: sequences that run together.
      devices: in place of all there are.
      adapter: folder of a LoRA that the model gets.

    Raises:
      ValueError: the model does not fit on the devices; names what would.
      FileNotFoundError, CheckpointError: a folder has no such files, or they are damaged or do not fit.
    """
    opened = checkpoint.Checkpoint(args.checkpoint)
    lora = None if adapter is None else checkpoint.Adapter(adapter)  # fails before loading
    weight_bytes = sum(file.size for file in opened.files)
    keep_programs()
    devices = jax.devices() if devices is None else list(devices)
    reasons: tuple[str, ...] = ("as given",)
    sizes = args.mesh
    if sizes == "auto":
        cache: CacheFormat = args.cache if numerics.is_released else "float"
        choice = serving_mesh(
            *(opened.config, devices),
            weight_bytes=weight_bytes,
            batch=batch,
            context=context,
            cache=cache,
        )
        sizes, reasons = choice.sizes, choice.reasons
    mesh = None if sizes is None else make_mesh(**sizes, devices=devices)
    started = time.monotonic()
    model = checkpoint.load(opened, numerics, mesh=mesh, progress=weight_bytes > BAR_BYTES)
    if lora is not None:
        model = checkpoint.load_adapter(model, lora)
    jax.block_until_ready(jax.tree.leaves(model))
    seconds = time.monotonic() - started
    shown = ", ".join(f"{axis}={size}" for axis, size in (sizes or {}).items() if size > 1)
    _say("model", opened.config.name)
    _say("devices", f"{len(devices)} x {devices[0].device_kind}")
    _say("mesh", shown or "one device", *reasons)
    rate = weight_bytes / seconds / 1e9
    _say("weights", f"{weight_bytes / 1e9:.2f} GB in {seconds:.1f} s, {rate:.2f} GB/s")
    if lora is not None:
        _say("adapter", f"{lora.path}, {len(lora.modules)} matrices, rank {lora.lora.rank}")
    _say("numerics", f"{numerics.name}, {numerics.dtype}")
    _say("cache", args.cache or "packed where it is exact, else float")
    _say("programs", _kept_programs())
    return model


def named_adapters(
    given: Sequence[tuple[str, pathlib.Path | str]], model: str
) -> dict[str, checkpoint.Adapter]:
    """Adapters by the names that requests choose them by, opened before anything is loaded.

    Args:
      given: names and folders, in order.
      model: the model's own name.

    Raises:
      ValueError: a name twice, or the model's.
      FileNotFoundError, CheckpointError: see `checkpoint.Adapter`.
    """
    adapters: dict[str, checkpoint.Adapter] = {}
    for name, folder in given:
        if name == model or name in adapters:
            raise ValueError(
                f"--adapter {name}={folder}: the model, or another adapter, has that name."
            )
        adapters[name] = checkpoint.Adapter(folder)
    return adapters


def _kept_programs() -> str:
    folder = jax_folder()
    return f"compiled ones are kept in {folder}" if folder else "compiled ones are not kept"


def _say(name: str, *lines: str) -> None:
    for label, line in zip((name, *[""] * len(lines)), lines):
        print(f"{label:9} {line}", file=sys.stderr)
