"""The compiled step, by Muon with its state in bfloat16 and in micro-batches: it learns, and what it skips."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from tests.models import random_model
from v4jax import tiny
from v4jax.train.losses import shifted
from v4jax.train.optimizers import muon
from v4jax.train.spikes import Spikes
from v4jax.train.step import TrainStep

# CSA, with an indexer, and a router with a bias.
SMALL = dataclasses.replace(tiny(), layers=tiny().layers[3:4], mtp_layers=())
TOKENS = np.random.default_rng(0).integers(2, 256, (4, 98)).astype(np.int32)


@pytest.fixture(scope="module")
def training():
    """A compiled step, and its first state as arrays of the host."""
    optimizer = muon(3e-3, state_dtype="bfloat16")
    options = dict(bias_speed=1e-3, micro_batches=2, skip_above=Spikes(5.0, steps=3, at_most=100.0))
    training = TrainStep(random_model(SMALL), optimizer, **options)
    return training, jax.tree.map(np.array, training.init())


def _same(new, old) -> list[bool]:
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    return [np.array_equal(a, b, equal_nan=True) for a, b in pairs]


def _with(state, value: float):
    """The state with the last norm's weights multiplied by a value."""
    params = jax.tree.map(lambda x: x, state.params)
    weight = params["norm"]["weight"]
    weight.set_value(weight.get_value() * np.float32(value))
    return dataclasses.replace(state, params=params)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e4])
def test_a_step_that_is_not_fit_changes_nothing(training, value):
    """Its loss is NaN or infinite, or the norm of its gradients is over 100."""
    training, state = training
    before = _with(state, value)

    after, metrics = training.step(before, shifted(TOKENS))

    assert metrics.skipped and all(_same(after, before))
    assert value == 1e4 or not math.isfinite(metrics.loss)
    after, metrics = training.step(state, shifted(TOKENS))
    assert not metrics.skipped and 0 < metrics.grad_norm < 100 == metrics.grad_limit
    assert not any(_same(after.params, state.params)) and not all(_same(after.fixed, state.fixed))


def test_it_learns(training):
    training, state = training
    losses = []
    for _ in range(6):
        state, metrics = training.step(state, shifted(TOKENS))
        losses.append(float(metrics.ce))
    assert losses[-1] < 0.8 * losses[0], losses
    bias = state.fixed["stages"][0]["blocks"][0]["moe"]["router"]["bias"].get_value()
    assert 0 < np.abs(bias).max() <= 6.01e-3  # one step of 1e-3 each time, not one for each part


def test_a_spike_is_skipped_when_enough_steps_were_taken(training):
    """And does not count among them; a state that is not scaled goes on."""
    training, state = training
    spike = _with(state, 8.0)
    after, metrics = training.step(spike, shifted(TOKENS))
    assert not metrics.skipped  # the first step, and its norm is below 100

    norms = []
    for _ in range(3):
        state, metrics = training.step(state, shifted(TOKENS))
        norms.append(float(metrics.grad_norm))
    np.testing.assert_array_equal(state.norms, np.float32(norms))
    state = jax.tree.map(np.array, state)
    after, metrics = training.step(_with(state, 8.0), shifted(TOKENS))
    limit = np.mean(norms) + 5 * max(np.std(norms), 0.01 * np.mean(norms))
    assert limit == pytest.approx(float(metrics.grad_limit), rel=1e-5)
    assert metrics.skipped and limit < metrics.grad_norm < 100
    np.testing.assert_array_equal(after.norms, state.norms)
    after, metrics = training.step(state, shifted(TOKENS))
    assert not metrics.skipped
    np.testing.assert_array_equal(after.norms, np.float32([*norms[1:], metrics.grad_norm]))


def test_what_is_no_spike_is_refused():
    with pytest.raises(ValueError, match=r"Spikes deviations=0: expected a number above 0"):
        Spikes(0)
    with pytest.raises(ValueError, match=r"Spikes steps=1: expected 2 or more"):
        Spikes(steps=1)
