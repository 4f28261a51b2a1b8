"""The HTTP server: shapes of answers, errors, streams, many clients, and how it ends.

All but the last test have a stand-in for the engine, which writes a text that the test gives.
"""

import asyncio
import contextlib
import dataclasses
import gzip
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import NANO, ROOT, environment
from v4jax import nano
from v4jax.inference.grammar import Grammar, GrammarError
from v4jax.inference.requests import EngineFullError
from v4jax.inference.sampling import Sampling
from v4jax.inference.server import ServerSettings, bind, make_app
from v4jax.inference.server.choice import Update
from v4jax.inference.server.fields import Fields
from v4jax.inference.server.prompts import EFFORTS, encode_chat, mode_of
from v4jax.inference.server.requests import read_chat
from v4jax.inference.server.responses import Answer
from v4jax.inference.server.run import GracefulServer
from v4jax.inference.tool_grammar import call_grammar
from v4jax.text.format import CALLS_END, CALLS_START, DSML, SPECIAL_TOKENS, THINK_END
from v4jax.text.prompt import with_bos
from v4jax.text.stream import Delta
from v4jax.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(NANO)
HELLO = [{"role": "user", "content": "Hello"}]
# The reasoning of nano ends when it likes; so it does soon.
BIAS = {str(TOKENIZER.id(THINK_END)): 10}
CALL = (
    f'{CALLS_START}>\n<{DSML}invoke name="walk">\n<{DSML}parameter name="to" string="true">Box "Hill"'
    f'</{DSML}parameter>\n<{DSML}parameter name="km" string="false">7</{DSML}parameter>\n'
    f'</{DSML}invoke>\n<{DSML}invoke name="rest">\n\n</{DSML}invoke>\n{CALLS_END}'
)
TOOLS = [{"type": "function", "function": {"name": "walk", "parameters": {"type": "object"}}}]


def _format(schema: dict) -> dict:
    """The field that asks for JSON of a schema."""
    described = {"name": "answer", "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": described}}


def _named(function: str) -> dict:
    """The field that asks for a call of a function."""
    return {"type": "function", "function": {"name": function}}


def _tools(parameters: dict, **options) -> list[dict]:
    described = {"name": "walk", "parameters": parameters, **options}
    return [{"type": "function", "function": described}]


@dataclasses.dataclass
class Logprob:
    logprob: float
    top: tuple[tuple[int, float], ...]


class FakeRequest:
    """What the server sees of a request."""

    def __init__(self, prompt, sampling, script, listener):
        self.prompt, self.sampling, self.listener = prompt, sampling, listener
        self.grammar: Grammar | None = None
        self.prompt_length, self.cached_tokens = len(prompt), min(2, len(prompt))
        self.script: list[int] = script
        self.tokens: list[int] = []
        self.logprobs: list[Logprob] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.submitted_at = time.monotonic()
        self.first_token_at: float | None = None
        self.finished_at: float | None = None
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


@dataclasses.dataclass
class FakeStats:
    queued: int
    running: int
    slots: int
    pages: int = 100
    pages_used: int = 5
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0


class FakeEngine:
    """Writes `reply`, then the end of the sentence: a token of each running request a step.

    A reply may be several texts, which requests get in turn.
    """

    def __init__(
        self, reply: str | list[str] = "It was fine.", *, slots: int = 8, limit: int = 1000
    ):
        self.cfg, self.tokenizer, self.adapters = nano(), TOKENIZER, ("tuned", "other")
        self.reply, self.slots, self.limit = reply, slots, limit
        self.pause = 0.0  # seconds of a step
        self.fault: str | None = None
        self.all: list[FakeRequest] = []
        self._waiting: list[FakeRequest] = []
        self._running: list[FakeRequest] = []
        self._lock, self._ends = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self.total = FakeStats(0, 0, slots)

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        listener: Callable[[FakeRequest], None] | None = None,
        grammar: Grammar | None = None,
        adapter: str | None = None,
    ) -> FakeRequest:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        replies = [self.reply] if isinstance(self.reply, str) else self.reply
        text = replies[len(self.all) % len(replies)]
        script = [*self.tokenizer.encode(text), self.tokenizer.stop_ids[0]]
        request = FakeRequest(ids, sampling, script, listener)
        request.grammar, request.adapter = grammar, adapter
        with self._lock:
            if len(self._waiting) >= self.limit:
                raise EngineFullError(f"{self.limit} requests wait already.")
            self._waiting.append(request)
            self.all.append(request)
        return request

    def start(self) -> None:
        self._ends.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self, grace: float = 0.0) -> None:
        self._ends.set()
        if self._thread is not None:
            self._thread.join()

    def stats(self) -> FakeStats:
        with self._lock:
            counts = {"queued": len(self._waiting), "running": len(self._running)}
        return dataclasses.replace(self.total, **counts)

    def _run(self) -> None:
        while not self._ends.is_set():
            with self._lock:
                room = self.slots - len(self._running)
                self._running += self._waiting[:room]
                del self._waiting[:room]
                cancelled = [r for r in self._waiting if r.is_cancelled]
                self._waiting = [r for r in self._waiting if not r.is_cancelled]
                running = [*self._running]
            for request in cancelled:
                self._end(request, "cancelled")
            for request in running:
                self._step(request)
            with self._lock:
                self._running = [r for r in self._running if r.finish_reason is None]
            time.sleep(self.pause if running else 0.001)

    def _step(self, request: FakeRequest) -> None:
        if request.is_cancelled:
            return self._end(request, "cancelled")
        if self.fault:
            request.error = self.fault
            return self._end(request, "error")
        if request.first_token_at is None:
            request.first_token_at = time.monotonic()
            self.total.prompt_tokens += request.prompt_length
        token = request.script[len(request.tokens)]
        if request.sampling.logprobs is not None:
            top = [(token, -0.5), (5, -1.5), (6, -float("inf"))][: request.sampling.logprobs]
            request.logprobs.append(Logprob(-0.5, tuple(top)))
        request.tokens.append(token)
        self.total.generated_tokens += 1
        if token in self.tokenizer.stop_ids:
            return self._end(request, "stop")
        if len(request.tokens) >= request.sampling.max_new_tokens:
            return self._end(request, "length")
        if request.listener:
            request.listener(request)
        return None

    def _end(self, request: FakeRequest, reason: str) -> None:
        request.finished_at, request.finish_reason = time.monotonic(), reason
        if request.listener:
            request.listener(request)


