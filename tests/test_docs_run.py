"""The commands of README, guides and programs, run one after the other as a reader would.

DIR, SOURCE and `nano` are a released-format model with one layer of random numbers, and files that a reader
brings are small ones. `SMALLER` is added to a command where it would run for hours. Not run, only
parsed (`test_docs.py`): what needs several hosts, an object store, a TPU, or its compiler for minutes.
"""

import dataclasses
import io
import json
import pathlib
import runpy
import shutil
import sys

import numpy as np
import pytest

import v4jax
from tests.conftest import NANO, ROOT
from tests.models import random_model
from tests.test_docs import PAGES, PATTERNS, PROGRAMS, _commands
from v4jax.cli import main
from v4jax.nn.quantization import to_released
from v4jax.train import adamw

GUIDES = [page for page in PAGES if page.parent.name != "measurements"]
TRAINING = "--steps 1 --seq-len 128 --batch-size 2 --warmup 0"
SMALLER = {
    "finetune": TRAINING,
    "generate": "--max-new-tokens 2",
    "batch": "--max-new-tokens 2 --batch-size 2 --dtype bfloat16",
    "chat": "--max-new-tokens 2",
    "serve": "--port 0 --slots 2 --host 127.0.0.1",
    "verify": "--quick --lengths 200,300",
}
STANDS_FOR = {
    "v4jax/assets/nano": "nano",
    "v4jax/assets/nano/tokenizer.json": "nano/tokenizer.json",
    "DIR": "nano",
    "DIR/tokenizer.json": "nano/tokenizer.json",
    "SOURCE": "nano",
    "FOLDER": "adapter",
    "runs/a/adapter": "adapter",
    "emma=runs/a/adapter": "emma=adapter",
    "box=runs/b/adapter": "box=adapter",
    "layers.20-42": "layers.0",
    "/mnt/shared/requests.jsonl": "requests.jsonl",
}
NEEDS_MORE = (
    "--distributed",
    "--coordinator",
    "gs://",
    "benchmarks.autotune",
)  # hosts, a store, a TPU


def _runs(words: tuple[str, ...]) -> bool:
    line = " ".join(words)
    if words[0] == "sh" or any(line.startswith(pattern) for pattern in PATTERNS if "X" in pattern):
        return False
    if words[:2] == ("v4jax", "plan"):
        return "serve" in words
    return words[1] != "COMMAND" and not any(part in line for part in NEEDS_MORE)


def _to_run(path: pathlib.Path) -> list[tuple[str, ...]]:
    commands = [command.words for command in _commands(path) if not command.is_partial]
    return [words for words in commands if _runs(words)]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> pathlib.Path:
    """What a reader has: a model, an adapter of it, and files."""
    folder = tmp_path_factory.mktemp("reader")
    csa = v4jax.tiny().layers[1]
    csa = dataclasses.replace(csa, hash_routed=False)
    cfg = dataclasses.replace(
        v4jax.tiny(), vocab_size=1280, layers=(csa,), mtp_layers=(), sinkhorn_iters=2
    )
    v4jax.save(to_released(random_model(cfg)), folder / "nano")
    shutil.copy(NANO / "tokenizer.json", folder / "nano")
    model = v4jax.load(folder / "nano", v4jax.released("bfloat16"))
    trainer = v4jax.Trainer(model, adamw(1e-4), trainable=v4jax.LoRA(rank=2))
    trainer.save(folder / "adapter")
    ids = np.random.default_rng(0).integers(3, 1000, 4000).astype(np.int32)
    (folder / "runs" / "nano" / "data").mkdir(parents=True)
    np.save(folder / "T.npy", ids)
    np.save(folder / "runs" / "nano" / "data" / "tokens.npy", ids)
    np.save(folder / "tokens.npy", ids[:300])
    text = "Emma Woodhouse, handsome, clever, and rich, had lived nearly twenty-one years in the world. "
    data = folder / "scripts" / "data" / "austen"
    data.mkdir(parents=True)
    (data / "heldout.txt").write_text(text * 5, encoding="utf-8")
    user, answer = {"role": "user", "content": "Who is Emma?"}, {"role": "assistant"}
    said = [{"messages": [user, {**answer, "content": word}]} for word in ("She.", "A girl.") * 4]
    pairs = [{"messages": [user], "chosen": "Miss Woodhouse.", "rejected": "Him."}] * 4
    vectors = [{"prompt": "Emma", "tokens": [5, 6, 7]}]
    requests = [{"messages": [user]}, {"prompt": "Mr. Darcy", "temperature": 0}]
    lines = {"chat": said, "held": said, "pairs": pairs, "vectors": vectors, "requests": requests}
    for name, values in lines.items():
        content = "".join(json.dumps(value) + "\n" for value in values)
        (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 3}}}
    (folder / "person.json").write_text(json.dumps(schema), encoding="utf-8")
    config = (
        'checkpoint = "nano"\ndata = "chat.jsonl"\noutput = "runs/config"\ntrainable = "lora"\n'
    )
    (folder / "run.toml").write_text(config + 'dtype = "bfloat16"\n', encoding="utf-8")
    (folder / "docs").mkdir()
    return folder


@pytest.fixture
def place(small, tmp_path, monkeypatch) -> pathlib.Path:
    """A folder of a page's own, where its commands run."""
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    monkeypatch.setattr("v4jax.inference.server.serve", lambda app, sock, grace: sock.close())
    return tmp_path


def _type(words: tuple[str, ...], number: int, monkeypatch) -> None:
    """Runs a command with what stands for a reader's own; a new folder is another for each."""
    new = {"NEW": f"new{number}", "TARGET": f"new{number}"}
    words = tuple({**STANDS_FOR, **new}.get(word, word) for word in words)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who is Emma?\n"))
    if words[0] == "python":
        monkeypatch.setattr(sys, "argv", [words[2], *words[3:]])
        runpy.run_module(words[2], run_name="__main__")
        return
    _, command, *options = words
    if command == "finetune" and "--model" in options:  # nano's own size takes minutes to compile
        options[options.index("--model") : options.index("--model") + 2] = ["--checkpoint", "nano"]
    for option in SMALLER.get(command, "").split():
        options.append(option)
    try:
        main([command, *options])
    except SystemExit as end:
        # Random numbers are no model that gets better with more text, which verify finds out.
        if end.code and command != "verify":
            raise


PAGES_WITH_COMMANDS = [path for path in (*GUIDES, *PROGRAMS) if _to_run(path)]


@pytest.mark.parametrize("path", PAGES_WITH_COMMANDS, ids=lambda path: path.name)
def test_commands_of_a_page_run(path, place, monkeypatch, capsys):
    for number, words in enumerate(_to_run(path)):
        try:
            _type(words, number, monkeypatch)
        except BaseException as error:
            out, err = capsys.readouterr()
            raise AssertionError(
                f"{' '.join(words)}: {error!r}\n{out[-1000:]}\n{err[-2000:]}"
            ) from error


def test_most_commands_run():
    run = {words[1] for path in PAGES_WITH_COMMANDS for words in _to_run(path)}

    assert run >= {"generate", "chat", "score", "batch", "serve", "verify", "finetune", "convert"}
    assert run >= {"data", "plan"}
    assert ROOT / "README.md" in PAGES_WITH_COMMANDS
