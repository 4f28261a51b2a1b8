"""Options from a TOML file: what wins, what is refused, and that a written file gives the same again."""

import pathlib
import sys
import tomllib

import pytest

import v4jax
from v4jax.cli.finetune_options import make_parser, parse_args
from v4jax.cli.settings import write_config


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """The options that a file's text and words of a command line give."""

    def call(text: str, *words: object):
        path = tmp_path / "run.toml"
        path.write_text(text)
        monkeypatch.setattr(sys, "argv", ["finetune", "--config", str(path), *map(str, words)])
        return parse_args(make_parser(None))

    return call


FILE = """
checkpoint = "nano"
data = "chat.jsonl"
output = "runs/a"
trainable = "lora"
lora-targets = ["attention.wq_b", "attention.wkv"]
lr = 1e-4
seq_len = 64
qat = true
mesh = "fsdp=4,expert=2"
"""


def test_a_file_has_options_and_flags_win(parse):
    args = parse(FILE, "--lr", 3e-4, "--output", "runs/b")
    assert args.lr == 3e-4 and args.output == pathlib.Path("runs/b")
    assert args.data == pathlib.Path("chat.jsonl") and args.seq_len == 64 and args.qat is True
    assert args.lora_targets == ["attention.wq_b", "attention.wkv"]
    assert args.mesh == {"fsdp": 4, "expert": 2} and args.save == "adapter"
    assert args.batch_size == 8  # the default
    sys.argv[1:3] = [f"--conf={sys.argv[2]}"]  # argparse takes beginnings
    assert parse_args(make_parser(None)).seq_len == 64


def test_a_flag_takes_the_place_of_what_it_excludes(parse):
    args = parse(FILE, "--tokens", "t.npy", "--model", "nano")
    assert args.data is None and args.tokens == pathlib.Path("t.npy")
    assert args.checkpoint is None and args.model == "nano" and args.mtp_weight == 0.3


@pytest.mark.parametrize(
    "text, message",
    [
        (FILE + "learning-rate = 1", r"unknown learning-rate\. Accepted: .*batch-size, .*lr, "),
        (FILE + "[optimizer]\nlr = 1", r"optimizer is \{'lr': 1\}: expected a text or a number"),
        (FILE + "[adam]\nlr = 1", r"unknown adam\. Accepted"),
        (FILE + "seq-len = 64", r"twice, once with - and once with _"),
        (FILE + "steps = true", r"steps is True: expected no boolean"),
        (FILE + "no-packing = 1", r"no-packing is 1: expected true or false"),
        (FILE + "steps = [1, 2]", r"steps is a list: expected one value"),
        ("checkpoint: nano\n", r"run\.toml is not TOML: .*Expected lines as"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_values_are_checked_as_those_of_flags_are(parse, capsys):
    for line, said in (
        ("steps = 0", "argument --steps: '0': expected a whole number from 1 on"),
        ('save = "x"', "argument --save: invalid choice: 'x'"),
    ):
        with pytest.raises(SystemExit):
            parse(FILE + line)
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(FILE.replace("output", "#"))
    assert "required: --output" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        sys.argv[2] = "nowhere.toml"
        parse_args(make_parser(None))


def test_what_is_written_gives_the_same_settings(parse, tmp_path):
    odd = 'a "quoted" \\ text, \u00fc\U0001f600\x7f'
    words = ("--sample", odd, "--sample=-x", "--eval-data", "h.jsonl", "--skip-above", "inf")
    args = parse(FILE, *words)
    path = tmp_path / "config.toml"
    write_config(path, make_parser(None), args)

    again = parse(path.read_text())

    assert again.sample == [odd, "-x"] and again.skip_above == float("inf")
    assert {**vars(again), "config": None} == {**vars(args), "config": None}
    made_by = tomllib.loads(path.read_text())["made_by"]
    assert made_by["v4jax"] == v4jax.__version__ and {"jax", "flax", "optax"} <= set(made_by)
    assert made_by["command"].endswith("--skip-above inf")
    assert [name.name for name in tmp_path.iterdir() if name.suffix == ".new"] == []


def test_other_settings_take_the_place_of_written_ones(parse, tmp_path):
    path = tmp_path / "config.toml"
    write_config(path, make_parser(None), parse(FILE))
    args = parse(path.read_text(), "--steps", 7)
    assert args.steps == 7 and args.qat and args.mesh == {"fsdp": 4, "expert": 2}
