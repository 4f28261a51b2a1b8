"""What `inspect` says of a layer is what the layer computes; variants share weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import NANO
from tests.models import random_model
from tests.tolerances import FLOAT32, assert_close
from v4jax import from_hf, load, tiny
from v4jax.config import CompressorSpec, LayerSpec
from v4jax.nn.layers import rotate

CONFIG = dataclasses.replace(tiny(), layers=tiny().layers[:3], mtp_layers=())
LENGTH = 261  # two rows of HCA, 65 of CSA of which 16 are picked
QUERIES = (0, 130, -1)


@pytest.fixture(scope="module")
def model():
    model = random_model(CONFIG, scan_layers=False)
    for i, stage in enumerate(model.stages):  # sinks that weigh something, not alike
        sink = stage.blocks[0].attention.sink
        sink.set_value(jnp.linspace(-1.0, 1.0 + i, sink.get_value().shape[0]))
    return model


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(2, 256, (2, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def views(model, tokens):
    return model.inspect(tokens, queries=QUERIES)


def test_layers_follow_each_other_as_in_the_model(model, tokens, views):
    streams, _ = jax.jit(model.trunk)(tokens)
    again = model.inspect(tokens, queries=[0])
    assert [view.kind for view in views] == ["window", "CSA", "HCA"]
    assert_close(views[0].streams, model.streams(model.embedding(tokens)), FLOAT32)
    blocks = [stage.blocks[0] for stage in model.stages]
    last, *_ = jax.jit(lambda b, s, t: b(s, t))(blocks[2], again[2].streams, tokens)
    assert_close(last, streams, FLOAT32)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_weights_times_rows_are_the_output_of_attention(model, views, layer):
    view, attention = views[layer], model.stages[layer].blocks[0].attention
    x, at = view.attention_input, np.array(QUERIES) % LENGTH
    positions = jnp.tile(jnp.arange(LENGTH), (2, 1))
    _, _, kv = attention.project(x, positions)
    window = np.asarray(kv)[:, np.maximum(at[:, None] - CONFIG.window + 1 + np.arange(16), 0)]
    out = np.einsum("bqnc,bqch->bqnh", view.window_weights, window)
    total = view.window_weights.sum(-1) + view.sink_weights
    if attention.compressor:
        rows = np.asarray(attention.compressor(x))
        out += np.einsum("bqns,bsh->bqnh", view.compressed_weights, rows)
        total += view.compressed_weights.sum(-1)
    assert_close(total, np.ones_like(total), FLOAT32)
    turned = rotate(jnp.asarray(out), positions[:, at], attention._rope, inverse=True)
    expected = attention.wo_b(attention.wo_a(turned.reshape(2, len(at), -1)))
    assert_close(expected, view.attention_output[:, at], FLOAT32)


def test_picks_are_the_best_scored_rows_that_are_complete(views):
    view = views[1]
    scores, picks = np.asarray(view.indexer_scores), np.asarray(view.picks)
    assert scores.shape == (2, 3, LENGTH // 4) and picks.shape == (2, 3, 16)
    assert (picks[:, 0] == -1).all()  # the first token sees no complete row
    for b in range(2):
        for q, complete in ((1, 131 // 4), (2, 261 // 4)):
            best = np.argsort(-scores[b, q])[:16]
            assert sorted(picks[b, q]) == sorted(best)
            assert np.isfinite(scores[b, q]).sum() == complete
    weighed = np.asarray(view.compressed_weights)[0, 2].max(0) > 0
    assert set(np.flatnonzero(weighed)) <= set(picks[0, 2])
    assert views[0].picks is None and views[2].indexer_scores is None


def test_experts_are_those_of_the_scores(views):
    view = views[2]  # routed by score, without a bias yet
    scores = np.asarray(view.router_scores)
    best = np.sort(np.argsort(-scores, axis=-1)[..., :2], axis=-1)
    np.testing.assert_array_equal(np.sort(view.experts, axis=-1), best)
    assert_close(view.expert_weights.sum(-1), np.full(scores.shape[:2], 1.5), FLOAT32)


def test_queries_outside_the_text_are_refused(model, tokens):
    with pytest.raises(ValueError, match=r"queries=\[261\]: expected positions in -261..260"):
        model.inspect(tokens, queries=[261])


def test_the_architecture_of_a_model_is_fixed(model):
    with pytest.raises(AttributeError, match=r"model\.variant\(cfg\)"):
        model.cfg = tiny()


def test_a_variant_computes_with_the_same_weights(model, tokens, views):
    """All rows in place of the best 16: what dense attention gives, and another top-k does not."""
    logits = jax.jit(lambda m, t: m(t))
    all_rows = model.variant(CONFIG.with_indexer(topk=1000))
    dense = model.variant(CONFIG.map_layers(lambda layer: dataclasses.replace(layer, indexer=None)))
    assert dense.stages[1].blocks[0].attention.indexer is None
    expected = logits(dense, tokens)
    assert_close(logits(all_rows, tokens), expected, FLOAT32)
    assert np.abs(np.asarray(logits(model, tokens)) - expected).max() > 1e-3
    view = dense.inspect(tokens, queries=[-1])[1]
    assert (view.compressed_weights > 0).all() and view.picks is None


def test_what_a_variant_lacks_is_named(model):
    other = dataclasses.replace(
        CONFIG, layers=(*CONFIG.layers[:2], LayerSpec(compressor=CompressorSpec(ratio=64)))
    )
    with pytest.raises(ValueError, match=r"compressor\.ape of \(64, 96\).*one of \(128, 96\)"):
        model.variant(other)
    more = dataclasses.replace(CONFIG, layers=(CONFIG.layers[1],) * 3)
    with pytest.raises(ValueError, match=r"needs stages\.0.*nothing by that name"):
        model.variant(more)


def test_a_checkpoint_loads_as_another_architecture():
    cfg = from_hf(NANO).map_layers(lambda layer: dataclasses.replace(layer, indexer=None))
    cfg = dataclasses.replace(cfg, mtp_layers=())
    model = load(NANO, config=cfg)
    assert model.cfg.indexer is None and not model.mtp
    assert load(NANO, config=from_hf(NANO).with_indexer(topk=5)).cfg.indexer.topk == 5
