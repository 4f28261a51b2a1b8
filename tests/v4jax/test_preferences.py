"""Training on preference pairs: data, loss, a run, and meshes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

import v4jax
from sharding import TRAIN, make_mesh
from tests.conftest import NANO
from tests.models import random_model
from tests.tolerances import FLOAT32, assert_close
from v4jax import LoRA, tiny
from v4jax.train import DPO, PreferencePairs, Trainer, adamw, log_probs
from v4jax.train.step import loss_and_gradients

CONFIG = dataclasses.replace(tiny(), vocab_size=1280, layers=tiny().layers[:1], mtp_layers=())
WORDS = ("Emma", "Harriet", "Mr. Knightley", "Highbury", "a ball", "the weather")
SEQ_LEN = 32


@pytest.fixture(scope="module")
def tokenizer():
    return v4jax.Tokenizer(NANO)


@pytest.fixture(scope="module")
def pairs(tokenizer, tmp_path_factory) -> PreferencePairs:
    """Six pairs, whose better answers are shorter and longer ones."""
    lines = [
        {"prompt": f"Question {n}?", "chosen": word, "rejected": WORDS[(n + 1) % len(WORDS)]}
        for n, word in enumerate(WORDS)
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return PreferencePairs(path, tokenizer, SEQ_LEN)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


def _truth(model, pairs: PreferencePairs) -> np.ndarray:
    """log p of the completions [N, 2] from the model's logits, in float64."""
    found = np.zeros((len(pairs), 2))
    for side in range(2):
        tokens, weights, _ = zip(*(pairs.row(number, side) for number in range(len(pairs))))
        inputs, following = np.stack(tokens, axis=1)
        logits = np.asarray(model(inputs), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = np.take_along_axis(log_p, following[..., None], axis=-1)[..., 0]
        found[:, side] = (chosen * np.stack(weights)).sum(-1)
    return found


@pytest.fixture(scope="module")
def reference(model, pairs) -> np.ndarray:
    return _truth(model, pairs)


def test_rows_have_loss_on_the_completion_alone(pairs, tokenizer):
    assert len(pairs) == len(WORDS) and repr(pairs).startswith("pairs.jsonl: 6 preference pairs")
    for side, word in enumerate(WORDS[2:4]):
        (inputs, following), weights, valid = pairs.row(2, side)
        assert tokenizer.decode(following[weights > 0].tolist()) == word  # and the end of the turn
        assert "Question 2?" in tokenizer.decode(inputs[valid].tolist())
        np.testing.assert_array_equal(inputs[1:][valid[1:]], following[:-1][valid[1:]])
        assert not valid.all() and not weights[~valid].any()


def test_pairs_of_an_epoch_are_all_there_once(pairs):
    pairs.reference = np.arange(12, dtype=np.float32).reshape(6, 2)
    orders = []
    for epoch in range(2):
        batches = [pairs.targets(3 * epoch + step, 2, CONFIG, None) for step in range(3)]
        found = np.concatenate([batch.reference for batch in batches]).reshape(-1, 2)
        np.testing.assert_array_equal(found[:, 1] - found[:, 0], 1)  # sides stay together
        orders.append(found[:, 0].tolist())
        assert sorted(orders[-1]) == [0, 2, 4, 6, 8, 10]
    assert orders[0] != orders[1]


def test_log_probs_are_sums_over_the_completion(model, pairs, reference):
    found = log_probs(model, pairs, batch_size=4)  # the last batch is not full
    assert found.dtype == np.float32
    assert_close(found, reference, FLOAT32)


@pytest.fixture(scope="module")
def found(model, pairs, reference):
    """Gradients and metrics on one device, with another reference than the model itself."""
    rng = np.random.default_rng(0)
    other = (reference + rng.normal(size=reference.shape) * 5).astype(np.float32)
    graphdef, params, fixed = nnx.split(model, nnx.Param, ...)
    loss = DPO(beta=0.2, label_smoothing=0.1, balance=0.01)
    step = jax.jit(loss_and_gradients(graphdef, loss, TRAIN))
    batch = pairs.batch([0, 1, 2, 3], other, None)
    return loss, other, step(params, fixed, *batch)


def test_the_loss_is_that_of_the_paper(reference, pairs, found):
    _, other, (_, metrics) = found
    rewards = 0.2 * (reference - other)[:4]
    margins = rewards[:, 0] - rewards[:, 1]
    assert (margins > 0).any() and (margins < 0).any()
    losses = 0.9 * np.log1p(np.exp(-margins)) + 0.1 * np.log1p(np.exp(margins))
    assert_close(metrics.loss - 0.01 * metrics.balance, losses.mean(), FLOAT32)
    assert_close(metrics.accuracy, (margins > 0).mean(), FLOAT32)
    assert_close(metrics.margin, margins.mean(), 10 * FLOAT32)  # a difference of large numbers
    assert_close(metrics.chosen_reward, rewards[:, 0].mean(), 10 * FLOAT32)
    assert_close(metrics.rejected_reward, rewards[:, 1].mean(), 10 * FLOAT32)
    counts = [pairs.row(number, 0)[1].sum() for number in range(4)]
    assert_close(metrics.ce, -reference[:4, 0].sum() / sum(counts), FLOAT32)


def test_a_mesh_computes_the_same(pairs, found):
    """Pairs cut over two devices, and their rows over two: a sum that is missing moves a half."""
    loss, other, (expected, expected_metrics) = found
    with jax.set_mesh(make_mesh(fsdp=2, context=2)):
        graphdef, params, fixed = nnx.split(random_model(CONFIG), nnx.Param, ...)
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), TRAIN.tokens)
        batch = pairs.batch([0, 1, 2, 3], other, sharding)
        step = jax.jit(loss_and_gradients(graphdef, loss, TRAIN))
        gradients, metrics = step(params, fixed, *batch)
    for a, b in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
        assert_close(a, b, 1e-3)  # of a parameter's largest, which may be 1e-4 of a model's
    for name in metrics.logged:
        assert_close(getattr(metrics, name), getattr(expected_metrics, name), 10 * FLOAT32)


