"""Layers that use rows of compressed KV, or picks of them, which an earlier layer has made.

Lengths pass the window (16), two rows of HCA (256) and 4 x top-k (64), and divide nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import v4jax
from sharding import make_mesh
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
from v4jax.nn.shared import Shared
from v4jax.nn.stages import plan_stages
from v4jax.planning import costs
from v4jax.planning.describe import memory_by_part
from v4jax.planning.step_report import representatives
from v4jax.train.indexer_warmup import dense
from v4jax.train.losses import LossWeights, shifted, training_loss

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
LENGTH = 262
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


def _by_hand(attention, x, rows, picks=None) -> np.ndarray:
    """Attention of x [T, D] to its window, its sink and given rows [S, H]: the picked ones, or all."""
    cfg, spec, positions = attention.cfg, attention.spec, jnp.arange(len(x))[None]
    _, q, kv = (_float64(y[0]) for y in _project(attention, x[None]))
    mixed, sink = np.zeros_like(q), np.exp(_float64(attention.sink[...]))
    for t in range(len(x)):
        seen = np.arange((t + 1) // spec.ratio) if picks is None else picks[t][picks[t] >= 0]
        keys = np.concatenate([kv[max(t - cfg.window + 1, 0) : t + 1], rows[seen]])
        e = np.exp(q[t] @ keys.T * cfg.head_dim**-0.5)
        mixed[t] = e @ keys / (e.sum(-1) + sink)[:, None]
    return jax.jit(lambda a, y: a._output(y, positions)[0])(attention, mixed[None].astype("f"))


@jax.jit
def _project(attention, x):
    return attention.project(x, jnp.arange(x.shape[1])[None])


def _picked(attention, x) -> np.ndarray:
    """[T, K] the rows that its indexer scores highest, of input x [T, D]; -1 where there are fewer."""

    @jax.jit
    def found(attention, x):
        positions, indexer = jnp.arange(x.shape[1])[None], attention.indexer
        latent, _, _ = attention.project(x, positions)
        return *indexer.queries(x, latent, positions), indexer.compressor(x)

    queries, weights, keys = (_float64(y[0]) for y in found(attention, x[None]))
    scores = np.einsum("tas,ta->ts", np.maximum(queries @ keys.T, 0), weights)
    picks = np.full((len(x), INDEXER.topk), -1)
    for t in range(len(x)):
        best = np.argsort(-scores[t, : (t + 1) // attention.spec.ratio], kind="stable")
        picks[t, : min(len(best), INDEXER.topk)] = best[: INDEXER.topk]
    return picks


@functools.partial(jax.jit, static_argnames="only")
def _attended(layers, inputs, given=None, only=range(5)):
    """Output and loss of the attention of layers of `ROLES`, each with what it takes of the others'."""
    made, found = {}, {}
    for index in only:
        shared = Shared.of(ROLES.layers[index], made)
        selection = given if index == 1 else None
        out, loss, made[index] = layers[index](inputs[index][None], None, selection, shared)
        found[index] = out[0], loss
    return found, made


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    shape = (len(ROLES.layers), LENGTH, ROLES.embed_dim)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def test_layers_attend_to_rows_and_picks_of_their_sources(model, inputs):
    """By hand, in float64, from the layer's own input and those of the layers that it names."""
    layers = [block.attention for block in model.layers()]
    assert [layer.spec.kind for layer in layers] == [
        *("CSA", "CSA reindex", "CSA reuse", "HCA", "HCA reuse")
    ]
    assert [layer.compressor is not None for layer in layers] == [True, False, False, True, False]
    assert [layer.indexer is not None for layer in layers] == [True, True, False, False, False]
    found, made = _attended(layers, inputs)
    rows = [_float64(_rows(layers[index], inputs[index])) for index in (0, 3)]
    expected, picks = _picked(layers[1], inputs[1]), made[1].selection.to_indices()[0]
    assert (np.sort(picks, -1) == np.sort(expected, -1)).all(-1).mean() > 0.99  # but near ties
    picks = np.asarray(picks)
    for index, rows_of, of_indexer in [(1, 0, picks), (2, 0, picks), (4, 1, None)]:
        expected = _by_hand(layers[index], inputs[index], rows[rows_of], of_indexer)
        assert_close(found[index][0], expected, FLOAT32)
    assert [float(loss) > 0 for _, loss in found.values()] == [True, True, False, False, False]
    with pytest.raises(ValueError, match="CSA reuse layer without the rows of layer 0"):
        layers[2](inputs[2][None])


@jax.jit
def _rows(attention, x):
    return attention.compressor(x[None])[0]


def test_given_picks_are_those_of_all_layers_that_use_them(model, inputs):
    """They are given for layers with an indexer of their own, of which there are two."""
    picks = jnp.zeros((1, LENGTH, 2, 3), jnp.int32)
    chosen = Choices(None, picks).by_layer(ROLES, (1, LENGTH))
    assert [choice.selection is not None for choice in chosen] == [True, True, False, False, False]
    with pytest.raises(ValueError, match=r"expected .*\(1, 262, 2, 'S'\)"):
        Choices(None, picks[:, :, :1]).by_layer(ROLES, (1, LENGTH))

    layers = [block.attention for block in model.layers()]
    given = jnp.where(jnp.arange(LENGTH)[:, None] > 24, jnp.array([0, 3, 5]), -1)
    found, _ = _attended(layers, inputs, given[None], only=range(3))
    rows = _float64(_rows(layers[0], inputs[0]))
    assert_close(found[2][0], _by_hand(layers[2], inputs[2], rows, np.asarray(given)), FLOAT32)


