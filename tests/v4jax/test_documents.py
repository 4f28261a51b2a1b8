"""Documents that share a row compute what each computes alone: losses, gradients, every layer kind."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sharding import TRAIN, make_mesh
from tests.models import random_model
from tests.tolerances import FLOAT32, assert_close, relative_error
from v4jax import plain, tiny
from v4jax.config import window_layer
from v4jax.nn.documents import Documents, alignment
from v4jax.nn.indexer import indexer_loss
from v4jax.nn.layers import ModelContext
from v4jax.nn.moe import Router
from v4jax.train.losses import (
    IGNORED,
    Batch,
    LossWeights,
    mean_share,
    shifted,
    training_loss,
    without_ignored,
)
from v4jax.train.step import loss_and_gradients

ALIGN, ROW = 128, 768
# HCA and CSA, and in the MTP block a window alone: what is compiled is small.
CFG = dataclasses.replace(tiny(), layers=tiny().layers[2:4], sinkhorn_iters=3)
# Of a parameter's largest gradient. Where 420 terms cancel to 1e-4 of what others have, 1.6e-4 is left of
# float32's rounding (mtp.0.hc_head.base).
RELATIVE = 5e-4
TERMS = ("loss", "ce", "mtp_ce", "indexer", "balance")
WEIGHTS = LossWeights(mtp=0.3, balance=0.1, indexer=0.5)  # all of them are to be seen in gradients
TOKENS = np.random.default_rng(3).integers(2, 256, (6, 2 * ALIGN + 2)).astype(np.int32)


def packed(*lengths: int, rows: int = 1) -> Batch:
    """The first tokens of rows of TOKENS in one row, between them padding that is not to be seen."""
    arrays = [np.random.default_rng(9).integers(2, 256, (3, ROW)).astype(np.int32)]
    weights, starts = np.zeros((2, ROW), np.float32), np.zeros(ROW, np.int32)
    valid, at = np.zeros(ROW, bool), 0
    for tokens, length in zip(TOKENS, lengths):
        for offset in range(3):
            arrays[0][offset, at : at + length] = tokens[offset : offset + length]
        weights[:, at : at + length] = 1
        valid[at : at + length], starts[at:] = True, at
        at += -(-length // ALIGN) * ALIGN
    assert at <= ROW
    found = [*arrays[0], *weights, Documents(valid, starts)]
    return Batch(*jax.tree.map(lambda x: np.tile(x, (rows, 1)), found))


@functools.cache
def _model():
    return random_model(CFG, seed=1)


@functools.cache
def _program():
    """(batch) -> metrics, and gradients by path."""
    graphdef, params, fixed = nnx.split(_model(), nnx.Param, ...)
    step = jax.jit(loss_and_gradients(graphdef, WEIGHTS, TRAIN, remat="none"))

    def run(batch: Batch):
        gradients, metrics = step(params, fixed, *batch)
        return metrics, _named(gradients)

    return run


def _named(gradients) -> dict[str, np.ndarray]:
    return {
        ".".join(map(str, path)): np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(gradients)
    }


def _assert_same_gradients(found, expected) -> None:
    """To 1e-5 of the largest of all gradients, and each parameter's own to `RELATIVE`."""
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for path, gradient in found.items():
        assert np.abs(gradient - expected[path]).max() <= FLOAT32 * largest, path
        assert relative_error(gradient, expected[path]) <= RELATIVE, path


def _alone(tokens: np.ndarray) -> Batch:
    """Three rows of one document each, as a token stream gives them."""
    ones = np.ones((3, 140), np.float32)
    return Batch(*shifted(tokens), ones, ones, None)


def _of(batch: Batch, row: int, start: int, length: int) -> tuple[float, float]:
    """Cross entropies of one document of a batch, whose loss alone counts."""
    weights = np.zeros(batch.inputs.shape, np.float32)
    weights[row, start : start + length] = 1
    metrics, _ = _program()(batch._replace(loss_weights=weights, after_weights=weights))
    return float(metrics.ce), float(metrics.mtp_ce)


def test_loss_and_gradients_of_packed_documents_are_those_of_documents_alone():
    """Three of 140 tokens: 12 of HCA's second window, and 116 of padding."""
    metrics, gradients = _program()(packed(140, 140, 140))
    alone, alone_gradients = _program()(_alone(TOKENS[:3, :142]))

    for name in TERMS:
        assert_close(getattr(metrics, name), getattr(alone, name), FLOAT32)
    for new, old in zip(*map(jax.tree.leaves, (metrics.expert_counts, alone.expert_counts))):
        np.testing.assert_array_equal(new, old)
    _assert_same_gradients(gradients, alone_gradients)


