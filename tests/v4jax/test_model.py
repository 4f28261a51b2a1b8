"""Equalities that must hold whatever the numbers are, on a model with every kind of layer.

Lengths pass the window (16), the window of HCA (128) and 4 x top-k (64), and divide nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models import extend, one_of_each, random_model
from tests.tolerances import FLOAT32, assert_close
from v4jax import Transformer, flash, plain, pro, released, tiny
from v4jax.config import csa_layer, hca_layer, window_layer
from v4jax.nn.cache import CacheFullError
from v4jax.nn.stages import plan_stages
from v4jax.planning.describe import abstract_model, bytes_by_part, count_parameters

LENGTH = 301
CAPACITY = 512


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(one_of_each(), scan_layers=False)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, tiny().vocab_size, (2, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def whole(model, tokens) -> np.ndarray:
    return np.asarray(_forward(model)(tokens))


@functools.cache
def _forward(model):
    graphdef, params = nnx.split(model)
    run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    return lambda tokens: run(params, tokens)


def _in_chunks(model, tokens, sizes) -> np.ndarray:
    cache, parts, start = model.init_cache(len(tokens), CAPACITY), [], 0
    for size in sizes:
        counts = jnp.full(len(tokens), size, jnp.int32)
        logits, cache = extend(model)(tokens[:, start : start + size], counts, cache)
        parts.append(np.asarray(logits))
        start += size
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(
    "sizes",
    [(7, 130, *[1] * 8, 60, 1, 95), (LENGTH,), (128, 128, *[1] * 45), tuple([1] * 140)],
    ids=["awkward", "whole", "aligned then decoding", "decoding alone"],
)
def test_chunks_give_the_logits_of_the_whole(sizes, model, tokens, whole):
    logits = _in_chunks(model, tokens, sizes)

    assert_close(logits, whole[:, : sum(sizes)], FLOAT32)


def test_rows_of_different_length_equal_the_rows_alone(model, tokens, whole):
    """Right-padded prefill of 171 and 301 tokens, then decoding both, one of them idle at times."""
    lengths = np.array([171, 250], np.int32)
    padded = np.where(np.arange(LENGTH) < lengths[:, None], tokens, 7)
    logits, cache = extend(model)(padded, lengths, model.init_cache(2, CAPACITY))
    for row, length in enumerate(lengths):
        assert_close(logits[row, :length], whole[row, :length], FLOAT32)

    active = [(1, 1), (1, 0), (0, 1), (1, 1), (1, 0), (1, 1)]
    for counts in np.array(active, np.int32):
        step = np.where(counts, tokens[np.arange(2), lengths], 3).astype(np.int32)
        logits, cache = extend(model)(step[:, None], counts, cache)
        for row in np.flatnonzero(counts):
            assert_close(logits[row, 0], whole[row, lengths[row]], FLOAT32)
        lengths += counts
    np.testing.assert_array_equal(cache.lengths, lengths)


def test_no_logit_depends_on_later_tokens(model, tokens, whole):
    changed = tokens.copy()
    changed[:, 150:] = (changed[:, 150:] + 1) % tiny().vocab_size

    logits = np.asarray(_forward(model)(changed))

    assert_close(logits[:, :150], whole[:, :150], FLOAT32)
    assert np.abs(logits[:, 150:] - whole[:, 150:]).max() > 0.1


def test_distant_tokens_are_seen_through_entries(model, tokens, whole):
    """Token 0 is out of every window at position 300, yet it has an effect there."""
    changed = tokens.copy()
    changed[:, 0] = (changed[:, 0] + 1) % tiny().vocab_size

    logits = np.asarray(_forward(model)(changed))

    assert np.abs(logits[:, -1] - whole[:, -1]).max() > 1e-4


def test_scanned_layers_equal_unrolled_ones(tokens):
    """tiny with its CSA and HCA layers not hash-routed, so that they repeat."""
    pair = (csa_layer(tiny().indexer), hca_layer())
    layers = (window_layer(hash_routed=True), *pair, *pair)
    cfg = dataclasses.replace(tiny(), layers=layers)
    scanned = random_model(cfg)
    assert [stage.repeats for stage in scanned.stages] == [1, 2]

    unrolled = nnx.eval_shape(lambda: Transformer(cfg, scan_layers=False, rngs=nnx.Rngs(0)))
    singles = [block for stage in scanned.stages for block in stage.layers()]
    for stage, block in zip(unrolled.stages, singles, strict=True):
        stage.blocks[0] = block
    for name in ("embed", "head", "hc_head", "norm", "mtp"):
        setattr(unrolled, name, getattr(scanned, name))

    short = tokens[:, :200]
    assert_close(_forward(scanned)(short), _forward(unrolled)(short), FLOAT32)


def test_cache_is_updated_in_place(model):
    cache = model.init_cache(1, CAPACITY)
    counts = jnp.ones(1, jnp.int32)
    step = extend(model)
    token = np.zeros((1, 1), np.int32)
    compiled = step.func.lower(*step.args, token, counts, cache).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == cache.nbytes

    entries = cache.pools[1].entries
    step(token, counts, cache)
    assert entries.is_deleted()


def test_a_full_cache_is_an_error_and_stays_as_it_was(model, tokens):
    cache = model.init_cache(2, 20)
    counts = jnp.array([20, 3], jnp.int32)
    _, cache = model.extend(tokens[:, :20], counts, cache)
    before = [np.asarray(x) for x in jax.tree.leaves(cache)]

    with pytest.raises(CacheFullError, match=r"sequence 0 would have 21 tokens.* holds 20"):
        model.extend(tokens[:, 20:21], jnp.ones(2, jnp.int32), cache)

    for old, new in zip(before, jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("capacity", [0, tiny().max_length + 1])
def test_capacity_is_checked(model, capacity):
    with pytest.raises(ValueError, match=f"capacity={capacity}"):
        model.init_cache(1, capacity)


def test_entries_past_the_capacity_are_dropped_under_jit(model, tokens):
    """Where lengths are not known, nothing is overwritten either: old entries stay."""
    cache = model.init_cache(2, 512)  # one page of CSA rows
    _, cache = extend(model)(tokens[:, :128], jnp.full(2, 128, jnp.int32), cache)
    entries = np.asarray(cache.layers[1].entries.contiguous())
    assert entries[:, :32].any(axis=-1).all()
    cache = dataclasses.replace(cache, lengths=jnp.full(2, 512, jnp.int32))

    _, cache = extend(model)(tokens[:, 128:256], jnp.full(2, 128, jnp.int32), cache)

    np.testing.assert_array_equal(entries, cache.layers[1].entries.contiguous())


def test_stage_plans_of_the_released_models():
    def summary(cfg):
        return [
            (plan.repeats, [(s.ratio, s.hash_routed) for s in plan.pattern])
            for plan in plan_stages(cfg.layers)
        ]

    pair = [(128, False), (4, False)]
    assert summary(flash()) == [(2, [(0, True)]), (1, [(4, True)]), (20, pair)]
    assert summary(pro()) == [(2, [(128, True)]), (1, [(4, True)]), (29, pair)]


@pytest.mark.parametrize(
    "cfg, total, with_mtp, active",
    [
        (flash(), 284_332_240_471, 290_942_289_362, 13_270_101_591),
        (pro(), 1_572_997_201_763, 1_598_837_347_742, 48_852_402_019),
    ],
    ids=["flash", "pro"],
)
def test_parameter_counts(cfg, total, with_mtp, active):
    count = count_parameters(cfg)

    assert (count.total, count.total_with_mtp, count.active) == (total, with_mtp, active)


@pytest.mark.parametrize(
    "cfg, released", [(flash(), 159_609_485_896), (pro(), 864_704_792_696)], ids=["flash", "pro"]
)
def test_bytes_in_memory_equal_those_of_the_released_files(cfg, released):
    tables = sum(spec.hash_routed for spec in cfg.layers) * cfg.vocab_size
    narrower = tables * cfg.moe.experts_per_token * 4  # hash tables: int64 on disk, int32 here

    assert sum(bytes_by_part(abstract_model(cfg)).values()) == released - narrower


def test_only_numerics_that_transform_keys_need_a_power_of_two():
    cfg = dataclasses.replace(tiny(), layers=tiny().layers[1:2], mtp_layers=())
    cfg = cfg.with_indexer(head_dim=48)

    def logits(numerics):
        return Transformer(cfg, numerics, rngs=nnx.Rngs(0))(jnp.zeros((1, 140), jnp.int32))

    assert jax.eval_shape(lambda: logits(plain())).shape == (1, 140, cfg.vocab_size)
    with pytest.raises(ValueError, match=r"indexer\.head_dim=48 with released .* v4jax\.plain"):
        jax.eval_shape(lambda: logits(released()))
