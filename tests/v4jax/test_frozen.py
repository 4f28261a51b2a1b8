"""Training of everything but the experts, which stay as released."""

import dataclasses
import gc

import jax
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.formats.quantize import QuantizedArray
from sharding import TRAIN
from tests.models import random_model, small_nano
from v4jax import Transformer, checkpoint, tiny
from v4jax.nn.quantization import is_expert, not_expert, to_float, to_released
from v4jax.train import Trainer
from v4jax.train.losses import LossWeights, shifted
from v4jax.train.optimizers import adamw
from v4jax.train.step import TrainStep, loss_and_gradients, trained_by

CONFIG = dataclasses.replace(tiny(), layers=tiny().layers[:2])


@pytest.fixture
def model() -> Transformer:
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 256, (2, 138)).astype(np.int32)


def _leaves(state) -> dict[str, np.ndarray]:
    named = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in named}


def test_a_step_changes_everything_but_the_experts(model, tokens):
    model = to_released(model, is_expert)
    step = TrainStep(model, adamw(1e-3), trainable=not_expert)
    state = step.init()
    experts = {name: x for name, x in _leaves(state.fixed).items() if x.dtype.itemsize == 1}
    assert len(experts) == 2 * 3 * (sum(len(s.blocks) for s in model.stages) + len(model.mtp))
    params = _leaves(state.params)

    state, metrics = step.step(state, shifted(tokens))

    assert np.isfinite(metrics.loss)
    after = _leaves(state.fixed)
    assert experts.keys() <= after.keys()
    for name, old in experts.items():
        np.testing.assert_array_equal(after[name], old)
    assert all((x != params[name]).any() for name, x in _leaves(state.params).items())


def _bytes_held() -> int:
    """Of all arrays, each buffer once."""
    gc.collect()
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays()}.values())


def test_experts_of_a_checkpoint_are_held_once_and_packed():
    """From the files into what trains in float32 and the rest as stored: nothing else is left."""
    folder, before = small_nano(), _bytes_held()
    trainer = Trainer(checkpoint.load(folder, use="train"), adamw(1e-3), trainable="no-experts")
    state = trainer.state

    held = _bytes_held() - before

    assert held == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    experts = [v for _, v in nnx.to_flat_state(state.fixed) if "expert" in v.axes]
    assert experts and all(isinstance(v.get_value(), QuantizedArray) for v in experts)
    packed = sum(leaf.nbytes for v in experts for leaf in jax.tree.leaves(v.get_value()))
    assert packed == sum(np.prod(v.get_value().shape) for v in experts) * 4.25 / 8


def test_gradients_of_the_rest_are_those_beside_float_experts(model, tokens):
    """The float experts have the values that the frozen ones were rounded to."""
    frozen = to_released(model, is_expert)
    found = {}
    for name, one in (("frozen", frozen), ("float", to_float(frozen))):
        graphdef, params, fixed = nnx.split(one, trained_by(not_expert), ...)
        step = loss_and_gradients(graphdef, LossWeights(), TRAIN)
        found[name] = _leaves(jax.jit(step)(params, fixed, *shifted(tokens))[0])

    assert found["frozen"].keys() == found["float"].keys()
    for name, expected in found["float"].items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found["frozen"][name], expected, atol=1e-4 * scale)


def test_what_cannot_be_trained_is_named(model):
    packed = to_released(model, is_expert)
    with pytest.raises(ValueError, match=r"moe\.w1\.kernel is packed .*fp4.*to_float"):
        TrainStep(packed, adamw(1e-3))
    with pytest.raises(ValueError, match="nothing to train"):
        TrainStep(packed, adamw(1e-3), trainable=lambda path, variable: False)
