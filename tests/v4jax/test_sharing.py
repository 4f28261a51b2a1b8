"""Layers that use rows of compressed KV, or picks of them, which an earlier layer has made.

Lengths pass the window (16), two rows of HCA (256) and 4 x top-k (64), and divide nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import v4jax
from sharding import TRAIN, make_mesh
from tests.models import extend, random_model
from tests.tolerances import FLOAT32, assert_close
from v4jax import Transformer, released, tiny
from v4jax.checkpoint.errors import ConfigError
from v4jax.checkpoint.hf_config import from_hf, to_hf
from v4jax.config import CompressorSpec, LayerSpec, csa_layer, hca_layer, window_layer
from v4jax.inference.engine import Engine
from v4jax.inference.sampling import Sampling
from v4jax.nn.cache import init_cache
from v4jax.nn.choices import Choices
from v4jax.nn.layers import copied
from v4jax.nn.model import plan_stages
from v4jax.nn.shared import Shared
from v4jax.planning import costs
from v4jax.planning.describe import memory_by_part
from v4jax.planning.step_report import representatives
from v4jax.train import IndexerWarmup
from v4jax.train.losses import LossWeights, shifted, training_loss
from v4jax.train.step import loss_and_gradients

INDEXER = tiny().indexer


def reuse(rows: int, picks: int | None = None, layer: LayerSpec | None = None) -> LayerSpec:
    """A CSA layer, or another, with rows and picks of others."""
    layer = csa_layer(INDEXER) if layer is None else layer
    return dataclasses.replace(layer, entries_from=rows, selection_from=picks)


def config(*layers: LayerSpec):
    """tiny() with these layers, all of them hash-routed: rounding sends no token to another expert."""
    layers = tuple(dataclasses.replace(layer, hash_routed=True) for layer in layers)
    return dataclasses.replace(tiny(), name="custom", layers=layers, mtp_layers=())


CSA, REUSE = csa_layer(INDEXER), reuse(0, 0)
PAIR = config(CSA, REUSE)
# Rows of layer 0, picks by itself; rows of 0 and picks of 1; HCA, and one with its rows.
ROLES = config(CSA, reuse(0), reuse(0, 1), hca_layer(), reuse(3, layer=hca_layer()))
TRAINED = config(window_layer(), window_layer(), CSA, reuse(2, 2))
LENGTH = 262
STEP = 0.2  # of a compressor's kernel, whose norm is 14
TOKENS = np.random.default_rng(0).integers(2, 256, (2, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return random_model(ROLES, scan_layers=False)


@pytest.fixture(scope="module")
def whole(model):
    return np.asarray(model(TOKENS))


def test_chunks_and_decoding_give_the_logits_of_the_whole(model, whole):
    """Rows of a batch with chunks of different lengths; a row of HCA is completed while decoding."""
    cache, done = model.init_cache(2, 512), np.zeros(2, int)
    for counts in [(7, 130), (130, 7), (113, 113), *[(1, 1)] * 12]:
        columns = 1 if max(counts) == 1 else 130
        at = np.minimum(done[:, None] + np.arange(columns), LENGTH - 1)
        tokens = np.take_along_axis(TOKENS, at, axis=1)
        logits, cache = extend(model)(tokens, jnp.array(counts, jnp.int32), cache)
        for row, count in enumerate(counts):
            assert_close(logits[row, :count], whole[row, done[row] : done[row] + count], FLOAT32)
        done += counts
    assert done.tolist() == [LENGTH, LENGTH]


def _float64(array) -> np.ndarray:
    return np.asarray(array, np.float64)


def _by_hand(attention, x, rows, picks) -> np.ndarray:
    """Attention of x [T, D] to its window, its sink and given rows [S, H], the picked ones or all."""
    cfg, spec = attention.cfg, attention.spec
    positions = jnp.arange(len(x))[None]
    _, q, kv = (_float64(y[0]) for y in attention.project(jnp.asarray(x)[None], positions))
    mixed, sink = np.zeros_like(q), np.exp(_float64(attention.sink[...]))
    for t in range(len(x)):
        seen = np.arange((t + 1) // spec.ratio) if picks is None else picks[t][picks[t] >= 0]
        keys = np.concatenate([kv[max(t - cfg.window + 1, 0) : t + 1], rows[seen]])
        e = np.exp(q[t] @ keys.T * cfg.head_dim**-0.5)
        mixed[t] = e @ keys / (e.sum(-1) + sink)[:, None]
    return attention._output(jnp.asarray(mixed[None], jnp.float32), positions)[0]


def _picked(attention, x) -> np.ndarray:
    """[T, K] the rows that its indexer scores highest, of input x [T, D]; -1 where there are fewer."""
    positions, indexer = jnp.arange(len(x))[None], attention.indexer
    latent, _, _ = attention.project(jnp.asarray(x)[None], positions)
    found = indexer.queries(jnp.asarray(x)[None], latent, positions)
    queries, weights, keys = (
        _float64(y[0]) for y in (*found, indexer.compressor(jnp.asarray(x)[None]))
    )
    scores = np.einsum("tas,ta->ts", np.maximum(queries @ keys.T, 0), weights)
    picks = np.full((len(x), INDEXER.topk), -1)
    for t in range(len(x)):
        count = (t + 1) // attention.spec.ratio
        best = np.argsort(-scores[t, :count], kind="stable")[: INDEXER.topk]
        picks[t, : len(best)] = best
    return picks


@pytest.fixture(scope="module")
def views(model):
    return model.inspect(TOKENS[:1])


def test_a_layer_attends_to_rows_of_its_source(model, whole, views):
    """Every layer's attention by hand, from its own input and those of the layers that it names."""
    inputs = [np.asarray(view.attention_input[0]) for view in views]
    blocks = list(model.layers())
    layers = [block.attention for block in blocks]
    assert [view.kind for view in views] == ["CSA", "CSA reindex", "CSA reuse", "HCA", "HCA reuse"]
    assert [layer.compressor is not None for layer in layers] == [True, False, False, True, False]
    assert [layer.indexer is not None for layer in layers] == [True, True, False, False, False]
    sources = [(0, 0), (0, 1), (0, 1), (3, None), (3, None)]
    for index, (rows_of, picks_of) in enumerate(sources):
        rows = _float64(layers[rows_of].compressor(inputs[rows_of][None])[0])
        picks = None
        if picks_of is not None:
            picks = np.sort(views[index].picks[0], -1)
            expected = np.sort(_picked(layers[picks_of], inputs[picks_of]), -1)
            assert (picks == expected).all(-1).mean() > 0.99  # but where two scores are nearly one
        expected = _by_hand(layers[index], inputs[index], rows, picks)
        assert_close(views[index].attention_output[0], expected, FLOAT32)
    assert [view.indexer_scores is not None for view in views] == [True, True, False, False, False]

    # What they show is what the model computes: its last layer, run on what the views show of it.
    last = jax.jit(lambda *x: blocks[4](x[0], TOKENS[:1], shared=Shared(x[1]))[0])
    streams = last(views[4].streams, jnp.asarray(rows[None], jnp.float32))
    assert_close(model.logits(model.hidden(streams))[0], whole[0], FLOAT32)


