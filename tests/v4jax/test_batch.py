"""Batch jobs: lines checked, files that survive a kill, results that depend on nothing else."""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import subprocess
import sys
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import NANO, ROOT
from tests.models import one_of_each, random_model
from tests.v4jax import killed_job
from v4jax import tiny
from v4jax.inference.batch import (
    Job,
    JobError,
    Plan,
    RequestError,
    Settings,
    merge_files,
    parse_request,
)
from v4jax.inference.batch import files as batch_files
from v4jax.inference.batch.files import (
    Journal,
    Sidecar,
    errors_path,
    fingerprint,
    part_path,
    read_lines,
)
from v4jax.inference.batch.requests import KEYS, line_text
from v4jax.inference.engine import Engine
from v4jax.inference.grammar import Grammar
from v4jax.inference.requests import Request as EngineRequest
from v4jax.inference.sampling import Sampling
from v4jax.text.format import BOS, EOS, ROLES
from v4jax.text.prompt import encode_messages
from v4jax.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "Who is Emma?"}
SYSTEM = {"role": "system", "content": "S"}
TOOL = {"type": "function", "function": {"name": "walk"}}


def parse(fields: object, line: int = 3, **defaults):
    return parse_request(json.dumps(fields).encode(), line, Settings(**defaults))


def test_a_prompt_takes_the_settings_it_does_not_give():
    request = parse({"prompt": "Emma was"}, temperature=0.5, max_new_tokens=7, seed=10)

    assert (request.line, request.id, request.thinking_mode) == (3, "3", None)
    assert request.prompt == BOS + "Emma was"
    expected = Sampling(temperature=0.5, max_new_tokens=7, seed=13)
    assert request.settings.sampling == expected


def test_messages_are_rendered_in_their_mode():
    request = parse({"id": "x", "messages": [USER], "mode": "think-max", "stop": "\n", "seed": 1})

    expected = encode_messages([USER], "thinking", reasoning_effort="max")
    assert (request.id, request.prompt, request.thinking_mode) == ("x", expected, "thinking")
    assert (request.settings.stop, request.settings.seed) == (("\n",), 1)


def test_a_schema_is_told_and_makes_a_grammar():
    schema = {"type": "array"}
    request = parse({"messages": [USER], "json_schema": schema})

    assert 'schema to reply:\n{"type": "array"}' in request.prompt
    assert request.settings.grammar == Grammar.json_schema(schema)
    assert parse({"prompt": "x", "json_schema": schema}).prompt == BOS + "x"


def test_tools_go_to_the_system_message():
    for messages in ([USER], [SYSTEM, USER]):
        has_system = messages[0] is SYSTEM
        first = {**(SYSTEM if has_system else {"role": "system", "content": ""}), "tools": [TOOL]}
        expected = encode_messages([first, USER], "chat")
        assert parse({"messages": messages, "tools": [TOOL]}).prompt == expected


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0, "top_p": 0.3},
        {"temperature": 2},
        {"top_k": 5},
        {"top_p": 1, "min_p": 0.1},
        {"temperature": 1e-300},
        {"max_new_tokens": 3, "seed": 4},
    ],
    ids=str,
)
def test_a_line_chooses_its_sampling(given):
    request = parse({"prompt": "x", **given}, temperature=0.8, top_p=0.9)

    inherited = dict(temperature=0.8, top_p=0.9, seed=3)  # the seed of line 3
    assert request.settings.sampling == Sampling(**{**inherited, **given})


