"""The command that trains: what it refuses, and what it leaves behind. Steps are not computed."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import NANO
from v4jax import checkpoint
from v4jax.checkpoint import Checkpoint
from v4jax.cli import finetune, run_folder
from v4jax.config import flash, tiny
from v4jax.nn.numerics import plain
from v4jax.nn.quantization import is_indexer
from v4jax.text.tokenizer import Tokenizer
from v4jax.train.data import PreferencePairs
from v4jax.train.data.pairs import PairBatch
from v4jax.train.indexer_warmup import IndexerWarmup
from v4jax.train.losses import Metrics
from v4jax.train.preferences import log_probs
from v4jax.train.step import TrainStep
from v4jax.train.trainer import Trainer


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command on one layer; `run.step` is what a step does, `run.folder` has the files."""
    small = dataclasses.replace(tiny(), layers=tiny().layers[:1], mtp_layers=())
    monkeypatch.setitem(finetune.VARIANTS, "tiny", lambda: small)
    np.save(tmp_path / "t.npy", np.arange(5000, dtype=np.uint16) % 256)

    def call(*options: object, **changed: object):
        given = {"tokens": tmp_path / "t.npy", "output": tmp_path / "o", "steps": 2, **changed}
        given = {"model": "tiny", "batch-size": 2, "seq-len": 64, "save": "float", **given}
        words = [str(w) for name, value in given.items() if value for w in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["finetune", *words, *map(str, options)])
        monkeypatch.setattr(TrainStep, "step", step)
        finetune.main()

    def step(self, state, tokens, number):
        del number
        call.batches.append(tokens)
        return call.step(state)

    call.batches = []
    call.step = lambda state: (state, Metrics(*[jnp.float32(1)] * 5, ()))
    call.folder = tmp_path
    return call


@pytest.mark.parametrize(
    "option",
    [
        *(("--lr", "nan"), ("--lr", "-1"), ("--lr", "inf"), ("--steps", "-3"), ("--steps", "0")),
        *(("--warmup", "-5"), ("--log-every", "0"), ("--save-every", "0"), ("--eval-every", "0")),
        *(("--seq-len", "-1"), ("--batch-size", "0"), ("--seed", "-1")),
    ],
    ids=" ".join,
)
def test_odd_numbers_are_refused_before_anything_is_written(run, option, capsys):
    with pytest.raises(SystemExit):
        run(*option)

    assert f"argument {option[0]}" in capsys.readouterr().err
    assert not (run.folder / "o").exists()


@pytest.mark.parametrize(
    "tokens, named",
    [
        (np.arange(5000, dtype=np.uint16) + 200, "token 256 .number 56."),
        (np.where(np.arange(5000) == 4321, 300, 5), "token 300 .number 4321."),
        (np.full(5000, -7), "token -7 .number 0."),
        (np.full(5000, 2**40 + 5), "token 1099511627781 .number 0."),
    ],
    ids=["too large", "one", "negative", "beyond 32 bits"],
)
def test_ids_outside_the_vocabulary_are_refused(run, tokens, named):
    np.save(run.folder / "t.npy", tokens)

    with pytest.raises(ValueError, match=rf"{named} is outside the vocabulary: .* 0\.\.255"):
        run()
    assert not (run.folder / "o").exists()


def test_held_out_ids_outside_the_vocabulary_are_refused(run):
    np.save(run.folder / "held.npy", np.full(100, 256))

    with pytest.raises(ValueError, match=r"token 256 .number 0. is outside the vocabulary"):
        run("--eval-tokens", run.folder / "held.npy")
    assert not (run.folder / "o").exists()


def test_all_settings_are_written_and_can_be_given_again(run, monkeypatch):
    run("--lr", 0.5, "--sample-tokens", 7)
    path = run.folder / "o" / "config.toml"
    written = path.read_text()
    assert "lr = 0.5\n" in written and "sample-tokens = 7\n" in written

    monkeypatch.setattr(sys, "argv", ["finetune", "--config", str(path)])
    finetune.main()  # the same run, which is done
    monkeypatch.setattr(sys, "argv", ["finetune", "--config", str(path), "--lr", "0.25"])
    with pytest.raises(ValueError, match="other settings: lr"):
        finetune.main()
    assert path.read_text().split("[made_by]")[0] == written.split("[made_by]")[0]


