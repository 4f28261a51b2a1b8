"""`v4jax verify`: its table, its file, its status, and what it refuses. No model runs here."""

import json
import math
import sys

import pytest

from v4jax.cli import main
from v4jax.cli import verify as command
from v4jax.inference.findings import FAIL, PASS, SKIPPED, Finding, Row

ROWS = [
    Row("tokenizer", Finding(PASS, "6 texts", "1280 ids"), 0.02),
    Row("decode", Finding(PASS, "1.0e-06", "", {"difference": 1e-6}), 12.25),
    Row("perplexity 32768", Finding(SKIPPED, reason="the text has 9 tokens"), 0.0),
]
FAILED = Row("batch", Finding(FAIL, "2 of 3", "token 4 is 5", {"lead": math.nan}), 3.0)


@pytest.fixture(autouse=True)
def _what_main_sets(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")


@pytest.fixture
def run(monkeypatch):
    """Runs the command with rows in place of the checks; gives the options that they would have."""

    def of(*words: object, rows=ROWS):
        seen = []

        def checks(model, tokenizer, options, cache):
            seen.append(options)
            yield from rows

        monkeypatch.setattr(command, "verify", checks)
        main(["verify", "--checkpoint", "nano", *map(str, words)])
        return seen[0]

    return of


def test_a_table_is_printed(run, capsys):
    run()

    assert capsys.readouterr().out.splitlines() == [
        "",
        "check             result   seconds  figure",
        "tokenizer         pass         0.0  6 texts (1280 ids)",
        "decode            pass        12.2  1.0e-06",
        "perplexity 32768  skipped      0.0  the text has 9 tokens",
        "",
        "2 passed, 1 skipped",
    ]


def test_a_failed_check_is_status_1_and_the_file_is_written(run, tmp_path, capsys):
    path = tmp_path / "verify.json"

    with pytest.raises(SystemExit) as end:
        run("--json", path, rows=[*ROWS, FAILED])

    assert end.value.code == 1
    assert "batch             fail         3.0  2 of 3: token 4 is 5" in capsys.readouterr().out
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["passed"] is False
    assert (report["numerics"], report["dtype"]) == ("released", "bfloat16")
    assert report["checks"][1] == {
        "check": "decode",
        "result": "pass",
        "figure": "1.0e-06",
        "reason": "",
        "seconds": 12.25,
        "difference": 1e-6,
    }
    assert report["checks"][3]["lead"] is None
    assert [file.name for file in tmp_path.iterdir()] == ["verify.json"]


def test_what_is_checked_is_chosen(run, tmp_path):
    vectors = tmp_path / "vectors.jsonl"
    vectors.write_text('{"prompt": "Emma was", "tokens": [5, 6]}\n')

    assert run().lengths == (2048, 8192, 32_768)
    assert run("--quick").lengths == (2048,)
    options = run("--lengths", "4096,1024", "--length", 300, "--vectors", vectors)
    assert (options.lengths, options.length) == ((1024, 4096), 300)
    assert [vector.tokens for vector in options.vectors] == [[5, 6]]


@pytest.mark.parametrize(
    "words, message",
    [
        (("--lengths", "2k"), "'2k': expected numbers of tokens with commas between them"),
        (("--lengths", "100"), "lengths=100: expected numbers of tokens above 512"),
        (("--length", "9"), "length=9: expected at least 256 tokens"),
        (("--json", "no/such.json"), "--json no/such.json: there is no folder"),
        (("--vectors", "no.jsonl"), "no.jsonl: No such file"),
        (("--numerics", "plain", "--recipe", "fp8"), "recipe='fp8' with plain numerics"),
        (("--checkpoint", "no"), "no has no config.json"),
    ],
)
def test_bad_options_end_in_one_message(run, words, message, capsys):
    with pytest.raises(SystemExit) as end:
        run(*words)

    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_malformed_vector_ends_in_one_message_before_the_model_is_loaded(run, tmp_path, capsys):
    vectors = tmp_path / "vectors.jsonl"
    vectors.write_text('{"prompt": "x", "tokens": [5]}\n{"prompt": "x"}\n')

    with pytest.raises(SystemExit) as end:
        run("--vectors", vectors)

    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err == f"error: {vectors}, line 2: tokens=None: expected a list of ids, not empty.\n"
