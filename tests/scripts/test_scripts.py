"""The scripts as a user runs them: in a process of their own, on the bundled model or two of its layers."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import GOLDEN, NANO, ROOT, environment
from tests.models import small_nano
from v4jax import checkpoint

PROMPT = "Elizabeth was surprised to see him, but"


def start(script: str, *args: object, new_session: bool = False, **options) -> subprocess.Popen:
    """A script that has begun; `options` are those of `environment`."""
    return subprocess.Popen(
        [sys.executable, "-m", f"scripts.{script}", *map(str, args)],
        cwd=ROOT,
        env=environment(**options),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=new_session,
    )


def run(script: str, *args: object, stdin: str = "", **options) -> tuple[str, str]:
    process = start(script, *args, **options)
    out, err = process.communicate(stdin, timeout=600)
    assert process.returncode == 0, err
    return out, err


def test_generate_continues_a_prompt_reproducibly():
    args = ("--checkpoint", small_nano(), "--mode", "raw", "--prompt", PROMPT)
    args += ("--max-new-tokens", 40)

    out, err = run("generate", *args, "--seed", 3)

    assert len(out.split()) > 8
    assert re.search(r"\d+ generated.* [\d.]+ tokens/s", err)
    assert run("generate", *args, "--seed", 3)[0] == out
    assert run("generate", *args, "--seed", 4)[0] != out


def test_generate_over_a_mesh_writes_the_same():
    """On several devices, by a mesh that is given and by the one that is chosen; it says which."""
    args = ("--checkpoint", small_nano(), "--mode", "raw", "--prompt", PROMPT)
    args += ("--max-new-tokens", 12, "--temperature", 0, "--dtype", "float32")

    chosen, said = run("generate", *args, devices=2)
    given, said_given = run("generate", *args, "--mesh", "expert=2", devices=2)

    assert given == chosen
    assert re.search(
        r"^devices +2 x cpu\nmesh +one device\n +2 x cpu: weights 0.0 \+", said, re.MULTILINE
    )
    assert re.search(
        r"^mesh +expert=2\n +as given\nweights +0.0\d GB in ", said_given, re.MULTILINE
    )


@pytest.mark.parametrize("mode", ["non-think", "think-high", "think-max"])
def test_generate_in_each_mode(mode):
    args = ("--checkpoint", small_nano(), "--mode", mode, "--prompt", "She was very happy.")

    out, _ = run("generate", *args, "--max-new-tokens", 30, "--temperature", 0)

    assert len(out.strip()) > 20


def test_chat_answers_every_message():
    stdin = "How is Mr. Knightley?\n/mode think-high\nWho is Emma?\n/mode shout\n/quit\n"

    out, err = run("chat", "--checkpoint", NANO, "--max-new-tokens", 30, stdin=stdin)

    first, second = (part.strip() for part in out.split("> ") if part.strip())
    assert len(first) > 20
    assert second.startswith("[")
    assert "mode='shout': release 'april' has non-think" in err


@pytest.mark.parametrize("decode", [(), ("--decode-from", 150)], ids=["whole", "decoded"])
def test_score_writes_the_logits_of_transformers(decode, hf_small, tmp_path):
    np.save(tmp_path / "tokens.npy", hf_small["tokens"].astype(np.int32))

    run(
        *("score", "--checkpoint", GOLDEN / "hf_small", "--tokens", tmp_path / "tokens.npy"),
        *("--out", tmp_path / "out.npz", "--dtype", "float32", "--numerics", "plain", *decode),
    )

    logits, expected = np.load(tmp_path / "out.npz")["logits"], hf_small["logits"]
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() <= 2e-4
    assert np.array_equal(logits.argmax(-1), expected.argmax(-1))


def test_score_prints_the_perplexity_of_the_documents():
    text = ROOT / "scripts" / "data" / "austen" / "heldout.txt"

    args = ("--checkpoint", NANO, "--text", text)
    out, _ = run("score", *args, jax_disable_most_optimizations=False)  # it computes for long

    documented = (ROOT / "docs" / "nano.md").read_text(encoding="utf-8")
    (expected,) = re.findall(r"FP4 \+ FP8, `released`[^|]*\| ([\d.]+)", documented)
    assert abs(float(re.search(r"perplexity ([\d.]+)", out).group(1)) - float(expected)) < 0.02


def test_prepare_nano_makes_the_tokenizer_of_the_bundled_model(tmp_path):
    out, _ = run("prepare_nano", "--output", tmp_path)

    assert json.loads(out)["vocab_size"] == 1280
    assert np.load(tmp_path / "tokens.npy").size == json.loads(out)["tokens"]
    assert 30_000 < np.load(tmp_path / "heldout.npy").size < 60_000
    ours, bundled = ((d / "tokenizer.json").read_bytes() for d in (tmp_path, NANO))
    assert ours == bundled


def test_finetune_goes_on_where_it_was_killed(tmp_path):
    tokens = np.random.default_rng(0).integers(3, 256, 4000).astype(np.uint16)
    np.save(tmp_path / "tokens.npy", tokens)
    args = (
        *("--checkpoint", small_nano(), "--tokens", tmp_path / "tokens.npy"),
        *("--steps", 6, "--seq-len", 150),
        *("--batch-size", 2, "--save-every", 2, "--log-every", 1, "--lr", 1e-3, "--warmup", 1),
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("finetune", *args, "--output", whole)

    process = start("finetune", *args, "--output", broken, new_session=True)
    deadline = time.monotonic() + 500
    while not (broken / "state" / "2").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    out, _ = run("finetune", *args, "--output", broken)

    assert "going on from step" in out
    run("plot_metrics", broken / "metrics.jsonl", tmp_path / "curve.svg")
    assert "</svg>" in (tmp_path / "curve.svg").read_text(encoding="utf-8")
    files = [d / "model" / "model.safetensors" for d in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert checkpoint.load(broken / "model").cfg == checkpoint.load(small_nano()).cfg


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--checkpoint", "nowhere", "--prompt", "x"], "error: nowhere does not exist"),
        (["generate", "--checkpoint", NANO, "--prompt", "x", "--temperature", "-1"], "error: temp"),
        (["score", "--checkpoint", NANO, "--tokens", "README.md", "--out", "x.npz"], "not a .npy"),
        (["score", "--checkpoint", NANO, "--text", "README.md", "--decode-from", "3"], "go with"),
        (["score", "--checkpoint", NANO, "--tokens", "t.npy", "--out", "no/x.npz"], "no folder"),
        (
            ["finetune", "--model", "tiny", "--tokens", "t", "--output", "o", "--mesh", "x=2"],
            "axis",
        ),
    ],
)
def test_bad_input_ends_with_one_message(arguments, message):
    process = start(*arguments)
    _, err = process.communicate(timeout=120)

    assert process.returncode == 2
    assert message in err
    assert "Traceback" not in err


def test_finetune_with_the_rounding_in_the_loop(tmp_path):
    """From a released-format checkpoint; what comes out is one again, and other weights."""
    tokens = np.random.default_rng(0).integers(3, 1280, 1000).astype(np.uint16)
    np.save(tmp_path / "tokens.npy", tokens)

    run(
        *("finetune", "--checkpoint", small_nano(), "--qat", "--tokens", tmp_path / "tokens.npy"),
        *("--steps", 2, "--seq-len", 70, "--batch-size", 1, "--lr", 1e-3, "--warmup", 1),
        *("--output", tmp_path / "run"),
    )

    before, after = (
        checkpoint.load(d).stages[1].blocks[0] for d in (small_nano(), tmp_path / "run/model")
    )
    old, new = before.moe.w1.kernel[...], after.moe.w1.kernel[...]
    assert new.is_fp4 and new.shape == old.shape
    assert 0 < np.mean(np.asarray(old.values) != np.asarray(new.values)) < 0.5
    assert not np.array_equal(old.dequantize(), new.dequantize())