def test_a_run_from_before_an_option_existed_goes_on(run):
    run()
    path = run.folder / "o" / "run.json"
    settings = json.loads(path.read_text())
    assert settings.pop("optimizer") == "adamw" and settings.pop("skip_above") == np.inf
    path.write_text(json.dumps(settings))
    run()
    with pytest.raises(ValueError, match="other settings: skip_above"):
        run("--skip-above", 5)


def test_the_best_state_is_written_where_it_is_asked_for(run, monkeypatch):
    """A model whose parameters are the number of the step; the held-out loss is lowest after the second."""
    losses = iter([3.0] * 4 + [1.0] * 4 + [2.0] * 4)
    monkeypatch.setattr(TrainStep, "loss", lambda *_: next(losses))

    def step(state):
        run.count += 1
        params = jax.tree.map(lambda x: jnp.full_like(x, run.count), state.params)
        metrics = Metrics(*[jnp.float32(1)] * 5, ())
        return dataclasses.replace(state, params=params), metrics

    run.step, run.count = step, 0
    run("--eval-tokens", run.folder / "t.npy", "--eval-every", 1, "--export", "best", steps=3)

    model = Checkpoint(run.folder / "o" / "model")
    assert (model.tensors["norm.weight"].view() == 2).all()


def test_options_that_need_others_are_refused(run, capsys):
    for options, message in (
        (("--export", "best"), "--export best: expected --eval-data or --eval-tokens"),
        (("--loss", "dpo"), "--loss dpo: expected --data of pairs, and --checkpoint"),
        (("--no-packing",), "--no-packing: expected --data beside it"),
        (("--mode", "think-high"), "--mode: expected --data beside it"),
        (("--init-adapter", "a"), "--init-adapter: expected --trainable lora beside it"),
        (
            ("--init-adapter", "a", "--trainable", "lora", "--lora-rank", "4"),
            "--lora-rank: expected none beside --init-adapter",
        ),
        (("--b2", "2"), "argument --b2: '2': expected a share from 0 to below 1"),
        (("--lr", "fast"), "argument --lr: 'fast': expected a number from 0 on"),
        (("--steps", "-2"), "argument --steps: '-2': expected a whole number from 1 on"),
        (("--sample", "x"), "--sample: expected --eval-data or --eval-tokens"),
        (
            ("--loss", "indexer", "--trainable", "lora"),
            "--loss indexer: expected --trainable indexer",
        ),
        (
            ("--train", "embed", "--trainable", "all"),
            "--train: expected no --trainable beside names",
        ),
        (
            ("--lora-dropout", "1"),
            "argument --lora-dropout: '1': expected a share from 0 to below 1",
        ),
        (("--skip-above", "0"), "argument --skip-above: '0': expected a number above 0"),
        (("--spike-steps", "1"), "argument --spike-steps: '1': expected a whole number from 2 on"),
    ):
        with pytest.raises(SystemExit):
            run(*options)
        assert message in capsys.readouterr().err


def test_a_text_is_no_token_file(run):
    (run.folder / "t.jsonl").write_text('{"text": "x"}\n')

    with pytest.raises(ValueError, match=r"t\.jsonl is not a \.npy file: .* token ids"):
        run(tokens=run.folder / "t.jsonl")


def test_a_state_is_not_continued_with_other_settings(run):
    run()
    np.save(run.folder / "u.npy", np.arange(5000, dtype=np.uint16)[::-1] % 256)
    others = {"seed": 5, "tokens": run.folder / "u.npy", "seq-len": 32, "batch-size": 4, "lr": 1}
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"other settings: {name.replace('-', '_')}"):
            run(**{name: value})
    for steps, why in ((3, "rates of --schedule cosine depend"), (1, "depend")):
        with pytest.raises(ValueError, match=rf"a run of 2 steps, and --steps is {steps}: .*{why}"):
            run(steps=steps)
    run()  # the same settings


def test_a_run_of_constant_rate_can_be_made_longer(run):
    run(schedule="constant")
    shutil.rmtree(run.folder / "o" / "model")
    count = len(run.batches)
    run(schedule="constant", steps=5)
    assert len(run.batches) == count + 3
    assert (run.folder / "o" / "model" / "config.json").exists()
    with pytest.raises(ValueError, match=r"a run of 5 steps, and --steps is 2: .* not shorter"):
        run(schedule="constant")


