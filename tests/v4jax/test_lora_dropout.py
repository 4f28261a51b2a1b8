"""Inputs that adapters leave out in a step: how many, when, and the same where they should be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sharding import TRAIN, AxisRules, collectives, make_mesh
from tests.models import random_model
from tests.tolerances import FLOAT32, GRADIENT_FLOAT32, assert_close
from v4jax import LoRA, plain, tiny
from v4jax.nn.layers import Linear, ModelContext
from v4jax.nn.lora import LoRAParam, LowRank, add_lora, dropping, drops, matrices
from v4jax.train import adamw
from v4jax.train.losses import shifted
from v4jax.train.step import TrainStep, loss_and_gradients

SHARE = 0.25
# Two equal layers, stacked.
CONFIG = dataclasses.replace(tiny(), layers=tiny().layers[:1] * 2, mtp_layers=())
# Matrices whose inputs a mesh over `tensor` does not cut, and those whose outputs it cuts.
LORA = LoRA(rank=2, targets=("attention.wq_a", "attention.wq_b", "moe.w1"), dropout=SHARE)
LENGTH = 24


def _adapted(lora: LoRA = LORA, count: int = 2):
    """A model of `count` layers with adapters that change something: B is not zero."""
    layers = CONFIG.layers[:count]
    model = add_lora(random_model(dataclasses.replace(CONFIG, layers=layers)), lora)
    for number, (_, matrix) in enumerate(matrices(model)):
        if matrix.adapter is not None:
            b, key = matrix.adapter.b, jax.random.key(number)
            b.set_value(0.3 * jax.random.normal(key, b.get_value().shape))
    return model


def test_means_stay_and_spread_by_the_share():
    """Over many masks: the product's mean is that without dropout, and its variance what p gives."""
    context = ModelContext(tiny(), plain(), AxisRules(), nnx.Rngs(0))
    matrix = Linear(context, 32, 8, ("embed", None))
    adapter = LowRank(matrix, LORA, jax.random.key(1), AxisRules())
    adapter.b.set_value(jax.random.normal(jax.random.key(2), (2, 8)))
    x, out = jax.random.normal(jax.random.key(3), (2, 3, 32)), jnp.zeros((2, 3, 8))
    product = np.asarray(adapter.product(), np.float64)
    whole = np.asarray(x, np.float64) @ product
    assert_close(adapter(x, out), whole, FLOAT32)  # without a key

    matrix.adapter, count = adapter, 20000

    @jax.jit
    @jax.vmap
    def dropped(number):
        model = nnx.merge(*nnx.split(matrix))
        return dropping(model, jax.random.fold_in(jax.random.key(4), number)).adapter(x, out)

    found = np.asarray(dropped(jnp.arange(count)), np.float64)
    variance = SHARE / (1 - SHARE) * np.einsum("bti,io->bto", np.asarray(x) ** 2, product**2)
    assert (np.abs(found.mean(0) - whole) < 5 * np.sqrt(variance / count)).all()
    np.testing.assert_allclose(found.var(0), variance, rtol=0.1)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    row = np.random.default_rng(0).integers(2, 256, (1, LENGTH + 2)).astype(np.int32)
    return np.concatenate([row, row])


def test_a_steps_number_says_what_is_left_out(tokens):
    """With a rate of 0; a held-out loss leaves nothing out."""
    trains = lambda path, variable: isinstance(variable, LoRAParam)
    model = _adapted()
    assert drops(model) and not drops(_adapted(dataclasses.replace(LORA, dropout=0.0)))
    whole = _cross_entropy(model, tokens)
    training = TrainStep(model, adamw(0.0), trainable=trains, remat="none", seed=3)
    state, found = training.init(), []
    with pytest.raises(ValueError, match="number=None with LoRA dropout"):
        training.step(state, shifted(tokens))
    for number in (0, 1, 0):
        state, metrics = training.step(state, shifted(tokens), number)
        found.append(float(metrics.ce))
    assert found[0] == found[2] and abs(found[0] - found[1]) > 1e-4
    assert abs(found[0] - whole) > 1e-4
    assert_close(training.loss(state, shifted(tokens)), whole, FLOAT32)


def _cross_entropy(model, tokens) -> float:
    inputs, following, _ = shifted(tokens)
    logits = np.asarray(model(inputs), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, following[..., None], axis=-1).mean()


class Queries:
    """A loss of one layer's queries: little to compile."""

    def __call__(self, model, batch, *, remat, shares=None):
        del remat, shares
        x = model.embed.rows(batch[0])
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        _, q, _ = model.stages[0].blocks[0].attention.project(x, positions)
        loss = collectives.reduce_from(jnp.sum(jnp.sin(3 * q)), "heads")
        return loss, loss

    def counts(self, cfg, batch):
        return jnp.ones(())


def _found(model, tokens, number: int | None, micro_batches: int = 1):
    """Gradients and the loss."""
    graphdef, params, fixed = nnx.split(model, LoRAParam, ...)
    number = None if number is None else np.uint32(number)
    step = loss_and_gradients(graphdef, Queries(), TRAIN, "none", micro_batches, seed=3)
    return jax.jit(step)(params, fixed, tokens, number=number)


@pytest.fixture(scope="module")
def one():
    return _adapted(count=1)


def test_rows_and_micro_batches_draw_by_themselves(one, tokens):
    """Of two equal rows: twice the loss of one without dropout, and not with it."""
    tokens = tokens[:, :LENGTH]
    for number in (None, 0):
        single, *twice = (
            float(_found(one, rows, number, parts)[1])
            for rows, parts in ((tokens[:1], 1), (tokens, 1), (tokens, 2))
        )
        apart = [abs(loss / single / 2 - 1) for loss in twice]
        assert max(apart) < FLOAT32 if number is None else min(apart) > 1e-3


def test_devices_that_share_inputs_leave_out_the_same(one, tokens):
    """Outputs cut over two devices: loss and gradients are those of one device, mask for mask."""
    expected, expected_loss = _found(one, tokens, 5)
    values = jax.device_get(one)
    with jax.set_mesh(make_mesh(tensor=2)):
        put = lambda value, like: jax.device_put(value, like.sharding)
        model = jax.tree.map(put, values, _adapted(count=1))
        gradients, loss = _found(model, tokens, 5)
    assert_close(loss, expected_loss, FLOAT32)
    for path, gradient in nnx.to_flat_state(gradients):
        other = dict(nnx.to_flat_state(expected))[path].get_value()
        assert_close(gradient.get_value(), other, GRADIENT_FLOAT32)
        assert np.abs(other).max() > 0 or "moe" in path


def test_a_share_is_one():
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"LoRA dropout={share}: expected a share"):
            LoRA(dropout=share)
