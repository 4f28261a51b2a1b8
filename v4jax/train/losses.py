"""The training loss: next token, the token after it (MTP), indexer, router balance, normaliser.

    loss = ce + mtp_weight * ce_mtp + balance_weight * balance + indexer_weight * indexer + z_weight * z

Source: report section 4.2; weights of the terms there and in `LossWeights`. z is the mean square of the log of
the softmax's normaliser, which keeps logits from drifting (PaLM, arXiv 2204.02311, section 5); the
report has none.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Float32, Int32

from pallas_kernels import signatures
from sharding import collectives
from v4jax.config import V4Config
from v4jax.nn.choices import Choices
from v4jax.nn.cross_entropy import cross_entropy, cross_entropy_and_normalizer
from v4jax.nn.documents import Documents, positions_of
from v4jax.nn.model import BlockStats, Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms. The report trains with mtp 0.3, then 0.1, balance 1e-4 and no z.

    PaLM's z is 1e-4.
    """

    mtp: float = 0.3
    balance: float = 1e-4
    indexer: float = 1.0
    z: float = 0.0

    def __call__(
        self, model: Transformer, batch: Sequence, *, remat: str, shares: "Counts | None" = None
    ) -> tuple[jax.Array, "Metrics"]:
        """`training_loss` with these weights, of what a step takes: a `Batch`, or its first parts."""
        inputs, following, after, *rest = batch
        options = dict(zip(Batch._fields[3:], rest))
        return training_loss(
            model, inputs, following, after, self, remat=remat, shares=shares, **options
        )

    def counts(self, cfg: V4Config, batch: Sequence) -> "Counts":
        """What the terms of the loss are means over, of a batch or a part of it."""
        return counts_of(cfg, **dict(zip(Batch._fields, batch)))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("loss", "ce", "mtp_ce", "indexer", "balance", "expert_counts"),
        *("z", "grad_norm", "grad_limit", "skipped", "anticipated"),
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Terms of the loss (scalars, float32), the routing counts by stage and block, and what a step did.

    Attributes:
      z: mean square of the log of the next token's normaliser, whether or not it has a weight.
      grad_norm: global norm of the gradients before clipping, float32. 0 of a loss without a step.
      grad_limit: the largest norm that the step would have been taken by.
      skipped: whether the step changed nothing, since its loss or gradients were not fit for one; bool.
      anticipated: whether parameters of steps before chose its experts (`Anticipation`); None: the run
        has no such option.
    """

    logged: ClassVar[tuple[str, ...]] = ("loss", "ce", "mtp_ce", "indexer", "balance", "z")
    loss: jax.Array
    ce: jax.Array
    mtp_ce: jax.Array
    indexer: jax.Array
    balance: jax.Array
    expert_counts: tuple[tuple[jax.Array, ...], ...]  # [repeats, E] int32; MTP blocks come last
    z: jax.Array = dataclasses.field(default_factory=lambda: jnp.zeros(()))
    grad_norm: jax.Array = dataclasses.field(default_factory=lambda: jnp.zeros(()))
    grad_limit: jax.Array = dataclasses.field(default_factory=lambda: jnp.full((), jnp.inf))
    skipped: jax.Array = dataclasses.field(default_factory=lambda: jnp.zeros((), bool))
    anticipated: bool | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["following", "after", "documents", "queries"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Counts:
    """What the terms of the loss are means over, in a batch or a part of it (scalars, float32)."""

    following: jax.Array  # weights of the next tokens
    after: jax.Array  # weights of MTP's targets
    documents: jax.Array
    queries: tuple[jax.Array, ...]  # that an indexer learns from, of each layer with one of its own


class Loss(Protocol):
    """What a step is taken on. `LossWeights` are one, `preferences.DPO` another."""

    def __call__(
        self, model: Transformer, batch: Sequence, *, remat: str, shares: Counts | None = None
    ) -> tuple[jax.Array, Metrics]:
        """This device's share of the loss, and metrics of all tokens; of a micro-batch, parts of them."""

    def counts(self, cfg: V4Config, batch: Sequence) -> Counts:
        """What its terms are means over, of a batch or a part of it: `shares` are parts of these."""


IGNORED = -100  # a target without loss


class Batch(NamedTuple):
    """What a step takes. Of a token stream it takes the first three alone."""

    inputs: jax.Array  # [B, T] int32
    following: jax.Array  # [B, T] the tokens after them
    after: jax.Array  # [B, T] and those after these
    loss_weights: jax.Array | None = None  # [B, T] float32, of `following`
    after_weights: jax.Array | None = None  # [B, T] float32, of `after`
    documents: Documents | None = None
    choices: Choices = Choices()


