"""Batch jobs: lines checked, files that survive a kill, results that depend on nothing else."""

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import NANO, ROOT
from tests.models import random_model
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
from v4jax.inference.generate import Generator
from v4jax.inference.sampling import Greedy, Temperature, TopK, TopP
from v4jax.text.format import BOS, EOS
from v4jax.text.prompt import encode_messages
from v4jax.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "Who is Emma?"}
TOOL = {"type": "function", "function": {"name": "walk"}}


def parse(fields: object, line: int = 3, **defaults):
    return parse_request(json.dumps(fields).encode(), line, Settings(**defaults))


def test_a_prompt_takes_the_settings_it_does_not_give():
    request = parse({"prompt": "Emma was"}, temperature=0.5, max_new_tokens=7, seed=10)

    assert (request.line, request.id, request.thinking_mode) == (3, "3", None)
    assert request.prompt == BOS + "Emma was"
    assert request.settings.sampler == Temperature(0.5)
    assert (request.settings.max_new_tokens, request.settings.seed) == (7, 13)


def test_messages_are_rendered_in_their_mode():
    request = parse({"id": "x", "messages": [USER], "mode": "think-max", "stop": "\n", "seed": 1})

    expected = encode_messages([USER], "thinking", reasoning_effort="max")
    assert (request.id, request.prompt, request.thinking_mode) == ("x", expected, "thinking")
    assert (request.settings.stop, request.settings.seed) == (("\n",), 1)


def test_tools_go_to_the_system_message():
    system = {"role": "system", "content": "S"}
    for messages in ([USER], [system, USER]):
        has_system = messages[0] is system
        first = {**(system if has_system else {"role": "system", "content": ""}), "tools": [TOOL]}
        expected = encode_messages([first, USER], "chat")
        assert parse({"messages": messages, "tools": [TOOL]}).prompt == expected


