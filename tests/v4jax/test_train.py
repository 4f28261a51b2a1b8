"""The training loss, its gradients, the step, and resuming. Sequences pass HCA's window (128)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.attention import selected_attention, selected_mass
from pallas_kernels.selection import Selection
from sharding import AxisRules
from tests.models import random_model
from tests.tolerances import FLOAT32, assert_close
from v4jax import Transformer, plain, tiny
from v4jax.config import window_layer
from v4jax.nn.cross_entropy import cross_entropy, cross_entropy_and_normalizer
from v4jax.nn.indexer import indexer_loss
from v4jax.nn.layers import ModelContext
from v4jax.nn.moe import Router
from v4jax.train.data import TokenStream
from v4jax.train.losses import LossWeights, shifted, training_loss
from v4jax.train.optimizers import adamw, is_matrix, update_routing_bias
from v4jax.train.schedules import schedule
from v4jax.train.state import Saver
from v4jax.train.step import TrainStep

LENGTH = 140


def _make_model() -> Transformer:
    return random_model(tiny())


@pytest.fixture(scope="module")
def model() -> Transformer:
    return _make_model()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, LENGTH + 2)).astype(np.int32)


@pytest.fixture(scope="module")
def gradients(model, tokens):
    """Gradients of the indexer's loss and of the cross entropies, by path."""
    graphdef, params, fixed = nnx.split(model, nnx.Param, ...)

    def terms(params):
        model = nnx.merge(graphdef, params, fixed)
        _, metrics = training_loss(model, *shifted(tokens), LossWeights(balance=0.0), remat="none")
        return jnp.stack([metrics.indexer, metrics.ce + metrics.mtp_ce])

    jacobian = jax.jit(jax.jacrev(terms))(params)
    return {
        ".".join(map(str, path)): np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(jacobian)
    }


def test_indexer_learns_from_its_own_loss_alone(gradients):
    for path, (indexer, language) in gradients.items():
        if ".indexer." in path:
            assert np.abs(indexer).max() > 0, path
            assert np.abs(language).max() == 0, path
        else:
            assert np.abs(indexer).max() == 0, path


def test_every_other_parameter_learns_from_the_text(gradients):
    for path, (_, language) in gradients.items():
        if ".indexer." not in path:
            assert np.isfinite(language).all() and np.abs(language).max() > 0, path


def test_cross_entropy_is_that_of_the_logits(model, tokens):
    """In chunks that do not divide the number of tokens."""
    hidden = jax.random.normal(jax.random.key(0), (2, LENGTH, tiny().embed_dim))
    targets = tokens[:, :LENGTH]

    losses, normalizers = cross_entropy_and_normalizer(model, hidden, targets, chunk=64)

    logits = np.asarray(model.logits(hidden), np.float64)
    expected = np.log(np.exp(logits).sum(-1, keepdims=True))
    assert_close(normalizers, expected[..., 0], FLOAT32)
    log_p = logits - expected
    assert_close(losses, -np.take_along_axis(log_p, targets[..., None], -1)[..., 0], FLOAT32)


def test_terms_of_the_loss(model, tokens):
    weights = LossWeights(mtp=0.3, balance=0.01, indexer=0.5, z=0.02)
    loss, metrics = jax.jit(lambda t: training_loss(model, *shifted(t), weights, remat="none"))(
        tokens
    )

    @jax.jit
    def cross_entropies(inputs, following, after):
        streams, _ = model.trunk(inputs)
        mtp_hidden, _ = model.mtp_hidden(streams, following)
        ce = cross_entropy(model, model.hidden(streams), following)
        logits = model.logits(model.hidden(streams))
        return ce.mean(), cross_entropy(model, mtp_hidden, after), logits

    ce, mtp_ce, logits = cross_entropies(*shifted(tokens))
    z = np.mean(np.log(np.exp(np.asarray(logits, np.float64)).sum(-1)) ** 2)
    assert_close(metrics.z, z, FLOAT32)
    assert_close(metrics.ce, ce, FLOAT32)
    assert_close(metrics.mtp_ce, mtp_ce.mean(), FLOAT32)
    expected = ce + 0.3 * mtp_ce.mean() + 0.01 * metrics.balance + 0.5 * metrics.indexer + 0.02 * z
    assert_close(loss, expected, FLOAT32)
    counts = [np.asarray(count) for stage in metrics.expert_counts for count in stage]
    assert sum(len(count) for count in counts) == len(tiny().layers) + 1
    assert all((count.sum(-1) == 2 * LENGTH * 2).all() for count in counts)


