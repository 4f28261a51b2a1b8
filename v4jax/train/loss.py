"""The training loss: next token, the token after it (MTP), indexer and router balance.

    loss = ce + mtp_weight * ce_mtp + balance_weight * balance + indexer_weight * indexer

Source: report section 4.2; weights of the terms there and in `LossWeights`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from v4jax.model import Transformer


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


def cross_entropy(
    model: Transformer,
    hidden: jax.Array,  # [B, T, D]
    targets: jax.Array,  # [B, T] int32
    *,
    chunk: int = 1024,
) -> jax.Array:  # [B, T] float32
    """-log p(target) per token. Logits are formed for `chunk` tokens at a time, twice."""
    shape = targets.shape
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    size = min(chunk, targets.shape[0])
    padding = -targets.shape[0] % size
    hidden = jnp.pad(hidden, [(0, padding), (0, 0)]).reshape(-1, size, hidden.shape[-1])
    labels = jnp.pad(targets, (0, padding)).reshape(-1, size)

    @jax.checkpoint
    def one(args):
        hidden, labels = args
        logits = model.logits(hidden)
        chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    losses = jax.lax.map(one, (hidden, labels)).reshape(-1)
    return losses[: targets.shape[0]].reshape(shape)


def training_loss(
    model: Transformer,
    tokens: jax.Array,  # [B, T + 2] int32
    weights: LossWeights = LossWeights(),
    *,
    remat: bool = True,
) -> tuple[jax.Array, Metrics]:
    """Loss of predicting tokens 1 .. T and, by MTP, 2 .. T + 1 from tokens 0 .. T - 1."""
    inputs, following, after = tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]
    streams, stats = model.trunk(inputs, remat=remat)
    ce = jnp.mean(cross_entropy(model, model.hidden(streams), following))
    blocks = [block for stage in stats for block in stage]
    mtp_ce = jnp.zeros(())
    if model.mtp:
        hidden, mtp_stats = model.mtp_hidden(streams, following)
        mtp_ce = jnp.mean(cross_entropy(model, hidden, after))
        mtp_stats = jax.tree.map(lambda x: x[None], mtp_stats)
        blocks.append(mtp_stats)
        stats = (*stats, (mtp_stats,))
    num_csa = sum(spec.is_csa for spec in model.cfg.layers)
    num_scored = sum(not spec.hash_routed for spec in model.cfg.layers) + len(model.mtp)
    indexer = sum(jnp.sum(b.indexer_loss) for b in blocks) / max(num_csa, 1)
    balance = sum(jnp.sum(b.router.balance_loss) for b in blocks) / max(num_scored, 1)
    loss = ce + weights.mtp * mtp_ce + weights.balance * balance + weights.indexer * indexer
    counts = tuple(tuple(block.router.counts for block in stage) for stage in stats)
    return loss, Metrics(loss, ce, mtp_ce, indexer, balance, counts)