@pytest.mark.parametrize(
    "given, sampler",
    [
        ({"temperature": 0, "top_p": 0.3}, Greedy()),
        ({"temperature": 2}, TopP(0.9, 2.0)),
        ({"top_k": 5}, TopK(5, 0.8)),
        ({"top_p": None}, Temperature(0.8)),
    ],
    ids=str,
)
def test_a_line_chooses_its_sampler(given, sampler):
    request = parse({"prompt": "x", **given}, temperature=0.8, top_p=0.9)

    assert request.settings.sampler == sampler


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
        ({"messages": []}, "expected a list with at least one message"),
        ({"messages": [{"role": "robot"}]}, "expected a dict with a 'role' from"),
        ({"messages": [{**USER, "task": {}}]}, "field of a wrong type"),
        ({"messages": [USER], "tools": []}, r"tools=\[\]: expected a list with at least one"),
        ({"messages": [{**USER, "tools": [TOOL]}], "tools": [TOOL]}, "give them once"),
        ({"messages": [USER], "mode": "think"}, "mode='think': expected one of non-think"),
        ({"messages": [USER], "mode": []}, r"mode=\[\]: expected one of non-think"),
        ({"prompt": "x", "temperature": -1}, "temperature=-1: expected a number from 0 on"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature=nan"),
        ({"prompt": "x", "temperature": True}, "temperature=True"),
        ({"prompt": "x", "top_p": 1.5}, r"top_p=1.5: expected a number in \(0, 1\]"),
        ({"prompt": "x", "top_k": 0}, "top_k=0: expected a positive integer"),
        ({"prompt": "x", "top_k": 3, "top_p": 0.5}, "top_k=3 and top_p=0.5 exclude each other"),
        ({"prompt": "x", "max_new_tokens": 1.0}, "max_new_tokens=1.0: expected a positive integer"),
        ({"prompt": "x", "seed": 2**32}, "seed=4294967296: expected an integer in"),
        ({"prompt": "x", "stop": ["a", ""]}, "stop=.* none empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_lines_are_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        parse(fields)


@pytest.mark.parametrize("text", [b"{", b"\xff{}", b"[" * 100_000, b"null"], ids=lambda t: t[:4])
def test_what_is_not_json_is_refused(text):
    with pytest.raises(RequestError):
        parse_request(text, 1, Settings())


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

    plan = Plan(path, Settings(), batch_size=2)

    assert [[plan.line(i) for i in range(*batch)] for batch in plan.batches] == [
        *([6, 8], [1]),  # shorter first, in batches of two
        *([3], [7]),  # another sampler, another length
    ]
    assert [plan.request(i).line for i in range(5)] == [6, 8, 1, 3, 7]
    assert plan.request(0).prompt == BOS + 5 * "é"
    assert [(r["line"], r["id"]) for r in plan.malformed] == [(4, None), (5, "1"), (9, "8")]
    assert "an earlier line has this id" in plan.malformed[1]["error"]
    assert (plan.count, plan.last_line, plan.size) == (8, 9, path.stat().st_size)


def test_a_plan_of_nothing(tmp_path):
    write(tmp_path / "in", "", "")

    plan = Plan(tmp_path / "in", Settings(), batch_size=2)

    assert (plan.batches, plan.count, plan.last_line) == ([], 0, 0)


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

    with pytest.raises(JobError, match=r"another job \(requests was 1, is 2\)"):
        sidecar.claim({"requests": 2, "stop": ()})
    sidecar.close()

    write(part_path(tmp_path / "other", 0, 2), {"line": 1})
    sidecar = Sidecar(tmp_path / "other")
    with pytest.raises(JobError, match="does not say of which job"):
        sidecar.claim({})
    sidecar.close()


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
def generator(tokenizer) -> Generator:
    """Random weights, float32 and no rounding: a row does not depend on its batch."""
    cfg = dataclasses.replace(tiny(), vocab_size=tokenizer.vocab_size, max_length=512)
    model = random_model(cfg, scan_layers=False, seed=1)
    return Generator(model, chunks=(16,))


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


def finish(job: Job, generator, tokenizer) -> int:
    with job:
        steps = list(job.run(generator, tokenizer))
        assert sum(step.requests for step in steps) == job.remaining
        return job.finish()


def records(path) -> list[dict]:
    return [json.loads(text) for _, text in read_lines(path)]


def test_results_are_those_of_each_request_alone(requests, generator, tokenizer, tmp_path):
    output = tmp_path / "out"

    assert finish(job_of(requests, output), generator, tokenizer) == 0

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
        (completion,) = generator.generate(
            [prompt],
            sampler=request.settings.sampler,
            max_new_tokens=12,
            stop_ids=tokenizer.stop_ids,
            seed=[request.settings.seed],
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


def test_interrupted_at_any_step_the_files_are_the_same(requests, generator, tokenizer, tmp_path):
    """Every restart goes one step further, with another number of processes each time."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(job_of(requests, whole), generator, tokenizer)

    for stop_after in itertools.count():
        count = 1 + stop_after % 3
        left = 0
        for process in range(count):
            with job_of(requests, broken, process=process, count=count) as job:
                list(itertools.islice(job.run(generator, tokenizer), stop_after))
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
    assert finish(job_of(requests, broken), generator, tokenizer) == 0
    assert broken.read_bytes() == whole.read_bytes()


def test_half_a_batch_is_filled_up(requests, generator, tokenizer, tmp_path):
    """A batch of which one line was written is computed again, and only the other one is added."""
    output = tmp_path / "out"
    finish(job_of(requests, output), generator, tokenizer)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[1:-1]) + lines[-1][:20])

    with job_of(requests, output) as job:
        assert job.total == 6 and job.remaining == 2
        assert list(job.run(generator, tokenizer))[-1].requests > 0
        assert len(output.read_bytes().splitlines()) == len(lines)
        assert job.finish() == 0

    assert output.read_bytes() == whole


def test_another_input_is_refused(requests, generator, tokenizer, tmp_path):
    output = tmp_path / "out"
    finish(job_of(requests, output), generator, tokenizer)

    with pytest.raises(JobError, match="batch_size was 2, is 3"):
        job_of(requests, output, batch_size=3)
    with open(requests, "a") as file:
        file.write('{"prompt": "one more"}\n')
    with pytest.raises(JobError, match=r"another job \(input was .*requests was 7, is 8"):
        job_of(requests, output)


def test_tool_calls_are_parsed(tokenizer, tmp_path, monkeypatch):
    """A generator that says what it is told to."""
    call = encode_messages(
        [USER, {"role": "assistant", "content": "Yes.", "tool_calls": [TOOL_CALL]}], "chat"
    ).partition("</think>")[2]
    tokens = tokenizer.encode(call)

    class Scripted:
        cfg = tiny()

        def stream(self, prompts, **_):
            for token in tokens:
                yield np.full(len(prompts), token)

    write(tmp_path / "in", {"messages": [USER], "tools": [TOOL]}, {"messages": [USER]})
    job = Job(tmp_path / "in", tmp_path / "out", Settings(), batch_size=2, identity={})
    assert finish(job, Scripted(), tokenizer) == 0

    for result in records(tmp_path / "out"):
        assert result["content"] == "Yes." and result["finish_reason"] == "stop"
        assert result["text"] + EOS == call
        (parsed,) = result["tool_calls"]
        assert parsed["function"] == TOOL_CALL["function"]
        assert result["completion_tokens"] == len(tokens)


TOOL_CALL = {"function": {"name": "walk", "arguments": '{"to": "Bath", "miles": 3}'}}
