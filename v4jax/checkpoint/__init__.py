"""Checkpoints in the released layout and in transformers' naming."""

from v4jax.checkpoint.adapters import Adapter, load_adapter, save_adapter
from v4jax.checkpoint.errors import CheckpointError
from v4jax.checkpoint.folders import Checkpoint
from v4jax.checkpoint.loading import load
from v4jax.checkpoint.saving import save

__all__ = [
    "Adapter",
    "Checkpoint",
    "CheckpointError",
    "load",
    "load_adapter",
    "save",
    "save_adapter",
]
