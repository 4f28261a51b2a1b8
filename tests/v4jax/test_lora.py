"""Adapters beside matrices that do not change: what they compute, learn and become when merged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sharding import TRAIN, make_mesh
from tests.models import random_model
from tests.tolerances import FLOAT32, GRADIENT_FLOAT32, assert_close
from v4jax import Transformer, checkpoint, tiny
from v4jax.checkpoint import CheckpointError, load_adapter, save_adapter
from v4jax.nn.layers import copied
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
CONFIG = dataclasses.replace(tiny(), layers=tiny().layers[:3], moe=MOE)
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
LENGTH = 144


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 256, (8, LENGTH + 2)).astype(np.int32)


def _adapted(model: Transformer, lora: LoRA = LORA) -> Transformer:
    """With adapters that have learnt something: B is not zero."""
    model = add_lora(model, lora)
    for i, (_, matrix) in enumerate(matrices(model)):
        if matrix.adapter is not None:
            b = matrix.adapter.b
            key = jax.random.fold_in(jax.random.key(1), i)
            b.set_value(0.1 * jax.random.normal(key, b.get_value().shape))
    return model


def test_a_new_adapter_changes_nothing(tokens):
    model = random_model(CONFIG)
    logits = jax.jit(lambda m, t: m(t))
    np.testing.assert_array_equal(
        logits(model, tokens[:1, :LENGTH]), logits(add_lora(model, LORA), tokens[:1, :LENGTH])
    )


def test_merged_matrices_compute_what_the_adapters_added(tokens):
    model = random_model(CONFIG)
    adapted = _adapted(model)
    logits = jax.jit(lambda m, t: m(t))
    expected = logits(adapted, tokens[:1, :LENGTH])
    merged = merge_lora(adapted)
    assert all(matrix.adapter is None for _, matrix in matrices(merged))
    assert_close(logits(merged, tokens[:1, :LENGTH]), expected, FLOAT32)
    assert np.abs(logits(model, tokens[:1, :LENGTH]) - expected).max() > 1e-3


def _gradients(model: Transformer, tokens) -> dict[str, np.ndarray]:
    graphdef, params, fixed = nnx.split(model, LoRAParam, ...)
    step = jax.jit(loss_and_gradients(graphdef, LossWeights(), TRAIN, remat=False))
    gradients, _ = step(params, fixed, *map(jnp.asarray, shifted(tokens)))
    return {
        ".".join(map(str, path)): np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(gradients)
    }


@pytest.fixture(scope="module")
def alone(tokens):
    found = _gradients(_adapted(random_model(CONFIG)), tokens)
    assert len(found) > 2 * len(EVERY_KIND)
    assert all(np.abs(gradient).max() > 0 for gradient in found.values())
    return found


@pytest.mark.parametrize(
    "shape",
    [dict(expert=2, tensor=2), dict(fsdp=2, context=2)],
    ids=str,
)
def test_gradients_on_a_mesh_are_those_of_one_device(shape, tokens, alone):
    with jax.set_mesh(make_mesh(**shape)):
        found = _gradients(_adapted(random_model(CONFIG)), tokens)
    assert found.keys() == alone.keys()
    for path, expected in alone.items():
        assert_close(found[path], expected, 1e-3)


def test_gradients_beside_packed_weights_are_those_beside_their_values(tokens):
    packed = to_released(random_model(CONFIG))
    found = _gradients(_adapted(packed), tokens[:2])
    floats = _gradients(_adapted(to_float(packed)), tokens[:2])
    for path, expected in floats.items():
        assert_close(found[path], expected, 10 * GRADIENT_FLOAT32)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_an_adapter_comes_back_from_its_files(tmp_path, scan_layers):
    lora = LoRA(rank=4, targets=(*ATTENTION, *SHARED_EXPERT, *EXPERTS, "indexer.wq_b"), rslora=True)
    adapted = _adapted(random_model(tiny(), scan_layers=scan_layers), lora)
    save_adapter(adapted, tmp_path)
    checkpoint.save(to_float(_without_adapters(adapted)), tmp_path / "base")

    again = load_adapter(checkpoint.load(tmp_path / "base", scan_layers=False), tmp_path)

    names = _stored(tmp_path / checkpoint.adapters.WEIGHTS)
    assert "base_model.model.layers.3.attn.wq_a.lora_A.weight" in names
    assert "base_model.model.layers.5.ffn.experts.7.w2.lora_B.weight" in names
    merged = [merge_lora(m) for m in (adapted, again)]
    for folder, one in zip(("a", "b"), merged):
        checkpoint.save(one, tmp_path / folder)
    a, b = (_stored(tmp_path / folder / "model.safetensors") for folder in "ab")
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def _without_adapters(model: Transformer) -> Transformer:
    model = copied(model)
    for _, matrix in matrices(model):
        matrix.adapter = nnx.data(None)
    return model


def _stored(path) -> dict[str, np.ndarray]:
    file = checkpoint.safetensors.SafetensorsFile(path)
    return {name: np.array(file.view(name)) for name in file.tensors}


def test_what_cannot_be_done_is_said(tmp_path):
    model = random_model(CONFIG)
    with pytest.raises(ValueError, match=r"LoRA target 'q_proj': .*attention\.wq_a.*moe\.w1"):
        add_lora(model, LoRA(targets=("q_proj",)))
    with pytest.raises(ValueError, match="rank=0"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="has no adapter"):
        save_adapter(model, tmp_path)
    adapted = add_lora(model, LoRA(targets=("wo_a",)))
    with pytest.raises(ValueError, match=r"attention\.wo_a has an adapter for each of its groups"):
        save_adapter(adapted, tmp_path)
    with pytest.raises(ValueError, match=r"attention\.wo_a has an adapter, .*merge"):
        checkpoint.save(adapted, tmp_path / "model")
    save_adapter(add_lora(model, LoRA(targets=("shared.w1",))), tmp_path / "a")
    other = random_model(dataclasses.replace(CONFIG, embed_dim=256))
    with pytest.raises(CheckpointError, match=r"shared_experts\.w1\.lora_A\.weight is \[16, 128\]"):
        load_adapter(other, tmp_path / "a")