def test_documents_of_all_lengths_have_their_own_losses():
    """Shorter than a window, as long, and one token around a window's end."""
    lengths, start = (127, 1, 129, 4, 3), 0
    batch = packed(*lengths)
    for i, length in enumerate(lengths):
        # In a row of its own it is followed by anything: nothing looks ahead.
        row = np.concatenate([TOKENS[i, : length + 2], TOKENS[5]])[:142]
        alone = _of(_alone(np.tile(row, (3, 1))), 1, 0, length)
        assert_close(_of(batch, 0, start, length), alone, FLOAT32)
        start += -(-length // ALIGN) * ALIGN


def test_nothing_of_another_document_or_of_padding_is_seen():
    batch = packed(140, 129, 200)
    spoiled = batch._replace(inputs=batch.inputs.copy(), following=batch.following.copy())
    for array in (spoiled.inputs, spoiled.following):
        array[0, :256] = array[0, :256][::-1]
        array[0, 256 + 129 : 512] = 7

    for start, length in ((256, 129), (512, 200)):
        assert _of(batch, 0, start, length) == _of(spoiled, 0, start, length)
    assert _of(batch, 0, 0, 140) != _of(spoiled, 0, 0, 140)


@pytest.mark.parametrize("shape", [dict(context=2, fsdp=2)], ids=str)
def test_packed_rows_are_cut_over_a_mesh(shape):
    """Documents across the cut, whose loss and gradients are those of one device."""
    batch = packed(140, 140, 140, rows=2)
    expected, expected_gradients = _program()(packed(140, 140, 140))
    with jax.set_mesh(make_mesh(**shape)):
        graphdef, params, fixed = nnx.split(random_model(CFG, rules=TRAIN, seed=1), nnx.Param, ...)
        run = jax.jit(loss_and_gradients(graphdef, WEIGHTS, TRAIN, remat="none"))
        gradients, metrics = run(params, fixed, *jax.tree.map(jnp.asarray, batch))

    for name in TERMS:
        assert_close(getattr(metrics, name), getattr(expected, name), FLOAT32)
    _assert_same_gradients(_named(gradients), expected_gradients)


def test_a_cut_through_compressed_rows_is_refused():
    batch = jax.tree.map(lambda x: x[:, :192], packed(60))
    graphdef, params, fixed = nnx.split(_model(), nnx.Param, ...)
    run = loss_and_gradients(graphdef, WEIGHTS, TRAIN)
    with (
        jax.set_mesh(make_mesh(context=2)),
        pytest.raises(ValueError, match="parts of 96 tokens, and a compressed row pools 128"),
    ):
        jax.eval_shape(run, params, fixed, *batch)


def test_documents_begin_at_multiples_of_all_ratios():
    assert alignment(tiny()) == 128
    assert alignment(dataclasses.replace(tiny(), layers=tiny().layers[:1])) == 1


def test_padding_behind_a_single_document_counts_for_nothing():
    """Rows of one document each, as without packing: routing counts, balance and indexer."""
    context = ModelContext(CFG, plain(), TRAIN, nnx.Rngs(0))
    router = Router(context, window_layer())
    x = jax.random.normal(jax.random.key(0), (2, 20, CFG.embed_dim))
    valid = np.arange(20) < 13
    tokens = np.zeros((2, 20), np.int32)
    *_, stats = router(x, tokens, Documents(np.stack([valid, valid])))
    *_, alone = router(x[:, :13], tokens[:, :13])
    assert_close(stats.balance_loss, alone.balance_loss, FLOAT32)
    np.testing.assert_array_equal(stats.counts, alone.counts)

    rng = np.random.default_rng(0)
    shapes = ((1, 20, 3, 8), (1, 20, 3), (1, 5, 8))
    q, weights, keys = (rng.standard_normal(shape, np.float32) for shape in shapes)
    indices, mass = np.tile(np.arange(4), (1, 20, 1)), rng.random((1, 20, 4), np.float32)
    loss = indexer_loss(q, weights, keys, indices, mass, valid[None])
    short = [array[:, :13] for array in (q, weights, indices, mass)]
    assert_close(loss, indexer_loss(*short[:2], keys, *short[2:]), FLOAT32)


def test_weights_of_the_loss_and_targets_that_are_ignored():
    losses = jnp.array([[1.0, 2.0, 4.0, 8.0]])
    targets, counted = without_ignored(jnp.array([[5, IGNORED, 7, 8]]), None)
    assert targets.tolist() == [[5, 0, 7, 8]] and counted.tolist() == [[1, 0, 1, 1]]
    assert_close(mean_share(losses, counted), 13 / 3, FLOAT32)
    weights = jnp.array([[0.5, 1, 0, 2]])
    assert_close(mean_share(losses, without_ignored(targets, weights)[1]), 18.5 / 3.5, FLOAT32)
    assert float(mean_share(losses, jnp.zeros((1, 4)))) == 0
    with pytest.raises(ValueError, match="loss_weights without after_weights: expected both"):
        training_loss(_model(), *shifted(TOKENS[:1, :10]), loss_weights=jnp.ones((1, 8)))
