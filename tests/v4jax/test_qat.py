"""Training with the rounding in the loop: what it computes is what is saved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pallas_kernels.formats.quantize import QuantizedArray, quantize_weight
from sharding import make_mesh
from tests.models import random_model
from tests.tolerances import GRADIENT_FLOAT32, assert_close
from v4jax import Transformer, checkpoint, plain, released, tiny
from v4jax.inference.score import Scorer
from v4jax.nn.quantization import round_to_released, to_released
from v4jax.train.losses import shifted, training_loss
from v4jax.train.optimizers import adamw
from v4jax.train.schedules import schedule
from v4jax.train.step import TrainStep

CONFIG = dataclasses.replace(tiny(), layers=tiny().layers[:3])  # window, CSA, HCA
LENGTH = 140
B1, CLIP_NORM = 0.9, 1.0
OPTIMIZER = adamw(schedule("cosine", 3e-3, 8, warmup_steps=1), b1=B1, clip_norm=CLIP_NORM)


def _make_model(numerics=released("float32")) -> Transformer:
    return random_model(CONFIG, numerics)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, LENGTH + 2)).astype(np.int32)


@pytest.fixture(scope="module")
def trained(tokens):
    """A trainer, its state after four steps on one batch, and the losses."""
    trainer = TrainStep(_make_model(), OPTIMIZER, qat=True)
    state, losses = trainer.init(), []
    for _ in range(4):
        state, metrics = trainer.step(state, shifted(tokens))
        losses.append(float(metrics.ce))
    return trainer, state, losses


def test_it_learns(trained):
    _, _, losses = trained
    assert losses[-1] < losses[0] - 0.1


def test_masters_keep_what_the_format_cannot_hold(trained):
    _, state, _ = trained
    rounded = jax.jit(round_to_released)(state.params)
    for path, master in nnx.to_flat_state(state.params):
        if master.stored in ("fp4", "fp8", "bf16") and master.get_value().ndim > 1:
            value = rounded
            for name in path:
                value = value[name]
            assert (master.get_value() != value.get_value()).any(), path


def test_what_is_saved_computes_the_logits_of_the_training(trained, tokens, tmp_path):
    trainer, state, _ = trained
    model = nnx.merge(trainer.graphdef, jax.jit(round_to_released)(state.params), state.fixed)
    expected = Scorer(model).logits(tokens)

    checkpoint.save(to_released(trainer.model(state)), tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model", released("float32"), scan_layers=True)

    assert isinstance(loaded.stages[0].blocks[0].moe.w1.kernel[...], QuantizedArray)
    np.testing.assert_array_equal(Scorer(loaded).logits(tokens), expected)
    plainly = Scorer(trainer.model(state)).logits(tokens)  # the masters: another function
    assert np.abs(plainly - expected).max() > 1e-2


def test_gradients_are_those_at_the_rounded_weights(tokens):
    """Adam's first moment after a step, against the gradient at what the format holds."""
    graphdef, params, fixed = nnx.split(_make_model(), nnx.Param, ...)

    def loss(params):
        return training_loss(nnx.merge(graphdef, params, fixed), *shifted(tokens))[0]

    gradient = jax.jit(lambda params: jax.grad(loss)(round_to_released(params)))(params)
    trainer = TrainStep(_make_model(), OPTIMIZER, qat=True)
    state, _ = trainer.step(trainer.init(), shifted(tokens))

    moment = optax.tree_utils.tree_get(state.opt_state, "mu")
    share = (1 - B1) * min(1, CLIP_NORM / optax.tree.norm(gradient))
    for expected, actual in zip(jax.tree.leaves(gradient), jax.tree.leaves(moment), strict=True):
        assert_close(actual, share * expected, GRADIENT_FLOAT32)


@pytest.mark.parametrize("stored", ["fp4", "fp8", "bf16"])
def test_rounding_is_that_of_the_released_format(stored):
    weight = jax.random.normal(jax.random.key(0), (3, 64, 40))
    state = nnx.State({"w": nnx.Param(weight, stored=stored)})

    rounded = jax.jit(round_to_released)(state)["w"].get_value()

    expected = (
        weight.astype(jnp.bfloat16)
        if stored == "bf16"
        else quantize_weight(weight, stored).dequantize()
    )
    assert rounded.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, expected.astype(jnp.float32))


def test_a_mesh_rounds_alike():
    alone = jax.jit(round_to_released)(nnx.state(_make_model(), nnx.Param))
    with jax.set_mesh(make_mesh(fsdp=2, expert=2, tensor=2)):
        params = nnx.state(_make_model(), nnx.Param)
        spread = jax.jit(round_to_released)(params)
    for a, b, like in zip(*map(jax.tree.leaves, (alone, spread, params)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert b.sharding.is_equivalent_to(like.sharding, b.ndim)


def test_other_numerics_are_refused():
    with pytest.raises(ValueError, match=r"qat=True with plain numerics: expected released"):
        TrainStep(_make_model(plain()), OPTIMIZER, qat=True)
