"""Compression ratios that no release has: against transformers, and chunked against whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import extend, random_model
from tests.reference.checkpoints import GOLDEN
from tests.reference.ratios import make_folder
from tests.tolerances import FLOAT32, assert_close
from v4jax import load, released, tiny
from v4jax.config import CompressorSpec, LayerSpec

PARITY = 1e-4


def test_logits_are_those_of_transformers(tmp_path):
    """Ratio 8 in CSA layers and 64 in HCA layers; 300 tokens, so 37 rows of which 16 are picked."""
    make_folder(tmp_path / "model")
    expected = np.load(GOLDEN / "hf_ratios.npz")

    model = load(tmp_path / "model")

    kinds = [layer.kind for layer in model.cfg.layers]
    assert kinds[2:4] == ["CSA ratio 8 overlapping", "HCA ratio 64"]
    logits = np.asarray(jax.jit(lambda m, t: m(t))(model, expected["tokens"]))
    found = logits[:, expected["positions"]]
    assert_close(found, expected["logits"], PARITY)
    np.testing.assert_array_equal(found.argmax(-1), expected["logits"].argmax(-1))


@pytest.mark.parametrize(
    "layer",
    [
        LayerSpec(compressor=CompressorSpec(ratio=8, overlap=True), indexer=tiny().indexer),
        LayerSpec(compressor=CompressorSpec(ratio=10, overlap=True)),
    ],
    ids=["8 overlapping, picked", "10 overlapping"],
)
def test_chunks_are_the_whole(layer):
    cfg = dataclasses.replace(tiny(), layers=(tiny().layers[0], layer), mtp_layers=())
    model = random_model(cfg, scan_layers=False)
    tokens = np.random.default_rng(0).integers(2, 256, (2, 173)).astype(np.int32)
    whole = jax.jit(lambda m, t: m(t))(model, tokens)

    cache, parts, start = model.init_cache(2, 200), [], 0
    for size in (7, 83, 83):
        padded = np.zeros((2, 83), np.int32)
        padded[:, :size] = tokens[:, start : start + size]
        logits, cache = extend(model)(padded, jnp.full(2, size, jnp.int32), cache)
        parts.append(np.asarray(logits)[:, :size])
        start += size

    assert_close(np.concatenate(parts, axis=1), whole, FLOAT32)


def test_a_packed_cache_holds_other_ratios():
    layer = LayerSpec(compressor=CompressorSpec(ratio=8, overlap=True), indexer=tiny().indexer)
    cfg = dataclasses.replace(tiny(), layers=(layer,), mtp_layers=())
    model = random_model(cfg, released("bfloat16"), scan_layers=False)
    tokens = np.random.default_rng(0).integers(2, 256, (1, 140)).astype(np.int32)
    found = []
    for form in ("packed", "float"):
        cache = model.init_cache(1, 2048, form)
        logits, cache = extend(model)(tokens, jnp.full(1, 140, jnp.int32), cache)
        assert cache.layers[0].entries.shape[1] == 2048 // 8
        found.append(np.asarray(logits))
    np.testing.assert_array_equal(*found)
