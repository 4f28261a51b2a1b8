"""Completions read piece by piece: the same message as from the whole text."""

import itertools
import json
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.conftest import NANO
from v4jax.inference.stop_text import StopScanner
from v4jax.text.format import BOS, CALLS_END, CALLS_START, DSML, EOS, THINK_END, THINKING_MODES
from v4jax.text.parse import parse_partial_completion
from v4jax.text.prompt import encode_messages
from v4jax.text.stream import CompletionStream
from v4jax.text.tokenizer import StreamDecoder, Tokenizer

INVOKE, END = f'<{DSML}invoke name="walk">\n', f"\n</{DSML}invoke>"
TEXT_VALUE = f'<{DSML}parameter name="to" string="true">'
JSON_VALUE = f'<{DSML}parameter name="km" string="false">'
VALUE_END = f"</{DSML}parameter>"
# What completions are made of here, whole and in parts.
PIECES = (
    *("a", " ", "\n", "\n\n", '"', "\\", "é", "<", ">", "</", "12", "<think>"),
    *(THINK_END, CALLS_START, f"{CALLS_START}>\n", f"\n{CALLS_END}", INVOKE, END),
    *(TEXT_VALUE, JSON_VALUE, VALUE_END, DSML, f"<{DSML}invoke", f"</{DSML}parameter \n"),
)


def answer_span(text: str, thinking_mode: str) -> tuple[int, int] | None:
    """(start, end) of the answer in a completion: after the reasoning, before calls and EOS.

    None while the reasoning goes on.
    """
    start = 0
    if thinking_mode == "thinking":
        at = text.find(THINK_END)
        if at < 0:
            return None
        start = at + len(THINK_END)
    end = re.search(f"{re.escape(EOS)}|{re.escape(CALLS_START)}", text[start:])
    return start, start + end.start() if end else len(text)


texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
cuts = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces, at = [], 0
    for size in itertools.cycle(sizes):
        if at >= len(text):
            return pieces
        pieces.append(text[at : at + size])
        at += size


def assemble(deltas) -> dict:
    """The message that the deltas add up to; `closed` says how many of its calls are closed."""
    message = {"reasoning_content": "", "content": "", "tool_calls": [], "closed": 0}
    for delta in deltas:
        assert delta.text or delta.kind in ("end", "call")
        if delta.kind in ("reasoning", "content"):
            key = {"reasoning": "reasoning_content", "content": "content"}[delta.kind]
            message[key] += delta.text
        elif delta.kind == "call":
            message["tool_calls"].append({"name": delta.text, "arguments": ""})
        elif delta.kind == "arguments":
            message["tool_calls"][-1]["arguments"] += delta.text
        else:
            message["closed"] += 1
            assert message["closed"] == len(message["tool_calls"])
    return message


def read(text: str, mode: str, sizes=(1,)) -> dict:
    stream = CompletionStream(mode)
    deltas = [delta for piece in cut(text, list(sizes)) for delta in stream.push(piece)]
    return assemble(deltas + stream.close())


@given(text=texts, mode=st.sampled_from(THINKING_MODES), sizes=cuts)
@settings(max_examples=400, deadline=None)
@example(text="a" + CALLS_START + ">" + INVOKE + END + THINK_END + "b", mode="thinking", sizes=[1])
@example(text="a" + CALLS_START + ">" + INVOKE + END, mode="thinking", sizes=[3])
def test_pieces_give_the_reasoning_and_the_content_of_the_whole(text, mode, sizes):
    whole = parse_partial_completion(text, mode, is_complete=True)
    message = read(text, mode, sizes)

    assert message["reasoning_content"] == whole["reasoning_content"]
    assert message["content"] == whole["content"]


@given(text=texts, mode=st.sampled_from(THINKING_MODES), sizes=cuts)
@settings(max_examples=200, deadline=None)
def test_how_a_text_is_cut_does_not_matter(text, mode, sizes):
    assert read(text, mode, sizes) == read(text, mode, [10**6])


