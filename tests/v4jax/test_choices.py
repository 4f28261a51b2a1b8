"""Experts and entries that a model is made to take: its own again, and others."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sharding import AxisRules
from tests.models import random_model
from tests.tolerances import FLOAT32, GRADIENT_FLOAT32, assert_close
from v4jax import plain, tiny
from v4jax.config import window_layer
from v4jax.nn.attention import Attention
from v4jax.nn.choices import Choices
from v4jax.nn.layers import KeyStream, ModelContext
from v4jax.nn.moe import MoE
from v4jax.train.losses import LossWeights, shifted, training_loss

CSA = dataclasses.replace(tiny().layers[3], indexer=dataclasses.replace(tiny().indexer, topk=5))
# A hash-routed layer, and two that are stacked.
CONFIG = dataclasses.replace(
    tiny(), layers=(window_layer(hash_routed=True), CSA, CSA), mtp_layers=()
)
LENGTH = 60
TOKENS = np.random.default_rng(0).integers(2, 256, (2, LENGTH + 2)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def own(model) -> Choices:
    """What the model chooses, as another program of it says."""
    views = model.inspect(TOKENS[:, :LENGTH])
    picks = [view.picks for view in views if view.picks is not None]
    return Choices(jnp.stack([view.experts for view in views], 2), jnp.stack(picks, 2))


@pytest.fixture(scope="module")
def loss_of(model):
    """A function of choices: the loss, and gradients and counts of experts."""
    graphdef, params, fixed = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def found(choices):
        def loss(params):
            return training_loss(
                nnx.merge(graphdef, params, fixed),
                *shifted(TOKENS),
                LossWeights(balance=0.01),
                choices=choices,
            )

        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, gradients, metrics.expert_counts

    return found


def test_its_own_choices_change_nothing(own, loss_of):
    assert own.selections.shape == (2, LENGTH, 2, CSA.indexer.topk)
    expected, actual = loss_of(Choices()), loss_of(own)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_each_layer_is_given_its_own(own, loss_of):
    """Counts of experts are those of the choices, layer by layer; -1 leaves a token to the layer."""
    rng = np.random.default_rng(1)
    experts = rng.permuted(np.tile(np.arange(8), (2, LENGTH, 3, 1)), axis=-1)[..., :2]
    experts[:, 40:] = -1
    *_, counts = loss_of(Choices(jnp.asarray(experts, jnp.int32), own.selections))
    counts = np.concatenate([count for stage in counts for count in stage])
    experts[:, 40:, 0] = np.asarray(own.experts)[:, 40:, 0]  # layers before it chose as they would
    for layer, count in enumerate(counts):
        given = np.bincount(experts[:, :40, layer].reshape(-1), minlength=8)
        assert (count >= given).all() and count.sum() == 2 * 2 * LENGTH
    left = np.bincount(np.asarray(own.experts)[:, 40:, 0].reshape(-1), minlength=8)
    given = np.bincount(experts[:, :40, 0].reshape(-1), minlength=8)
    np.testing.assert_array_equal(counts[0], given + left)


def _context() -> ModelContext:
    return ModelContext(CONFIG, plain(), AxisRules(), KeyStream(jax.random.key(3)))


def _float64(module) -> dict:
    leaves = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): np.asarray(v.get_value(), np.float64) for path, v in leaves}


def _mixture(weights: dict, x: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """The MoE of rows x [P, D] through given experts [P, K], token by token."""

    def expert(x, w1, w2, w3):
        gate, up = np.minimum(x @ w1, limit), np.clip(x @ w3, -limit, limit)
        return (gate / (1 + np.exp(-gate)) * up) @ w2

    limit, scale = CONFIG.moe.swiglu_limit, CONFIG.moe.routed_scale
    scores = np.sqrt(np.log1p(np.exp(x @ weights["router.gate.kernel"])))
    out = expert(x, *(weights[f"shared.w{n}.kernel"] for n in (1, 2, 3)))
    for token, ids in enumerate(experts):
        share = scores[token, ids] / scores[token, ids].sum() * scale
        for expert_id, weight in zip(ids, share):
            matrices = (weights[f"w{n}.kernel"][expert_id] for n in (1, 2, 3))
            out[token] += weight * expert(x[token], *matrices)
    return out


@pytest.mark.parametrize("kind", ["scored", "hash"])
def test_given_experts_are_a_mixture_by_the_scores(kind):
    """Output and the gradient of the router, against NumPy and its central differences."""
    moe = MoE(_context(), window_layer(hash_routed=kind == "hash"))
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((1, 12, CONFIG.embed_dim)), jnp.float32)
    experts = rng.permuted(np.tile(np.arange(8), (1, 12, 1)), axis=-1)[..., :2].astype(np.int32)
    d_out = rng.standard_normal(x.shape)
    tokens = jnp.zeros((1, 12), jnp.int32)
    own, _, _ = moe.router(x, tokens)
    assert (np.sort(own) != np.sort(experts)).any(-1).mean() > 0.5
    graphdef, params, fixed = nnx.split(moe, nnx.Param, ...)

    def loss(params):
        out, _ = nnx.merge(graphdef, params, fixed)(x, tokens, None, jnp.asarray(experts))
        return jnp.sum(out * d_out), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    gradient = np.asarray(gradients["router"]["gate"]["kernel"].get_value())

    weights = _float64(moe)
    mixture = functools.partial(_mixture, x=np.asarray(x[0], np.float64), experts=experts[0])
    assert_close(out[0], mixture(weights), FLOAT32)
    places = [np.unravel_index(np.argmax(np.abs(gradient)), gradient.shape), (0, 0), (5, 3)]
    expected = []
    for place in places:
        sides = []
        for step in (1e-5, -1e-5):
            gate = weights["router.gate.kernel"].copy()
            gate[place] += step
            sides.append((mixture({**weights, "router.gate.kernel": gate}) * d_out[0]).sum())
        expected.append((sides[0] - sides[1]) / 2e-5)
    assert_close([gradient[place] for place in places], expected, GRADIENT_FLOAT32)


def test_given_entries_are_attended_to():
    """Window, sink and the given entries in one softmax, against NumPy; the last of S stand for none."""
    attention = Attention(_context(), CSA)
    x = jax.random.normal(jax.random.key(4), (1, LENGTH, CONFIG.embed_dim))
    rng = np.random.default_rng(5)
    selection = np.full((1, LENGTH, 3), -1, np.int32)
    for t in range(LENGTH):
        seen = (t + 1) // CSA.ratio
        picked = rng.permutation(seen)[:2]  # of any score
        selection[0, t, : len(picked)] = picked

    out, *_ = jax.jit(lambda x, s: attention(x, None, s))(x, selection)

    positions = jnp.arange(LENGTH)[None]
    _, q, kv = attention.project(x, positions)
    entries = attention.compressor(x)
    q, kv, entries = (np.asarray(y[0], np.float64) for y in (q, kv, entries))
    mixed = np.zeros_like(q)
    for t in range(LENGTH):
        rows = kv[max(t - CONFIG.window + 1, 0) : t + 1]
        rows = np.concatenate([rows, entries[selection[0, t][selection[0, t] >= 0]]])
        e = np.exp(q[t] @ rows.T * CONFIG.head_dim**-0.5)
        mixed[t] = e @ rows / (e.sum(-1) + np.exp(_float64(attention)["sink"]))[:, None]
    expected = attention._output(jnp.asarray(mixed[None], jnp.float32), positions)
    assert_close(out, expected, FLOAT32)


def test_choices_of_another_shape_are_refused(model, own):
    with pytest.raises(
        ValueError, match=r"choices.experts \(2, 60, 2, 2\): expected .*\(2, 60, 3, 2\)"
    ):
        model.trunk(TOKENS[:, :LENGTH], None, Choices(own.experts[:, :, :2]))
    with pytest.raises(ValueError, match=r"choices.selections .*expected .*\(2, 60, 2, 'S'\)"):
        model.trunk(TOKENS[:, :LENGTH], None, Choices(None, own.selections[:, :, :1]))
