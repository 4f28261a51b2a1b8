"""The loop of a run: what it tells, when it skips, stops and saves, and what it writes. No step is computed
but in the last tests: `_Script` says what each does."""

import dataclasses
import json
import math
import pathlib
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event as BoardEvent

from pallas_kernels import chips
from tests.conftest import NANO, ROOT
from tests.models import random_model
from tests.v4jax.test_trainer import SMALL
from v4jax.checkpoint import CheckpointError
from v4jax.text.tokenizer import Tokenizer
from v4jax.train import TokenStream, Trainer, adamw, events
from v4jax.train.losses import Metrics
from v4jax.train.progress import show
from v4jax.train.samples import Prompts
from v4jax.train.speed import Speed
from v4jax.train.step import TrainStep
from v4jax.train.stopping import StopOnSignal

# Orbax leaves tasks of a read or write that failed to a loop that has ended, and Python says so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
DATA = TokenStream(np.arange(5000) % 251 + 2, 30)


@pytest.fixture
def interruptible():
    """Ctrl-C does what it does in a terminal: what a script runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def make(monkeypatch):
    """Makes trainers whose steps are skipped where their numbers say so, and whose losses are listed."""
    model = random_model(SMALL)

    def call(
        skipped: Sequence[int] = (),
        losses: Sequence[float] = (),
        at=lambda step: None,
        ahead: Sequence[int] = (),
    ):
        left = iter(losses)

        def step(self, state, tokens, before):
            number = before + 1
            at(number)
            is_skipped = number in skipped
            loss = math.nan if is_skipped else float(number)
            terms = [jnp.float32(loss)] * 5
            counts = ((jnp.array([[3, 1], [2, 2]]),),)
            norm, flag = jnp.float32(2 * loss), jnp.asarray(is_skipped)
            done = Metrics(*terms, counts, grad_norm=norm, skipped=flag)
            return state, dataclasses.replace(done, anticipated=number in ahead if ahead else None)

        monkeypatch.setattr(TrainStep, "step", step)
        monkeypatch.setattr(TrainStep, "loss", lambda *_: next(left))
        trainer = Trainer(jax.tree.map(jnp.copy, model), adamw(1e-3))
        return trainer

    return call


def _told(found, kind) -> list:
    return [event for event in found if isinstance(event, kind)]


def _lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_tells_steps_evaluations_and_saves(make, tmp_path):
    trainer = make(losses=[3.0] * 4 + [1.0] * 4 + [2.0] * 4)
    options = dict(batch_size=2, output=tmp_path, evaluation=DATA, eval_every=3, save_every=4)

    found = list(trainer.events(DATA, 7, log_every=2, **options))

    steps = _told(found, events.StepDone)
    assert [event.step for event in steps] == [2, 3, 4, 6, 7]
    assert [event.heldout_ce for event in steps] == [None, 3.0, None, 1.0, 2.0]
    assert steps[0].expert_load == 1.5 and steps[0].tokens_per_second > 0 and steps[0].memory > 1e6
    measured = [(e.step, e.heldout_ce, e.is_best) for e in _told(found, events.Evaluated)]
    assert measured == [(3, 3.0, True), (6, 1.0, True), (7, 2.0, False)]
    saved = [(event.step, event.is_best) for event in _told(found, events.Saved)]
    assert saved == [(3, True), (4, False), (6, True), (7, False)]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["6", "7"]
    lines = _lines(tmp_path)
    assert lines == [event.line for event in steps]
    assert lines[1] == {
        "step": 3,
        "loss": 3.0,
        "ce": 3.0,
        "mtp_ce": 3.0,
        "indexer": 3.0,
        "balance": 3.0,
        "z": 0.0,
        "grad_norm": 6.0,
        "expert_load": 1.5,
        "heldout_ce": 3.0,
    }

    again = make(losses=[0.5] * 4)
    found = list(again.events(DATA, 8, **options))
    assert found[0] == events.Resumed(step=7, folder=tmp_path / "state", damaged={})
    assert _told(found, events.Evaluated)[0].is_best
    assert again.take_best(tmp_path) == 0.5 and again.steps == 8
    assert make().take_best(tmp_path) == 0.5
    with pytest.raises(CheckpointError, match="no state with a held-out loss"):
        make().take_best(tmp_path / "other")


def test_a_best_of_an_earlier_process_counts(make, tmp_path):
    options = dict(batch_size=2, output=tmp_path, evaluation=DATA, eval_every=2)
    list(make(losses=[1.0] * 4).events(DATA, 2, **options))
    trainer = make(losses=[2.0] * 8)
    assert not any(e.is_best for e in _told(trainer.events(DATA, 6, **options), events.Evaluated))
    assert trainer.steps == 6 and trainer.take_best(tmp_path) == 1.0 and trainer.steps == 2


def test_skipped_steps_are_said_and_a_row_of_them_ends_the_run(make, tmp_path):
    found = []
    trainer = make(skipped=(2, 3, 5, 6, 7))
    with pytest.raises(ValueError, match=r"steps 5 to 7 were all skipped: .* loss is nan .*lower"):
        found.extend(trainer.events(DATA, 9, output=tmp_path, save_every=3, max_skipped=3))
    said = [(event.step, event.in_a_row) for event in _told(found, events.Skipped)]
    assert said == [(2, 1), (3, 2), (5, 1), (6, 2), (7, 3)]
    assert all(math.isnan(event.loss) for event in _told(found, events.Skipped))
    # A skipped step leaves a good state, which is saved.
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["3", "6"]


def test_anticipated_steps_are_said(make, tmp_path, capsys):
    trainer = make(skipped=(2, 4), ahead=(3, 4, 5))
    events_ = show(trainer.events(DATA, 6, output=tmp_path, log_every=1), 0, 6, StopOnSignal())
    found = list(events_)
    said = [(event.step, event.is_on) for event in _told(found, events.Anticipating)]
    assert said == [(3, True), (6, False)]
    assert [line["anticipated"] for line in _lines(tmp_path)] == [0, 0, 1, 1, 1, 0]
    assert [event.anticipated for event in _told(found, events.Skipped)] == [False, True]
    captured = capsys.readouterr()
    assert "step 3: experts are chosen by parameters of steps before" in captured.out
    assert "step 6: experts are chosen by its own parameters" in captured.out
    assert "ahead=on" in captured.err


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(make, tmp_path):
    trainer = make()
    options = dict(batch_size=2, output=tmp_path, log_every=2)
    found = list(trainer.events(DATA, 9, stop=lambda: trainer.steps == 5, **options))
    assert found[-2:] == [
        events.Saved(step=5, folder=tmp_path / "state" / "5", is_best=False),
        events.Stopped(step=5, folder=tmp_path / "state"),
    ]
    assert [record["step"] for record in make().run(DATA, 9, **options)] == [6, 8, 9]
    assert [line["step"] for line in _lines(tmp_path)] == [2, 4, 6, 8, 9]


@pytest.mark.parametrize(
    "number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_signals_end_a_run_with_a_save(make, tmp_path, number, error, capfd):
    before = signal.getsignal(number)

    def at(step):
        if step == 3:
            signal.raise_signal(number)

    with pytest.raises(error) as raised:
        make(at=at).fit(DATA, 9, output=tmp_path)
    assert signal.getsignal(number) is before
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["3"]
    assert error is KeyboardInterrupt or raised.value.code == 143
    out, err = capfd.readouterr()
    assert f"{number.name}: the run ends after this step" in err
    assert f"stopped by {number.name} after step 3: its state is in {tmp_path / 'state'}" in out


def test_a_second_signal_ends_at_once(make, interruptible, tmp_path):
    def at(step):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make(at=at).fit(DATA, 9, output=tmp_path, progress=False)
    assert not list((tmp_path / "state").iterdir())


def test_a_damaged_newest_state_is_said_and_computed_again(make, tmp_path, capsys):
    make().fit(DATA, 4, output=tmp_path, save_every=2, progress=False)
    for path in (tmp_path / "state" / "4").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")

    make().fit(DATA, 4, output=tmp_path, save_every=2)

    out = capsys.readouterr().out
    assert f"{tmp_path / 'state' / '4'} is damaged and left aside: " in out
    assert f"going on from step 2 of {tmp_path / 'state'}" in out
    names = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert names == ["2", "4", "4.damaged"]


def _board(folder: pathlib.Path) -> dict[str, dict[int, float]]:
    """tag -> step -> value, as TensorBoard reads the files: what a later file purges is left out."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.iterdir()):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (size,) = struct.unpack("<Q", data[position : position + 8])
            event = BoardEvent.FromString(data[position + 12 : position + 12 + size])
            position += 16 + size
            if event.session_log.status == 1:  # START: of a run that goes on
                for values in found.values():
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_tensorboard_has_every_step_once_after_a_kill(make, tmp_path):
    def at(step):
        if step == 6:
            raise KeyboardInterrupt

    options = dict(output=tmp_path, save_every=3, log_every=1, tensorboard=True, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        list(make(at=at).events(DATA, 7, **options))
    time.sleep(1.1)  # names of the files are times in seconds
    list(make(losses=[4.0] * 4).events(DATA, 7, evaluation=DATA, **options))

    found = _board(tmp_path / "tensorboard")
    assert list(found["loss/ce"].items()) == [(step, float(step)) for step in range(1, 8)]
    assert found["step/expert_load"][7] == 1.5 and found["loss/heldout_ce"] == {7: 4.0}
    assert found["speed/tokens_per_second"][5] > 0 and "speed/flop_utilisation" not in found
    with pytest.raises(ValueError, match="tensorboard=True: expected output="):
        list(make().events(DATA, 7, tensorboard=True))


def test_tensorboard_without_its_package_is_said(make, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"pip install 'v4jax\[tensorboard\]'"):
        list(make().events(DATA, 7, output=tmp_path, tensorboard=True))


def test_a_share_of_the_peak(monkeypatch):
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(chips.CHIPS, "x", dataclasses.replace(chips.V5E, kinds=(kind,), flops=1e6))
    times = iter([100.0, 102.0, 102.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    speed = Speed(step_tokens=50, step_flops=3e5, devices=4)
    for _ in range(8):
        speed.step()
    assert speed.tokens_per_second == 8 * 50 / 2
    assert speed.flop_utilisation == pytest.approx(8 * 3e5 / 2 / 4e6)


def test_a_rate_of_zero_changes_nothing():
    """A hundred steps from a checkpoint, as the command makes them: not a bit, of what trains or stays."""
    trainer = Trainer(random_model(SMALL), adamw(0.0))
    before = [np.array(x) for x in jax.tree.leaves((trainer.state.params, trainer.state.fixed))]
    for number in range(100):
        trainer.step(trainer.batch(DATA, number, 1))
    after = jax.tree.leaves((trainer.state.params, trainer.state.fixed))
    assert trainer.steps == 100 and len(before) > 20
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_samples_are_what_the_model_finds_likeliest():
    """Of two prompts of different length, against the model's logits for the whole text."""
    cfg = dataclasses.replace(SMALL, vocab_size=1280)
    tokenizer = Tokenizer(NANO)
    trainer = Trainer(random_model(cfg), adamw(1e-3))
    texts = ["Emma was", "Mr. Knightley said that"]

    found = trainer.continued(Prompts(texts, tokenizer, max_new_tokens=4))

    assert [text for text, _ in found] == texts
    for text, continuation in found:
        prompt = [
            tokenizer.id("<\uff5cbegin\u2581of\u2581sentence\uff5c>"),
            *tokenizer.encode(text),
        ]
        ids = list(prompt)
        for _ in range(4):
            padded = np.zeros((1, 40), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(np.argmax(trainer.model(padded)[0, len(ids) - 1])))
        assert continuation == tokenizer.decode(ids[len(prompt) :])


def test_prompts_are_rendered_and_checked():
    tokenizer = Tokenizer(NANO)
    asked, begun = (
        Prompts(["Who?"], tokenizer, mode=mode)._ids[0] for mode in ("non-think", "raw")
    )
    assert tokenizer.decode(asked, keep_special=True).endswith(
        "Who?<\uff5cAssistant\uff5c></think>"
    )
    assert tokenizer.decode(begun) == "Who?"
    with pytest.raises(ValueError, match="mode"):
        Prompts(["Who?"], tokenizer, mode="deep")
    with pytest.raises(ValueError, match="at least one text"):
        Prompts([], tokenizer)


def _start(folder: pathlib.Path, steps: int) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    words = [sys.executable, "-m", "tests.v4jax.killed_run", str(folder), str(steps)]
    return subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def _bits(folder: pathlib.Path) -> list[list[str]]:
    path = folder / "bits"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_a_run_that_is_killed_anywhere_computes_the_same_bits(tmp_path):
    """Two kills, at a random moment after a random step. Spikes are skipped, and routing is anticipated."""
    steps, broken, whole = 48, tmp_path / "broken", tmp_path / "whole"
    rng = np.random.default_rng()
    for _ in range(2):
        last = len(_bits(broken)) + rng.integers(1, 15)
        process = _start(broken, steps)
        while len(_bits(broken)) < last and process.poll() is None:
            time.sleep(0.003)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    for folder in (broken, whole):
        process = _start(folder, steps)
        _, err = process.communicate()
        assert process.returncode == 0, err

    wanted = dict(_bits(whole))
    assert len(wanted) == steps
    assert all(bits == wanted[step] for step, bits in _bits(broken))
    assert (broken / "digest").read_text() == (whole / "digest").read_text()
    assert [line["step"] for line in _lines(broken)] == list(range(1, steps + 1))
    assert _lines(broken) == _lines(whole)
    assert {line["anticipated"] for line in _lines(whole)} == {0, 1}