def shifted(tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens [B, T + 2] -> inputs, the tokens after them, and those after these, [B, T] each."""
    return tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]


@signatures.shaped
def training_loss(
    model: Transformer,
    inputs: Int32[jax.Array, "B T"],
    following: Int32[jax.Array, "B T"],  # the tokens after them
    after: Int32[jax.Array, "B T"],  # and those after these
    weights: LossWeights = LossWeights(),
    *,
    remat: str = "layers",
    loss_weights: Float32[jax.Array, "B T"] | None = None,  # of `following`
    after_weights: Float32[jax.Array, "B T"] | None = None,  # of `after`
    documents: Documents | None = None,
    choices: Choices = Choices(),
    shares: Counts | None = None,
) -> tuple[Float32[jax.Array, ""], Metrics]:
    """Loss of predicting the following tokens and, by MTP, those after them.

    Cross entropies are weighted means over all targets. A target of -100 (`IGNORED`) has weight 0; MTP,
    which reads the following tokens, then takes the next input in its place. Weights leave it the token.

    Args:
      loss_weights, after_weights: default 1.
      documents: what the rows hold, if not one sequence each. Indexer and balance are then means over
        tokens and documents, without padding.
      choices: experts and entries to take in place of the layers' own, as those of the program that
        sampled the text.
      shares: these tokens' parts of the counts of a step, if they are one of its micro-batches. Terms
        are weighted by them, so that those of all micro-batches add up to the terms of the step.

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
    losses, normalizers = cross_entropy_and_normalizer(model, model.hidden(streams), labels)
    ce, z = (mean_share(terms, counted) for terms in (losses, normalizers**2))
    mtp_ce = jnp.zeros(())
    if model.mtp:
        read = jnp.where(following == IGNORED, jnp.roll(inputs, -1, axis=1), following)
        hidden, mtp_stats = model.mtp_hidden(streams, read, documents=documents)
        labels, counted = without_ignored(after, after_weights)
        mtp_ce = mean_share(cross_entropy(model, hidden, labels), counted)
        mtp_stats = jax.tree.map(lambda x: x[None], mtp_stats)
        stats = (*stats, (mtp_stats,))
    indexer, balance = layer_losses(model, stats, shares)
    if shares is not None:
        ce, z, mtp_ce = shares.following * ce, shares.following * z, shares.after * mtp_ce
    loss = ce + weights.mtp * mtp_ce + weights.balance * balance + weights.indexer * indexer
    loss = loss + weights.z * z if weights.z else loss
    counts = tuple(tuple(block.router.counts for block in stage) for stage in stats)
    terms = jnp.stack([loss, ce, mtp_ce, indexer, balance, z])
    total, ce, mtp_ce, indexer, balance, z = collectives.reduce_from(terms, "batch", "seq")
    return loss, Metrics(total, ce, mtp_ce, indexer, balance, counts, z)


def layer_losses(
    model: Transformer,
    stats: tuple[tuple[BlockStats, ...], ...],
    shares: Counts | None = None,
) -> tuple[jax.Array, jax.Array]:
    """This device's shares of the indexers' and of the balance loss, means over the layers that have one.

    Args:
      stats: by stage and block; MTP blocks are a stage of their own.
      shares: of a micro-batch, see `training_loss`.
    """
    num_mtp = len(stats) - len(model.stages)
    num_scored = sum(not spec.hash_routed for spec in model.cfg.layers) + num_mtp
    balances = [jnp.sum(block.router.balance_loss) for stage in stats for block in stage]
    balance = sum(balances, jnp.zeros(())) / max(num_scored, 1)
    indexers = [loss for stage in stats[: len(model.stages)] for loss in _by_layer(stage)]
    indexed = [
        loss for loss, spec in zip(indexers, model.cfg.layers, strict=True) if spec.own_indexer
    ]
    if shares is not None:
        balance = shares.documents * balance
        indexed = [share * loss for share, loss in zip(shares.queries, indexed, strict=True)]
    return sum(indexed, jnp.zeros(())) / max(len(indexed), 1), balance


def _by_layer(stage: tuple[BlockStats, ...]) -> list[jax.Array]:
    """The indexers' losses of a stage's layers, in their order."""
    losses = jnp.stack([block.indexer_loss for block in stage], axis=1)  # [repeats, blocks]
    return list(losses.reshape(-1))


def counts_of(
    cfg: V4Config,
    inputs: jax.Array,
    following: jax.Array,
    after: jax.Array | None = None,
    loss_weights: jax.Array | None = None,
    after_weights: jax.Array | None = None,
    documents: Documents | None = None,
    choices: Choices = Choices(),
) -> Counts:
    """What the terms of `training_loss` are means over. Of the tokens of all devices."""
    positions = positions_of(documents, *inputs.shape)
    valid = jnp.ones(inputs.shape, bool) if documents is None else documents.valid

    def total(counted: jax.Array) -> jax.Array:
        return collectives.psum(jnp.sum(counted.astype(jnp.float32)), "batch", "seq")

    def weight(targets: jax.Array | None, weights: jax.Array | None) -> jax.Array:
        return jnp.zeros(()) if targets is None else total(without_ignored(targets, weights)[1])

    queries: list[jax.Array] = []
    indexed = [(spec.ratio, spec.own_indexer.topk) for spec in cfg.layers if spec.own_indexer]
    for number, (ratio, topk) in enumerate(indexed):
        entries = jnp.minimum((positions + 1) // ratio, topk)
        if choices.selections is not None:
            entries = jnp.sum(choices.selections[:, :, number] >= 0, axis=-1)
        queries.append(total(valid & (entries > 1)))
    return Counts(
        weight(following, loss_weights),
        weight(after, after_weights),
        total(valid & (positions == 0)),
        tuple(queries),
    )


def without_ignored(targets: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Targets [B, T] that are ids everywhere, and their weights [B, T], 0 for those that were not."""
    counts = targets != IGNORED
    weights = jnp.ones(targets.shape) if weights is None else weights
    return jnp.where(counts, targets, 0), jnp.where(counts, weights, 0)


def mean_share(losses: jax.Array, weights: jax.Array) -> jax.Array:
    """This device's share of the weighted mean over all tokens; 0 if none counts."""
    total = collectives.psum(jnp.sum(weights), "batch", "seq")
    return jnp.sum(losses * weights) / jnp.where(total > 0, total, 1)
