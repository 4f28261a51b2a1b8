"""What a run leaves for others: a checkpoint in the released layout, or an adapter in PEFT's files."""

import os

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from v4jax.checkpoint import saving
from v4jax.checkpoint.adapters import save_adapter
from v4jax.nn.lora import LoRA, LoRAParam, merge_lora
from v4jax.nn.model import Transformer
from v4jax.nn.quantization import to_float, to_released

FORMATS = ("released", "float", "adapter")


def export(
    model: Transformer, folder: str | os.PathLike, lora: LoRA | None, format: str | None = None
) -> None:
    """Writes a trained model, adapters included. `Trainer.save` has what the arguments mean.

    A model that is spread over several processes is written by all of them together (`saving.save`).

    Raises:
      ValueError: an unknown format, or "adapter" without one; `folder` has a checkpoint.
    """
    format = format or ("released" if lora is None else "adapter")
    if format not in FORMATS or (format == "adapter" and lora is None):
        raise ValueError(
            f"format={format!r}: expected one of {', '.join(map(repr, FORMATS))}, and "
            '"adapter" for a model that was trained with a LoRA.'
        )
    if format == "adapter":
        return _save_adapter(model, folder)
    model = to_float(model) if format == "float" else model
    model = model if lora is None else merge_lora(model)
    return saving.save(to_released(model) if format == "released" else model, folder)


def _save_adapter(model: Transformer, folder: str | os.PathLike) -> None:
    """By the first process, from whole arrays: adapters are small, and a mesh may have cut them."""
    is_spread = not all(array.is_fully_addressable for array in jax.tree.leaves(nnx.state(model)))
    graphdef, *states = nnx.split(model, LoRAParam, ...)
    adapters, rest = states
    whole = jax.tree.map(lambda array: np.asarray(saving.one(array, ())), adapters)
    if not is_spread or jax.process_index() == 0:
        save_adapter(nnx.merge(graphdef, whole, rest), folder)
    if is_spread:
        multihost_utils.sync_global_devices("the adapter is written")
