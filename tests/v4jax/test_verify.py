"""`v4jax verify`: nano passes every check, and what is wrong with a model is found by the check for it.

One `Checks` runs all of them, so that its programs are compiled once.
"""

import dataclasses
import json
import math
import re
import sys

import numpy as np
import pytest

import v4jax
from tests.conftest import GOLDEN, NANO, ROOT
from v4jax.cli import main
from v4jax.inference import verify as verifying
from v4jax.inference import verify_text
from v4jax.inference.findings import FAIL, PASS, SKIPPED, Finding, run_check
from v4jax.inference.verify import Checks, Options, needed_room, prompt_length
from v4jax.inference.verify_text import Vector, check_prompts, check_tokenizer, read_vectors
from v4jax.text import prompt as prompts
from v4jax.text.tokenizer import Tokenizer

LENGTHS = (640, 768)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(NANO)


@pytest.fixture(scope="module")
def checks(tokenizer) -> Checks:
    """Its contexts for perplexity are fed in the chunks that the other checks feed."""
    return Checks(v4jax.load(NANO), tokenizer, Options(lengths=LENGTHS), None)


@pytest.fixture
def vector(checks) -> Vector:
    """What the model does with a prompt."""
    prompt = checks.tokens[:60]
    greedy = v4jax.Sampling(temperature=0, max_new_tokens=6)
    (completion,) = checks.engine.generate([prompt], greedy, stop_ids=[])
    return Vector(1, prompt, list(completion.tokens))


def test_nano_passes(checks, monkeypatch, tmp_path, capsys):
    """By the command, whose checks are ours."""
    monkeypatch.setattr(verifying, "Checks", lambda *_: checks)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    lengths = ",".join(map(str, LENGTHS))
    options = ("--lengths", lengths, "--dtype", "float32", "--numerics", "plain")

    main(["verify", "--checkpoint", "nano", *options, "--json", str(tmp_path / "verify.json")])

    report = json.loads((tmp_path / "verify.json").read_text(encoding="utf-8"))
    assert (report["model"], report["numerics"], report["passed"]) == ("nano", "plain", True)
    names = ["tokenizer", "prompts", "prefill", "decode", "batch"]
    rows = {row["check"]: row for row in report["checks"]}
    assert list(rows) == [*names, *(f"perplexity {n}" for n in LENGTHS)]
    assert [row["result"] for row in rows.values()] == [PASS] * len(rows), rows
    assert rows["prefill"]["difference"] < 1e-5 and rows["decode"]["difference"] < 1e-5
    assert rows["batch"]["equal"] == 3
    assert 10 < rows["perplexity 768"]["perplexity"] < 25
    assert capsys.readouterr().out.endswith("\n7 passed\n")


def test_the_prompt_makes_every_kind_of_layer_choose(checks):
    cfg = checks.cfg
    assert checks.length % 2 and checks.length > max(cfg.window, 4 * cfg.indexer.topk)
    assert (checks.length + 3) % 128 == 0  # decoded tokens complete an entry
    for config in (v4jax.flash(), v4jax.pro()):
        assert prompt_length(config) % 2 and prompt_length(config) > 4 * config.indexer.topk
    assert prompt_length(v4jax.flash(), 300) == 253
    assert prompt_length(dataclasses.replace(cfg, max_length=64)) == 55


def test_a_cache_has_room_for_what_is_checked(checks):
    cfg = checks.cfg
    assert needed_room(cfg, Options()) == (4096, 8)
    assert needed_room(cfg, Options(lengths=(131_072, 10**9))) == (16_384, 8)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lengths": (512,)}, "lengths=512: expected numbers of tokens above 512"),
        ({"lengths": ()}, "expected numbers of tokens above 512"),
        ({"length": 100}, "length=100: expected at least 256 tokens"),
    ],
)
def test_odd_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


class _Broken:
    """A tokenizer with something else in place of what one of its methods gives."""

    def __init__(self, tokenizer, **methods):
        self._tokenizer, self._methods = tokenizer, methods

    def __getattr__(self, name):
        return self._methods.get(name) or getattr(self._tokenizer, name)


def _encode_otherwise(tokenizer, text, ids):
    return lambda given: ids if given == text else tokenizer.encode(given)


@pytest.mark.parametrize(
    "text, ids, message",
    [
        ("<think>", [5, 6], "<think> is 2 ids, not one"),
        ("<think>", [5], "<think> is id 5, which is not its own"),
        ("<｜begin▁of▁sentence｜>", [1], "is id .1., and the config has 0"),
        (verify_text.TEXTS["code"], [40, 41], "code does not come back from its ids"),
    ],
)
def test_a_wrong_id_is_found(checks, tokenizer, text, ids, message):
    broken = _Broken(tokenizer, encode=_encode_otherwise(tokenizer, text, ids))

    finding = check_tokenizer(broken, checks.cfg)

    assert finding.result == FAIL
    assert re.search(message, finding.reason)


