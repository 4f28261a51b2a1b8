"""Anticipatory routing: whose choice experts are, when it is on, and that a run goes on to the same bits."""

import dataclasses
import math
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from sharding import TRAIN, make_mesh
from tests.models import random_model
from tests.tolerances import FLOAT32, assert_close
from v4jax import tiny
from v4jax.checkpoint import CheckpointError
from v4jax.cli import finetune
from v4jax.cli.finetune_options import make_parser, parse_args
from v4jax.config import window_layer
from v4jax.nn.documents import Documents
from v4jax.train import Anticipation, IndexerWarmup, Spikes, TokenStream, Trainer, adamw
from v4jax.train import trainer as trainer_module
from v4jax.train.anticipation import Routing
from v4jax.train.lookahead import Lookahead
from v4jax.train.losses import Batch
from v4jax.train.state import Saver, freed
from v4jax.train.step import TrainStep

CFG = dataclasses.replace(tiny(), layers=(window_layer(),) * 2, mtp_layers=())  # stacked
HASHED = dataclasses.replace(CFG, layers=(window_layer(hash_routed=True), *CFG.layers))
ROWS, LENGTH, SPEED = 8, 32, 0.01
DATA = TokenStream(np.random.default_rng(0).integers(2, 256, 5000), LENGTH)
RULE = Anticipation(delay=2, steps=3)


@pytest.fixture(scope="module")
def training():
    """A compiled step, and its first state as arrays of the host."""
    options = dict(bias_speed=SPEED, skip_above=1e3, anticipate=RULE, remat="none")
    training = TrainStep(random_model(CFG), adamw(3e-2), **options)
    return training, jax.tree.map(np.array, training.init())


def _on(state, steps: int = 100):
    return dataclasses.replace(state, routing=Routing(np.int32(steps)))


def _steps(training, state, numbers, rule=RULE):
    """Of each step the state before it, its batch and its metrics; and the state after all."""
    lookahead, found = Lookahead(rule, training), []
    for number in numbers:
        before = jax.tree.map(np.array, state)
        batch, state = lookahead.batch(state, number, DATA, ROWS)
        state, metrics = training.step(state, batch)
        found.append((before, batch, metrics))
    return found, state


def _bits(found, state) -> list:
    losses = [np.asarray(metrics.loss) for *_, metrics in found]
    return [x.tobytes() for x in (*losses, *map(np.asarray, jax.tree.leaves(state)))]


def _chosen(training, state, tokens) -> np.ndarray:
    """Experts [B, T, L, K] by a state's parameters, as `inspect` finds them."""
    views = training.model(state).inspect(np.asarray(tokens))
    return np.stack([view.experts for view in views], axis=2)


def _assert_same(found, expected) -> None:
    """Of a thousand tokens one may have others, where two programs round scores that nearly tie."""
    found, expected = np.sort(found), np.sort(expected)
    assert found.shape == expected.shape
    assert (found != expected).any(-1).mean() <= 1e-3


def test_experts_are_the_choice_of_parameters_some_steps_before(training):
    """And the counts, which the routing bias follows, are of these experts."""
    training, state = training
    found, last = _steps(training, _on(state), range(5))
    states = [before for before, *_ in found]
    moved = 0
    for number, (before, batch, metrics) in enumerate(found):
        given = np.asarray(batch.choices.experts)
        own = _chosen(training, before, batch.inputs)
        earlier = _chosen(training, states[max(number - 2, 0)], batch.inputs)
        _assert_same(given, earlier)
        moved += (np.sort(given) != np.sort(own)).any(-1).sum()
        assert metrics.anticipated and given.dtype == np.int16
        ((counts,),) = metrics.expert_counts
        for layer, count in enumerate(counts):
            np.testing.assert_array_equal(
                count, np.bincount(given[:, :, layer].ravel(), minlength=8)
            )
        after = states[number + 1] if number < 4 else last
        old, new = (
            np.asarray(s.fixed["stages"][0]["blocks"][0]["moe"]["router"]["bias"].get_value())
            for s in (before, after)
        )
        under = np.sign(np.mean(counts, -1, keepdims=True) - counts)
        np.testing.assert_allclose(new - old, SPEED * under, atol=1e-7)
    assert moved > 100