def test_indexer_loss_is_a_divergence():
    """KL(mass || softmax of scores) over the selected entries, against NumPy; 0 when equal."""
    rng = np.random.default_rng(0)
    q, keys = rng.normal(size=(1, 5, 3, 8)), rng.normal(size=(1, 7, 8))
    weights = rng.normal(size=(1, 5, 3))
    indices = np.array([[[0, -1, -1], [1, 0, -1], [2, 1, 0], [3, 6, 1], [-1, -1, -1]]])
    mass = rng.random((1, 5, 3)) * (indices >= 0)
    args = [jnp.asarray(x, jnp.float32) for x in (q, weights, keys)]

    scores = np.maximum(np.einsum("btai,bsi->btas", q, keys), 0)
    scores = np.einsum("btas,bta->bts", scores, weights)
    divergences = []
    for t in (1, 2, 3):  # the others see fewer than two entries
        chosen = indices[0, t] >= 0
        p = mass[0, t, chosen] / mass[0, t, chosen].sum()
        x = np.exp(scores[0, t, indices[0, t, chosen]])
        divergences.append((p * np.log(p / (x / x.sum()))).sum())
    assert_close(indexer_loss(*args, indices, mass), np.mean(divergences), FLOAT32)

    same = np.where(indices >= 0, np.exp(np.take_along_axis(scores, indices, axis=-1)), 0)
    assert abs(float(indexer_loss(*args, indices, same))) < 1e-6


