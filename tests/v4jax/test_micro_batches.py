"""A step in micro-batches is the step of the whole batch, whatever each of them has to learn from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sharding import TRAIN, make_mesh
from tests.models import random_model
from tests.tolerances import assert_close, relative_error
from tests.v4jax.test_documents import CFG, RELATIVE, TERMS, packed
from v4jax.nn.choices import Choices
from v4jax.train.losses import IGNORED, Batch, LossWeights
from v4jax.train.optimizers import adamw
from v4jax.train.step import TrainStep, loss_and_gradients

WEIGHTS = LossWeights(mtp=0.3, balance=0.1, indexer=0.5, z=0.01)
CSA = dataclasses.replace(CFG, layers=CFG.layers[1:])  # with an MTP block


def _unequal() -> Batch:
    """Four rows: three documents, five short ones, a long one with few targets, and nothing."""
    rows = [packed(140, 140, 140), packed(127, 1, 129, 4, 3), packed(250), packed()]
    batch = jax.tree.map(lambda *x: np.concatenate(x), *rows)
    batch.loss_weights[2, 20:] = 0
    batch.loss_weights[0, :30] = 0.5
    batch.following[1, 5:60] = IGNORED
    return batch


@functools.cache
def _model():
    return random_model(CSA, seed=1)


def _step(micro_batches: int):
    """Gradients by path, and metrics."""
    graphdef, *state = nnx.split(_model(), nnx.Param, ...)
    step = loss_and_gradients(graphdef, WEIGHTS, TRAIN, "none", micro_batches)
    gradients, metrics = jax.jit(step)(*state, *_unequal())
    named = jax.tree_util.tree_leaves_with_path(gradients)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in named}, metrics


@pytest.fixture(scope="module")
def whole():
    return _step(1)


def _assert_same(found, expected) -> None:
    (found, metrics), (expected, whole) = found, expected
    for name in (*TERMS, "z"):
        assert_close(getattr(metrics, name), getattr(whole, name), 1e-6)
    for new, old in zip(*map(jax.tree.leaves, (metrics.expert_counts, whole.expert_counts))):
        np.testing.assert_array_equal(new, old)
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for path, gradient in found.items():
        assert np.abs(gradient - expected[path]).max() <= 1e-6 * largest, path
        assert relative_error(gradient, expected[path]) <= RELATIVE, path


def test_gradients_and_terms_are_those_of_the_whole_batch(whole):
    _assert_same(_step(4), whole)


def test_each_device_cuts_its_own_sequences(whole):
    with jax.set_mesh(make_mesh(fsdp=2, context=2)):
        _assert_same(_step(2), whole)


def test_queries_that_learn_from_given_entries_are_counted():
    selections = np.full((4, 768, 1, 4), -1, np.int32)
    selections[0, 100:130, 0, :2], selections[1, 3, 0] = 7, 5  # of row 1, token 3 is document 0's
    selections[2, 5, 0, 0] = 1  # one entry is no choice
    selections[3, 8, 0] = 2  # padding
    batch = (*_unequal()[:6], Choices(selections=jnp.asarray(selections)))
    assert float(WEIGHTS.counts(CSA, batch).queries[0]) == 31


def test_numbers_that_do_not_divide_are_named():
    with pytest.raises(
        ValueError, match="micro_batches=3: a device has 4 sequences of a batch; expected"
    ):
        _step(3)
    with pytest.raises(ValueError, match="micro_batches=0: expected 1 or more"):
        TrainStep(_model(), adamw(1e-3), micro_batches=0)