@pytest.mark.parametrize(
    "fields, message",
    [
        ([1], "list instead of a JSON object"),
        ({"prompt": "x", "id": 4}, "id=4: expected a text"),
        (
            {"prompt": "x", "max_tokens": 4},
            "unknown keys max_tokens: expected some of id, messages",
        ),
        ({}, "exactly one of the keys messages and prompt"),
        ({"prompt": "x", "messages": [USER]}, "exactly one of the keys messages and prompt"),
        ({"prompt": "x", "mode": "non-think"}, "mode beside prompt"),
        ({"prompt": ["x"]}, r"prompt=\['x'\]: expected a text"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"messages": []}, "exactly one of the keys messages and prompt"),
        ({"messages": {"role": "user"}}, "messages=.*: expected a list"),
        ({"messages": [SYSTEM]}, "The last message is from system, which asks for no reply"),
        ({"messages": [{"role": "robot"}]}, "expected a dict with a 'role' from"),
        ({"messages": [{**USER, "task": {}}]}, "field of a wrong type"),
        ({"messages": [USER], "tools": "walk"}, "tools='walk': expected a list"),
        ({"messages": [USER], "tools": [None]}, "Tool None: expected"),
        ({"messages": [{**USER, "tools": [TOOL]}], "tools": [TOOL]}, "give them once"),
        ({"messages": [USER], "mode": "think"}, "mode='think': expected one of non-think"),
        ({"messages": [USER], "mode": {}}, r"mode=\{\}: expected one of non-think"),
        ({"messages": [USER], "mode": "think-low"}, "release 'april' has non-think, think-high"),
        ({"messages": [{**USER, "content": BOS}]}, "begins a prompt, and stands there once"),
        ({"prompt": "x", "\ud800": 1}, r"unknown keys '\\ud800'"),
        ({"prompt": "x", "temperature": -1}, "temperature=-1: expected a number from 0 on"),
        ({"prompt": "x", "temperature": float("nan")}, "'NaN': expected a number"),
        ({"prompt": "x", "temperature": 10**400}, "temperature=10+\\.\\.\\.: expected a number"),
        ({"prompt": "x", "temperature": 1e39}, "temperature=1e.39: expected a number"),
        ({"prompt": "x", "temperature": True}, "temperature=True"),
        ({"prompt": "x", "top_p": 1.5}, r"top_p=1.5: expected a number in \(0, 1\]"),
        ({"prompt": "x", "top_k": 0}, "top_k=0: expected a positive integer"),
        ({"prompt": "x", "max_new_tokens": 1.0}, "max_new_tokens=1.0: expected a positive integer"),
        ({"prompt": "x", "seed": 2**32}, "seed=4294967296: expected an integer in"),
        ({"prompt": "x", "stop": ["a", ""]}, "stop=.* none empty"),
        ({"prompt": "x", "json_schema": [1]}, r"json_schema=\[1\]: expected a JSON schema"),
        ({"prompt": "x", "json_schema": {"type": "text"}}, "Invalid type: text"),
        ({"messages": [USER], "json_schema": {}, "tools": [TOOL]}, "json_schema beside tools"),
        ({"prompt": "x", "stop": "\ud800"}, r"stop='\\ud800': expected"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_lines_are_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        parse(fields)


@pytest.mark.parametrize("key", [k for k in KEYS if k not in ("messages", "prompt")] + ["user"])
@pytest.mark.parametrize("value", [None, []], ids=str)
def test_null_and_an_empty_list_are_not_given(key, value):
    if key == "user" and value == []:
        value = None  # of no known key, null alone means nothing
    defaults = {"temperature": 0.5, "top_p": 0.9, "stop": "end", "mode": "think-high"}

    assert parse({"messages": [USER], "prompt": value, key: value}, **defaults) == parse(
        {"messages": [USER]}, **defaults
    )


def test_top_k_beside_a_top_p_that_is_null():
    assert parse({"prompt": "x", "top_k": 5, "top_p": None}, top_p=0.9).settings.top_k == 5


@pytest.mark.parametrize(
    "number", [b"1e400", b"-1e400", b"Infinity", b"NaN", b"9" * 5000], ids=lambda n: n[:9]
)
def test_a_number_that_is_none_is_refused_with_the_id_of_its_line(number):
    """Wherever it stands: in a setting, or deep in a schema, where it would go into a prompt."""
    for before, after in ((b'"prompt": "x", "seed": ', b""), (b'"tools": [{"a": [', b"]}]")):
        text = b'{"id": "mine", ' + before + number + after + b"}"
        with pytest.raises(RequestError, match=f"'{number[:3].decode()}.*expected a num") as error:
            parse_request(text, 1, Settings())
        assert error.value.id == "mine"


def test_a_line_chooses_the_model_or_an_adapter_of_it():
    """As requests of a server do: the model's own name is the model alone."""
    models = ("nano", "emma", "box")
    for model, adapter in ((None, None), ("nano", None), ("emma", "emma"), ("box", "box")):
        line = json.dumps({"prompt": "x", "model": model}).encode()
        assert parse_request(line, 1, Settings(), models=models).adapter == adapter
    for model, known, message in (
        ("jane", models, "model='jane': expected one of nano, emma, box"),
        (["emma"], models, r"model=\['emma'\]: expected one of nano"),
        ("nano", (), "model='nano': expected none, since the job names no models"),
    ):
        line = json.dumps({"prompt": "x", "id": "mine", "model": model}).encode()
        with pytest.raises(RequestError, match=message) as error:
            parse_request(line, 1, Settings(), models=known)
        assert error.value.id == "mine"


def test_a_rendered_prompt_gets_no_second_beginning():
    prompt = encode_messages([USER], "chat")

    assert parse({"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize(
    "messages, thinking_mode",
    [
        ([USER], "thinking"),
        ([USER, {"role": "assistant", "content": "Emma is", "wo_eos": True}], "chat"),
        ([SYSTEM, {**USER, "task": "query"}], "chat"),
        ([USER, {"role": "latest_reminder", "content": "Friday"}], "thinking"),
        ([USER, {"role": "tool", "content": "10:00"}], "thinking"),
    ],
    ids=["user", "open turn", "task", "reminder", "tool"],
)
def test_how_a_completion_is_read_depends_on_the_last_message(messages, thinking_mode):
    """A turn that is continued has its reasoning behind it, whatever the mode."""
    assert parse({"messages": messages, "mode": "think-high"}).thinking_mode == thinking_mode


def test_the_effort_text_is_that_of_the_release():
    line = json.dumps({"messages": [USER], "mode": "think-max"}).encode()

    for release in ("april", "0731"):
        expected = encode_messages([USER], "thinking", reasoning_effort="max", release=release)
        assert parse_request(line, 1, Settings(), release).prompt == expected


@pytest.mark.parametrize("text", [b"{", b"\xff{}", b"[" * 100_000, b"null"], ids=lambda t: t[:4])
def test_what_is_not_json_is_refused(text):
    with pytest.raises(RequestError):
        parse_request(text, 1, Settings())


def test_depth_has_a_limit_that_does_not_depend_on_who_reads():
    """Or a request could be planned, and not be read again from deeper in the program."""
    for depth, is_fine in ((150, True), (250, False)):
        deep = json.loads("[" * depth + "]" * depth)
        fields = {"messages": [USER], "tools": [{"function": {"name": "walk", "where": deep}}]}
        if is_fine:
            assert "[" * depth in parse(fields).prompt
        else:
            with pytest.raises(RequestError, match="more than 200 times"):
                parse(fields)


def test_an_error_knows_the_id_and_is_short():
    with pytest.raises(RequestError) as error:
        parse({"id": "mine", "messages": [{"role": "user", "content": 4 * [1000 * "x"]}]})

    assert error.value.id == "mine"
    assert len(str(error.value)) < 600


def write(path, *lines: object) -> None:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")


def test_a_plan_counts_and_sorts(tmp_path):
    path = tmp_path / "in"
    write(
        *(path, {"prompt": 9 * "x"}, "", {"prompt": "x", "temperature": 0}, "nothing"),
        *({"prompt": "x", "id": "1"}, {"prompt": 5 * "é"}, {"prompt": "x", "max_new_tokens": 2}),
        *({"prompt": 7 * "x"}, {"prompt": "x", "id": "8"}),
    )

    plan = Plan(path, Settings())

    lines = [1, 8, 6, 3, 7]  # the longest answer first, then the longest prompt
    assert [plan.line(i) for i in range(plan.requests)] == lines
    assert [plan.request(i).line for i in range(5)] == lines
    assert plan.request(2).prompt == BOS + 5 * "é"
    assert [(r["line"], r["id"]) for r in plan.malformed] == [(4, None), (5, "1"), (9, "8")]
    assert "an earlier line has this id" in plan.malformed[1]["error"]
    assert (plan.count, plan.last_line, plan.size) == (8, 9, path.stat().st_size)


def test_a_byte_order_mark_costs_no_request(tmp_path):
    """At the start, and where files with one were joined; a line of nothing else is blank."""
    path = tmp_path / "in"
    path.write_text('\ufeff{"prompt": "one"}\n\ufeff{"prompt": "two"}\n\ufeff\n', encoding="utf-8")

    plan = Plan(path, Settings())

    assert (plan.count, plan.malformed) == (2, [])
    assert sorted(plan.request(i).prompt for i in range(2)) == [BOS + "one", BOS + "two"]


@pytest.mark.parametrize("text", ['{"prompt": "two"}\n', ""])
def test_an_input_that_is_edited_while_the_job_runs_ends_it(text, tmp_path):
    write(tmp_path / "in", {"prompt": "one"})
    plan = Plan(tmp_path / "in", Settings())
    (tmp_path / "in").write_text(text)

    with pytest.raises(JobError, match="was changed while the job was running: line 1"):
        plan.request(0)


def test_a_plan_wants_a_mode_of_the_release(tmp_path):
    write(tmp_path / "in", {"messages": [USER]})

    Plan(tmp_path / "in", Settings(mode="think-low"), "0731")
    with pytest.raises(ValueError, match="mode='think-low': release 'april' has non-think"):
        Plan(tmp_path / "in", Settings(mode="think-low"))


def test_a_pipe_cannot_be_planned(tmp_path):
    """It would wait for ever, and could not be read again."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="is not a regular file"):
            Plan(path, Settings())


def test_a_plan_of_nothing(tmp_path):
    write(tmp_path / "in", "", "")

    plan = Plan(tmp_path / "in", Settings())

    assert (plan.requests, plan.count, plan.last_line) == (0, 0, 0)


@pytest.mark.parametrize("torn", ['{"line": 3, "te', "x" * 200_000, '{"line": 3}'])
def test_a_line_cut_short_is_removed(torn, tmp_path):
    path = tmp_path / "out"
    Journal(path).append([{"line": 1, "text": "é\n"}, {"line": 2}])
    with open(path, "a") as file:
        file.write(torn)
    assert [line for line, _ in read_lines(path)] == [1, 2]

    Journal(path).append([{"line": 4}])

    assert [json.loads(text) for _, text in read_lines(path)] == [
        *({"line": 1, "text": "é\n"}, {"line": 2}, {"line": 4})
    ]
    assert path.read_bytes().endswith(b"\n")


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path):
    (tmp_path / "out").write_text("{")

    Journal(tmp_path / "out")

    assert (tmp_path / "out").read_bytes() == b""


def test_damage_in_the_middle_is_reported(tmp_path):
    write(tmp_path / "out", {"line": 1}, "\0\0", {"line": 2})

    with pytest.raises(JobError, match="line 2 is no record"):
        list(read_lines(tmp_path / "out"))


def test_merging_sorts_and_drops_what_is_double(tmp_path):
    output = tmp_path / "out[1]"  # a name that means something to glob
    sidecar = Sidecar(output)
    sidecar.claim({"requests": 6})
    sidecar.close()
    write(output, {"line": 5}, {"line": 1})
    write(part_path(output, 0, 2), {"line": 5}, {"line": 4})
    write(part_path(output, 1, 3), {"line": 2})
    with open(part_path(output, 1, 3), "a") as file:
        file.write('{"line": 3')
    write(part_path(errors_path(output), 1, 2), {"line": 6, "error": "x"})

    assert merge_files(output) == (4, 1, 1)

    assert [line for line, _ in read_lines(output)] == [1, 2, 4, 5]
    assert [line for line, _ in read_lines(errors_path(output))] == [6]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"out[1]", "out[1].errors", "out[1].job"}
    assert merge_files(output) == (4, 1, 1)


def test_merging_needs_a_job(tmp_path):
    with pytest.raises(JobError, match="nothing to merge"):
        merge_files(tmp_path / "out")


HOLD = """
import pathlib, sys
from v4jax.inference.batch.files import Sidecar
sidecar = Sidecar(pathlib.Path(sys.argv[1]))
sidecar.lock_share(int(sys.argv[2]), int(sys.argv[3]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_processes_with_the_same_share_exclude_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_files, "_PATIENCE", 0.2)
    output = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(output), "1", "2"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as holder:
        assert holder.stdout.readline() == "locked\n"
        sidecar = Sidecar(output)
        for share in ((1, 2), (0, 1), (2, 3)):
            with pytest.raises(JobError, match="another process is at work"):
                sidecar.lock_share(*share)
        sidecar.lock_share(0, 2)
        assert not sidecar.lock_all()
        holder.kill()
        holder.wait()
        assert sidecar.lock_all()
        sidecar.close()


def test_results_belong_to_one_job(tmp_path):
    output = tmp_path / "out"
    sidecar = Sidecar(output)
    assert sidecar.header() is None
    sidecar.path.write_text('{"requests": ')  # killed while it was written
    sidecar.claim({"requests": 1, "stop": ()})
    sidecar.claim({"requests": 1, "stop": ()})

    write(output, {"line": 1})
    with pytest.raises(JobError, match=r"another job \(requests was 1, is 2\)"):
        sidecar.claim({"requests": 2, "stop": ()})
    sidecar.close()

    write(part_path(tmp_path / "other", 0, 2), {"line": 1})
    sidecar = Sidecar(tmp_path / "other")
    with pytest.raises(JobError, match="does not say of which job"):
        sidecar.claim({})
    sidecar.close()


# Locks the thirds of a sidecar that nobody else has, without importing jax; says which they are.
THIRDS = """
import fcntl, sys
file, free = open(sys.argv[1], "r+b"), []
for third in sys.argv[2]:
    start, end = int(third) * (1 << 20) // 3, (int(third) + 1) * (1 << 20) // 3
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, end - start, start)
        free.append(third)
    except OSError:
        pass
print("".join(free), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def lock_thirds(sidecar, thirds: str):
    command = [sys.executable, "-c", THIRDS, str(sidecar.path), thirds]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as holder:
        yield holder.stdout.readline().strip()
        holder.kill()


def test_a_job_that_wrote_nothing_gives_way(tmp_path):
    """Unless somebody is at work on it; and afterwards a share is locked as before, no more."""
    sidecar = Sidecar(tmp_path / "out")
    sidecar.lock_share(1, 3)
    sidecar.claim({"mesh": "expert=3"}, 1, 3)

    with lock_thirds(sidecar, "2") as locked:
        assert locked == "2"
        with pytest.raises(JobError, match="mesh was expert=3, is None"):
            sidecar.claim({"mesh": None}, 1, 3)
    sidecar.claim({"mesh": None}, 1, 3)

    assert sidecar.header() == {"mesh": None}
    with lock_thirds(sidecar, "012") as locked:
        assert locked == "02"
    sidecar.close()


@pytest.mark.parametrize("text", ["nonsense\n", "[1]\n", "[" * 5000 + "\n", "{}\n"])
def test_a_damaged_sidecar_is_named(text, tmp_path):
    (tmp_path / "out.job").write_text(text)

    with pytest.raises(JobError, match=r"out\.job"):
        merge_files(tmp_path / "out")


@pytest.mark.parametrize("line", ["true", "1e3", str(2**63), "[" * 5000, '"1"'])
def test_a_record_without_a_line_number_is_named(line, tmp_path):
    (tmp_path / "out").write_text(f'{{"line": {line}}}\n')

    with pytest.raises(JobError, match="line 1 is no record"):
        list(read_lines(tmp_path / "out"))


def test_those_who_follow_hear_that_their_leader_cannot_open_the_job(tmp_path):
    write(tmp_path / "out", {"line": 1})  # of no job that is known
    (tmp_path / "in").write_text('{"prompt": "x"}')
    options = dict(batch_size=1, identity={})
    said = []

    with pytest.raises(JobError, match="does not say of which job"):
        Job(*(tmp_path / "in", tmp_path / "out", Settings()), **options, agree=said.append)
    with pytest.raises(JobError, match="that leads this one could not open"):
        Job(
            *(tmp_path / "in", tmp_path / "out", Settings()),
            **options,
            leads=False,
            agree=lambda mine: said[0],
        )

    assert len(said) == 1


def test_a_fingerprint_sees_weights_and_names(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(300_000))
    before = fingerprint([path])

    path.write_bytes(bytes(150_000) + b"\1" + bytes(149_999))
    changed = fingerprint([path])
    path.rename(tmp_path / "b")

    assert len({before, changed, fingerprint([tmp_path / "b"])}) == 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(NANO)


@pytest.fixture(scope="module")
def engine(tokenizer) -> Engine:
    """Random weights, float32 and no rounding: a row does not depend on its batch."""
    cfg = dataclasses.replace(one_of_each(), vocab_size=tokenizer.vocab_size, max_length=512)
    model = random_model(cfg, scan_layers=False, seed=1)
    return Engine(model, tokenizer, slots=2, chunks=(128,))


@pytest.fixture
def requests(tmp_path):
    """Two samplers, three modes, a stop text, a prompt too long, and one past the window."""
    text = (ROOT / "scripts" / "data" / "austen" / "heldout.txt").read_text(encoding="utf-8")
    greedy = {"temperature": 0}
    path = tmp_path / "in.jsonl"
    write(
        *(path, {"prompt": text[:50]}, {"messages": [USER], "id": "chat"}, "broken"),
        *({"prompt": 4 * text, **greedy}, {"messages": [USER], "mode": "think-high", **greedy}),
        *(
            {"prompt": text[:600], **greedy},
            {"prompt": text[90:99], "seed": 5, "stop": list("aeiou")},
        ),
    )
    return path


def job_of(requests, output, **options) -> Job:
    settings = Settings(max_new_tokens=12)
    return Job(requests, output, settings, **{"batch_size": 2, "identity": {}, **options})


def finish(job: Job, engine, tokenizer) -> int:
    with job:
        steps = list(job.run(engine, tokenizer))
        assert sum(step.requests for step in steps) == job.remaining
        return job.finish()


def records(path) -> list[dict]:
    return [json.loads(text) for _, text in read_lines(path)]


def test_results_are_those_of_each_request_alone(requests, engine, tokenizer, tmp_path):
    output = tmp_path / "out"

    assert finish(job_of(requests, output), engine, tokenizer) == 0

    results, errors = records(output), records(errors_path(output))
    assert [(r["line"], r["id"]) for r in results] == [
        *((1, "1"), (2, "chat"), (5, "5"), (6, "6"), (7, "7"))
    ]
    assert [(r["line"], r["id"]) for r in errors] == [(3, None), (4, "4")]
    assert "more than the 512 tokens of tiny" in errors[1]["error"]
    lines = requests.read_bytes().split(b"\n")
    for result in results:
        request = parse_request(
            lines[result["line"] - 1], result["line"], Settings(max_new_tokens=12)
        )
        prompt = tokenizer.encode(request.prompt)
        (completion,) = engine.generate(
            [prompt], [request.settings.sampling], stop_ids=tokenizer.stop_ids
        )
        assert result["prompt_tokens"] == len(prompt)
        if request.settings.stop:
            text = tokenizer.decode(completion.tokens)
            cut = min(at for stop in "aeiou" if (at := text.find(stop)) >= 0)
            assert (result["text"], result["finish_reason"]) == (text[:cut], "stop")
            assert result["completion_tokens"] < 12
        else:
            stopped = completion.finish_reason == "stop"
            text = tokenizer.decode(completion.tokens[: -1 if stopped else None])
            assert (result["text"], result["finish_reason"]) == (text, completion.finish_reason)
            assert result["completion_tokens"] == len(completion.tokens)
    assert results[3]["prompt_tokens"] > 129
    chat, thinking = results[1], results[2]
    assert (chat["content"], chat["reasoning_content"]) == (chat["text"], "")
    assert (thinking["content"], thinking["reasoning_content"]) == ("", thinking["text"])
    assert chat["tool_calls"] == [] and "content" not in results[0]


def test_interrupted_at_any_step_the_files_are_the_same(requests, engine, tokenizer, tmp_path):
    """Every restart goes one step further, with another number of processes each time."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(job_of(requests, whole), engine, tokenizer)

    for stop_after in itertools.count():
        count = 1 + stop_after % 3
        left = 0
        for process in range(count):
            with job_of(requests, broken, process=process, count=count) as job:
                list(itertools.islice(job.run(engine, tokenizer), stop_after))
                if process == count - 1:
                    left = job.finish()
        if not left:
            break

    assert stop_after > 3
    for path in (whole, broken):
        assert sorted(p.name for p in tmp_path.glob(path.name + "*")) == [
            *(path.name, path.name + ".errors", path.name + ".job")
        ]
    assert broken.read_bytes() == whole.read_bytes()
    assert errors_path(broken).read_bytes() == errors_path(whole).read_bytes()
    assert finish(job_of(requests, broken), engine, tokenizer) == 0
    assert broken.read_bytes() == whole.read_bytes()


def test_only_what_is_missing_is_generated(requests, engine, tokenizer, tmp_path):
    output = tmp_path / "out"
    finish(job_of(requests, output), engine, tokenizer)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[1:-1]) + lines[-1][:20])

    before = engine.stats().prompt_tokens
    with job_of(requests, output) as job:
        assert job.total == 6 and job.remaining == 2
        assert sum(progress.requests for progress in job.run(engine, tokenizer)) == 2
        assert len(output.read_bytes().splitlines()) == len(lines)
        assert job.finish() == 0
    fed = sum(json.loads(lines[n])["prompt_tokens"] for n in (0, -1))
    assert engine.stats().prompt_tokens - before == fed

    assert output.read_bytes() == whole


def test_another_input_is_refused(requests, engine, tokenizer, tmp_path):
    output = tmp_path / "out"
    finish(job_of(requests, output), engine, tokenizer)

    with pytest.raises(JobError, match="batch_size was 2, is 3"):
        job_of(requests, output, batch_size=3)
    with open(requests, "a") as file:
        file.write('{"prompt": "one more"}\n')
    with pytest.raises(JobError, match=r"another job \(input was .*requests was 7, is 8"):
        job_of(requests, output)


def test_killed_at_any_moment_the_files_are_the_same(tmp_path):
    """Twenty times at a random moment, reading, generating, writing or merging."""
    path, whole, broken = (tmp_path / name for name in ("in", "whole", "broken"))
    lines = [
        {
            "prompt": f"{n} times",
            "max_new_tokens": 1 + n % 7,
            "model": [*killed_job.MODELS, None][n % 4],
        }
        for n in range(60)
    ]
    write(path, *lines[:30], "broken", *lines[30:])
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.v4jax.killed_job"])
    draw, kills = random.Random(0), 0

    def start(output, pause):
        process = processes.Process(target=killed_job.run, args=(str(path), str(output), pause))
        process.start()
        return process

    first = start(whole, 0.0)
    first.join(timeout=120)
    assert first.exitcode == 0
    while kills < 20:
        process = start(broken, 0.01)
        process.join(timeout=draw.uniform(0.05, 0.6))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:  # it was done: begin anew
            assert process.exitcode == 0
            assert broken.read_bytes() == whole.read_bytes()
            for file in tmp_path.glob("broken*"):
                file.unlink()
    last = start(broken, 0.0)
    last.join(timeout=120)
    assert last.exitcode == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert errors_path(broken).read_bytes() == errors_path(whole).read_bytes()
    assert len(records(whole)) == 60


class Scripted:
    """An engine that says what it is told to, to everybody, a token a step."""

    cfg = tiny()

    def __init__(self, tokens):
        self.tokens, self.running = tokens, []

    def submit(self, prompt, sampling, *, stop_ids, grammar, adapter):
        number = len(self.running)
        self.running.append(EngineRequest(number, prompt, sampling, stop_ids, adapter=adapter))
        return self.running[-1]

    def step(self):
        served = [request for request in self.running if not request.is_ended]
        for request in served:
            request.tokens.append(self.tokens[len(request.tokens)])
            limit = min(len(self.tokens), request.sampling.max_new_tokens)
            request.finish_reason = "length" if len(request.tokens) == limit else None
        return served


def answers(tmp_path, tokenizer, text: str, *lines: object) -> list[dict]:
    """Results of a job in which the model says the same to all."""
    write(tmp_path / "in", *lines)
    job = Job(tmp_path / "in", tmp_path / "out", Settings(), batch_size=2, identity={})
    assert finish(job, Scripted(tokenizer.encode(text)), tokenizer) == 0
    return records(tmp_path / "out")


def test_answers_of_a_schema(engine, tokenizer, tmp_path, monkeypatch):
    schema = {"type": "array", "items": {"enum": ["tea", 7]}, "minItems": 2, "maxItems": 3}
    asked = {"json_schema": schema, "max_new_tokens": 300}
    lines = [{"messages": [USER], **asked}, {"prompt": "She"}, {"prompt": "He", **asked}]
    write(tmp_path / "in", *lines)
    assert finish(job_of(tmp_path / "in", tmp_path / "out"), engine, tokenizer) == 0
    first, other, last = records(tmp_path / "out")
    assert {len(json.loads(text)) for text in (first["content"], last["text"])} <= {2, 3}
    assert first["finish_reason"] == last["finish_reason"] == "stop"
    request = parse({"prompt": "She"}, line=2, max_new_tokens=12)
    alone = engine.generate([tokenizer.encode(request.prompt)], [request.settings.sampling])
    assert other["text"] == alone[0].text
    monkeypatch.setattr(engine, "tokenizer", None)
    monkeypatch.delitem(engine.__dict__, "_matchers")
    assert finish(job_of(tmp_path / "in", tmp_path / "again"), engine, tokenizer) == 0
    assert {r["error"][:27] for r in records(errors_path(tmp_path / "again"))} == {
        "a grammar needs a tokenizer"
    }


def test_tool_calls_are_parsed(tokenizer, tmp_path):
    call = encode_messages(
        [USER, {"role": "assistant", "content": "Yes.", "tool_calls": [TOOL_CALL]}], "chat"
    ).partition("</think>")[2]
    lines = ({"messages": [USER], "tools": [TOOL]}, {"messages": [USER]})

    for result in answers(tmp_path, tokenizer, call, *lines):
        assert result["content"] == "Yes." and result["finish_reason"] == "stop"
        assert result["text"] + EOS == call
        (parsed,) = result["tool_calls"]
        assert parsed["function"] == TOOL_CALL["function"]
        assert result["completion_tokens"] == len(tokenizer.encode(call))


TOOL_CALL = {"function": {"name": "walk", "arguments": '{"to": "Bath", "miles": 3}'}}


def test_a_stop_text_in_the_reasoning_or_in_a_call_ends_nothing(tokenizer, tmp_path):
    call = encode_messages(
        [USER, {"role": "assistant", "content": "", "tool_calls": [TOOL_CALL]}], "chat"
    ).partition("</think>")[2]
    line = {"messages": [USER], "mode": "think-high", "stop": ["Bath:", "Bath"]}
    text = "It says Bath: first.</think>She walks to Bath: today." + EOS

    (result,) = answers(tmp_path, tokenizer, text, line)
    assert result["reasoning_content"] == "It says Bath: first."
    assert (result["content"], result["finish_reason"]) == ("She walks to ", "stop")

    (tmp_path / "calls").mkdir()
    (result,) = answers(tmp_path / "calls", tokenizer, f"Bath</think>Yes.{call}", line)
    assert result["content"] == "Yes."
    assert result["tool_calls"][0]["function"] == TOOL_CALL["function"]

    (tmp_path / "raw").mkdir()
    line = {"prompt": "x", "stop": "Bath"}
    (result,) = answers(tmp_path / "raw", tokenizer, text, line)
    assert (result["text"], result["finish_reason"]) == ("It says ", "stop")


def test_a_completion_ends_where_it_ends(tokenizer, tmp_path):
    """What could have been the start of a tag is kept, since nothing comes."""
    for i, text in enumerate(("so 1 + 1 <", "def f():\n", "a\n\n")):
        (tmp_path / str(i)).mkdir()
        line = {"messages": [USER], "max_new_tokens": len(tokenizer.encode(text))}
        (result,) = answers(tmp_path / str(i), tokenizer, text, line)
        assert (result["content"], result["finish_reason"]) == (text, "length")


def test_a_job_whose_model_does_not_load_is_forgotten(tokenizer, tmp_path):
    """Its output can be that of the corrected command, although the input has a bad line."""
    write(tmp_path / "in", {"prompt": "x"}, "broken")
    options = dict(batch_size=2)
    for mesh in ({"expert": 3}, {}):
        job = Job(tmp_path / "in", tmp_path / "out", Settings(), identity={"mesh": mesh}, **options)
        if mesh:
            job.close()
    assert finish(job, Scripted([1]), tokenizer) == 0
    assert [r["line"] for r in records(tmp_path / "out")] == [1]
    assert [r["line"] for r in records(tmp_path / "out.errors")] == [2]

    with pytest.raises(JobError, match="another job"):
        Job(tmp_path / "in", tmp_path / "out", Settings(), identity={}, batch_size=3)


# One odd line never ends a job.

TEXTS = st.text(st.characters(exclude_categories=()), max_size=8)  # halves of pairs among them
NUMBERS = st.sampled_from([10**30, 10**400, 2**63, -1, 0, 1e308, 1e-320, float("nan"), 1.5])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.integers() | st.floats(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3),
    max_leaves=6,
)
FIELDS = ("content", "tool_calls", "tools", "tool_call_id", "task", "wo_eos", "response_format")
MESSAGES = st.builds(
    lambda fields, role: {"role": role, **fields},
    st.dictionaries(st.sampled_from([*FIELDS, "reasoning_content"]), VALUES, max_size=3),
    st.sampled_from([*ROLES, "robot"]),
)
CALLS = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": TEXTS, "arguments": TEXTS})}
)
CALLING = st.builds(
    lambda calls: {"role": "assistant", "tool_calls": calls}, st.lists(CALLS, max_size=2)
)
LINES = st.builds(
    lambda fields, messages: json.dumps({**fields, **messages}).encode(),
    st.dictionaries(st.sampled_from([*KEYS, "user"]), VALUES, max_size=3),
    st.fixed_dictionaries({"messages": st.lists(MESSAGES | CALLING | st.just(USER), max_size=3)})
    | st.fixed_dictionaries({"prompt": TEXTS})
    | st.just({}),
)
NESTED = st.builds(
    lambda start, depth, end: start + b"[" * depth + b"]" * depth + end,
    st.sampled_from([b"", b'{"messages": ', b'{"tools": ', b'{"id": "a", "prompt": ']),
    st.sampled_from([190, 250, 900, 2000, 100_000]),
    st.sampled_from([b"", b"}", b', "messages": [{"role": "user"}]}']),
)
# Good but for one value.
NUMBER_KEYS = st.sampled_from(["temperature", "top_k", "top_p", "max_new_tokens", "seed"])
TEXT_KEYS = st.sampled_from(["id", "stop", "mode", "prompt", "\ud800"])
HALVES = st.sampled_from(["\ud800", "a\udfff", "\x00", "", "\ufeff", BOS, EOS])
ONE_ODD = st.builds(
    lambda key, value: json.dumps({"prompt": "x", key: value}).encode(), NUMBER_KEYS, NUMBERS
) | st.builds(
    lambda key, value: json.dumps({"prompt": "x", key: value}).encode(), TEXT_KEYS, HALVES
)
ODD = st.one_of(
    st.binary(max_size=40),
    LINES,
    ONE_ODD,
    NESTED,
    (LINES | ONE_ODD).map(lambda line: b"\xef\xbb\xbf" + line),
)


@settings(deadline=None, max_examples=100)
@given(odd=st.lists(ODD.map(lambda line: line.replace(b"\n", b" ")), max_size=15), data=st.data())
def test_odd_lines_never_end_a_job(tokenizer, odd, data):
    """Every good line gets its result, every other one a result or an error, and none both."""
    good = [json.dumps({"id": f"good {i}", "messages": [USER]}).encode() for i in range(3)]
    lines = data.draw(st.permutations([*odd, *good]))
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=9))
    with tempfile.TemporaryDirectory() as folder:
        path, output = pathlib.Path(folder, "in"), pathlib.Path(folder, "out")
        path.write_bytes(b"\n".join(lines))
        job = Job(path, output, Settings(), batch_size=2, identity={})

        assert finish(job, Scripted(tokens), tokenizer) == 0

        results = records(output)
        errors = records(errors_path(output)) if errors_path(output).exists() else []
        assert {r["id"] for r in results} >= {f"good {i}" for i in range(3)}
        done = sorted(r["line"] for r in results + errors)
        assert done == [i for i, line in enumerate(lines, 1) if line_text(line)]