def test_without_a_delay_nothing_changes(training):
    """Not a bit of losses and parameters."""
    training, state = training
    plain, end = _steps(training, state, range(3))
    found, other = _steps(training, _on(state), range(3), Anticipation(delay=0))
    assert all(m.anticipated for *_, m in found) and not any(m.anticipated for *_, m in plain)
    assert _bits(found, other.without_ahead().params) == _bits(plain, end.params)


def test_it_is_on_for_some_steps_after_a_skipped_one(training):
    """Steps 1 and 3 are skipped: 2 to 6 are anticipated, by parameters of 2 and later."""
    training, good = training
    lookahead, state, on = Lookahead(RULE, training), good, []
    for number in range(8):
        params = jax.tree.map(lambda x: x, good.params)
        weight = params["norm"]["weight"]
        weight.set_value(weight.get_value() * np.float32(1e4 if number in (1, 3) else 1))
        state = dataclasses.replace(state, params=params)
        batch, state = lookahead.batch(state, number, DATA, ROWS)
        ahead = len(state.routing.ahead)
        state, metrics = training.step(state, batch)
        assert bool(metrics.skipped) == (number in (1, 3))
        on.append((metrics.anticipated, ahead))
    assert on == [(False, 0)] * 2 + [(True, 3)] * 5 + [(False, 0)]


def test_what_waits_is_saved_and_goes_on_to_the_same_bits(training, tmp_path):
    training, state = training
    expected = _steps(training, _on(state), range(6))
    _, half = _steps(training, _on(state), range(3))
    saver = Saver(tmp_path)
    saver.save(3, half)
    saver.wait()

    shapes = freed(half)
    (found, number) = saver.restore(shapes)
    assert number == 3 and len(found.routing.ahead) == 2
    rest, last = _steps(training, jax.tree.map(np.array, found), range(3, 6))
    assert _bits(rest, last) == _bits(expected[0][3:], expected[1])

    with pytest.raises(CheckpointError, match=r"routing\.left differ"):
        saver.restore(dataclasses.replace(shapes, routing=None))
    saver.close()


def test_a_trainer_that_goes_back_takes_the_same_steps(training, monkeypatch, tmp_path):
    """To its best state, which frees arrays of the batches that were read early."""
    step, state = training
    losses = iter([1.0] * 4 + [2.0] * 4)
    monkeypatch.setattr(TrainStep, "loss", lambda *_: next(losses))
    monkeypatch.setattr(trainer_module, "TrainStep", lambda *_, **__: step)
    trainer = Trainer(random_model(CFG), adamw(3e-2), anticipate=RULE)
    trainer._state = _on(state)
    options = dict(batch_size=ROWS, log_every=1)
    saved = dict(output=tmp_path, evaluation=DATA, eval_every=2)
    first = list(trainer.run(DATA, 4, **options, **saved))

    trainer.take_best(tmp_path)

    assert trainer.steps == 2 and len(trainer.state.routing.ahead) == 2
    trainer._state = jax.tree.map(np.array, trainer.state)  # as compiled for
    again = list(trainer.run(DATA, 4, **options))
    assert [record["loss"] for record in again] == [record["loss"] for record in first[2:]]
    assert all(record["anticipated"] == 1 for record in (*first, *again))


def test_experts_that_were_chosen_for_other_data_are_dropped(training):
    training, state = training
    _, state = _steps(training, _on(state), range(2))
    other = TokenStream(DATA.tokens[::-1], LENGTH)
    batch, after = Lookahead(RULE, training).batch(state, 2, other, ROWS)
    expected = _chosen(training, state, other.batch(2, ROWS)[:, :LENGTH])
    _assert_same(batch.choices.experts, expected)
    assert len(after.routing.ahead) == 3


