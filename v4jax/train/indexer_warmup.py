"""Warming indexers up: attention sees all compressed entries, and indexers learn what it looks at.

    loss = mean over CSA layers and queries of KL(attention mass || softmax of scores), over all visible entries

Attention mass is summed over heads, with the softmax's whole denominator (window and sink included). An
indexer that starts random picks entries at random, and the loss over its own picks says nothing of the
others; so this stage comes first, and training on sparse attention goes on from its model. Only indexers
train: the text's loss is none of this one, and is told beside it.

    trainer = v4jax.Trainer(
        model, v4jax.train.adamw(1e-3), trainable="indexer", loss=v4jax.train.IndexerWarmup()
    )

Held-out loss is that of sparse attention: it comes down to `ce`, which is that of dense attention.

Source: DeepSeek-V3.2 report (arXiv 2512.02556) section 2.1.1; V4 report section 4.2.2.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sharding import collectives
from v4jax.config import V4Config
from v4jax.nn.attention import Attention
from v4jax.nn.choices import Choices
from v4jax.nn.cross_entropy import cross_entropy
from v4jax.nn.layers import copied
from v4jax.nn.model import Transformer
from v4jax.train.losses import (
    Batch,
    Counts,
    Metrics,
    counts_of,
    layer_losses,
    mean_share,
    without_ignored,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[field.name for field in dataclasses.fields(Metrics)],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class WarmupMetrics(Metrics):
    """Metrics of a warm-up. `ce` is the next token's, by dense attention; MTP has none."""

    logged: ClassVar[tuple[str, ...]] = ("loss", "ce", "indexer", "balance")


class IndexerWarmup:
    """The loss of a warm-up, for `Trainer(..., trainable="indexer", loss=IndexerWarmup())`."""

    def __call__(
        self, model: Transformer, batch: Sequence, *, remat: str, shares: Counts | None = None
    ) -> tuple[jax.Array, WarmupMetrics]:
        """Of what a step takes: this device's share of the indexers' loss, and metrics of all tokens.

        Args:
          shares: these tokens' parts of the counts of a step, if they are one of its micro-batches.

        Raises:
          ValueError: the model has no indexer, or the batch has entries to select.
        """
        if not any(spec.indexer for spec in model.cfg.layers):
            raise ValueError(f"{model.cfg.name} has no indexer to warm up: expected a CSA layer.")
        given = dict(zip(Batch._fields, batch))
        choices = given.get("choices", Choices())
        if choices.selections is not None:
            raise ValueError(
                "choices.selections in a warm-up: expected none, since attention sees all entries."
            )
        model = dense(model)
        documents = given.get("documents")
        streams, stats = model.trunk(given["inputs"], documents, choices, remat=remat)
        loss, balance = layer_losses(model, stats, shares)
        labels, counted = without_ignored(given["following"], given.get("loss_weights"))
        ce = mean_share(cross_entropy(model, model.hidden(streams), labels), counted)
        ce = ce if shares is None else shares.following * ce
        terms = jax.lax.stop_gradient(jnp.stack([loss, ce, balance]))
        total, ce, balance = collectives.psum(terms, "batch", "seq")
        counts = tuple(tuple(block.router.counts for block in stage) for stage in stats)
        none = jnp.zeros(())
        return loss, WarmupMetrics(total, ce, none, total, balance, counts)

    def counts(self, cfg: V4Config, batch: Sequence) -> Counts:
        """What its terms are means over, of a batch or a part of it."""
        sees_all = cfg.with_indexer(topk=jnp.iinfo(jnp.int32).max)
        return counts_of(sees_all, **dict(zip(Batch._fields, batch)))


def dense(model: Transformer) -> Transformer:
    """A copy, with the same arrays, whose layers with an indexer attend to all visible entries."""
    model = copied(model)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Attention) and module.indexer is not None:
            module.sees_all = True
    return model
