"""Anticipatory routing: the experts of a step's tokens are those that earlier parameters chose for them.

    of step t:  features, scores and weights of experts from theta[t],  their ids from theta[t - delay]

The report found that spikes of the loss come with outliers in MoE layers, which routing makes worse; ids by
older parameters keep the two apart. No older parameters are held for that. The batch of step t is read
`delay` steps early, a forward pass chooses its experts then, and their ids wait for the step:

    bytes = (delay + 1) * tokens of a batch * (2 * layers * experts per token + 4)

cut over devices as tokens are. When anticipation begins, at step s, the experts of the batches s .. s +
delay are chosen by theta[s]: ids of step t are from theta[max(s, t - delay)].

Source: report section 4.2.3, which gives neither the delay, nor how long it stays on, nor what a spike is.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from v4jax.config import V4Config
from v4jax.nn.model import BlockStats
from v4jax.train.indexer_warmup import IndexerWarmup
from v4jax.train.losses import Loss
from v4jax.train.spikes import Spikes

WHEN = ("auto", "always")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anticipation:
    """For `Trainer(anticipate=Anticipation())`: experts are chosen by the parameters of some steps before.

    Attributes:
      when: "auto": after a step that was skipped (`skip_above`), for a while; "always".
      delay: steps between the choice and its use. 0 chooses by the parameters of the step itself.
      steps: that "auto" stays on for, counted from the last skipped step.

    Raises:
      ValueError: another `when`, a negative delay, or no step.
    """

    when: str = "auto"
    delay: int = 4
    steps: int = 128

    def __post_init__(self):
        if self.when not in WHEN:
            raise ValueError(f"Anticipation when={self.when!r}: expected 'auto' or 'always'.")
        if self.delay < 0:
            raise ValueError(f"Anticipation delay={self.delay}: expected 0 or more steps.")
        if self.steps < 1:
            raise ValueError(f"Anticipation steps={self.steps}: expected 1 or more.")

    def check(self, cfg: V4Config, loss: Loss | None, skip_above: float | Spikes) -> None:
        """Refuses a run in which nothing would be anticipated.

        Raises:
          ValueError: "auto" where no norm is too large, an indexer's warm-up, or no router that learns.
        """
        if self.when == "auto" and not isinstance(skip_above, Spikes) and math.isinf(skip_above):
            raise ValueError(
                "Anticipation when='auto' begins after a skipped step, and skip_above=inf skips none for its "
                "norm: expected skip_above=Spikes(...) or a norm, or when='always'."
            )
        if isinstance(loss, IndexerWarmup):
            raise ValueError(  # noqa: TRY004 - as other options that do not go together
                "anticipate= in an indexer's warm-up: expected None, since routers and what they read stay."
            )
        if all(spec.hash_routed for spec in cfg.layers):
            raise ValueError(
                f"anticipate=: {cfg.name} has hash-routed layers alone, whose experts parameters do not "
                "choose. Expected a model with a router that learns, or None."
            )

    def start(self) -> "Routing":
        """Before the first step."""
        return Routing(jnp.full((), int(self.when == "always"), jnp.int32))

    def left_after(self, left: jax.Array, fit: jax.Array) -> jax.Array:
        """Steps that are left, after one that was taken (`fit`) or skipped."""
        if self.when == "always":
            return left
        return jnp.where(fit, jnp.maximum(left - 1, 0), self.steps)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["inputs", "experts"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Ahead:
    """Experts that were chosen for a step to come."""

    inputs: jax.Array  # [B, T] int32, the tokens that they are of
    experts: jax.Array  # [B, T, L, K] int16


@functools.partial(jax.tree_util.register_dataclass, data_fields=["left", "ahead"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Routing:
    """What is known of the routing of the next steps; a part of the training state.

    Attributes:
      left: [] int32, steps that experts are still chosen ahead for; of "always" it stays 1.
      ahead: experts of the next steps, that of the next one first. Empty when anticipation is off.
    """

    left: jax.Array
    ahead: tuple[Ahead, ...] = ()


def has_next(batch: Sequence, routing: Routing) -> bool:
    """Whether a batch has the experts that were chosen ahead for the next step."""
    choices = getattr(batch, "choices", None)
    return choices is not None and any(choices.experts is a.experts for a in routing.ahead[:1])


def experts_of(stats: tuple[tuple[BlockStats, ...], ...]) -> jax.Array:
    """Of `Transformer.trunk`'s statistics: experts [B, T, L, K] int16 of all layers."""
    layers = []
    for stage in stats:  # [repeats, blocks, B, T, K]: layers in their order
        chosen = jnp.stack([block.router.experts for block in stage], axis=1)
        layers.append(chosen.reshape(-1, *chosen.shape[2:]))
    return jnp.moveaxis(jnp.concatenate(layers), 0, 2).astype(jnp.int16)
