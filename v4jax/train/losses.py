"""The training loss: next token, the token after it (MTP), indexer and router balance.

    loss = ce + mtp_weight * ce_mtp + balance_weight * balance + indexer_weight * indexer

Source: report section 4.2; weights of the terms there and in `LossWeights`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sharding import collectives
from v4jax.nn.cross_entropy import cross_entropy
from v4jax.nn.model import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms. The report trains with mtp 0.3, then 0.1, and balance 1e-4."""

    mtp: float = 0.3
    balance: float = 1e-4
    indexer: float = 1.0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["loss", "ce", "mtp_ce", "indexer", "balance", "expert_counts"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Terms of the loss (scalars, float32) and the routing counts by stage and block."""

    loss: jax.Array
    ce: jax.Array
    mtp_ce: jax.Array
    indexer: jax.Array
    balance: jax.Array
    expert_counts: tuple[tuple[jax.Array, ...], ...]  # [repeats, E] int32; MTP blocks come last


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
) -> tuple[jax.Array, Metrics]:
    """Loss of predicting the following tokens and, by MTP, those after them.

    Returns:
      the loss to differentiate and the metrics. With tokens cut over devices the first is this
      device's share, and shares add up to the loss; metrics are of all tokens.
    """
    streams, stats = model.trunk(inputs, remat=remat)
    ce = mean_share(cross_entropy(model, model.hidden(streams), following))
    blocks = [block for stage in stats for block in stage]
    mtp_ce = jnp.zeros(())
    if model.mtp:
        hidden, mtp_stats = model.mtp_hidden(streams, following)
        mtp_ce = mean_share(cross_entropy(model, hidden, after))
        mtp_stats = jax.tree.map(lambda x: x[None], mtp_stats)
        blocks.append(mtp_stats)
        stats = (*stats, (mtp_stats,))
    num_indexers = sum(spec.indexer is not None for spec in model.cfg.layers)
    num_scored = sum(not spec.hash_routed for spec in model.cfg.layers) + len(model.mtp)
    indexer = sum(jnp.sum(b.indexer_loss) for b in blocks) / max(num_indexers, 1)
    balance = sum(jnp.sum(b.router.balance_loss) for b in blocks) / max(num_scored, 1)
    loss = ce + weights.mtp * mtp_ce + weights.balance * balance + weights.indexer * indexer
    counts = tuple(tuple(block.router.counts for block in stage) for stage in stats)
    terms = jnp.stack([loss, ce, mtp_ce, indexer, balance])
    total, ce, mtp_ce, indexer, balance = collectives.reduce_from(terms, "batch", "seq")
    return loss, Metrics(total, ce, mtp_ce, indexer, balance, counts)


def mean_share(losses: jax.Array) -> jax.Array:
    """This device's share of the mean over all tokens."""
    return jnp.sum(losses) / (losses.size * collectives.axis_size("batch", "seq"))
