"""Adapters beside matrices that do not change: what they compute, learn and become when merged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sharding import TRAIN, make_mesh
from tests.conftest import NANO
from tests.models import random_model
from tests.tolerances import FLOAT32, GRADIENT_FLOAT32, assert_close
from v4jax import Transformer, load, tiny
from v4jax.nn.lora import (
    ATTENTION,
    EXPERTS,
    SHARED_EXPERT,
    LoRA,
    LoRAParam,
    add_lora,
    matrices,
    merge_lora,
)
from v4jax.nn.quantization import to_float, to_released
from v4jax.train.losses import LossWeights, shifted
from v4jax.train.step import loss_and_gradients

# Without a step of the gradient at SwiGLU's limit, which rounding may put on either side.
MOE = dataclasses.replace(tiny().moe, swiglu_limit=100.0)
# Two CSA layers, stacked: a layer of this kind has every kind of matrix.
CSA = tiny().layers[3]
CONFIG = dataclasses.replace(tiny(), layers=(CSA, CSA), mtp_layers=(), moe=MOE)
# One of every kind of matrix: its inputs cut over devices, its outputs, neither, in groups, of experts.
EVERY_KIND = (
    *ATTENTION,
    "wo_a",
    "compressor.wkv",
    "indexer.weights_proj",
    "gate",
    *SHARED_EXPERT,
    *EXPERTS,
)
LORA = LoRA(rank=4, targets=EVERY_KIND)
LENGTH = 96  # 24 compressed rows, of which 16 are picked


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 256, (4, LENGTH + 2)).astype(np.int32)


def _adapted(model: Transformer, lora: LoRA = LORA) -> Transformer:
    """With adapters that have learnt something: B is not zero."""
    model = add_lora(model, lora)
    for i, (_, matrix) in enumerate(matrices(model)):
        if matrix.adapter is not None:
            b = matrix.adapter.b
            key = jax.random.fold_in(jax.random.key(1), i)
            b.set_value(0.1 * jax.random.normal(key, b.get_value().shape))
    return model


@jax.jit
def _logits(model: Transformer, tokens) -> jax.Array:
    return model(tokens)


def test_a_new_adapter_changes_nothing_and_one_that_has_learnt_can_be_merged(tokens):
    model, tokens = random_model(CONFIG), tokens[:1, :LENGTH]
    before = _logits(model, tokens)
    np.testing.assert_array_equal(_logits(add_lora(model, LORA), tokens), before)
    adapted = _adapted(model)
    expected = _logits(adapted, tokens)

    merged = merge_lora(adapted)

    assert all(matrix.adapter is None for _, matrix in matrices(merged))
    assert_close(_logits(merged, tokens), expected, FLOAT32)
    assert np.abs(before - expected).max() > 1e-3


@functools.cache
def _step(graphdef, mesh):
    """Compiled once for models that differ in their arrays alone."""
    del mesh  # the ambient one
    return jax.jit(loss_and_gradients(graphdef, LossWeights(), TRAIN, remat="none"))


def _gradients(model: Transformer, tokens) -> dict[str, np.ndarray]:
    graphdef, params, fixed = nnx.split(model, LoRAParam, ...)
    step = _step(graphdef, jax.sharding.get_abstract_mesh())
    gradients, _ = step(params, fixed, *map(jnp.asarray, shifted(tokens)))
    return {
        ".".join(map(str, path)): np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(gradients)
    }


@pytest.fixture(scope="module")
def packed() -> Transformer:
    return to_released(random_model(CONFIG))


@pytest.fixture(scope="module")
def alone(packed, tokens):
    """Beside the values of the packed weights."""
    found = _gradients(_adapted(to_float(packed)), tokens)
    assert len(found) == 2 * (len(EVERY_KIND) + 1)  # the indexer has a compressor too
    assert all(np.abs(gradient).max() > 0 for gradient in found.values())
    return found


@pytest.mark.parametrize(
    "shape",
    [dict(expert=2, tensor=2), dict(fsdp=2, context=2)],
    ids=str,
)
def test_gradients_on_a_mesh_are_those_of_one_device(shape, packed, tokens, alone):
    values = jax.device_get(to_float(packed))
    with jax.set_mesh(make_mesh(**shape)):
        model = random_model(CONFIG)
        put = lambda value, like: jax.device_put(value, like.sharding)
        found = _gradients(_adapted(jax.tree.map(put, values, model)), tokens)
    assert found.keys() == alone.keys()
    for path, expected in alone.items():
        assert_close(found[path], expected, 1e-3)


def test_gradients_beside_packed_weights_are_those_beside_their_values(packed, tokens, alone):
    found = _gradients(_adapted(packed), tokens)
    assert found.keys() == alone.keys()
    for path, expected in alone.items():
        assert_close(found[path], expected, 10 * GRADIENT_FLOAT32)


def test_targets_have_names():
    assert LoRA().targets == LoRA(targets="attention").targets == ATTENTION
    assert LoRA(targets="attention+shared").targets == ATTENTION + SHARED_EXPERT
    model = add_lora(load(NANO, scan_layers=True), LoRA(targets="all-linear"))
    assert model.mtp
    found = {path for path, matrix in matrices(model) if matrix.adapter is not None}
    found = {path.split(".", 4)[-1] if path.startswith("stages.") else path for path in found}
    expected = (*ATTENTION, *(f"moe.{end}" for end in SHARED_EXPERT), *EXPERTS)
    assert found == {*expected}  # MTP has none
    with pytest.raises(ValueError, match=r"targets='all': expected one of attention, .*experts"):
        LoRA(targets="all")


def test_what_cannot_be_done_is_said():
    model = random_model(CONFIG)
    with pytest.raises(ValueError, match=r"LoRA target 'q_proj': .*attention\.wq_a.*moe\.w1"):
        add_lora(model, LoRA(targets=("q_proj",)))
    with pytest.raises(ValueError, match="rank=0"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match=r"targets=\(\): expected one of"):
        LoRA(targets=())
