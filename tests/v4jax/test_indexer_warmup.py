"""Warming indexers up: a loss over all visible entries, that indexers alone learn from."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.attention import window_attention
from sharding import TRAIN, make_mesh
from tests.models import random_model
from tests.tolerances import FLOAT32, assert_close
from v4jax import tiny
from v4jax.nn.attention import Attention
from v4jax.nn.choices import Choices
from v4jax.nn.indexer import BLOCK_QUERIES, dense_indexer_loss
from v4jax.train import IndexerWarmup, LossWeights, TokenStream, Trainer, adamw
from v4jax.train.losses import Batch, shifted
from v4jax.train.step import loss_and_gradients

CSA = next(spec for spec in tiny().layers if spec.indexer)
CONFIG = dataclasses.replace(tiny(), layers=(CSA,), mtp_layers=())
LENGTH = 96  # 24 compressed rows, of which the indexer picks fewer
FEW = CONFIG.with_indexer(topk=4)
WINDOW, RATIO, SCALE = 8, 4, 0.25


def _truth(queries, weights, keys, q, window, entries, sink, starts, valid) -> float:
    """The formula, query by query in float64: KL(mass || softmax of scores) over visible entries."""
    divergences = []
    for row, t in np.ndindex(q.shape[:2]):
        begin = starts[row, t]
        first, end = begin // RATIO, begin // RATIO + (t - begin + 1) // RATIO
        if end - first < 2 or not valid[row, t]:
            continue
        near = [WINDOW + s for s in range(max(begin, t - WINDOW + 1), t + 1)]
        mass = np.zeros(end - first)
        for head in range(q.shape[2]):
            away = np.exp(SCALE * entries[row, first:end] @ q[row, t, head])
            beside = np.exp(SCALE * window[row, near] @ q[row, t, head])
            mass += away / (away.sum() + beside.sum() + np.exp(sink[head]))
        p = mass / mass.sum()
        dots = np.maximum(keys[row, first:end] @ queries[row, t].T, 0)
        scores = dots @ weights[row, t]
        log_q = scores - np.log(np.exp(scores).sum())
        divergences.append((p * (np.log(p) - log_q)).sum())
    return float(np.mean(divergences))


@pytest.mark.parametrize("has_documents", [False, True])
def test_the_loss_is_that_of_the_formula(has_documents):
    """Over several blocks of queries, of which the last is not full."""
    length, rows = BLOCK_QUERIES + 24, 2
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=(rows, *shape))
    queries, weights, keys = draw(length, 3, 8), draw(length, 3), draw(length // RATIO, 8)
    q, entries = draw(length, 2, 16), draw(length // RATIO, 16)
    window, sink = draw(WINDOW + length, 16), rng.normal(size=2)
    starts, valid = np.zeros((rows, length), np.int32), np.ones((rows, length), bool)
    if has_documents:
        starts[1, 40:], valid[0, -7:] = 40, False
    positions = np.arange(length, dtype=np.int32) - starts
    first = starts // RATIO if has_documents else None
    args = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (queries, weights, keys, q, entries))

    @jax.jit
    def loss(queries, weights, keys, q, entries):
        _, denominator = window_attention(
            q,
            jnp.float32(window),
            entries,
            jnp.float32(sink),
            positions,
            first,
            ratio=RATIO,
            scale=SCALE,
        )
        return dense_indexer_loss(
            queries,
            weights,
            keys,
            q,
            entries,
            denominator,
            positions,
            first,
            valid if has_documents else None,
            ratio=RATIO,
            scale=SCALE,
        )

    expected = _truth(queries, weights, keys, q, window, entries, sink, starts, valid)
    assert_close(loss(*args), expected, FLOAT32)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 256, (2, LENGTH + 2)).astype(np.int32)


def _gradients(cfg, loss, tokens, **options):
    graphdef, params, fixed = nnx.split(random_model(cfg), nnx.Param, ...)
    step = jax.jit(loss_and_gradients(graphdef, loss, TRAIN, remat="none", **options))
    gradients, metrics = step(params, fixed, *map(jnp.asarray, shifted(tokens)))
    flat = nnx.to_flat_state(gradients)
    return {".".join(map(str, p)): np.asarray(v.get_value()) for p, v in flat}, metrics


@pytest.fixture(scope="module")
def found(tokens):
    return _gradients(FEW, IndexerWarmup(), tokens)


def test_indexers_alone_learn(found):
    """No other parameter, though all were asked for; nor do indexers from the text's loss."""
    gradients, metrics = found
    for path, gradient in gradients.items():
        assert (np.abs(gradient).max() > 0) == (".indexer." in path), path
    assert metrics.loss == metrics.indexer > 0 and float(metrics.ce) > 1


def test_a_warm_up_is_what_an_indexer_that_picks_everything_learns_from(found, tokens):
    """Of dense attention and of all picks: the loss, its gradients and the text's cross entropy."""
    weights = LossWeights(balance=0.0, indexer=1.0)
    expected, metrics = _gradients(CONFIG.with_indexer(topk=LENGTH), weights, tokens)
    gradients, warm = found
    assert_close(warm.indexer, metrics.indexer, FLOAT32)
    assert_close(warm.ce, metrics.ce, FLOAT32)
    for path, gradient in gradients.items():
        if ".indexer." in path:
            assert_close(gradient, expected[path], 1e-4)


def test_micro_batches_on_a_mesh_compute_the_same(found, tokens):
    """Heads, positions and sequences cut over devices, and a device's sequences one after the other."""
    with jax.set_mesh(make_mesh(tensor=2, context=2)):
        gradients, metrics = _gradients(FEW, IndexerWarmup(), tokens, micro_batches=2)
    expected, expected_metrics = found
    for name in expected_metrics.logged:
        assert_close(getattr(metrics, name), getattr(expected_metrics, name), 10 * FLOAT32)
    for path, gradient in expected.items():
        assert_close(gradients[path], gradient, 1e-3)


def test_a_trained_indexer_picks_what_attention_looks_at():
    """The loss falls, what is not the indexer's stays, and the model attends to picks as before."""
    data = TokenStream(np.random.default_rng(0).integers(2, 256, 2000), LENGTH)
    model = random_model(FEW)
    before = {path: np.array(value) for path, value in _arrays(model)}
    trainer = Trainer(model, adamw(1e-2), trainable="indexer", loss=IndexerWarmup())
    batch = trainer.batch(data, 0, 2)
    losses = [float(trainer.step(batch).loss) for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0] and not math.isnan(losses[-1])
    for path, value in _arrays(trainer.model):
        assert np.array_equal(value, before[path]) == (".indexer." not in path), path
    attention = trainer.model.stages[0].blocks[0].attention
    assert isinstance(attention, Attention) and not attention.sees_all


def _arrays(model):
    return [(".".join(map(str, p)), v.get_value()) for p, v in nnx.to_flat_state(nnx.state(model))]


def test_what_cannot_be_warmed_up_is_said(tokens):
    window = dataclasses.replace(CONFIG, layers=tiny().layers[:1])
    with pytest.raises(ValueError, match="has no indexer to warm up: expected a CSA layer"):
        IndexerWarmup()(random_model(window), shifted(tokens), remat="none")
    picks = Choices(selections=jnp.zeros((2, LENGTH, 1, 4), jnp.int32))
    batch = Batch(*shifted(tokens), None, None, None, picks)
    with pytest.raises(ValueError, match="selections in a warm-up: expected none"):
        IndexerWarmup()(random_model(CONFIG), batch, remat="none")
