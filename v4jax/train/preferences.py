"""Direct preference optimisation (DPO): training on pairs of completions, of which one is better.

    reward = beta * (log p(completion) - log p_reference(completion))
    margin = reward(chosen) - reward(rejected)
    loss   = -(1 - s) * log sigmoid(margin) - s * log sigmoid(-margin)          a mean over pairs

Log-probabilities are sums over the tokens of a completion, and the reference is the model that training
starts from. The label smoothing s is the share of pairs that are taken to be in the wrong order.

    pairs = v4jax.train.PreferencePairs("pairs.jsonl", tokenizer, seq_len=512)
    pairs.reference = v4jax.train.log_probs(model, pairs)  # before the first step
    trainer = v4jax.Trainer(model, v4jax.train.adamw(1e-6), loss=v4jax.train.DPO())
    trainer.fit(pairs, 1000)

Source: arXiv 2305.18290, equation 7.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from sharding import TRAIN, AxisRules, collectives
from v4jax.config import V4Config
from v4jax.nn.compilation import jitted
from v4jax.nn.cross_entropy import cross_entropy
from v4jax.nn.model import BlockStats, Transformer
from v4jax.nn.placement import mesh_of, on_mesh, specs
from v4jax.train.data.pairs import PairBatch, PreferencePairs
from v4jax.train.losses import Counts, Metrics, counts_of, layer_losses


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *[field.name for field in dataclasses.fields(Metrics)],
        *("accuracy", "margin", "chosen_reward", "rejected_reward"),
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceMetrics(Metrics):
    """Metrics of pairs (scalars, float32). `ce` is of the chosen completions, a mean over their tokens."""

    logged: ClassVar[tuple[str, ...]] = (
        *("loss", "ce", "indexer", "balance"),
        *("accuracy", "margin", "chosen_reward", "rejected_reward"),
    )
    accuracy: jax.Array  # share of pairs with a margin over 0
    margin: jax.Array  # means over pairs
    chosen_reward: jax.Array
    rejected_reward: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO:
    """The loss of preference pairs, for `Trainer(..., loss=DPO())`.

    Attributes:
      beta: how close to the reference the model stays: the larger, the closer.
      label_smoothing: the share of pairs that are taken to be in the wrong order, at most 0.5.
      balance, indexer: weights of the routers' balance loss and of the indexers' loss. MTP has none.

    Raises:
      ValueError: a value outside of its range.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    balance: float = 1e-4
    indexer: float = 1.0

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"DPO beta={self.beta}: expected a number over 0.")
        if not 0 <= self.label_smoothing <= 0.5:
            raise ValueError(
                f"DPO label_smoothing={self.label_smoothing}: expected a share of 0 .. 0.5."
            )

    def __call__(
        self, model: Transformer, batch: Sequence, *, remat: str, shares: Counts | None = None
    ) -> tuple[jax.Array, PreferenceMetrics]:
        """Of the parts of a `PairBatch`: the loss to differentiate, and metrics of all pairs.

        With pairs cut over devices the first is this device's share.

        Args:
          shares: parts of the counts of a step that these pairs have, if they are a micro-batch of it.
        """
        pairs = PairBatch(*batch)
        found, stats = row_log_probs(model, pairs, remat=remat)
        rewards = self.beta * (found - pairs.reference).reshape(-1, 2)
        margins = rewards[:, 0] - rewards[:, 1]
        losses = -(1 - self.label_smoothing) * jax.nn.log_sigmoid(margins)
        losses -= self.label_smoothing * jax.nn.log_sigmoid(-margins)

        whole = len(margins) * collectives.axis_size("batch")
        count = whole if shares is None else whole / shares.after
        indexer, balance = layer_losses(model, stats, shares)
        layers = self.balance * balance + self.indexer * indexer
        loss = jnp.sum(losses) / count + layers

        # Rows that are cut over devices were summed on each: of those every device counts a part.
        parts = count * collectives.axis_size("seq")
        tokens = collectives.psum(jnp.sum(pairs.loss_weights[::2]), "batch", "seq")
        ce = -jnp.sum(found[::2]) / tokens / collectives.axis_size("seq")
        ce = ce if shares is None else shares.following * ce
        means = [jnp.sum(x) / parts for x in (losses, margins > 0, margins, *rewards.T)]
        terms = jnp.stack([means[0] + layers, ce, indexer, balance, *means[1:]])
        total, ce, indexer, balance, accuracy, margin, chosen, rejected = collectives.psum(
            terms, "batch", "seq"
        )
        counts = tuple(tuple(block.router.counts for block in stage) for stage in stats)
        return loss, PreferenceMetrics(
            loss=total,
            ce=ce,
            mtp_ce=jnp.zeros(()),
            indexer=indexer,
            balance=balance,
            expert_counts=counts,
            accuracy=accuracy,
            margin=margin,
            chosen_reward=chosen,
            rejected_reward=rejected,
        )

    def counts(self, cfg: V4Config, batch: Sequence) -> Counts:
        """What its terms are means over: tokens of chosen completions, and pairs in place of MTP's targets.

        Raises:
          ValueError: half a pair.
        """
        pairs = PairBatch(*batch)
        rows = len(pairs.inputs)
        if rows % 2:
            raise ValueError(
                f"a micro-batch of {rows} rows: expected whole pairs, of two rows. Take fewer micro-batches."
            )
        counts = counts_of(
            cfg, pairs.inputs, pairs.following, documents=pairs.documents, choices=pairs.choices
        )
        tokens = collectives.psum(jnp.sum(pairs.loss_weights[::2]), "batch", "seq")
        number = jnp.float32(rows // 2 * collectives.axis_size("batch"))
        return dataclasses.replace(counts, following=tokens, after=number)


def row_log_probs(
    model: Transformer, batch: PairBatch, *, remat: str = "none"
) -> tuple[jax.Array, tuple[tuple[BlockStats, ...], ...]]:
    """log p of each row's completion, [2 B] float32 and differentiable, and the layers' statistics."""
    streams, stats = model.trunk(batch.inputs, batch.documents, batch.choices, remat=remat)
    losses = cross_entropy(model, model.hidden(streams), batch.following)
    found = -jnp.sum(losses * batch.loss_weights, axis=1)
    return collectives.reduce_from(found, "seq"), stats


def log_probs(model: Transformer, pairs: PreferencePairs, *, batch_size: int = 8) -> np.ndarray:
    """log p of every completion, summed over its tokens: [N, 2] float32, chosen and rejected.

    Of the model that training starts from these are `pairs.reference`; of a trained one they tell which
    completions it takes for better. A model that lies on a mesh computes there.

    Args:
      batch_size: pairs that are computed together; the mesh has to divide it.

    Raises:
      ValueError: an id outside the vocabulary.
    """
    pairs.require_ids(model.cfg.vocab_size)
    mesh, found = mesh_of(model), []
    sharding = None if mesh is None else jax.NamedSharding(mesh, TRAIN.tokens)
    graphdef, params = nnx.split(model)
    none = np.zeros((len(pairs), 2), np.float32)
    size = len(pairs)
    with on_mesh(mesh):
        for start in range(0, size, batch_size):
            numbers = [n % size for n in range(start, start + batch_size)]  # whole at the end too
            out = _log_probs(graphdef, TRAIN, params, pairs.batch(numbers, none, sharding))
            if jax.process_count() > 1:
                out = multihost_utils.process_allgather(out, tiled=True)
            found.append(np.asarray(out).reshape(-1, 2))
    return np.concatenate(found)[:size]


@jitted(static_argnums=(0, 1))
def _log_probs(graphdef, rules: AxisRules, params, batch: PairBatch) -> jax.Array:
    def on_device(params, batch):
        return row_log_probs(nnx.merge(graphdef, params), batch)[0]

    of_batch = jax.tree.map(lambda x: jax.P(*rules.tokens[: x.ndim]), batch)
    rows = jax.P(*rules.tokens[:1])
    return collectives.per_device(on_device, rules, (specs(params, rules), of_batch), rows)(
        params, batch
    )