names = st.text("abc_", min_size=1, max_size=4)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@given(
    calls=st.lists(
        st.tuples(names, st.dictionaries(names, values, max_size=3)), min_size=1, max_size=3
    ),
    mode=st.sampled_from(THINKING_MODES),
    sizes=cuts,
)
@settings(max_examples=100, deadline=None)
def test_calls_as_the_format_writes_them_come_back(calls, mode, sizes):
    message = {
        "role": "assistant",
        "content": "I go.",
        "reasoning_content": "Let me see.",
        "tool_calls": [
            {"function": {"name": name, "arguments": json.dumps(given, ensure_ascii=False)}}
            for name, given in calls
        ],
    }
    text = encode_messages([{"role": "user", "content": "Go."}, message], mode)
    text = text.partition("<think>")[2] if mode == "thinking" else text.partition(THINK_END)[2]
    text = text.removesuffix(EOS)

    result = read(text, mode, sizes)

    whole = parse_partial_completion(text, mode, is_complete=True)
    assert [c["function"] for c in whole["tool_calls"]] == result["tool_calls"]
    assert result["closed"] == len(calls)
    assert [json.loads(call["arguments"]) for call in result["tool_calls"]] == [c[1] for c in calls]


def test_arguments_come_as_they_are_written():
    stream = CompletionStream("chat")
    seen = []
    for piece in (f"{CALLS_START}>\n{INVOKE}", TEXT_VALUE, "Box ", "Hi", "ll", VALUE_END):
        seen.append([(delta.kind, delta.text) for delta in stream.push(piece)])

    assert seen == [
        [("call", "walk"), ("arguments", "{")],
        [("arguments", '"to": "')],
        [("arguments", "Box ")],
        [("arguments", "Hi")],
        [("arguments", "ll")],
        [("arguments", '"')],
    ]


@pytest.mark.parametrize("head", [f"<{DSML}invoke name='", INVOKE + TEXT_VALUE, "<" + DSML])
def test_a_long_and_garbled_call_takes_linear_time(head):
    stream = CompletionStream("chat")
    stream.push(f"{CALLS_START}>{head}")
    started = time.monotonic()
    for _ in range(20_000):
        stream.push(f"</{DSML}para <{DSML}")
    assert time.monotonic() - started < 20
    assert len(stream._pending) < 20_000


def scan(text: str, stops, mode, sizes=(1,)) -> tuple[str, bool]:
    scanner = StopScanner(stops, mode)
    let_through = "".join(scanner.push(piece) for piece in cut(text, list(sizes)))
    return let_through + scanner.close(), scanner.is_met


STOPS = st.lists(st.text("ab\n<", min_size=1, max_size=4), max_size=3)


@given(
    text=st.lists(st.sampled_from(("a", "b", "\n", "<", THINK_END, CALLS_START))).map("".join),
    stops=STOPS,
    mode=st.sampled_from((*THINKING_MODES, None)),
    sizes=cuts,
)
@settings(max_examples=400, deadline=None)
def test_a_stop_text_is_found_where_the_text_first_holds_one(text, stops, mode, sizes):
    """The oracle looks at every beginning of the text, as if characters came one by one."""
    expected = text, False
    for end in range(len(text) + 1):
        begun = text[:end]
        span = (0, end) if mode is None else answer_span(begun, mode)
        found = [begun.find(stop, *span) for stop in stops] if span else []
        if any(at >= 0 for at in found):
            expected = begun[: min(at for at in found if at >= 0)], True
            break

    assert scan(text, stops, mode, sizes) == expected


def test_what_may_begin_a_stop_text_is_held_back():
    scanner = StopScanner(["STOP"], None)

    assert [scanner.push(piece) for piece in ("a S", "T", "x ST", "OP b", "c")] == [
        *("a ", "", "STx ", "", "")
    ]
    assert scanner.is_met
    assert scanner.close() == ""


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(NANO)


@given(ids=st.lists(st.integers(0, 1300), max_size=40), keep=st.booleans())
@settings(max_examples=300, deadline=None)
def test_tokens_one_by_one_are_the_text_of_all(tokenizer, ids, keep):
    decoder = StreamDecoder(tokenizer, keep_special=keep)
    text = "".join([decoder.push(index) for index in ids]) + decoder.close()

    assert text == tokenizer.decode(ids, keep_special=keep)


@given(text=st.text(st.characters(codec="utf-8")))
@settings(max_examples=100, deadline=None)
def test_no_half_character_is_let_go(tokenizer, text):
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(index) for index in tokenizer.encode(text)]

    assert "".join(pieces) == text.replace(EOS, "").replace(BOS, "")
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_bytes_of_tokens_make_up_the_text(tokenizer):
    text = "Emma 😀 <｜DSML｜tool_calls> é"
    ids = tokenizer.encode(text)

    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.token_bytes(10**6) == b""