def test_settings_of_a_run_that_saved_nothing_make_room(run):
    """The corrected command takes the place of one that failed."""
    with pytest.raises(ValueError, match=r"LoRA target 'nope'"):
        run("--trainable", "lora", "--lora-targets", "nope", save=None)
    path = run.folder / "o" / "run.json"
    assert json.loads(path.read_text())["trainable"] == "lora"
    run()
    assert json.loads(path.read_text())["trainable"] == "all"
    with pytest.raises(ValueError, match="other settings: lr"):
        run(lr=1)


def test_a_folder_has_one_run_at_a_time(run):
    with run_folder.locked(run.folder / "o"):
        with pytest.raises(
            ValueError, match=r"--output .*o: another process trains in this folder"
        ):
            run()
        assert not (run.folder / "o" / "run.json").exists()
    run()
    (run.folder / "file").touch()
    with pytest.raises(ValueError, match=r"--output .*file: .*expected a folder"):
        run(output=run.folder / "file")


def test_what_layers_keep_is_said_by_name_and_may_change_in_a_run(run, monkeypatch, capsys):
    taken = []

    def recorded(*args, **options):
        taken.append(options["remat"])
        return Trainer(*args, **options)

    monkeypatch.setattr(finetune, "Trainer", recorded)
    run()
    run("--remat", "outputs")

    assert taken == ["layers", "outputs"]
    with pytest.raises(SystemExit):
        run("--remat", "all")
    assert "argument --remat: invalid choice: 'all'" in capsys.readouterr().err


def test_the_source_is_never_deleted(run):
    source = run.folder / "o" / "model"
    shutil.copytree(NANO, source)
    before = sorted(path.name for path in source.iterdir())

    with pytest.raises(ValueError, match="exists, and this run did not write it"):
        run(checkpoint=source, model=None)

    assert sorted(path.name for path in source.iterdir()) == before


def test_a_state_that_is_not_finite_is_not_saved(run):
    def step(state):
        run.count += 1
        if run.count < 3:
            return state, Metrics(*[jnp.float32(1)] * 5, ())
        spoiled = jax.tree.map(
            lambda a: a * np.nan if jnp.issubdtype(a.dtype, jnp.floating) else a, state
        )
        return spoiled, Metrics(*[jnp.float32(run.loss)] * 5, ())

    run.step = step
    for loss in (np.nan, 1.0):  # a step's loss is that of the parameters before it
        run.count, run.loss = 0, loss
        with pytest.raises(ValueError, match=r"step 3: .* Nothing was saved; the last good state"):
            run("--save-every", 1, output=run.folder / f"o{loss}", steps=4)
        states = sorted(path.name for path in (run.folder / f"o{loss}" / "state").iterdir())
        assert states == ["1", "2"]
        assert not (run.folder / f"o{loss}" / "model").exists()


def test_metrics_have_every_step_once_after_a_kill(run):
    def step(state):
        run.count += 1
        if run.count == 8:
            raise Killed
        return state, Metrics(*[jnp.float32(1)] * 5, ())

    run.step, run.count = step, 0
    options = ("--save-every", 5, "--log-every", 1)
    with pytest.raises(Killed):
        run(*options, steps=10)
    with open(run.folder / "o" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    run(*options, steps=10)

    lines = (run.folder / "o" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))


def test_held_out_loss_is_measured_when_it_is_asked_for(run, monkeypatch):
    monkeypatch.setattr(TrainStep, "loss", lambda *_: 2.0)

    run("--eval-tokens", run.folder / "t.npy", "--eval-every", 3, "--log-every", 5, steps=7)

    lines = map(json.loads, (run.folder / "o" / "metrics.jsonl").read_text().splitlines())
    assert {line["step"]: "heldout_ce" in line for line in lines} == {
        3: True,
        5: False,
        6: True,
        7: True,
    }


def test_the_export_has_the_tokenizer_of_what_it_started_from(run):
    np.save(run.folder / "t.npy", np.arange(5000) % 1280)

    run(checkpoint=NANO, model=None, steps=1, save="released")

    assert Checkpoint(run.folder / "o" / "model").config.name == "nano"
    assert Tokenizer(run.folder / "o" / "model").encode("Emma") == Tokenizer(NANO).encode("Emma")


