"""Training: `Trainer`, data, losses, optimizers."""

from v4jax.train.anticipation import Anticipation
from v4jax.train.choosing import matching
from v4jax.train.data import Examples, PreferencePairs, TokenStream
from v4jax.train.indexer_warmup import IndexerWarmup
from v4jax.train.losses import LossWeights
from v4jax.train.optimizers import adamw, muon
from v4jax.train.preferences import DPO, log_probs
from v4jax.train.samples import Prompts
from v4jax.train.schedules import schedule
from v4jax.train.spikes import Spikes
from v4jax.train.trainer import Trainer

__all__ = [
    "DPO",
    "Anticipation",
    "Examples",
    "IndexerWarmup",
    "LossWeights",
    "PreferencePairs",
    "Prompts",
    "Spikes",
    "TokenStream",
    "Trainer",
    "adamw",
    "log_probs",
    "matching",
    "muon",
    "schedule",
]