def test_given_picks_are_those_of_all_layers_that_use_them(model, whole, views):
    """Picks are given for layers with an indexer of their own: two, and a third takes one's."""
    own = jnp.stack([views[0].picks, views[1].picks], axis=2)
    logits = jax.jit(lambda m, c: m.logits(m.hidden(m.trunk(TOKENS[:1], None, c)[0])))
    assert_close(logits(model, Choices(None, own))[0], whole[0], FLOAT32)
    with pytest.raises(ValueError, match=r"expected .*\(1, 262, 2, 'S'\)"):
        model.trunk(TOKENS[:1], None, Choices(None, own[:, :, :1]))

    source, user = (block.attention for block in list(model.layers())[1:3])
    x = views[2].attention_input
    given = jnp.where(jnp.arange(LENGTH)[:, None] > 24, jnp.array([0, 3, 5]), -1)[None]
    rows = Shared(jax.random.normal(jax.random.key(0), (1, LENGTH // 4, ROLES.head_dim)))
    made = jax.jit(lambda x: source(x, None, given, rows)[2])(x)
    out, loss, _ = jax.jit(lambda x, made: user(x, shared=made))(x, made)
    assert_close(out[0], _by_hand(user, x[0], _float64(rows.entries[0]), given[0]), FLOAT32)
    assert loss == 0
    with pytest.raises(ValueError, match="CSA reuse layer without the rows of layer 0"):
        user(x)


def _gradients(tokens, **options):
    """Of the loss of `TRAINED`, its layers computed again in the backward pass."""
    graphdef, params, fixed = nnx.split(random_model(TRAINED), nnx.Param, ...)
    step = jax.jit(loss_and_gradients(graphdef, LossWeights(), TRAIN, remat=True, **options))
    gradients, metrics = step(params, fixed, *map(jnp.asarray, shifted(tokens)))
    flat = nnx.to_flat_state(gradients)
    return {".".join(map(str, p)): np.asarray(v.get_value()) for p, v in flat}, metrics


@pytest.fixture(scope="module")
def trained():
    return _gradients(TOKENS[:, :154])


def _wkv(model):
    return model.stages[1].blocks[0].attention.compressor.wkv.kernel


def test_the_gradient_of_a_source_is_of_all_who_use_its_rows(trained):
    """By central differences along the gradient. The layers before the source are scanned."""
    model, (gradients, metrics) = random_model(TRAINED), trained
    assert [stage.repeats for stage in model.stages] == [2, 1, 1]
    gradient = gradients["stages.1.blocks.0.attention.compressor.wkv.kernel"]
    norm, kernel = np.linalg.norm(gradient), _wkv(model).get_value()

    @jax.jit
    def loss(kernel):
        moved = copied(model)
        _wkv(moved).set_value(kernel)
        return training_loss(moved, *shifted(jnp.asarray(TOKENS[:, :154])), remat=False)[1].ce

    assert_close(loss(kernel), metrics.ce, FLOAT32)
    above, below = (float(loss(kernel + step * gradient / norm)) for step in (STEP, -STEP))
    np.testing.assert_allclose((above - below) / (2 * STEP), norm, rtol=1e-2)


def test_a_mesh_computes_the_same(trained):
    """Heads and positions cut over devices: rows are of all devices' tokens, gradients of all heads'."""
    with jax.set_mesh(make_mesh(tensor=2, context=2)):
        gradients, metrics = _gradients(TOKENS[:, :154])
    for name in metrics.logged:
        assert_close(getattr(metrics, name), getattr(trained[1], name), 10 * FLOAT32)
    for path, gradient in trained[0].items():
        assert_close(gradients[path], gradient, 1e-3)


def test_a_warm_up_attends_to_all_rows_in_layers_that_share():
    """As an indexer that picks everything does; one layer of two has an indexer's loss."""
    model, tokens = random_model(PAIR, scan_layers=False), shifted(jnp.asarray(TOKENS[:, :100]))
    everything = model.variant(PAIR.with_indexer(topk=LENGTH))
    warm = jax.jit(lambda m: IndexerWarmup()(m, tokens, remat=False)[1])(model)
    expected = jax.jit(lambda m: training_loss(m, *tokens, remat=False)[1])(everything)
    assert_close(warm.ce, expected.ce, FLOAT32)
    assert_close(warm.indexer, expected.indexer, FLOAT32)


def test_an_engine_pages_and_keeps_prefixes_of_layers_that_share(tmp_path):
    """A checkpoint with such layers, read again; the second request finds the first one's prefix."""
    model = random_model(PAIR, scan_layers=False)
    v4jax.save(model, tmp_path / "model")
    loaded = v4jax.load(tmp_path / "model")
    assert loaded.cfg.layers == PAIR.layers
    for old, new in zip(*map(jax.tree.leaves, (nnx.state(model), nnx.state(loaded))), strict=True):
        np.testing.assert_array_equal(old, new)

    engine = Engine(loaded, slots=2, chunks=(128,))
    greedy, prompt = Sampling(temperature=0, max_new_tokens=12), TOKENS[0, :150].tolist()
    (first,) = engine.generate([prompt], greedy, stop_ids=[])
    again = engine.submit(prompt, greedy, stop_ids=[])
    engine.run_until_idle()
    logits = model(np.array([prompt + list(first.tokens)]))[0]
    assert first.tokens == tuple(np.argmax(logits[149:-1], axis=-1))
    assert again.cached_tokens == 128 and tuple(again.tokens) == first.tokens


def test_caches_and_costs_are_without_what_others_make():
    def held(cfg, length=1 << 15):
        cache = jax.eval_shape(lambda: init_cache(cfg, released(), 8, length, "packed"))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.pools)), cache

    row, key = costs.kv_row_bytes(ROLES), costs.index_key_bytes(INDEXER)
    assert costs.cache_bytes_per_token(ROLES) == (row + 2 * key) / 4 + row / 128
    growth = held(ROLES, 1 << 16)[0] - held(ROLES)[0]
    assert growth == 8 * (1 << 15) * costs.cache_bytes_per_token(ROLES)
    layers = held(ROLES)[1].layers
    have = [[getattr(x, name) is not None for x in layers] for name in ("entries", "index_keys")]
    assert have == [[True, False, False, True, False], [True, True, False, False, False]]
    pools = [[getattr(x, name) is not None for x in layers] for name in ("pool", "index_pool")]
    assert pools == have

    alone = config(CSA, CSA, CSA, hca_layer(), hca_layer())
    per_token = costs.decode_flops(alone, 1 << 15) + costs.decode_flops(ROLES, 1 << 15) * -1
    compressors = 2 * 2 * ROLES.embed_dim * ROLES.head_dim * (2 + 2 + 1)
    width, heads = INDEXER.head_dim, INDEXER.num_heads
    indexer = 2 * ROLES.embed_dim * (heads + 2 * 2 * width)
    assert per_token.wide == compressors + indexer
    assert per_token.linear == 2 * ROLES.q_lora_rank * heads * width
    assert per_token.indexer == 2 * heads * width * (1 << 13) and per_token.attention == 0
    kinds = {kind.kind: kind for kind in costs.by_kind(ROLES, 1 << 15)}
    assert kinds["CSA reuse, hash-routed"].cache_bytes == ROLES.window * row
    assert kinds["CSA reuse, hash-routed"].cache_bytes_read == (ROLES.window + INDEXER.topk) * row
    seen = (ROLES.window + INDEXER.topk) * row + (1 << 13) * key
    assert kinds["CSA reindex, hash-routed"].cache_bytes_read == seen
    parts, apart = (memory_by_part(nnx.eval_shape(lambda c=c: _model(c))) for c in (ROLES, alone))
    dim, width = ROLES.embed_dim, ROLES.head_dim  # value, gate, bias of positions, norm
    csa, hca = (2 * dim + 4) * 2 * width + width, (2 * dim + 128) * width + width
    assert parts["compressors"].parameters == csa + hca
    assert apart["compressors"].parameters == 3 * csa + 2 * hca
    assert parts["indexers"].parameters * 3 == apart["indexers"].parameters * 2


def _model(cfg):
    return Transformer(cfg, rngs=nnx.Rngs(0))


def test_layers_that_share_are_scanned_with_no_other():
    layers = (CSA, CSA, CSA, reuse(2, 2), reuse(2, 2), hca_layer(), hca_layer())
    plans = [(len(plan.pattern), plan.repeats) for plan in plan_stages(layers)]
    assert plans == [(1, 2), (1, 1), (1, 1), (1, 1), (1, 2)]


def test_a_report_of_a_step_has_a_layer_of_each_kind_with_its_sources():
    layers = (window_layer(), *TRAINED.layers, reuse(3), reuse(3, 5), reuse(3, 5))
    moved = dataclasses.replace(layers[4], entries_from=3, selection_from=3)
    cfg = dataclasses.replace(TRAINED, layers=(*layers[:4], moved, *layers[5:]))
    found = representatives(cfg)
    assert list(found) == ["window", "CSA", "CSA reindex", "CSA reuse"]
    assert found["CSA reindex"] == reuse(1) and found["CSA reuse"] == reuse(1, 2)
    dataclasses.replace(cfg, layers=(*found.values(), found["CSA reuse"]))  # is a config


def test_configs_are_written_and_read():
    for cfg in (ROLES, TRAINED):
        assert from_hf(to_hf(cfg)) == cfg
    written = to_hf(PAIR)
    written["v4jax_layers"][1]["entries_from"] = "0"
    with pytest.raises(ConfigError, match=r"v4jax_layers\[1\].entries_from='0'"):
        from_hf(written)
    written["v4jax_layers"][1]["entries_from"] = 1
    with pytest.raises(ConfigError, match=r"layers\[1\].entries_from=1: expected an earlier"):
        from_hf(written)


RATIO_8 = LayerSpec(compressor=CompressorSpec(ratio=8, overlap=True), indexer=INDEXER)


@pytest.mark.parametrize(
    "layers, message",
    [
        ((reuse(0),), r"layers\[0\].entries_from=0: expected None: no layer is earlier"),
        ((CSA, reuse(1)), r"layers\[1\].entries_from=1: expected an earlier layer, 0..0"),
        ((CSA, reuse(-1)), r"layers\[1\].entries_from=-1: expected an earlier"),
        ((window_layer(), reuse(0)), "layer 0 has no compressor of its own. Expected a layer that"),
        ((CSA, REUSE, reuse(1)), r"layers\[2\].entries_from=1: .* Expected 0, whose it uses"),
        ((CSA, reuse(0, layer=RATIO_8)), r"layers\[1\].compressor=.*ratio=8.* layer 0, .*ratio=4"),
        (
            (CSA, reuse(0, layer=LayerSpec(compressor=CSA.compressor))),
            "expected an indexer, as layer",
        ),
        ((LayerSpec(compressor=CSA.compressor), reuse(0)), "expected None, as in layer 0"),
        ((CSA, REUSE, reuse(0, 1)), r"layers\[2\].selection_from=1: .* Expected 0, whose it uses"),
        ((CSA, CSA, reuse(0, 1)), "layer 1 picks from rows of layer 1. Expected entries_from=1"),
        (
            (CSA, reuse(0), CSA, reuse(2, 1)),
            "layer 1 picks from rows of layer 0. Expected entries_from=0",
        ),
        ((CSA, dataclasses.replace(REUSE, indexer=dataclasses.replace(INDEXER, topk=8))), "topk=8"),
    ],
)
def test_sources_that_cannot_be_are_named(layers, message):
    with pytest.raises(ValueError, match=message):
        config(*layers)


def test_parts_of_a_layer_that_cannot_be_are_named():
    with pytest.raises(
        ValueError, match="entries_from=3 without compressor: expected the compressor"
    ):
        LayerSpec(entries_from=3)
    with pytest.raises(ValueError, match="selection_from=3 without entries_from: expected both"):
        dataclasses.replace(CSA, selection_from=3)
    with pytest.raises(ValueError, match="selection_from=3 without indexer: expected both"):
        LayerSpec(compressor=CSA.compressor, entries_from=3, selection_from=3)
