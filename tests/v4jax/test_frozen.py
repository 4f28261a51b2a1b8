"""Training of everything but the experts, which stay as released."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.formats.quantize import QuantizedArray
from sharding import TRAIN
from tests.models import random_model
from v4jax import Transformer, tiny
from v4jax.nn.quantization import Frozen, freeze_experts, to_float
from v4jax.train.losses import LossWeights, shifted
from v4jax.train.optimizers import OptimizerConfig
from v4jax.train.trainer import Trainer, loss_and_gradients

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
    config = OptimizerConfig(warmup_steps=1, total_steps=10)
    trainer = Trainer(freeze_experts(model), config)
    state = trainer.init()
    assert sum(isinstance(v, Frozen) for _, v in nnx.to_flat_state(state.fixed)) == 3 * (
        sum(len(stage.blocks) for stage in model.stages) + len(model.mtp)
    )
    experts = {name: x for name, x in _leaves(state.fixed).items() if x.dtype.itemsize == 1}
    params = _leaves(state.params)

    for _ in range(2):  # the first step's learning rate is 0
        state, metrics = trainer.step(state, shifted(tokens))

    assert np.isfinite(metrics.loss)
    after = _leaves(state.fixed)
    assert experts.keys() <= after.keys()
    for name, old in experts.items():
        np.testing.assert_array_equal(after[name], old)
    assert all((x != params[name]).any() for name, x in _leaves(state.params).items())


def test_gradients_of_the_rest_are_those_beside_float_experts(model, tokens):
    """The float experts have the values that the frozen ones were rounded to."""
    frozen = freeze_experts(model)
    found = {}
    for name, one in (("frozen", frozen), ("float", to_float(frozen))):
        graphdef, params, fixed = nnx.split(one, nnx.Param, ...)
        step = loss_and_gradients(graphdef, LossWeights(), TRAIN)
        found[name] = _leaves(jax.jit(step)(params, fixed, *shifted(tokens))[0])

    assert found["frozen"].keys() == found["float"].keys()
    for name, expected in found["float"].items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found["frozen"][name], expected, atol=1e-4 * scale)


def test_experts_need_a_format_to_be_frozen_in():
    cfg = dataclasses.replace(tiny(), expert_format=None)
    floats = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))

    with pytest.raises(ValueError, match=r"expert_format=None of tiny: freezing needs experts"):
        freeze_experts(floats)
    shapes = nnx.eval_shape(lambda: freeze_experts(Transformer(tiny(), rngs=nnx.Rngs(0))))
    weights = shapes.stages[0].blocks[0].moe.w1.kernel.get_value()
    assert isinstance(weights, QuantizedArray)
