"""Batches of steps to come, and their experts, chosen early: what `anticipation.py` says, done."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from v4jax.nn.choices import Choices
from v4jax.train.anticipation import Ahead, Anticipation, Routing
from v4jax.train.data import Data
from v4jax.train.losses import Batch
from v4jax.train.step import TrainState, TrainStep


class Lookahead:
    """Reads batches early and has their experts chosen. Holds no more than the batches of `delay` steps."""

    def __init__(self, rule: Anticipation, step: TrainStep):
        self._rule, self._step = rule, step
        self._batches: dict[int, Sequence] = {}
        self._source: tuple[Data, int] | None = None
        self._none: jax.Array | None = None

    def batch(
        self, state: TrainState, number: int, data: Data, batch_size: int
    ) -> tuple[Sequence, TrainState]:
        """The batch of the next step with its experts, and the state to take it by.

        Off, experts are -1 and layers choose: one program takes all steps, so that none has to be
        compiled when a spike comes, and a delay of 0 changes no bit. Experts that wait for other tokens
        (a run that goes on with other data) are dropped, and anticipation begins anew.

        Args:
          number: of the step, from 0 on.
        """
        if self._source is None or self._source[0] is not data or self._source[1] != batch_size:
            self._source, self._batches = (data, batch_size), {}
        routing = state.routing
        assert routing is not None  # `TrainStep.init` made it
        batch, last = self._read(number), number + self._rule.delay
        if routing.ahead:  # before devices are waited for
            self._read(last)
        if not int(routing.left):
            self._batches.clear()
            state = dataclasses.replace(state, routing=Routing(routing.left))
            return with_experts(batch, self._own(batch[0])), state
        ahead = list(routing.ahead)
        if ahead and not bool(jnp.array_equal(ahead[0].inputs, batch[0])):
            ahead = []
        for later in range(number + len(ahead), last + 1):
            found = self._read(later)
            ahead.append(Ahead(found[0], self._step.experts(state, found)))
        self._batches = {step: kept for step, kept in self._batches.items() if step > number}
        state = dataclasses.replace(state, routing=Routing(routing.left, tuple(ahead)))
        return with_experts(batch, ahead[0].experts), state

    def forget(self) -> None:
        """Lets go of batches that were read early: a state whose arrays are freed shares theirs."""
        self._batches.clear()

    def _own(self, inputs: jax.Array) -> jax.Array:
        """Experts [B, T, L, K] that say nothing of tokens [B, T]."""
        if self._none is None or self._none.shape[:2] != inputs.shape:
            cfg = self._step.cfg
            shape = (*inputs.shape, len(cfg.layers), cfg.moe.experts_per_token)
            none = jnp.full_like(inputs, -1, jnp.int16)
            self._none = jnp.broadcast_to(none[:, :, None, None], shape)
        return self._none

    def _read(self, step: int) -> Sequence:
        if step not in self._batches:
            assert self._source is not None
            self._batches[step] = self._step.batch(self._source[0], step, self._source[1])
        return self._batches[step]


def with_experts(batch: Sequence, experts: jax.Array) -> Sequence:
    """What a step takes, with experts [B, T, L, K] for its tokens."""
    whole: Any = batch if hasattr(batch, "choices") else Batch(*batch)
    return whole._replace(choices=Choices(experts, whole.choices.selections))
