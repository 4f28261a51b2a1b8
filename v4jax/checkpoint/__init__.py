"""Checkpoints in the released layout and in transformers' naming."""

from v4jax.checkpoint.loading import Checkpoint, load
from v4jax.checkpoint.safetensors import CheckpointError
from v4jax.checkpoint.saving import save

__all__ = ["Checkpoint", "CheckpointError", "load", "save"]
