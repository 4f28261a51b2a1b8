"""What the commands feed to a model, and what they make of odd input; the model itself is a script."""

import io
import json
import shutil
import sys

import pytest

import v4jax
from tests.conftest import NANO
from tests.scripts.test_scripts import start
from v4jax.cli import batch, chat, generate, score
from v4jax.cli.errors import one_message
from v4jax.inference.batch import JobError
from v4jax.text.format import BOS, EFFORT_PROMPTS, EOS, THINK_START, USER
from v4jax.text.prompt import encode_messages
from v4jax.text.release import PROFILE_KEY
from v4jax.text.tokenizer import Tokenizer


@pytest.fixture
def model(monkeypatch):
    """Stands for the engine: says `says` and ends with EOS; `asked` has the prompts, as text."""
    tokenizer = Tokenizer(NANO)

    class Scripted:
        cfg = v4jax.nano()
        says, asked, error = "Yes.", [], None

        def stream(self, prompts, *_, **__):
            if self.error:
                raise self.error
            self.asked.append(tokenizer.decode(prompts[0], keep_special=True))
            for token in tokenizer.encode(self.says):
                yield [token]

    scripted = Scripted()
    scripted.asked = []
    for module in (chat, generate):
        monkeypatch.setattr(module, "load_for_serving", lambda *_, **__: None)
        monkeypatch.setattr(module, "Engine", lambda *_, **__: scripted)
    return scripted


def run(monkeypatch, module, *options: object, stdin: bytes = b"") -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--checkpoint", *map(str, options)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
    with one_message():
        module.main()


@pytest.fixture
def later(tmp_path):
    """A folder of the 0731 release."""
    shutil.copyfile(NANO / "tokenizer.json", tmp_path / "tokenizer.json")
    config = json.loads((NANO / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, PROFILE_KEY: "official"}))
    return tmp_path


@pytest.mark.parametrize("mode, effort", [("think-high", "high"), ("think-max", "max")])
def test_a_0731_folder_gets_the_texts_of_its_release(mode, effort, later, model, monkeypatch):
    run(monkeypatch, generate, later, "--prompt", "q", "--mode", mode)
    run(monkeypatch, chat, later, "--mode", mode, stdin=b"q\n")

    expected = f"{BOS}{EFFORT_PROMPTS['0731'][effort]}{USER}q"
    assert [prompt.startswith(expected) for prompt in model.asked] == [True, True]


def test_a_mode_of_another_release_is_refused(later, model, monkeypatch, capsys):
    run(monkeypatch, generate, later, "--prompt", "q", "--mode", "think-low")
    assert model.asked.pop().endswith(THINK_START)

    for options in ((generate, NANO, "--prompt", "q"), (chat, NANO)):
        with pytest.raises(SystemExit) as end:
            run(monkeypatch, *options, "--mode", "think-low")
        assert end.value.code == 2
        assert "release 'april' has non-think, think-high, think-max" in capsys.readouterr().err
    assert not model.asked


def test_raw_text_begins_once(model, monkeypatch):
    rendered = encode_messages([{"role": "user", "content": "hi"}], "chat")
    for text in (rendered, "hi"):
        run(monkeypatch, generate, NANO, "--prompt", text, "--mode", "raw")

    assert model.asked == [rendered, BOS + "hi"]


@pytest.mark.parametrize("says", ["so 1 + 1 <", "def f():\n", "a\n\n", "<｜DSML｜"], ids=repr)
@pytest.mark.parametrize("end", [EOS, ""], ids=["ended", "cut"])
def test_a_reply_is_kept_to_its_last_character(says, end, model, monkeypatch):
    """As the next prompt shows."""
    model.says = says + end
    run(monkeypatch, chat, NANO, stdin=b"one\ntwo\n")

    assert f"</think>{says}{EOS}{USER}two" in model.asked[1]


def test_a_reply_that_was_cut_is_said_to_be(model, monkeypatch, capsys):
    model.says = "I think that"
    run(monkeypatch, chat, NANO, "--max-new-tokens", 7, "--mode", "think-high", stdin=b"one\n")

    out, err = capsys.readouterr()
    assert "[I think that" in out
    assert "the reasoning was cut after 7 tokens: see --max-new-tokens" in err


def test_a_bad_line_ends_no_conversation(model, monkeypatch, capsys):
    """Bytes that are not UTF-8, a second beginning, a mode that is none."""
    lines = [b"caf\xe9", f"{BOS}x".encode(), b"/mode shout", b"one", b""]
    run(monkeypatch, chat, NANO, "--mode", "think-high", stdin=b"\n".join(lines))

    assert model.asked == [f"{BOS}{USER}one<｜Assistant｜>{THINK_START}"]
    err = capsys.readouterr().err
    assert "has no UTF-8 form: expected text in UTF-8" in err
    assert "stands there once" in err
    assert "mode='shout': release 'april' has" in err


def test_a_prompt_that_the_model_refuses_ends_no_conversation(model, monkeypatch, capsys):
    model.error = ValueError("too long")
    run(monkeypatch, chat, NANO, stdin=b"one\n/quit\n")
    assert "error: too long" in capsys.readouterr().err


def test_an_interrupt_ends_a_reply_and_then_the_conversation(model, monkeypatch, capsys):
    model.error = KeyboardInterrupt()
    answers = iter(["one"])

    def answer(_):
        for line in answers:
            return line
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", answer)
    run(monkeypatch, chat, NANO)
    assert "the reply was interrupted" in capsys.readouterr().err


def test_odd_bytes_and_an_lfs_pointer_end_a_command_with_one_message(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")

    for folder, prompt in ((tmp_path, "hi"), (NANO, "caf\udce9")):
        process = start("generate", "--checkpoint", folder, "--prompt", prompt)
        _, err = process.communicate(timeout=600)
        assert process.returncode == 2
        assert err.startswith("error: ") and err.count("\n") == 1, err


def test_a_batch_job_renders_for_the_release(later, monkeypatch):
    seen = {}

    def job(*_, **options):
        seen.update(options)
        raise JobError("enough is known")

    monkeypatch.setattr(batch, "Job", job)
    with pytest.raises(SystemExit, match="enough is known"):
        run(monkeypatch, batch, later, "--input", later / "in", "--output", later / "out")
    assert seen["release"] == "0731"


@pytest.mark.parametrize("text", ["Emma", f"{BOS}Emma", "\ufeffEmma"], ids=repr)
def test_a_scored_text_begins_once(text, tmp_path, monkeypatch, capsys):
    """A byte-order mark is not part of it, and is not counted among its bytes."""
    seen = []

    class Scorer:
        def __init__(self, *_, **__):
            pass

        def perplexity(self, tokens, **_):
            seen.append(tokens)
            return 2.0, 4

    monkeypatch.setattr(score, "load_for_serving", lambda *_, **__: None)
    monkeypatch.setattr(score, "Scorer", Scorer)
    (tmp_path / "text").write_text(text, encoding="utf-8")

    run(monkeypatch, score, NANO, "--text", tmp_path / "text")

    assert seen == [Tokenizer(NANO).encode(BOS + "Emma")]
    if BOS not in text:
        assert "1.0000 bits per byte" in capsys.readouterr().out