class Live:
    """A server in a thread of this process, at a port of the loopback."""

    def __init__(self, engine, grace: float = 5.0, **options):
        options = {"model": "nano", **options}
        self.engine = engine
        self.app = make_app(engine, ServerSettings(**options))
        self.sock = bind("127.0.0.1", 0)
        self.port = self.sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = GracefulServer(self.app, "127.0.0.1", self.port, grace)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.sock]})

    def __enter__(self) -> Self:
        self.thread.start()
        wait_for(lambda: self.server.started)
        self.client = httpx.Client(base_url=self.url, timeout=30)
        return self

    def __exit__(self, *error) -> None:
        self.client.close()
        self.stop()
        self.sock.close()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def chat(self, **fields) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json={"messages": HELLO, **fields})

    def complete(self, **fields) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": "Emma", **fields})


def wait_for(holds: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with Live(FakeEngine()) as live:
        yield live


@pytest.fixture
def live(server) -> Live:
    """The shared server, with an engine as new."""
    server.engine.reply, server.engine.pause, server.engine.fault = "It was fine.", 0.0, None
    server.engine.limit = 1000
    server.engine.all.clear()
    return server


def events(response: httpx.Response) -> list[dict]:
    """The objects of a stream, read as plain lines."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = [b for b in response.text.split("\n\n") if b and not b.startswith(":")]
    assert blocks[-1] == "data: [DONE]"
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block[6:]) for block in blocks[:-1]]


def joined(chunks: list[dict], index: int = 0) -> dict:
    """The message, its end and its calls that the chunks of a choice add up to."""
    message: dict = {"content": "", "reasoning_content": "", "tool_calls": [], "reasons": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            message["reasons"] += [choice["finish_reason"]] if choice["finish_reason"] else []
            for name in ("content", "reasoning_content"):
                message[name] += choice["delta"].get(name) or ""
            for call in choice["delta"].get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    message["tool_calls"].append(dict(call["function"]))
                else:
                    function = message["tool_calls"][call["index"]]
                    function["arguments"] += call["function"]["arguments"]
    return message


# Answers.


def test_a_chat_is_answered(live):
    live.engine.pause = 0.005
    response = live.chat(max_tokens=50)

    body = response.json()
    assert response.status_code == 200
    assert response.elapsed.total_seconds() < 10  # it was not a heartbeat that woke the reader
    assert (body["object"], body["model"]) == ("chat.completion", "nano")
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    message = choice["message"]
    assert (message["role"], message["content"]) == ("assistant", "It was fine.")
    assert message["reasoning_content"] is None and "tool_calls" not in message
    (request,) = live.engine.all
    assert request.prompt == TOKENIZER.encode(TOKENIZER.render(HELLO).text)
    assert body["usage"] == {
        "prompt_tokens": len(request.prompt),
        "completion_tokens": len(request.script),
        "total_tokens": len(request.prompt) + len(request.script),
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_a_text_is_continued(live):
    body = live.complete(max_tokens=3).json()

    (choice,) = body["choices"]
    expected = TOKENIZER.decode(TOKENIZER.encode("It was fine.")[:3])
    assert (choice["text"], choice["finish_reason"]) == (expected, "length")
    assert body["object"] == "text_completion"
    assert live.engine.all[0].prompt == TOKENIZER.encode(with_bos("Emma"))


@pytest.mark.parametrize(
    "prompt, count",
    [(["Emma", "was"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2), ([True], 0), ([[5, 10**6]], 0)],
)
def test_prompts_may_be_several_and_token_ids(live, prompt, count):
    response = live.complete(prompt=prompt, n=2)

    assert response.status_code == (200 if count else 400)
    assert len(response.json().get("choices", [])) == 2 * count
    assert [c["index"] for c in response.json().get("choices", [])] == list(range(2 * count))


@pytest.mark.parametrize("is_streamed", [False, True])
def test_reasoning_and_tool_calls_have_their_own_fields(live, is_streamed):
    live.engine.reply = f"I think.{THINK_END}I go.{CALL}"

    response = live.chat(mode="think-high", tools=TOOLS, stream=is_streamed)

    if is_streamed:
        message = joined(events(response))
        assert message["reasons"] == ["tool_calls"]
        calls = message["tool_calls"]
    else:
        (choice,) = response.json()["choices"]
        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
        assert all(call["id"] and call["type"] == "function" for call in message["tool_calls"])
        calls = [call["function"] for call in message["tool_calls"]]
        reasoning = response.json()["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert reasoning == len(TOKENIZER.encode(f"I think.{THINK_END}"))
    assert (message["reasoning_content"], message["content"]) == ("I think.", "I go.")
    assert [call["name"] for call in calls] == ["walk", "rest"]
    assert json.loads(calls[0]["arguments"]) == {"to": 'Box "Hill"', "km": 7}
    assert calls[1]["arguments"] == "{}"


def test_a_chunk_has_reasoning_or_what_follows_it():
    """Tokens of a busy server come several at a time, and clients read one text of a chunk."""
    fields = {"messages": HELLO, "mode": "think-high", "stream": True}
    asked = read_chat(fields, FakeEngine(), ServerSettings(model="nano"))
    came = [Delta("reasoning", "I "), Delta("reasoning", "think."), Delta("content", "Two.")]

    chunks = Answer(asked, TOKENIZER).chunks(0, Update(came, finish_reason="stop"))

    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"reasoning_content": "I think."},
        {"content": "Two."},
        {},
    ]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_without_parallel_calls_the_first_ends_the_answer(live, is_streamed):
    live.engine.reply = CALL

    response = live.chat(tools=TOOLS, parallel_tool_calls=False, stream=is_streamed)

    if is_streamed:
        message = joined(events(response))
        calls = message["tool_calls"]
    else:
        calls = [c["function"] for c in response.json()["choices"][0]["message"]["tool_calls"]]
    assert [call["name"] for call in calls] == ["walk"]
    json.loads(calls[0]["arguments"])
    wait_for(lambda: live.engine.all[0].finish_reason)
    assert len(live.engine.all[0].tokens) < len(live.engine.all[0].script)


def test_arguments_stream_as_they_are_written(live):
    live.engine.reply, live.engine.pause = CALL, 0.002

    chunks = events(live.chat(tools=TOOLS, stream=True))

    assert sum(bool(c["choices"][0]["delta"].get("tool_calls")) for c in chunks) > 4


def test_a_stream_has_its_usage_at_the_end_if_asked(live):
    options = {"stream_options": {"include_usage": True}}
    chunks = events(live.chat(stream=True, **options))

    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(chunks)["content"] == "It was fine."
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(live.engine.all[0].script)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    texts = events(live.complete(stream=True, **options))
    assert "".join(c["choices"][0]["text"] for c in texts[:-1]) == "It was fine."
    assert "usage" not in events(live.complete(stream=True))[0]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_stop_text_ends_the_answer_and_the_request(live, is_streamed):
    live.engine.reply = f"It is fine.{THINK_END}It was fine. And so on, and so on."
    live.engine.pause = 0.005

    fields = {"mode": "think-high", "stop": ["fine", "XYZ"], "stream": is_streamed}
    response = live.chat(**fields)

    message = joined(events(response)) if is_streamed else response.json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("It is fine.", "It was ")
    wait_for(lambda: live.engine.all[0].finish_reason == "cancelled")


def test_a_choice_that_a_stop_text_ends_does_not_wait_for_others(live):
    live.engine.reply, live.engine.pause = ["STOP " * 99, "It was fine. " * 8], 0.01

    response = live.chat(n=2, stop="STOP")

    texts = [choice["message"]["content"] for choice in response.json()["choices"]]
    assert texts == ["", "It was fine. " * 8]
    assert len(live.engine.all[0].tokens) < len(live.engine.all[1].tokens)


def test_half_characters_are_held_back(live):
    live.engine.reply = "a 😀 é 漢 b"
    chunks = events(live.chat(stream=True))

    assert joined(chunks)["content"] == live.engine.reply
    assert not any("\ufffd" in chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_n_choices_draw_with_seeds_in_a_row(live, is_streamed):
    response = live.chat(n=3, seed=2**32 - 2, stream=is_streamed)

    assert [r.sampling.seed for r in live.engine.all] == [2**32 - 2, 2**32 - 1, 0]
    if is_streamed:
        chunks = events(response)
        assert [joined(chunks, i)["content"] for i in range(3)] == ["It was fine."] * 3
    else:
        assert [choice["index"] for choice in response.json()["choices"]] == [0, 1, 2]


def test_a_request_without_a_seed_gets_one(live):
    live.chat()
    live.chat()

    assert live.engine.all[0].sampling.seed != live.engine.all[1].sampling.seed


def test_log_probabilities_of_a_chat(live):
    live.engine.reply = f"So.{THINK_END}é😀"
    body = live.chat(mode="think-high", logprobs=True, top_logprobs=3).json()

    logprobs = body["choices"][0]["logprobs"]
    content = logprobs["content"]
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == "é😀"
    assert [len(entry["top_logprobs"]) for entry in content] == [3] * len(content)
    assert content[0]["top_logprobs"][0] == {
        key: content[0][key] for key in ("token", "logprob", "bytes")
    }
    assert content[0]["top_logprobs"][2]["logprob"] == -9999.0
    assert "".join(e["token"] for e in logprobs["reasoning_content"]) == f"So.{THINK_END}"
    assert live.engine.all[0].sampling.logprobs == 3
    without = live.chat(logprobs=True).json()["choices"][0]["logprobs"]
    assert without["content"][0]["top_logprobs"] == []
    chunks = events(live.chat(logprobs=True, stream=True))
    entries = [e for c in chunks for e in (c["choices"][0]["logprobs"] or {}).get("content", [])]
    assert len(entries) == len(live.engine.all[-1].script) - 1


def test_log_probabilities_of_a_continued_text(live):
    logprobs = live.complete(logprobs=2).json()["choices"][0]["logprobs"]

    assert "".join(logprobs["tokens"]) == "It was fine."
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
    assert set(logprobs["token_logprobs"]) == {-0.5}
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])


def test_all_of_sampling_reaches_the_engine(live):
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": -1}
    given |= {"presence_penalty": 1.0, "frequency_penalty": -0.5, "repetition_penalty": 1.1}
    assert live.chat(**given, logit_bias={"5": -100, "7": 2.5}).status_code == 200

    sampling = live.engine.all[0].sampling
    seed = {"seed": 2**32 - 1}
    assert {name: getattr(sampling, name) for name in given} == given | seed
    assert sampling.logit_bias == {5: -100.0, 7: 2.5}
    live.chat(top_k=-1, **dict.fromkeys(given.keys() - {"top_k"}))
    assert live.engine.all[1].sampling.top_k is None
    assert live.engine.all[1].sampling.temperature == 1.0


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6, "max_tokens": 5}, 6),
        ({"max_tokens": 7.0}, 7),
        ({}, 100),
        ({"max_tokens": None}, 100),
    ],
)
def test_how_many_tokens_at_most(fields, expected):
    with Live(FakeEngine(), max_new_tokens=100) as live:
        live.chat(**fields)
        assert live.engine.all[0].sampling.max_new_tokens == expected


# Prompts.


def mode(values: dict, tokenizer=TOKENIZER, default="non-think") -> str:
    return mode_of(Fields(values), tokenizer, default)


def test_every_effort_is_a_mode_of_every_release():
    for release in ("april", "0731"):
        tokenizer = Tokenizer(NANO, release=release)
        modes = {effort: mode({"reasoning_effort": effort}, tokenizer) for effort in EFFORTS}
        assert modes["none"] == modes["minimal"] == "non-think"
        assert modes["low"] == ("think-high" if release == "april" else "think-low")
        assert modes["medium"] == modes["high"] == "think-high"
        assert modes["xhigh"] == modes["max"] == "think-max"


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, "think-max"),
        ({"mode": "think-high", "reasoning_effort": "none"}, "think-high"),
        ({"chat_template_kwargs": {"thinking": True}}, "think-high"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "non-think"),
        ({"chat_template_kwargs": {"thinking": True, "reasoning_effort": "max"}}, "think-max"),
        ({"chat_template_kwargs": {"thinking": False}, "reasoning_effort": "max"}, "non-think"),
        ({"thinking": {"type": "enabled"}}, "think-high"),
        ({"thinking": {"type": "disabled"}}, "non-think"),
    ],
)
def test_what_other_servers_call_thinking(values, expected):
    assert mode(values, default="think-max") == expected


def test_content_parts_and_developer_messages_are_understood():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "developer", "content": "S"}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hel\n\nlo"}]

    ids, _ = encode_chat(TOKENIZER, messages, "non-think", None)

    assert ids == TOKENIZER.encode(TOKENIZER.render(plain).text)


SPELLED = st.lists(st.sampled_from([*SPECIAL_TOKENS[:9], "a", "<", " ", "｜"])).map("".join)


@given(text=SPELLED)
@settings(max_examples=100, deadline=None)
def test_a_token_that_is_spelled_out_is_text(text):
    def conversation(text: str) -> list[dict]:
        arguments = json.dumps({"to": text, text: [text]})
        call = {"id": text, "function": {"name": text, "arguments": arguments}}
        return [
            {"role": "user", "content": text},
            {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [call]},
            {"role": "tool", "content": [{"type": "text", "text": text}], "tool_call_id": text},
        ]

    def tools(text: str) -> list[dict]:
        return [{"function": {"name": text, "description": text}}]

    def special(ids: list[int]) -> list[int]:
        return [index for index in ids if TOKENIZER.decode([index], keep_special=True) in tokens]

    tokens = set(SPECIAL_TOKENS)
    ids, _ = encode_chat(TOKENIZER, conversation(text), "think-high", tools(text))
    plain, _ = encode_chat(TOKENIZER, conversation("x"), "think-high", tools("x"))

    assert special(ids) == special(plain)
    rendered = TOKENIZER.decode(ids, keep_special=True)
    assert rendered.count(text) >= 7


def test_calls_that_are_given_back_render_as_they_were():
    call = {"id": "1", "function": {"name": "walk", "arguments": '{"to": "\\u00e9", "km": 7.50}'}}
    messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}, {"role": "tool"}]

    ids, _ = encode_chat(TOKENIZER, messages, "non-think", None)

    assert ids == TOKENIZER.encode(TOKENIZER.render(messages).text)


# Errors.


def error(response: httpx.Response, status: int) -> dict:
    body = response.json()
    assert response.status_code == status, body
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert isinstance(body["error"]["message"], str) and body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    "fields, param, text",
    [
        ({"messages": None}, "messages", "one at least"),
        ({"messages": []}, "messages", "one at least"),
        ({"messages": "Hi"}, "messages", "list of messages"),
        ({"messages": [{"role": "bard"}]}, "messages", "role"),
        ({"messages": [{"role": "system", "content": "S"}]}, "messages", "asks for no reply"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "UTF-8"),
        ({"messages": [{"role": "user", "content": "\ufdd0"}]}, "messages", "FDD0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            *("messages", "text only"),
        ),
        ({"model": 3}, "model", "a text"),
        ({"temperature": "hot"}, "temperature", "a number"),
        ({"temperature": -1}, "temperature", "a number"),
        ({"temperature": True}, "temperature", "a number"),
        ({"top_p": 0}, "top_p", "(0, 1]"),
        ({"top_p": 2}, "top_p", "[0, 1]"),
        ({"top_k": -2}, "top_k", "an integer"),
        ({"min_p": 1.5}, "min_p", "a number"),
        ({"seed": 0.5}, "seed", "an integer"),
        ({"max_tokens": 0}, "max_tokens", "an integer"),
        ({"n": 65}, "n", "1..64"),
        ({"stop": ""}, "stop", "none empty"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": [1]}, "stop", "texts"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "[-100, 100]"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "token ids in 0..1279"),
        ({"presence_penalty": 3}, "presence_penalty", "[-2, 2]"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        ({"logprobs": 2}, "logprobs", "true or false"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0..20"),
        ({"tools": {}}, "tools", "a list"),
        ({"tools": [1]}, "messages", "Tool 1"),
        ({"tool_choice": "any"}, "tool_choice", "none, auto, required, or a function"),
        ({"tool_choice": "required"}, "tool_choice", "tools beside it"),
        ({"tool_choice": _named("walk")}, "tool_choice", "tools beside it"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice.type", "function"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": 3}}},
            *("tool_choice.function.name", "name=3: expected one of walk"),
        ),
        (
            {"tools": TOOLS, "tool_choice": _named("ride")},
            *("tool_choice.function.name", "name='ride': expected one of walk"),
        ),
        (
            {"tools": _tools({"anyOf": [{}]}), "tool_choice": "required"},
            *("tools", "tools: parameters of 'walk' have 'anyOf'"),
        ),
        ({"tools": _tools({"if": {}}, strict=True)}, "tools", "parameters of 'walk' have 'if'"),
        (
            _format({}) | {"tools": TOOLS, "tool_choice": "required"},
            *("response_format", "beside tools: expected tool_choice"),
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object or json_sch"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema.schema",
            "a JSON schema",
        ),
        (_format({"type": "integer", "minimum": "a"}), "response_format", "minimum"),
        (_format({"not": {}}), "response_format", 'Unimplemented keys: ["not"]'),
        (_format({}) | {"tools": TOOLS}, "response_format", "beside tools: expected tool_choice"),
        ({"response_format": "json"}, "response_format", "an object"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "minimal"),
        ({"reasoning_effort": ["max"]}, "reasoning_effort", "minimal"),
        ({"mode": "think-low"}, "mode", "release 'april'"),
        ({"chat_template_kwargs": {"thinking": 1}}, "chat_template_kwargs.thinking", "true or"),
        ({"thinking": {"type": "adaptive"}}, "thinking.type", "disabled"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or"),
        ({"functions": [{}]}, "functions", "does not have it"),
        ({"guided_json": {}}, "guided_json", "does not have it"),
        ({"max_tokens": 10**9}, "messages", "maximum context length is"),
    ],
)
def test_a_wrong_field_is_named(live, fields, param, text):
    body = json.dumps({"messages": HELLO, **fields})
    headers = {"content-type": "application/json"}
    found = error(live.client.post("/v1/chat/completions", content=body, headers=headers), 400)

    assert found["param"] == param
    assert text in found["message"]
    assert found["type"] == "invalid_request_error"
    assert not live.engine.all


def test_a_schema_comes_to_the_engine_and_into_the_prompt(live):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    system = [{"role": "system", "content": "Be <｜User｜> brief."}]
    assert live.chat(**_format(schema), n=2).status_code == 200
    assert live.chat(**_format(schema), messages=system + HELLO).status_code == 200
    assert live.chat(response_format={"type": "json_object"}).status_code == 200
    assert live.chat(response_format={"type": "text"}).status_code == 200
    assert live.complete(**_format(schema)).status_code == 200
    ignored = live.chat(**_format(schema), tools=TOOLS, tool_choice="none")
    assert ignored.status_code == 200
    found = live.engine.all
    expected = Grammar.json_schema(schema)
    kinds = [expected] * 3 + [Grammar.json_object(), None, expected, expected]
    assert [request.grammar for request in found] == kinds
    texts = [TOKENIZER.decode(request.prompt, keep_special=True) for request in found]
    line = 'schema to reply:\n{"type": "object", "properties": {"a": {"type": "integer"}}}'
    has = [line in text for text in texts]
    assert has == [True, True, True, False, False, False, True]
    assert "brief." in texts[2]
    told = [{"role": "system", "content": "S", "response_format": {"type": "array"}}]
    twice = live.chat(**_format(schema), messages=told + HELLO)
    assert "give them once" in twice.json()["error"]["message"]


def test_calls_that_are_asked_for_come_to_the_engine_as_a_grammar(live):
    """The tools are in the prompt then, and with tool_choice none neither is there."""
    strict = _tools({"type": "object", "properties": {"to": {"type": "string"}}}, strict=True)
    required, name = {"tool_choice": "required"}, {"tool_choice": _named("walk")}
    live.engine.reply = CALL
    for fields in (required, name, {**required, "parallel_tool_calls": False}, {}):
        response = live.chat(tools=strict, **fields)
        (choice,) = response.json()["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "walk"
    live.chat(tools=TOOLS)
    for tools in (strict, TOOLS):
        assert live.chat(tools=tools, tool_choice="none").status_code == 200
    found = live.engine.all
    assert [request.grammar for request in found] == [
        call_grammar(strict, TOKENIZER),
        call_grammar(strict, TOKENIZER, name="walk"),
        call_grammar(strict, TOKENIZER, is_parallel=False),
        call_grammar(strict, TOKENIZER, is_required=False),
        *(None, None, None),
    ]
    texts = [TOKENIZER.decode(request.prompt, keep_special=True) for request in found]
    assert ['{"name": "walk"' in text for text in texts] == [True] * 5 + [False] * 2


def test_a_grammar_that_the_engine_refuses_is_said_of_its_field(live, monkeypatch):
    def submit(*args, **kwargs):
        raise GrammarError("too large.")

    monkeypatch.setattr(live.engine, "submit", submit)
    for fields, param in (
        ({"tools": TOOLS, "tool_choice": "required"}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ):
        found = error(live.chat(**fields), 400)
        assert (found["param"], found["message"]) == (param, f"{param}: too large.")


def test_structured_output_that_is_not_installed_is_said(live, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    error = live.chat(response_format={"type": "json_object"}).json()["error"]
    assert "v4jax[structured]" in error["message"] and error["param"] == "response_format"


def test_the_context_may_be_shorter_than_the_models():
    with Live(FakeEngine(), max_context=20) as live:
        assert live.client.get("/v1/models/nano").json()["max_model_len"] == 20
        assert "length is 20 tokens" in error(live.complete(prompt=[5] * 20), 400)["message"]
        assert live.complete(prompt=[5] * 15).status_code == 200
        assert live.engine.all[0].sampling.max_new_tokens == 5


def test_a_prompt_that_does_not_fit_says_how_long_it_is(live):
    found = error(live.complete(prompt=[5] * (live.engine.cfg.max_length)), 400)

    assert found["code"] == "context_length_exceeded"
    assert f"maximum context length is {live.engine.cfg.max_length} tokens" in found["message"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b'"x"', b"\xff", b'{"n": NaN}', b"[" * 10**5, b'{"n": 1' + b"0" * 5000],
)
def test_a_body_that_is_no_object_is_refused(live, content):
    headers = {"content-type": "application/json"}
    response = live.client.post("/v1/completions", content=content, headers=headers)

    assert "The body" in error(response, 400)["message"]


def test_deep_json_is_refused(live):
    deep = json.loads("[" * 500 + "]" * 500)

    assert "in each other" in error(live.chat(tools=deep), 400)["message"]


def test_another_content_type_is_refused(live):
    response = live.client.post("/v1/chat/completions", data={"messages": "x"})

    assert "application/json" in error(response, 400)["message"]


def test_unknown_fields_are_ignored_and_named(live):
    response = live.chat(colour="red", user="me", **{"two words": 1})

    assert response.status_code == 200
    assert response.headers["x-v4jax-ignored"] == "colour"


def test_unknown_paths_methods_and_models(live):
    assert "There is no GET" in error(live.client.get("/v1/embeddings"), 404)["message"]
    assert "/%00" not in error(live.client.get("/%00%ff"), 404)["message"]
    assert "allow" in live.client.get("/v1/completions").headers
    error(live.client.get("/v1/completions"), 405)
    assert error(live.chat(model="gpt"), 404)["code"] == "model_not_found"
    error(live.client.get("/v1/models/gpt"), 404)


@pytest.mark.parametrize("stream", [False, True])
def test_the_field_model_names_an_adapter(live, stream):
    for name in ("other", "nano", None):
        answers = [live.chat(model=name, stream=stream)]
        body = {"prompt": "Emma", "model": name, "stream": stream}
        answers.append(live.client.post("/v1/completions", json=body))
        for answer in answers:
            shown = answer.text.partition("data: ")[2].partition("\n")[0] if stream else answer.text
            assert json.loads(shown)["model"] == (name or "nano")
        expected = "other" if name == "other" else None
        assert [request.adapter for request in live.engine.all[-2:]] == [expected] * 2
    assert "'nano', 'tuned', 'other'" in error(live.chat(model=""), 404)["message"]


def test_models_are_listed(live):
    model, *adapters = live.client.get("/v1/models").json()["data"]

    assert model == live.client.get("/v1/models/nano").json()
    assert [(m["id"], m["parent"]) for m in adapters] == [("tuned", "nano"), ("other", "nano")]
    assert adapters[0] == live.client.get("/v1/models/tuned").json()
    assert model == adapters[0] | {"id": "nano", "parent": None}
    assert model["modes"] == list(TOKENIZER.modes)
    assert model["max_model_len"] == live.engine.cfg.max_length


def test_an_api_key_is_asked_for():
    with Live(FakeEngine(), api_key="secret") as live:
        for headers in ({}, {"authorization": "secret"}, {"authorization": "Bearer \xe9"}):
            raw = {name: value.encode("latin-1") for name, value in headers.items()}
            found = error(live.client.get("/v1/models", headers=raw), 401)
            assert found["code"] == "invalid_api_key"
        error(live.client.get("/v1/nothing"), 401)
        error(live.chat(), 401)
        good = {"authorization": "Bearer secret"}
        assert live.client.get("/v1/models", headers=good).status_code == 200
        assert live.client.get("/health").status_code == 200


def test_a_body_over_the_limit_is_refused():
    with Live(FakeEngine(), max_body_bytes=1000) as live:
        for size in (1001, 3000, 10**5):
            text = "x" * size
            assert error(live.complete(prompt=text), 413)["code"] == "request_too_large"
        pieces = iter([b'{"prompt": "', *[b"x" * 100] * 20, b'"}'])
        headers = {"content-type": "application/json"}
        error(live.client.post("/v1/completions", content=pieces, headers=headers), 413)
        assert live.complete().status_code == 200


def test_a_full_queue_is_said_and_leaves_nothing_behind(live):
    live.engine.limit, live.engine.pause = 0, 0.0
    response = live.chat()

    assert error(response, 429)["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "1"
    live.engine.limit, live.engine.slots = 3, 0
    try:
        error(live.chat(n=5), 429)
        wait_for(lambda: all(r.finish_reason == "cancelled" for r in live.engine.all))
        assert len(live.engine.all) == 3
    finally:
        live.engine.slots = 8


def test_what_the_engine_refuses_is_the_requests_fault(live, monkeypatch):
    def submit(*args, **kwargs):
        raise ValueError("3 pages are more than there are.")

    monkeypatch.setattr(live.engine, "submit", submit)
    assert "3 pages" in error(live.chat(), 400)["message"]


def test_a_fault_of_the_engine_is_said(live):
    live.engine.fault = "out of memory"

    assert "out of memory" in error(live.chat(), 500)["message"]
    last = events(live.chat(stream=True))[-1]
    assert "out of memory" in last["error"]["message"]


def test_a_request_that_takes_too_long_is_given_up():
    engine = FakeEngine()
    engine.pause = 0.1
    with Live(engine, timeout=0.3) as live:
        assert error(live.chat(), 503)["code"] == "timeout"
        assert events(live.chat(stream=True))[-1]["error"]["code"] == "timeout"
        wait_for(lambda: all(r.finish_reason == "cancelled" for r in engine.all))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "system", "assistant", "tool", "developer"])
            | json_values
        },
        optional={
            "content": st.text(max_size=8) | json_values,
            "tool_calls": st.lists(
                st.fixed_dictionaries(
                    {},
                    optional={
                        "id": json_values,
                        "function": st.fixed_dictionaries(
                            {}, optional={"name": json_values, "arguments": json_values}
                        ),
                    },
                )
                | json_values,
                max_size=2,
            )
            | json_values,
            **dict.fromkeys(("reasoning_content", "tool_call_id", "task", "tools"), json_values),
            **dict.fromkeys(("wo_eos", "response_format"), json_values),
        },
    )
    | json_values,
    max_size=3,
)
FIELDS = (
    *("model", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p"),
    *("top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("logit_bias", "logprobs", "top_logprobs", "n", "seed", "stop", "tools", "tool_choice"),
    *("parallel_tool_calls", "reasoning_effort", "chat_template_kwargs", "mode", "thinking"),
    *("response_format", "echo", "suffix", "functions", "user", "stream", "prompt"),
)
numbers = st.integers(-3, 70) | st.floats(-3, 3)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "messages": messages | st.just(HELLO) | json_values,
        **{name: json_values | numbers | st.booleans() for name in FIELDS},
    },
)


@given(body=bodies, path=st.sampled_from(["chat/completions", "completions"]))
@settings(max_examples=250, deadline=None)
def test_no_body_is_a_fault_of_the_server(server, body, path):
    server.engine.pause, server.engine.fault = 0.0, None
    content = json.dumps(body)
    headers = {"content-type": "application/json"}
    response = server.client.post(f"/v1/{path}", content=content, headers=headers)

    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error(response, response.status_code)


# Clients that come, many at once, and go.


def test_the_official_client(live):
    live.engine.reply = f"I think.{THINK_END}I go.{CALL}"
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["nano", *live.engine.adapters]
        asked = {"model": "nano", "messages": HELLO, "tools": TOOLS, "reasoning_effort": "high"}
        reply = client.chat.completions.create(**asked)
        message = reply.choices[0].message
        assert (message.content, message.reasoning_content) == ("I go.", "I think.")
        assert [call.function.name for call in message.tool_calls] == ["walk", "rest"]
        assert reply.usage.completion_tokens_details.reasoning_tokens > 1
        with client.chat.completions.stream(
            **asked, stream_options={"include_usage": True}
        ) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.content == "I go."
        calls = final.choices[0].message.tool_calls
        assert json.loads(calls[0].function.arguments) == {"to": 'Box "Hill"', "km": 7}
        assert final.usage.completion_tokens == reply.usage.completion_tokens
        text = client.completions.create(model="nano", prompt="Emma", max_tokens=4, logprobs=1)
        assert text.choices[0].finish_reason == "length"
        with pytest.raises(openai.BadRequestError, match="temperature=-1"):
            client.chat.completions.create(model="nano", messages=HELLO, temperature=-1)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt", messages=HELLO)
        live.engine.limit = 0
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="nano", messages=HELLO)


def test_the_example_of_the_guide_runs(live, capsys, tmp_path):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    live.engine.reply = f"I think.{THINK_END}Two."

    example = tmp_path / "example.py"
    example.write_text(block.replace("http://127.0.0.1:8000", live.url), encoding="utf-8")

    runpy.run_path(os.fspath(example))

    assert capsys.readouterr().out.count("Two.") >= 2


def test_five_hundred_clients_lose_nothing_in_bounded_memory():
    engine = FakeEngine("It was a fine morning. " * 10, slots=64)

    async def ask(client: httpx.AsyncClient, number: int) -> bool:
        fields = {"messages": HELLO, "max_tokens": 24, "stream": number % 2 == 0}
        response = await client.post("/v1/chat/completions", json=fields)
        if not fields["stream"]:
            return response.json()["choices"][0]["finish_reason"] == "length"
        return joined(events(response))["reasons"] == ["length"]

    async def all_of(url: str) -> list[bool]:
        limits = httpx.Limits(max_connections=500)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(500)))

    with Live(engine) as live:
        tracemalloc.start()
        try:
            assert all(asyncio.run(all_of(live.url)))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 80e6  # with the clients, which are in this process too
        assert len(engine.all) == 500
        assert not live.app.state.service._live
        text = live.client.get("/metrics").text
        assert 'v4jax_requests_total{outcome="length"} 500.0' in text


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("slots", [0, 8])
def test_a_client_that_leaves_cancels_its_requests(is_streamed, slots):
    """In the queue as well as while it runs."""
    engine = FakeEngine("It was a fine morning. " * 100, slots=slots)
    engine.pause = 0.01
    with Live(engine) as live:
        body = json.dumps({"messages": HELLO, "stream": is_streamed, "n": 2}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", live.port)) as sock:
            sock.sendall(head.encode() + body)
            wait_for(lambda: len(engine.all) == 2 and (not slots or engine.all[0].tokens))
        wait_for(lambda: all(r.finish_reason == "cancelled" for r in engine.all))
        wait_for(lambda: not live.app.state.service._live)
        wait_for(lambda: 'outcome="cancelled"} 2.0' in live.client.get("/metrics").text)


def test_a_client_that_breaks_off_in_its_body_does_no_harm(live):
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", live.port)) as sock:
        sock.sendall((head + 'Content-Length: 100\r\n\r\n{"pro').encode())
    assert live.complete().status_code == 200


def test_a_slow_reader_holds_up_nobody(live):
    live.engine.reply = "It was a fine morning. " * 300
    with live.client.stream(
        "POST", "/v1/chat/completions", json={"messages": HELLO, "stream": True}
    ) as response:
        live.engine.reply = "Yes."
        assert live.chat().json()["choices"][0]["message"]["content"] == "Yes."
        response.read()
    assert len(joined(events(response))["content"]) == len("It was a fine morning. " * 300)


def test_a_stream_without_tokens_shows_that_it_lives(live, monkeypatch):
    monkeypatch.setattr("v4jax.inference.server.exchange.HEARTBEAT", 0.02)
    live.engine.pause = 0.1

    response = live.chat(stream=True)

    assert ": waiting\n\n" in response.text
    assert joined(events(response))["content"] == "It was fine."


# Around it.


def test_metrics_are_counted():
    with Live(FakeEngine()) as live:
        live.chat()
        live.chat(n=2, stream=True)
        wait_for(lambda: 'outcome="stop"} 3.0' in live.client.get("/metrics").text)
        text = live.client.get("/metrics").text
    values = dict(re.findall(r"^(v4jax_\w+) ([\d.e+-]+)$", text, re.MULTILINE))
    count = len(live.engine.all[0].script)
    assert float(values["v4jax_generated_tokens_total"]) == 3 * count
    assert float(values["v4jax_time_to_first_token_seconds_count"]) == 3
    assert float(values["v4jax_request_seconds_count"]) == 3
    assert float(values["v4jax_time_between_tokens_seconds_count"]) == 3 * (count - 1)
    names = ("requests_queued", "requests_running", "slots", "pages", "pages_used")
    totals = ("prompt_tokens", "prefix_hit_tokens", "preemptions", "steps")
    assert {f"v4jax_{n}" for n in names} | {f"v4jax_{n}_total" for n in totals} <= set(values)


def test_the_page_needs_nothing_from_elsewhere(live):
    response = live.client.get("/")

    assert response.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in response.headers["content-security-policy"]
    assert not re.search(r"https?://|//[a-z]+\.", response.text)
    assert "innerHTML" not in response.text
    for word in ("details", "tokens/s", 'id="mode"', "reasoning_content"):
        assert word in response.text


def test_at_the_end_requests_are_finished():
    engine = FakeEngine("It was a fine morning. " * 4)
    engine.pause = 0.02
    with Live(engine, grace=20) as live:
        answers = ask_in_background(live, engine)
        live.stop()
    assert [answer["choices"][0]["finish_reason"] for answer in answers()] == ["stop"] * 2
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{live.url}/health")


def test_at_the_end_of_the_grace_time_requests_are_cancelled():
    engine = FakeEngine("It was a fine morning. " * 100)
    engine.pause = 0.05
    with Live(engine, grace=0.2) as live:
        answers = ask_in_background(live, engine)
        started = time.monotonic()
        live.stop()
        assert time.monotonic() - started < 4
    assert [answer["error"]["code"] for answer in answers()] == ["cancelled"] * 2
    assert all(request.finish_reason == "cancelled" for request in engine.all)


def ask_in_background(live: Live, engine: FakeEngine) -> Callable[[], list[dict]]:
    """Two requests that run; the function waits for what comes of them."""
    found: list[dict] = []
    threads = [
        threading.Thread(target=lambda: found.append(httpx_chat(live.url))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(engine.all) == 2 and all(request.tokens for request in engine.all))

    def wait() -> list[dict]:
        for thread in threads:
            thread.join(30)
        return found

    return wait


def httpx_chat(url: str) -> dict:
    return httpx.post(f"{url}/v1/chat/completions", json={"messages": HELLO}, timeout=30).json()


def test_a_draining_server_takes_nothing(live):
    service = live.app.state.service
    service.drain()
    try:
        assert error(live.chat(), 503)["code"] == "shutting_down"
        error(live.client.get("/health"), 503)
    finally:
        service._is_draining = False
    assert live.client.get("/health").json() == {"status": "ok"}


def test_settings_and_addresses_are_checked():
    for options in ({"api_key": ""}, {"api_key": "é"}, {"timeout": 0}, {"model": ""}):
        with pytest.raises(ValueError):
            ServerSettings(**{"model": "nano", **options})
    with pytest.raises(ValueError, match="mode='think-low'"):
        make_app(FakeEngine(), ServerSettings(model="nano", mode="think-low"))
    with pytest.raises(ValueError, match="model='tuned': an adapter has that name"):
        make_app(FakeEngine(), ServerSettings(model="tuned"))
    with contextlib.closing(bind("127.0.0.1", 0)) as sock:
        sock.listen()
        with pytest.raises(OSError, match="cannot listen"):
            bind("127.0.0.1", sock.getsockname()[1])
    with pytest.raises(OSError, match="cannot listen"):
        bind("127.0.0.1", 10**6)


def test_the_command_serves_nano_and_ends_at_sigterm(tmp_path):
    """With the engine itself."""
    command = [sys.executable, "-m", "v4jax", "serve", "--checkpoint", "nano", "--port", "0"]
    with subprocess.Popen(
        [*command, "--dtype", "float32", "--slots", "2", "--profile", "trace"],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": os.fspath(ROOT), "V4JAX_API_KEY": "k"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            url = next(
                (m[1] for line in process.stderr if (m := re.search(r"(http://\S+),", line))), None
            )
            assert url is not None, "the server has ended"
            schema = {"type": "object", "properties": {"is_clever": {"type": "boolean"}}}
            schema |= {"required": ["is_clever"], "additionalProperties": False}
            with openai.OpenAI(base_url=f"{url}/v1", api_key="k", timeout=300) as client:
                asked: dict = {"model": "nano", "messages": HELLO, "seed": 1, "max_tokens": 12}
                reply = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
                again = [
                    chunk.choices[0].delta.content or ""
                    for chunk in client.chat.completions.create(**asked, stream=True)
                ]
                asked |= {**_format(schema), "max_tokens": 300, "reasoning_effort": "high"}
                answer = client.chat.completions.create(**asked, logit_bias=BIAS)
                del asked["response_format"]
                asked |= {"tools": _tools(schema), "tool_choice": _named("walk")}
                called = client.chat.completions.create(**asked, logit_bias=BIAS)
            assert answer.choices[0].finish_reason == "stop"
            assert list(json.loads(answer.choices[0].message.content)) == ["is_clever"]
            assert called.choices[0].finish_reason == "tool_calls"
            (call,) = called.choices[0].message.tool_calls
            assert call.function.name == "walk"
            assert list(json.loads(call.function.arguments)) == ["is_clever"]
            assert 1 <= reply.usage.completion_tokens <= 12
            assert reply.choices[0].logprobs.content[0].logprob <= 0
            assert "".join(again) == reply.choices[0].message.content
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert "steps, in trace" in process.stderr.read()
            (path,) = (tmp_path / "trace").rglob("*.trace.json.gz")
            assert b"while" in gzip.decompress(path.read_bytes())  # the loop of decoding steps
        finally:
            process.kill()