def test_a_lora_run_leaves_an_adapter_with_the_tokenizer(run, capsys):
    np.save(run.folder / "t.npy", np.arange(5000) % 1280)

    options = ("--lora-rank", 4, "--lora-rslora", "--lora-dropout", 0.25)
    run("--trainable", "lora", *options, checkpoint=NANO, model=None, steps=1, save=None)

    adapter = run.folder / "o" / "adapter"
    names = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
    assert names <= {path.name for path in adapter.iterdir()}
    config = json.loads((adapter / "adapter_config.json").read_text())
    expected = {"r": 4, "lora_alpha": 8, "use_rslora": True, "lora_dropout": 0.25}
    assert {name: config[name] for name in expected} == expected
    assert checkpoint.Adapter(adapter).lora.dropout == 0.25
    assert not (run.folder / "o" / "model").exists()
    with pytest.raises(SystemExit):
        run("--save", "adapter", output=run.folder / "p", save=None)
    assert "expected --trainable lora" in capsys.readouterr().err


def test_parameters_are_trained_and_left_by_name(run, monkeypatch):
    """A step makes what trains 7. Equal layers are one array, unless names tell them apart."""
    window = tiny().layers[0]
    cfg = dataclasses.replace(tiny(), layers=(window, window), mtp_layers=())
    monkeypatch.setitem(finetune.VARIANTS, "tiny", lambda: cfg)

    def step(state):
        params = jax.tree.map(lambda x: jnp.full_like(x, 7), state.params)
        return dataclasses.replace(state, params=params), Metrics(*[jnp.float32(1)] * 5, ())

    run.step = step
    with pytest.raises(ValueError, match=r"'layers\.1\.attn' matches no parameter"):
        run("--train", "layers.1.attn")
    assert not (run.folder / "o").exists()
    run("--train", "layers.1.attention", "embed", "--freeze", "*.wq_a", "*.sink", steps=1)

    model = Checkpoint(run.folder / "o" / "model")
    sevens = {name for name, tensor in model.tensors.items() if (tensor.view() == 7).all()}
    assert {name for name in sevens if not name.startswith("layers.1.attn.")} == {"embed.weight"}
    attention = {name for name in model.tensors if name.startswith("layers.1.attn.")}
    left = {"layers.1.attn.wq_a.weight", "layers.1.attn.attn_sink"}
    assert attention - sevens == left and left < attention


