"""Training with the rounding in the loop: what it computes is what is saved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pallas_kernels.formats.quantize import QuantizedArray, quantize_weight
from sharding import TRAIN, collectives, make_mesh
from tests.models import random_model
from tests.tolerances import GRADIENT_FLOAT32, assert_close
from v4jax import Transformer, checkpoint, plain, released, tiny
from v4jax.config import window_layer
from v4jax.inference.score import Scorer
from v4jax.nn.placement import joined
from v4jax.nn.quantization import to_float, to_released, with_rounding
from v4jax.nn.rounding import rounded
from v4jax.train.losses import shifted, training_loss
from v4jax.train.optimizers import adamw
from v4jax.train.schedules import schedule
from v4jax.train.step import TrainStep

CONFIG = dataclasses.replace(
    tiny(), layers=tiny().layers[1:3]
)  # CSA, HCA; the MTP block is a window layer
LENGTH = 140
B1, CLIP_NORM = 0.9, 1.0
OPTIMIZER = adamw(schedule("cosine", 3e-3, 8, warmup_steps=1), b1=B1, clip_norm=CLIP_NORM)


def _matrices(params):
    return [(path, v) for path, v in nnx.to_flat_state(params) if v.matrix and v.stored != "f32"]


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
    masters = {path: v for path, v in _matrices(state.params)}

    @jax.jit
    def changed(masters):
        return {
            path: jnp.any(v.get_value() != rounded(v.get_value(), v.stored))
            for path, v in masters.items()
        }

    assert all(changed(masters).values()) and len(masters) > 30


def test_what_is_saved_computes_the_logits_of_the_training(trained, tokens, tmp_path):
    trainer, state, _ = trained
    expected = Scorer(with_rounding(trainer.model(state))).logits(tokens)

    checkpoint.save(to_released(trainer.model(state)), tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model", released("float32"), scan_layers=True)

    assert isinstance(loaded.stages[0].blocks[0].moe.w1.kernel[...], QuantizedArray)
    np.testing.assert_array_equal(Scorer(loaded).logits(tokens), expected)
    plainly = Scorer(trainer.model(state)).logits(tokens)  # the masters: another function
    assert np.abs(plainly - expected).max() > 1e-2


def test_gradients_are_those_at_the_rounded_weights(tokens):
    """Adam's first moment after a step, against the gradient at what the format holds."""
    graphdef, params, fixed = nnx.split(to_float(to_released(_make_model())), nnx.Param, ...)

    def loss(params):
        return training_loss(nnx.merge(graphdef, params, fixed), *shifted(tokens))[0]

    gradient = jax.jit(jax.grad(loss))(params)
    trainer = TrainStep(_make_model(), OPTIMIZER, qat=True)
    state, _ = trainer.step(trainer.init(), shifted(tokens))

    moment = optax.tree_utils.tree_get(state.opt_state, "mu")
    share = (1 - B1) * min(1, CLIP_NORM / optax.tree.norm(gradient))
    for expected, actual in zip(jax.tree.leaves(gradient), jax.tree.leaves(moment), strict=True):
        assert_close(actual, share * expected, GRADIENT_FLOAT32)


@pytest.mark.parametrize("stored", ["fp4", "fp8", "bf16"])
def test_rounding_is_that_of_the_released_format(stored):
    weight = jax.random.normal(jax.random.key(0), (3, 64, 40))

    found, pullback = jax.vjp(jax.jit(lambda weight: rounded(weight, stored)), weight)

    expected = (
        weight.astype(jnp.bfloat16)
        if stored == "bf16"
        else quantize_weight(weight, stored).dequantize()
    )
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected.astype(jnp.float32))
    np.testing.assert_array_equal(pullback(2 * weight)[0], 2 * weight)  # of the identity


def test_stacked_layers_are_rounded_where_they_run():
    """Nothing outside the scan over layers has the shape of all of a matrix's layers."""
    cfg = dataclasses.replace(tiny(), layers=(window_layer(),) * 3, mtp_layers=())
    model = with_rounding(random_model(cfg, released("float32")))
    graphdef, params, fixed = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return jnp.sum(nnx.merge(graphdef, params, fixed).trunk(jnp.zeros((1, 8), jnp.int32))[0])

    outside, scans = [], []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "scan":
                scans.append(eqn)
                continue
            outside.extend(out.aval.shape for out in eqn.outvars)
            jax.tree.map(visit, [x for x in jax.tree.leaves(eqn.params) if hasattr(x, "eqns")])

    visit(jax.make_jaxpr(loss)(params).jaxpr)
    stacked = {
        variable.get_value().shape
        for path, variable in nnx.to_flat_state(params)
        if path[0] == "stages" and variable.stored in ("fp4", "fp8")
    }
    assert len(scans) == 1 and len(stacked) > 4 and not stacked & set(outside)


@pytest.mark.parametrize(
    "stored, shape",
    [
        ("fp8", (256, 40)),
        ("fp8", (128, 40)),
        ("fp4", (64, 40)),
        ("fp4", (32, 40)),
        ("bf16", (8, 6)),
    ],
)
def test_a_mesh_rounds_alike(stored, shape):
    """Activations in bfloat16. Parts of whole blocks before they travel, and blocks that are cut (the second and fourth) after."""
    weight = jax.random.normal(jax.random.key(0), shape)
    matrix = nnx.Param(weight, stored=stored, axes=("embed", None), matrix=True)
    d_out = jax.random.normal(jax.random.key(1), shape)

    def on_device(part):
        def whole(part):
            return joined(matrix.replace(part), jnp.bfloat16, as_released=True).astype(jnp.float32)

        found, pullback = jax.vjp(whole, part)
        return found, pullback(d_out)[0]

    with jax.set_mesh(make_mesh(fsdp=2)):
        cut = TRAIN.spec("embed", None)
        run = collectives.per_device(on_device, TRAIN, (cut,), (jax.P(), cut))
        found, gradient = jax.jit(run)(jax.device_put(weight, cut))

    np.testing.assert_array_equal(found, rounded(weight, stored))
    assert_close(gradient, 2 * d_out, 2**-8)  # each of two devices computed with the whole


def test_a_mesh_that_cuts_blocks_is_refused():
    model, message = _make_model(), "but its scales need blocks of 128 whole"
    with jax.set_mesh(make_mesh(tensor=2)), pytest.raises(ValueError, match=message):
        TrainStep(model, OPTIMIZER, qat=True)


def test_other_numerics_are_refused():
    with pytest.raises(ValueError, match=r"qat=True with plain numerics: expected released"):
        TrainStep(_make_model(plain()), OPTIMIZER, qat=True)
