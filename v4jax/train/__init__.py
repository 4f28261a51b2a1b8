"""Training: `Trainer`, data, losses, optimizers."""

from v4jax.train.choosing import matching
from v4jax.train.data import Examples, TokenStream
from v4jax.train.losses import LossWeights
from v4jax.train.optimizers import adamw, muon
from v4jax.train.samples import Prompts
from v4jax.train.schedules import schedule
from v4jax.train.trainer import Trainer

__all__ = [
    "Examples",
    "LossWeights",
    "Prompts",
    "TokenStream",
    "Trainer",
    "adamw",
    "matching",
    "muon",
    "schedule",
]
