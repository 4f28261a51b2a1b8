"""--profile: a trace of steps, in which parts of the model have names."""

import gzip
import json

import jax
import jsonschema
import pytest

import v4jax
from tests.models import small_nano
from v4jax import Engine
from v4jax.cli import main
from v4jax.cli.profiling import STEPS, profiled
from v4jax.inference.steps import decode_shapes

OPTIONS = ["--checkpoint", "nano", "--dtype", "float32", "--numerics", "plain"]
SCHEMA = {"type": "array", "items": {"type": "boolean"}, "minItems": 12, "maxItems": 12}


def names_of(folder) -> set[str]:
    """Of the events in a trace."""
    (path,) = folder.rglob("*.trace.json.gz")
    with gzip.open(path) as file:
        return {event.get("name", "") for event in json.load(file)["traceEvents"]}


def test_generate_writes_a_trace_of_later_steps(tmp_path, capsys, monkeypatch):
    """Of an answer of a schema, whose steps give a token each."""
    monkeypatch.setattr("sys.argv", ["v4jax"])
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    folder = tmp_path / "made" / "trace"
    asked = ["--prompt", "Well?", "--json-schema", str(schema), "--profile", str(folder)]
    main(["generate", *OPTIONS, *asked, "--max-new-tokens", "400"])
    said = capsys.readouterr()
    jsonschema.validate(json.loads(said.out), SCHEMA)
    assert f"{STEPS} steps, in {folder}" in said.err
    names = names_of(folder)
    assert any("while" in name for name in names)  # the loop of decoding steps has run
    assert not any("backend_compile" in name for name in names)


def test_a_batch_job_writes_a_trace(tmp_path, capsys, monkeypatch):
    """`serve` does in tests/v4jax/test_server.py."""
    monkeypatch.setattr("sys.argv", ["v4jax"])
    asked, folder = tmp_path / "asked.jsonl", tmp_path / "trace"
    lines = [{"id": name, "prompt": "Emma was"} for name in "ab"]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--input", str(asked), "--output", str(tmp_path / "results.jsonl")]
    options = ["--batch-size", "1", "--max-new-tokens", "20", "--profile", str(folder)]
    main(["batch", *OPTIONS, *files, *options])
    assert f"steps, in {folder}" in capsys.readouterr().err
    assert any("while" in name for name in names_of(folder))


def test_the_names_of_the_models_parts_are_in_the_compiled_step():
    model = v4jax.load(small_nano(), v4jax.plain("float32"))
    engine = Engine(model, slots=1)
    shapes = decode_shapes(model, 1, 4096)
    text = engine._decode.lower(engine.leaves, *shapes).compile().as_text()
    for name in ("indexer/select", "attention/project", "moe/experts", "hc/pre", "head"):
        assert f"{name}/" in text, name


def test_a_short_run_is_said(tmp_path, capsys):
    model = v4jax.load(small_nano(), v4jax.plain("float32"))
    engine = Engine(model, slots=1)
    with profiled(engine, tmp_path / "trace"):
        pass
    assert "no step came after the first" in capsys.readouterr().err
    with profiled(engine, None):
        assert engine.before_step is None
    with pytest.raises(RuntimeError, match="No profile"):
        jax.profiler.stop_trace()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has list: expected a JSON schema"),
        ('{"type": "text"}', "Invalid type: text"),
    ],
)
def test_a_file_that_is_no_schema(text, message, tmp_path, capsys, monkeypatch):
    """Before the model is loaded."""
    monkeypatch.setattr("sys.argv", ["v4jax"])
    path = tmp_path / "schema.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["generate", *OPTIONS, "--prompt", "x", "--json-schema", str(path)])
    assert end.value.code == 2 and message in capsys.readouterr().err