def test_documents_of_a_row_choose_as_they_do_alone():
    """In a hash-routed layer, and in two that are stacked behind it."""
    training = TrainStep(random_model(HASHED), adamw(1e-3))
    state = training.init()
    tokens = np.random.default_rng(1).integers(2, 256, (ROWS, 2 * LENGTH)).astype(np.int32)
    starts = np.broadcast_to(np.arange(2 * LENGTH) // LENGTH * LENGTH, tokens.shape)
    documents = Documents(np.ones(tokens.shape, bool), starts.astype(np.int32))
    found = training.experts(state, Batch(tokens, tokens, tokens, documents=documents))
    halves = [_chosen(training, state, half) for half in np.split(tokens, 2, axis=1)]
    _assert_same(found, np.concatenate(halves, axis=1))
    (table,) = (x for path, x in nnx.to_flat_state(state.fixed) if path[-1] == "table")
    np.testing.assert_array_equal(found[:, :, 0], table.get_value()[tokens])


def test_two_devices_take_the_steps_of_one(training, tmp_path):
    """In micro-batches. Each device has the experts of its tokens, also when they were saved."""
    single, state = training
    expected, _ = _steps(single, _on(state), range(3))
    rule = Anticipation(when="always", delay=2)
    mesh = make_mesh(fsdp=2)
    with jax.set_mesh(mesh):
        options = dict(bias_speed=SPEED, micro_batches=2, anticipate=rule, remat="none")
        cut = TrainStep(random_model(CFG), adamw(3e-2), **options)
        found, state = _steps(cut, cut.init(), range(3), rule)
        for (*_, metrics), (*_, alone) in zip(found, expected, strict=True):
            assert_close(metrics.loss, alone.loss, FLOAT32)
        for (_, batch, _), (_, alone, _) in zip(found, expected, strict=True):
            _assert_same(batch.choices.experts, alone.choices.experts)
        saver = Saver(tmp_path)
        saver.save(3, state)
        saver.wait()
        held = [np.asarray(ahead.experts) for ahead in state.routing.ahead]
        state, _ = saver.restore(freed(state), tokens=jax.NamedSharding(mesh, TRAIN.tokens))
        saver.close()
        assert len(held) == 2
        for ahead, experts in zip(state.routing.ahead, held, strict=True):
            np.testing.assert_array_equal(ahead.experts, experts)
            assert ahead.experts.addressable_shards[0].data.shape == (ROWS // 2, LENGTH, 2, 2)
        batch, _ = Lookahead(rule, cut).batch(state, 3, DATA, ROWS)
        assert batch.choices.experts is state.routing.ahead[0].experts


def test_odd_options_are_named():
    for options, named in (
        ({"when": "on"}, r"when='on': expected 'auto' or 'always'"),
        ({"delay": -1}, r"delay=-1: expected 0 or more"),
        ({"steps": 0}, r"steps=0: expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=named):
            Anticipation(**options)
    always = Anticipation(when="always")
    hashed = dataclasses.replace(CFG, layers=HASHED.layers[:1])
    for rule, cfg, loss, skip, named in (
        (Anticipation(), CFG, None, math.inf, r"skip_above=inf skips none .*Spikes"),
        (always, CFG, IndexerWarmup(), math.inf, "warm-up: expected None"),
        (always, hashed, None, math.inf, "tiny has hash-routed layers alone"),
    ):
        with pytest.raises(ValueError, match=named):
            rule.check(cfg, loss, skip)
    Anticipation().check(CFG, None, Spikes())
    Anticipation().check(CFG, None, 5.0)


def test_options_of_the_command(monkeypatch, capsys):
    def parsed(*words: str):
        given = ["finetune", "--model", "nano", "--tokens", "t.npy", "--output", "o", *words]
        monkeypatch.setattr(sys, "argv", given)
        return parse_args(make_parser(None))

    monkeypatch.setattr(finetune, "Trainer", lambda model, optimizer, **options: options)
    for words, expected in (
        ((), None),
        (
            ("--anticipate-routing", "always", "--routing-delay", "0"),
            Anticipation(when="always", delay=0),
        ),
        (
            ("--anticipate-routing", "auto", "--skip-spikes", "6", "--routing-steps", "9"),
            Anticipation(steps=9),
        ),
    ):
        assert finetune.make_trainer(parsed(*words), None)["anticipate"] == expected
    for words, named in (
        (("--anticipate-routing", "auto"), "expected --skip-spikes or --skip-above"),
        (("--anticipate-routing", "always", "--loss", "indexer"), "another --loss than indexer"),
        (("--routing-delay", "-1"), "--routing-delay: '-1': expected a whole number"),
        (("--routing-steps", "0"), "--routing-steps: '0': expected a whole number from 1 on"),
    ):
        with pytest.raises(SystemExit):
            parsed(*words)
        assert named in " ".join(capsys.readouterr().err.split())