def test_a_vocabulary_that_is_larger_than_the_models_is_found(checks, tokenizer):
    finding = check_tokenizer(tokenizer, dataclasses.replace(checks.cfg, vocab_size=1000))
    assert finding.result == FAIL
    assert "1280 ids, more than vocab_size=1000" in finding.reason


def test_prompts_are_those_of_the_released_module():
    cases = json.loads((GOLDEN / "encoding_cases.json").read_text(encoding="utf-8"))
    golden = {case["name"]: case for case in cases}
    for name, case in verify_text.PROMPT_CASES.items():
        assert case.expected == golden[name]["expected"]
        assert len(case.messages) == len(golden[name]["messages"])
        assert (case.tools or []) == golden[name].get("tools", [])


def test_a_prompt_that_is_rendered_otherwise_is_found(tokenizer, monkeypatch):
    monkeypatch.setattr(prompts, "USER", "<|User|>")

    finding = check_prompts(tokenizer)

    assert finding.result == FAIL
    assert "chat_multi_turn: '|User|>Hi<｜Assistant｜></think>' at character 36" in finding.reason
    assert re.search(r"; and \d+ more$", finding.reason)


def test_a_special_token_that_is_cut_up_is_found(tokenizer):
    pieces = tokenizer.encode("<thi") + tokenizer.encode("nk>")
    think = tokenizer.id("<think>")

    def encode(text):
        ids = [([i] if i != think else pieces) for i in tokenizer.encode(text)]
        return [i for piece in ids for i in piece]

    finding = check_prompts(_Broken(tokenizer, encode=encode))

    assert finding.result == FAIL
    assert "<think> does not occur as one id" in finding.reason


def test_a_changed_logit_of_prefill_is_found(checks, monkeypatch):
    feed = checks.feeder.feed

    def other(*args, **options):
        cache, logits = feed(*args, **options)
        return cache, logits.at[0, 17].add(0.1)

    monkeypatch.setattr(checks.feeder, "feed", other)
    finding = run_check("prefill", checks.prefill).finding

    assert finding.result == FAIL
    assert "expected at most 0.002" in finding.reason
    assert finding.values["difference"] > 2e-3


@pytest.mark.parametrize("amount", [0.1, 100.0, math.nan])
def test_a_changed_logit_of_the_decoding_step_is_found(checks, monkeypatch, amount):
    feed = checks.feeder.feed

    def other(prompts, cache, *, chunk):
        cache, logits = feed(prompts, cache, chunk=chunk)
        return cache, logits.at[0, 17].add(amount) if chunk == 1 else logits

    monkeypatch.setattr(checks.feeder, "feed", other)
    finding = checks.decode()

    assert finding.result == FAIL
    assert "expected at most 0.002" in finding.reason
    assert ("17 is likeliest decoded" in finding.reason) == (amount != 0.1)


def test_a_step_that_forgets_is_found(checks, monkeypatch):
    """A cache that is one token short: the layers look at the wrong rows."""
    feed = checks.feeder.feed

    def other(prompts, cache, *, chunk):
        if chunk == 1:
            cache = dataclasses.replace(cache, lengths=cache.lengths - 1)
        return feed(prompts, cache, chunk=chunk)

    monkeypatch.setattr(checks.feeder, "feed", other)

    assert checks.decode().result == FAIL


def test_a_row_that_depends_on_the_batch_is_found(checks, monkeypatch):
    generate = checks.engine.generate

    def other(prompts, *args, **options):
        completions = generate(prompts, *args, **options)
        if len(prompts) == 1:
            return completions
        changed = (*completions[1].tokens[:4], *[9] * 12)
        return [completions[0], dataclasses.replace(completions[1], tokens=changed), completions[2]]

    monkeypatch.setattr(checks.engine, "generate", other)
    finding = checks.batch()

    assert finding.result == FAIL
    assert finding.figure == "2 of 3 requests equal"
    assert "prompt of 7 tokens: token 4 is " in finding.reason


def test_perplexity_that_rises_is_found(checks, monkeypatch):
    losses = {128: np.full(512, 3.0), 256: np.full(512, 3.4)}
    monkeypatch.setattr(checks, "_losses", lambda before, *_: losses[len(before)])
    monkeypatch.setattr(checks, "_perplexities", {})

    assert checks.perplexity(640).result == PASS
    finding = checks.perplexity(768)

    assert finding.result == FAIL
    assert "more than 40% above the 20.086 at 640 tokens" in finding.reason