def test_a_warm_up_trains_indexers(run, monkeypatch):
    found = []
    monkeypatch.setattr(finetune, "Trainer", lambda *_, **options: found.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--loss", "indexer")
    assert isinstance(found[0]["loss"], IndexerWarmup) and found[0]["trainable"] is is_indexer


def test_values_of_fine_tuning_are_those_of_fine_tuning(run, monkeypatch):
    found = []
    monkeypatch.setattr(finetune, "make_trainer", lambda args, model: found.append(args) or 1 / 0)
    np.save(run.folder / "t.npy", np.arange(5000) % 256)
    for given in ({"output": run.folder / "a"}, {"checkpoint": NANO, "model": None}):
        with pytest.raises(ZeroDivisionError):
            run(**given)
    scratch, tuning = found
    assert (scratch.bias_speed, scratch.mtp_weight) == (1e-3, 0.3)
    assert (tuning.bias_speed, tuning.mtp_weight) == (0.0, 0.1)


def test_a_run_that_no_memory_here_holds_is_refused(run, monkeypatch):
    monkeypatch.setitem(finetune.VARIANTS, "flash", flash)

    with pytest.raises(ValueError, match=r"training flash needs at least 4,\d+\.\d GiB .*lora"):
        run(model="flash")
    assert not (run.folder / "o").exists()


@pytest.fixture
def talk(run, monkeypatch):
    """`run` over a file of conversations, with nano's tokenizer."""
    small = dataclasses.replace(tiny(), layers=tiny().layers[:1], mtp_layers=(), vocab_size=1280)
    monkeypatch.setitem(finetune.VARIANTS, "tiny", lambda: small)
    path = run.folder / "d.jsonl"
    lines = [{"prompt": f"Who is {n}?", "completion": "Emma. " * n} for n in range(1, 22)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def call(*options: object, **changed: object):
        given = {"tokens": None, "data": path, "tokenizer": NANO / "tokenizer.json", **changed}
        run(*options, **given)

    call.run, call.path = run, path
    return call


def test_a_run_over_data_goes_on_with_the_rows_that_it_would_have_read(talk):
    def step(state):
        if len(talk.run.batches) == stop:
            raise Killed
        return state, Metrics(*[jnp.float32(1)] * 5, ())

    talk.run.step, stop = step, None
    talk("--save-every", 2, steps=7, output=talk.run.folder / "whole")
    whole = list(talk.run.batches)
    talk.run.batches.clear()
    stop = 6
    with pytest.raises(Killed):
        talk("--save-every", 2, steps=7)
    talk.run.batches.clear()
    stop = None
    talk("--save-every", 2, steps=7)

    assert len(whole) == 7 and len(talk.run.batches) == 3
    for new, old in zip(*map(jax.tree.leaves, (talk.run.batches, whole[4:])), strict=True):
        np.testing.assert_array_equal(new, old)
    (model,) = (talk.run.folder / "o" / "model").glob("tokenizer.json")
    assert Tokenizer(model).encode("Emma") == Tokenizer(NANO).encode("Emma")


def test_preference_pairs_are_measured_by_the_checkpoint_before_the_first_step(talk):
    lines = [
        {"prompt": f"Who is {n}?", "chosen": "Emma.", "rejected": "No " * n} for n in range(1, 4)
    ]
    talk.path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    given = {"checkpoint": NANO, "model": None, "tokenizer": None, "save": None}
    talk("--loss", "dpo", "--eval-data", talk.path, "--trainable", "lora", **given)

    pairs = PreferencePairs(talk.path, Tokenizer(NANO), 64)
    model = checkpoint.load(NANO, plain("float32"), use="train")
    expected = log_probs(model, pairs, batch_size=2)
    found = np.concatenate([PairBatch(*batch).reference for batch in talk.run.batches])
    assert len(found) == 8 and set(found) == set(expected.reshape(-1))
    assert (talk.run.folder / "o" / "adapter").exists()
    with pytest.raises(ValueError, match="other settings: dpo_beta"):
        talk("--loss", "dpo", "--dpo-beta", 0.5, "--trainable", "lora", **given)


def test_settings_of_data_belong_to_the_run(talk):
    talk()
    for options, name in (
        (("--no-packing",), "no_packing"),
        (("--too-long", "refuse"), "too_long"),
    ):
        with pytest.raises(ValueError, match=f"other settings: {name}"):
            talk(*options)
    with pytest.raises(ValueError, match="other settings: mode"):
        talk("--mode", "think-high")
    lines = talk.path.read_text()
    talk.path.write_text(lines.replace("Emma", "Anne"))
    with pytest.raises(ValueError, match="other settings: data"):
        talk()
    talk.path.write_text(lines)
    talk()


def test_held_out_data_is_weighed_by_its_tokens(talk, monkeypatch):
    """Four batches of one row each, whose losses are their numbers."""
    losses = iter(range(1, 5))
    monkeypatch.setattr(TrainStep, "loss", lambda self, state, batch: next(losses))
    talk("--eval-data", talk.path, "--batch-size", 1, steps=1)

    record = json.loads((talk.run.folder / "o" / "metrics.jsonl").read_text())
    rows = finetune.Examples(talk.path, Tokenizer(NANO), 64, align=1)
    counts = [rows.row(i)[1][0].sum() for i in range(4)]
    assert len(set(counts)) > 1
    expected = np.dot(counts, (1, 2, 3, 4)) / np.sum(counts)
    assert record["heldout_ce"] == pytest.approx(expected, abs=1e-5)


def test_data_needs_a_tokenizer(talk, capsys):
    with pytest.raises(SystemExit):
        talk(tokenizer=None)
    assert "--data: expected --tokenizer FILE beside --model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        talk("--tokens", talk.run.folder / "t.npy")
    assert "not allowed with argument" in capsys.readouterr().err
    talk.path.write_text('{"messages": 1}\n')
    with pytest.raises(ValueError, match="line 1: messages is 1"):
        talk()
    assert not (talk.run.folder / "o").exists()