def test_micro_batches_are_the_whole_batch(model, pairs, found):
    loss, other, (expected, expected_metrics) = found
    graphdef, params, fixed = nnx.split(model, nnx.Param, ...)
    batch = pairs.batch([0, 1, 2, 3], other, None)
    step = jax.jit(loss_and_gradients(graphdef, loss, TRAIN, micro_batches=2))
    gradients, metrics = step(params, fixed, *batch)
    for a, b in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
        assert_close(a, b, 1e-3)
    for name in metrics.logged:
        assert_close(getattr(metrics, name), getattr(expected_metrics, name), 10 * FLOAT32)
    with pytest.raises(ValueError, match="a micro-batch of 1 rows: expected whole pairs"):
        loss_and_gradients(graphdef, loss, TRAIN, micro_batches=8)(params, fixed, *batch)


def test_a_run_learns_which_is_better(model, pairs):
    """By an adapter, beside the starting model as reference."""
    pairs.reference = log_probs(model, pairs)
    assert 0 < (pairs.reference[:, 0] > pairs.reference[:, 1]).mean() < 1
    lora = LoRA(rank=4, targets=("attention.wq_b", "attention.wo_b", "shared.w2"))
    trainer = Trainer(model, adamw(1e-2), trainable=lora, loss=DPO())

    records = trainer.fit(pairs, 12, batch_size=6, log_every=1, progress=False)

    assert records[0]["margin"] == pytest.approx(0, abs=1e-3)  # the adapter adds nothing yet
    assert records[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)
    assert records[-1]["accuracy"] == 1 and records[-1]["loss"] < records[0]["loss"] / 2
    after = log_probs(trainer.model, pairs)
    assert ((after - pairs.reference) @ [1, -1] > 0).all()


def test_what_is_no_pair_is_said(pairs, tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"prompt": "Who?", "completion": "Emma."}\n{"prompt": "Who?", "chosen": "E"}\n'
    )
    with pytest.raises(
        ValueError, match="line 1: no chosen and rejected completion; line 2: reject"
    ):
        PreferencePairs(path, tokenizer, SEQ_LEN)
    with pytest.raises(
        ValueError, match=r"line 1 has \d+ tokens, and a row 4: expected at most one"
    ):
        PreferencePairs(pairs.path, tokenizer, 4, too_long="refuse")
    with pytest.raises(
        ValueError, match="has no pair with a completion on both sides in the first 4"
    ):
        PreferencePairs(pairs.path, tokenizer, 4)
    with pytest.raises(
        ValueError, match=r"no reference of the pairs yet: .*v4jax\.train\.log_probs"
    ):
        PreferencePairs(pairs.path, tokenizer, SEQ_LEN).targets(0, 2, CONFIG, None)
    with pytest.raises(ValueError, match=r"reference \(6,\): expected finite .* \(6, 2\)"):
        pairs.reference = np.zeros(6)
    with pytest.raises(ValueError, match=r"DPO beta=0: expected a number over 0"):
        DPO(beta=0)
    with pytest.raises(ValueError, match=r"label_smoothing=0\.6: expected a share of 0 \.\. 0\.5"):
        DPO(label_smoothing=0.6)