def test_perplexity_near_that_of_a_guess_is_found(checks, monkeypatch):
    """Of a model whose weights make no sense, which agrees with itself all the same."""
    for loss in (5.0, math.nan):
        monkeypatch.setattr(checks, "_losses", lambda *_, loss=loss: np.full(512, loss))
        monkeypatch.setattr(checks, "_perplexities", {})
        finding = checks.perplexity(640)

        assert finding.result == FAIL
        assert "expected at most 35.8, half the bits of a guess" in finding.reason


def test_what_the_text_or_the_model_is_too_short_for_is_skipped(checks):
    assert checks.perplexity(200_000) == Finding(SKIPPED, reason="max_length=131072")
    reason = f"the text has {len(checks.text)} tokens"
    assert checks.perplexity(100_000) == Finding(SKIPPED, reason=reason)


def test_the_text_is_long_enough_for_32768_tokens_of_the_released_vocabulary():
    """Which has some 4.4 bytes of English a token."""
    text = verifying.TEXT.read_text(encoding="utf-8")
    assert 4.8 * 32_768 < len(text.encode()) <= 200_000
    heldout = (ROOT / "scripts" / "data" / "austen" / "heldout.txt").read_text(encoding="utf-8")
    assert text[-8000:].strip() in heldout


def test_vectors_agree_or_say_where_they_do_not(checks, vector, monkeypatch):
    wrong = dataclasses.replace(vector, line=4, tokens=[*vector.tokens[:3], 9, *vector.tokens[4:]])
    monkeypatch.setattr(checks, "options", dataclasses.replace(checks.options, vectors=[vector]))

    assert checks.vector(vector).result == PASS
    assert checks.all_vectors().figure == "min 100.0%, mean 100.0%"
    finding = checks.vector(wrong)
    assert finding.result == FAIL
    assert finding.figure == "3 of 6 tokens"
    assert f"token 3 is {vector.tokens[3]}, expected 9; it leads by " in finding.reason

    options = dataclasses.replace(checks.options, vectors=[vector, wrong])
    monkeypatch.setattr(checks, "options", options)
    finding = checks.all_vectors()
    assert (finding.result, finding.reason) == (FAIL, "1 of 2 completions differ")
    assert finding.figure == "min 50.0%, mean 75.0%"


def test_vectors_are_read(checks, tokenizer, tmp_path):
    path = tmp_path / "vectors.jsonl"
    path.write_text(
        '\ufeff{"prompt": "Emma was", "tokens": [5, 6]}\n\n'
        '{"messages": [{"role": "user", "content": "Hi"}], "mode": "think-high", "tokens": [7]}\n',
        encoding="utf-8",
    )

    first, second = read_vectors(path, tokenizer, checks.cfg)

    assert first == Vector(1, tokenizer.encode("<｜begin▁of▁sentence｜>Emma was"), [5, 6])
    assert second.line == 3
    assert tokenizer.decode(second.prompt, keep_special=True).endswith("Hi<｜Assistant｜><think>")


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON in UTF-8"),
        ("[1]", r"\[1\]: expected an object with some of prompt, messages, mode, tools, tokens"),
        ('{"prompt": "x"}', "tokens=None: expected a list of ids, not empty"),
        ('{"prompt": "x", "tokens": [1.5]}', r"tokens=\[1.5\]: expected a list of ids"),
        ('{"prompt": "x", "tokens": [1280]}', r"token 1280: expected ids in 0\.\.1279"),
        (
            '{"prompt": "x", "tokens": [1], "seed": 3}',
            "unknown key 'seed': expected some of prompt",
        ),
        ('{"tokens": [1]}', "expected exactly one of the keys messages and prompt"),
        (
            '{"messages": [{"role": "user", "content": "x"}], "mode": "loud", "tokens": [1]}',
            "mode='l",
        ),
        ("[" * 100_000, "line 2: "),
    ],
)
def test_a_malformed_line_is_refused_by_its_number(line, message, checks, tokenizer, tmp_path):
    path = tmp_path / "vectors.jsonl"
    path.write_text(f'{{"prompt": "x", "tokens": [1]}}\n{line}\n', encoding="utf-8")

    with pytest.raises(ValueError, match=message) as error:
        read_vectors(path, tokenizer, checks.cfg)
    assert str(error.value).startswith(f"{path}, line 2: ")


def test_a_file_without_vectors_is_refused(checks, tokenizer, tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"none\.jsonl has no line: expected JSON objects with"):
        read_vectors(tmp_path / "none.jsonl", tokenizer, checks.cfg)


def test_a_check_that_cannot_run_has_failed():
    """Ids that the model does not have, say: the next checks still run."""

    def refuse():
        raise ValueError("prompt 0 has token ids in 0..1280")

    row = run_check("batch", refuse)

    assert (row.check, row.finding.result) == ("batch", FAIL)
    assert row.finding.reason.endswith("0..1280")
    with pytest.raises(TypeError):
        run_check("batch", lambda: len(3))