def test_a_warm_up_attends_to_all_rows_in_layers_that_share(model, inputs):
    layers = [block.attention for block in dense(model).layers()]
    found, made = _attended(layers, inputs, only=range(3))
    rows = _float64(_rows(layers[0], inputs[0]))
    assert made[1].selection is None and float(found[1][1]) > 0
    for index in (1, 2):
        expected = _by_hand(layers[index], inputs[index], rows)
        assert_close(found[index][0], expected, FLOAT32)


@pytest.fixture(scope="module")
def pair():
    return random_model(PAIR, scan_layers=False)


def test_what_a_layer_with_picks_of_another_did_is_shown(pair):
    """Weights of the other's rows that the other picked, and none of its own scores."""
    tokens = TOKENS[:1, :150]
    views = pair.inspect(tokens, queries=[70, 149])
    source, user = (block.attention for block in pair.layers())
    assert views[0].indexer_scores is not None and views[1].indexer_scores is None
    np.testing.assert_array_equal(views[0].picks, views[1].picks)
    x = np.asarray(views[1].attention_input[0])
    rows = _float64(_rows(source, np.asarray(views[0].attention_input[0])))
    _, q, _ = (_float64(y[0]) for y in _project(user, x[None]))
    for column, query in enumerate((70, 149)):
        picks = np.asarray(views[1].picks[0, column])
        weights = np.asarray(views[1].compressed_weights[0, column])  # [N, S]
        assert len(set(picks)) == INDEXER.topk
        assert (np.flatnonzero(weights[0]) == np.sort(picks)).all()
        ratios = np.exp(q[query] @ (rows[picks[1:]] - rows[picks[0]]).T * PAIR.head_dim**-0.5)
        assert_close(weights[:, picks[1:]] / weights[:, picks[:1]], ratios, FLOAT32)


def test_the_gradient_of_a_source_is_of_all_who_use_its_rows(pair):
    """By central differences along the gradient, with layers computed again in the backward pass."""
    tokens, step = shifted(jnp.asarray(TOKENS[:, :154])), 0.002

    def kernel_of(model):
        return model.stages[0].blocks[0].attention.compressor.wkv.kernel

    @jax.jit
    @jax.value_and_grad
    def loss(kernel):
        moved = copied(pair)
        kernel_of(moved).set_value(kernel)
        return training_loss(moved, *tokens, LossWeights(indexer=0.0), remat="layers")[0]

    kernel = kernel_of(pair).get_value()
    gradient = loss(kernel)[1]
    norm = float(jnp.linalg.norm(gradient))
    above, below = (float(loss(kernel + h * gradient / norm)[0]) for h in (step, -step))
    np.testing.assert_allclose((above - below) / (2 * step), norm, rtol=2e-3)


def test_a_mesh_computes_the_same(pair, tmp_path):
    """Heads and positions cut over devices: rows are of all devices' tokens."""
    v4jax.save(pair, tmp_path / "model")
    placed = v4jax.load(tmp_path / "model", mesh=make_mesh(tensor=2, context=2))
    tokens = TOKENS[:, :154]
    np.testing.assert_allclose(placed(tokens), pair(tokens), atol=1e-4)


def test_an_engine_pages_and_keeps_prefixes_of_layers_that_share(tmp_path):
    """Of a checkpoint with such layers behind stacked ones; a request finds another's prefix."""
    model = random_model(config(window_layer(), window_layer(), CSA, reuse(2, 2)))
    assert [stage.repeats for stage in model.stages] == [2, 1, 1]
    v4jax.save(model, tmp_path / "model")
    loaded = v4jax.load(tmp_path / "model")
    assert loaded.cfg.layers == model.cfg.layers and len(loaded.stages) == 4

    engine = Engine(loaded, slots=2, chunks=(128,))
    greedy, prompt = Sampling(temperature=0, max_new_tokens=12), TOKENS[0, :150].tolist()
    (first,) = engine.generate([prompt], greedy, stop_ids=[])
    again = engine.submit(prompt, greedy, stop_ids=[])
    engine.run_until_idle()
    logits = model(np.array([prompt + list(first.tokens)]))[0]
    assert first.tokens == tuple(np.argmax(logits[149:-1], axis=-1).tolist())
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
    layers = (window_layer(), CSA, CSA, reuse(2, 2), reuse(2), reuse(2, 4), reuse(2, 4))
    cfg = dataclasses.replace(PAIR, layers=layers)
    found = representatives(cfg)
    assert list(found) == ["window", "CSA", "CSA reindex", "CSA reuse"]
    assert found["CSA reindex"] == reuse(1) and found["CSA reuse"] == reuse(1, 2)
    dataclasses.replace(cfg, layers=(*found.values(), found["CSA reuse"]))  # is a config


def test_configs_are_written_and_read():
    assert from_hf(to_hf(ROLES)) == ROLES
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
