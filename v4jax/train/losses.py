"""The training loss: next token, the token after it (MTP), indexer and router balance.

    loss = ce + mtp_weight * ce_mtp + balance_weight * balance + indexer_weight * indexer

Source: report section 4.2; weights of the terms there and in `LossWeights`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from sharding import collectives
from v4jax.nn.choices import Choices
from v4jax.nn.cross_entropy import cross_entropy
from v4jax.nn.documents import Documents
from v4jax.nn.model import BlockStats, Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms. The report trains with mtp 0.3, then 0.1, and balance 1e-4."""

    mtp: float = 0.3
    balance: float = 1e-4
    indexer: float = 1.0

    def __call__(
        self, model: Transformer, batch: Sequence, *, remat: bool
    ) -> tuple[jax.Array, "Metrics"]:
        """`training_loss` with these weights, of what a step takes: a `Batch`, or its first parts."""
        inputs, following, after, *rest = batch
        options = dict(zip(Batch._fields[3:], rest))
        return training_loss(model, inputs, following, after, self, remat=remat, **options)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["loss", "ce", "mtp_ce", "indexer", "balance", "expert_counts"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Terms of the loss (scalars, float32) and the routing counts by stage and block."""

    logged: ClassVar[tuple[str, ...]] = ("loss", "ce", "mtp_ce", "indexer", "balance")
    loss: jax.Array
    ce: jax.Array
    mtp_ce: jax.Array
    indexer: jax.Array
    balance: jax.Array
    expert_counts: tuple[tuple[jax.Array, ...], ...]  # [repeats, E] int32; MTP blocks come last


# (model, batch, remat=...) -> this device's share of the loss, and metrics of all tokens. `LossWeights`
# are one, `preferences.DPO` another.
Loss = Callable[..., tuple[jax.Array, Metrics]]
IGNORED = -100  # a target without loss


class Batch(NamedTuple):
    """What a step takes. Of a token stream it takes the first three alone."""

    inputs: jax.Array  # [B, T] int32
    following: jax.Array  # [B, T] the tokens after them
    after: jax.Array  # [B, T] and those after these
    loss_weights: jax.Array  # [B, T] float32, of `following`
    after_weights: jax.Array  # [B, T] float32, of `after`
    documents: Documents
    choices: Choices = Choices()


def shifted(tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens [B, T + 2] -> inputs, the tokens after them, and those after these, [B, T] each."""
    return tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]


def training_loss(
    model: Transformer,
    inputs: jax.Array,  # [B, T] int32
    following: jax.Array,  # [B, T] the tokens after them
    after: jax.Array,  # [B, T] and those after these
    weights: LossWeights = LossWeights(),
    *,
    remat: bool = True,
    loss_weights: jax.Array | None = None,  # [B, T] float32, of `following`
    after_weights: jax.Array | None = None,  # [B, T] float32, of `after`
    documents: Documents | None = None,
    choices: Choices = Choices(),
) -> tuple[jax.Array, Metrics]:
    """Loss of predicting the following tokens and, by MTP, those after them.

    Cross entropies are weighted means over all targets. A target of -100 (`IGNORED`) has weight 0; MTP,
    which reads the following tokens, then takes the next input in its place. Weights leave it the token.

    Args:
      loss_weights, after_weights: default 1.
      documents: what the rows hold, if not one sequence each. Indexer and balance are then means over
        tokens and documents, without padding.
      choices: experts and entries to take in place of the layers' own, as those of the program that
        sampled the text.

    Returns:
      the loss to differentiate and the metrics. With tokens cut over devices the first is this
      device's share, and shares add up to the loss; metrics are of all tokens.

    Raises:
      ValueError: loss weights without those of MTP's targets, where MTP has a loss.
    """
    if model.mtp and weights.mtp and loss_weights is not None and after_weights is None:
        raise ValueError(
            "loss_weights without after_weights: expected both, or LossWeights(mtp=0). MTP predicts "
            "`after`, and which of its targets count cannot be told from those of `following`."
        )
    streams, stats = model.trunk(inputs, documents, choices, remat=remat)
    labels, counted = without_ignored(following, loss_weights)
    ce = mean_share(cross_entropy(model, model.hidden(streams), labels), counted)
    mtp_ce = jnp.zeros(())
    if model.mtp:
        read = jnp.where(following == IGNORED, jnp.roll(inputs, -1, axis=1), following)
        hidden, mtp_stats = model.mtp_hidden(streams, read, documents=documents)
        labels, counted = without_ignored(after, after_weights)
        mtp_ce = mean_share(cross_entropy(model, hidden, labels), counted)
        mtp_stats = jax.tree.map(lambda x: x[None], mtp_stats)
        stats = (*stats, (mtp_stats,))
    indexer, balance = layer_losses(model, stats)
    loss = ce + weights.mtp * mtp_ce + weights.balance * balance + weights.indexer * indexer
    counts = tuple(tuple(block.router.counts for block in stage) for stage in stats)
    terms = jnp.stack([loss, ce, mtp_ce, indexer, balance])
    total, ce, mtp_ce, indexer, balance = collectives.reduce_from(terms, "batch", "seq")
    return loss, Metrics(total, ce, mtp_ce, indexer, balance, counts)


def layer_losses(
    model: Transformer, stats: tuple[tuple[BlockStats, ...], ...]
) -> tuple[jax.Array, jax.Array]:
    """This device's shares of the indexers' and of the balance loss, means over the layers that have one.

    Args:
      stats: by stage and block; MTP blocks are a stage of their own.
    """
    blocks = [block for stage in stats for block in stage]
    num_mtp = len(stats) - len(model.stages)
    num_indexers = sum(spec.indexer is not None for spec in model.cfg.layers)
    num_scored = sum(not spec.hash_routed for spec in model.cfg.layers) + num_mtp
    indexer = sum((jnp.sum(b.indexer_loss) for b in blocks), jnp.zeros(()))
    balance = sum((jnp.sum(b.router.balance_loss) for b in blocks), jnp.zeros(()))
    return indexer / max(num_indexers, 1), balance / max(num_scored, 1)


def without_ignored(targets: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Targets [B, T] that are ids everywhere, and their weights [B, T], 0 for those that were not."""
    counts = targets != IGNORED
    weights = jnp.ones(targets.shape) if weights is None else weights
    return jnp.where(counts, targets, 0), jnp.where(counts, weights, 0)


def mean_share(losses: jax.Array, weights: jax.Array) -> jax.Array:
    """This device's share of the weighted mean over all tokens; 0 if none counts."""
    total = collectives.psum(jnp.sum(weights), "batch", "seq")
    return jnp.sum(losses * weights) / jnp.where(total > 0, total, 1)