@pytest.mark.parametrize("what", ["sink", "window"])
def test_teacher_has_the_denominator_of_the_whole_softmax(what):
    """Attention on entries depends on the sink of one head and on one window row."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, 9, 2, 16))
    window = jax.random.normal(keys[1], (1, 4 + 9, 16))
    entries = jax.random.normal(keys[2], (1, 6, 16))
    indices, positions = jnp.tile(jnp.arange(4), (1, 9, 1)), jnp.arange(20, 29)[None]

    def mass(sink, window):
        selection = Selection.of_indices(indices, 6)
        _, lse = selected_attention(q, window, entries, selection, sink, positions, scale=0.25)
        return selected_mass(q, entries, indices, lse, scale=0.25)

    sink = jnp.zeros(2)
    before = mass(sink, window)
    assert ((before.sum(-1) > 0) & (before.sum(-1) < 2)).all()  # two heads
    after = (
        mass(sink.at[1].add(2.0), window)
        if what == "sink"
        else mass(sink, window.at[0, 10].multiply(3.0))
    )
    assert np.abs(after - before).max() > 1e-3
    assert what == "window" or (after.sum(-1) < before.sum(-1)).all()


def test_balance_loss_of_an_even_router_is_one(tokens):
    context = ModelContext(tiny(), plain(), AxisRules(), nnx.Rngs(0))
    router = Router(context, window_layer())
    x = jax.random.normal(jax.random.key(0), (2, 64, tiny().embed_dim))
    router.gate.kernel.set_value(jnp.zeros_like(router.gate.kernel[...]))  # all scores equal
    _, _, stats = router(x, tokens[:, :64])
    assert_close(stats.balance_loss, 1.0, FLOAT32)

    router.gate.kernel.set_value(jnp.zeros_like(router.gate.kernel[...]).at[0, 0].set(9.0))
    _, _, stats = router(jnp.abs(x), tokens[:, :64])  # everybody prefers expert 0
    assert stats.balance_loss > 1.2


def test_routing_bias_moves_against_the_load(model):
    cfg, model = tiny(), _make_model()
    blocks = [block for stage in model.stages for block in stage.blocks]
    before = [b.moe.router.bias and b.moe.router.bias[...] for b in blocks]
    load = np.array([9, 1, 4, 4, 2, 6, 3, 3])  # mean 4
    counts = [tuple(jnp.tile(load, (s.repeats, 1)) for _ in s.blocks) for s in model.stages]
    counts.append((jnp.asarray(load)[None],))

    update_routing_bias(model, tuple(counts), 0.001)

    step = 0.001 * np.array([-1, 1, 0, 0, 1, -1, 1, 1], np.float32)
    scored = 0
    for block, old in zip(blocks, before, strict=True):
        if old is not None:
            np.testing.assert_allclose(
                block.moe.router.bias[...] - old, np.broadcast_to(step, old.shape)
            )
            scored += old.size // step.size
    assert scored == sum(not spec.hash_routed for spec in cfg.layers)
    np.testing.assert_allclose(model.mtp[0].block.moe.router.bias[...], step)


def test_adamw_is_the_published_rule():
    """Two steps against NumPy: warm-up to the peak, decay on the matrix and not on the vector."""
    rate = schedule("cosine", 0.1, 10, warmup_steps=1)
    matrix = nnx.Param(jnp.array([[2.0, -1.0]]), matrix=True)
    # As of two stacked layers: an axis more does not make it a matrix.
    vector = nnx.Param(jnp.array([[0.5], [0.7]]), matrix=False)
    params = nnx.State({"matrix": matrix, "vector": vector})
    grads = [
        nnx.State(
            {
                "matrix": matrix.replace(jnp.array([[1.0, -3.0]])),
                "vector": vector.replace(jnp.array([[-2.0], [1.0]])),
            }
        )
    ]
    grads.append(jax.tree.map(lambda g: 0.5 * g, grads[0]))
    tx = adamw(rate, clip_norm=1e9)
    state, moments = tx.init(params), {k: (0.0, 0.0) for k in params}
    expected = {k: np.asarray(v.get_value(), np.float64) for k, v in params.items()}
    rates = (0.1, 0.01 + 0.09 * (1 + np.cos(np.pi / 9)) / 2)
    for t, (grad, lr) in enumerate(zip(grads, rates), start=1):
        updates, state = tx.update(grad, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for k in params:
            g = np.asarray(grad[k].get_value(), np.float64)
            m, v = 0.9 * moments[k][0] + 0.1 * g, 0.95 * moments[k][1] + 0.05 * g**2
            moments[k] = m, v
            step = (m / (1 - 0.9**t)) / np.sqrt(v / (1 - 0.95**t))
            expected[k] -= lr * (step + (0.1 * expected[k] if k == "matrix" else 0.0))
    for k in params:
        assert_close(params[k].get_value(), expected[k], FLOAT32)


def test_only_matrices_decay_in_stacked_layers():
    model = nnx.eval_shape(lambda: Transformer(tiny(), rngs=nnx.Rngs(0)))
    decays = {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(is_matrix(nnx.state(model, nnx.Param)))
    }

    vectors = ("weight", "sink", "base", "scale", "ape")  # norms are `weight`, sites base and scale
    assert {path for path in decays if path.endswith(vectors)} == {
        path for path, decay in decays.items() if not decay
    }
    assert sum(decays.values()) > 80 and any(path.startswith("stages.1") for path in decays)


def test_training_learns_and_resumes_to_the_same_bits(tmp_path, tokens):
    """Six steps on one batch, against three, a save, a restore into a new model, and three more."""
    optimizer = adamw(schedule("cosine", 3e-3, 6, warmup_steps=1))
    cfg = dataclasses.replace(tiny(), layers=tiny().layers[2:6])  # HCA and CSA twice, stacked
    trainer = TrainStep(random_model(cfg), optimizer, bias_speed=1e-3)
    state, losses = trainer.init(), []
    saver = Saver(tmp_path / "state")
    for step in range(6):
        if step == 3:
            saver.save(step, state)
            saver.wait()
        state, metrics = trainer.step(state, shifted(tokens))
        losses.append(float(metrics.ce))
    assert losses[-1] < 0.8 * losses[0]

    resumed, step = saver.restore(TrainStep(random_model(cfg), optimizer, bias_speed=1e-3).init())
    saver.close()
    assert step == 3
    for step in range(3, 6):
        resumed, metrics = trainer.step(resumed, shifted(tokens))
        assert float(metrics.ce) == losses[step]
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_restore_finds_nothing_in_a_new_folder(tmp_path, model):
    trainer = TrainStep(model, adamw(1e-4))
    saver = Saver(tmp_path / "state")
    assert saver.restore(trainer.init()) is None
    saver.close()


def test_mtp_blocks_that_would_not_learn_are_named():
    cfg = dataclasses.replace(tiny(), layers=tiny().layers[:1], mtp_layers=tiny().mtp_layers * 2)
    model = random_model(cfg)
    with pytest.raises(ValueError, match="tiny has 2 MTP blocks, and the loss is of the first"):
        TrainStep(model, adamw(1e-4))
    TrainStep(model, adamw(1e-4), LossWeights(mtp=0.0))


def test_batches_depend_on_seed_and_step_alone(tmp_path):
    tokens = np.arange(1000, dtype=np.uint16)
    np.save(tmp_path / "tokens.npy", tokens)
    stream, again = (
        TokenStream(tokens, 30, seed=1),
        TokenStream(tmp_path / "tokens.npy", 30, seed=1),
    )

    batch = stream.batch(7, 4)

    assert batch.shape == (4, 32) and batch.dtype == np.int32
    assert (np.diff(batch, axis=1) == 1).all()
    np.testing.assert_array_equal(batch, again.batch(7, 4))
    assert (batch != stream.batch(8, 4)).any()
    assert (batch != TokenStream(tokens, 30, seed=2).batch(7, 4)).any()


def test_streams_are_checked():
    with pytest.raises(ValueError, match="31 tokens are fewer than a window of 32"):
        TokenStream(np.zeros(31, int), 30)
    with pytest.raises(ValueError, match=r"float64\(40,\): expected integers"):
        TokenStream(np.zeros(40), 30)
