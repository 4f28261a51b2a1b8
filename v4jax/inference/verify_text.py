"""The checks of `v4jax verify` that need no weights: the tokenizer, prompts, and a file of vectors."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence

from v4jax.config import V4Config
from v4jax.inference.batch.requests import Settings, line_text, parse_request
from v4jax.inference.findings import Finding
from v4jax.text.format import (
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    SPECIAL_TOKENS,
    THINK_END,
    THINK_START,
    USER,
    is_too_deep,
    shown,
)
from v4jax.text.prompt import render
from v4jax.text.tokenizer import Tokenizer

_KEYS = ("prompt", "messages", "mode", "tools", "tokens")  # of a line of vectors
_NAMES = ", ".join(_KEYS)
_SPECIAL_OF_CASES = (BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END, DSML)

# What has to come back from its ids as it went in.
TEXTS = {
    "ASCII": "The quick brown fox jumps over 13 lazy dogs; it's 100% true!",
    "CJK": "深度求索发布了新模型。東京は雨です。한국어도 됩니다.",
    "emoji": "👩‍💻 writes 🐍, 🇫🇷 and 👍🏽",
    "white space": "  two  spaces\n\n\ttabs\t\r\nand lines \n",
    "code": 'def f(x: int) -> str:\n    return f"{x:>08b}"  # λ ≤ ∞\n\n\nassert f(5) != "\\n"\n',
    "other scripts": "naïve Ærøskøbing, Ελλάδα, Россия, עברית, ไทย",
}


@dataclasses.dataclass(frozen=True)
class PromptCase:
    """A conversation, and the text that the encoding module of the April release makes of it."""

    mode: str
    messages: Sequence[Mapping[str, object]]
    expected: str
    tools: Sequence[Mapping[str, object]] | None = None


def _says(role: str, content: str, **fields: object) -> dict[str, object]:
    return {"role": role, "content": content, **fields}


_CITY = {"type": "string", "description": "City name"}
_PARAMETERS = {"type": "object", "properties": {"city": _CITY}, "required": ["city"]}
_GET_TIME = {
    "name": "get_time",
    "description": "Current time in a city",
    "parameters": _PARAMETERS,
}
_CALL = {"id": "c1", "function": {"name": "get_time", "arguments": '{"city": "Oslo"}'}}

# Some of tests/golden/encoding_cases.json, under the names that they have there.
PROMPT_CASES = {
    "chat_multi_turn": PromptCase(
        "non-think",
        [
            _says("system", "You are terse."),
            _says("user", "Hi"),
            _says("assistant", "Hello."),
            _says("user", "Bye"),
            _says("assistant", "Goodbye."),
            _says("user", "Wait!"),
        ],
        "<｜begin▁of▁sentence｜>You are terse.<｜User｜>Hi<｜Assistant｜></think>Hello."
        "<｜end▁of▁sentence｜><｜User｜>Bye<｜Assistant｜></think>Goodbye.<｜end▁of▁sentence｜>"
        "<｜User｜>Wait!<｜Assistant｜></think>",
    ),
    "think_drop_history": PromptCase(
        "think-high",
        [
            _says("system", "S"),
            _says("user", "q1"),
            _says("assistant", "a1", reasoning_content="r1"),
            _says("user", "q2"),
            _says("assistant", "a2", reasoning_content="r2"),
            _says("user", "q3"),
        ],
        "<｜begin▁of▁sentence｜>S<｜User｜>q1<｜Assistant｜></think>a1<｜end▁of▁sentence｜><｜User｜>q2"
        "<｜Assistant｜></think>a2<｜end▁of▁sentence｜><｜User｜>q3<｜Assistant｜><think>",
    ),
    "think_max_with_system": PromptCase(
        "think-max",
        [_says("system", "You are terse."), _says("user", "Prove 2+2=4.")],
        """\
<｜begin▁of▁sentence｜>Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve \
the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and \
adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, \
considered alternative, and rejected hypothesis to ensure absolutely no assumption is left \
unchecked.

You are terse.<｜User｜>Prove 2+2=4.<｜Assistant｜><think>""",
    ),
    "tool_history_without_tools_field_drops_reasoning": PromptCase(
        "think-high",
        [
            _says("system", "S"),
            _says("user", "q1"),
            _says("assistant", "", reasoning_content="r1", tool_calls=[_CALL]),
            _says("tool", "10:00", tool_call_id="c1"),
        ],
        """\
<｜begin▁of▁sentence｜>S<｜User｜>q1<｜Assistant｜></think>

<｜DSML｜tool_calls>
<｜DSML｜invoke name="get_time">
<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜tool_calls><｜end▁of▁sentence｜><｜User｜><tool_result>10:00</tool_result><｜Assistant｜>\
<think>""",
    ),
    "tools_on_empty_system": PromptCase(
        "think-high",
        [_says("system", ""), _says("user", "Time in Oslo?")],
        """\
<｜begin▁of▁sentence｜>

## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, \
booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{"name": "get_time", "description": "Current time in a city", "parameters": {"type": "object", \
"properties": {"city": {"type": "string", "description": "City name"}}, "required": ["city"]}}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
<｜User｜>Time in Oslo?<｜Assistant｜><think>""",
        [{"type": "function", "function": _GET_TIME}],
    ),
}


def check_tokenizer(tokenizer: Tokenizer, cfg: V4Config) -> Finding:
    """Texts come back from their ids, special tokens are single ids, and the model knows all ids."""
    problems, count = [], 0
    if tokenizer.vocab_size > cfg.vocab_size:
        problems.append(f"{tokenizer.vocab_size} ids, more than vocab_size={cfg.vocab_size}")
    for name, text in TEXTS.items():
        ids = tokenizer.encode(text)
        count += len(ids)
        if tokenizer.decode(ids, keep_special=True) != text:
            problems.append(f"{name} does not come back from its ids: {text[:40]!r}")
        if not all(0 <= index < cfg.vocab_size for index in ids):
            problems.append(f"{name} has ids outside 0..{cfg.vocab_size - 1}")
    for token in SPECIAL_TOKENS:
        ids = tokenizer.encode(token)
        if len(ids) != 1:
            problems.append(f"{token} is {len(ids)} ids, not one")
        elif ids[0] >= cfg.vocab_size or tokenizer.decode(ids, keep_special=True) != token:
            problems.append(f"{token} is id {ids[0]}, which is not its own")
    for token, name in ((BOS, "bos_id"), (EOS, "eos_id")):
        if (found := tokenizer.encode(token)) != [getattr(cfg, name)]:
            problems.append(f"{token} is id {found}, and the config has {getattr(cfg, name)}")
    figure = f"{len(TEXTS)} texts, {len(SPECIAL_TOKENS)} special tokens"
    note = f"{tokenizer.vocab_size} ids, the model has {cfg.vocab_size}"
    return Finding.of(problems, figure, note, ids=tokenizer.vocab_size, texts_ids=count)


def check_prompts(tokenizer: Tokenizer) -> Finding:
    """Conversations become the released module's texts, and those the ids of the special tokens.

    The texts are those of the April release. What the checkpoint's own release writes is encoded in each
    of its modes.
    """
    problems = []
    for name, case in PROMPT_CASES.items():
        text = render(case.messages, case.mode, release="april", tools=case.tools).text
        if text != case.expected:
            at = next(
                (i for i, (a, b) in enumerate(zip(text, case.expected)) if a != b),
                min(len(text), len(case.expected)),
            )
            problems.append(
                f"{name}: {text[at : at + 30]!r} at character {at}, expected "
                f"{case.expected[at : at + 30]!r}"
            )
    for mode in tokenizer.modes:
        for name, case in PROMPT_CASES.items():
            prompt = tokenizer.render(case.messages, mode, tools=case.tools)
            ids = tokenizer.encode(prompt.text)
            last = THINK_START if prompt.thinking_mode == "thinking" else THINK_END
            found = {token: ids.count(tokenizer.id(token)) for token in _SPECIAL_OF_CASES}
            wrong = [t for t, count in found.items() if count != prompt.text.count(t)]
            if (ids[0], ids[-1]) != (tokenizer.id(BOS), tokenizer.id(last)):
                problems.append(f"{name} in {mode} does not begin with {BOS} and end with {last}")
            if wrong:
                problems.append(f"{name} in {mode}: {wrong[0]} does not occur as one id")
            if tokenizer.decode(ids, keep_special=True) != prompt.text:
                problems.append(f"{name} in {mode} does not come back from its ids")
    figure = f"{len(PROMPT_CASES)} texts, {len(tokenizer.modes)} modes"
    return Finding.of(problems, figure, f"release {tokenizer.release}")


@dataclasses.dataclass(frozen=True)
class Vector:
    """A prompt and the greedy completion that it should have."""

    line: int
    prompt: list[int]
    tokens: list[int]


def read_vectors(path: str | os.PathLike, tokenizer: Tokenizer, cfg: V4Config) -> list[Vector]:
    """The lines of a file of vectors.

    Args:
      path: JSON lines, each an object with `tokens` (ids of the completion, in order) and either
        `prompt` (a text that is continued as it is, after BOS) or `messages` (see docs/prompts.md), and
        with these `mode` and `tools`. Empty lines do not count.
      tokenizer, cfg: what prompts and ids are read by.

    Raises:
      ValueError: a line that is none, with its number and what is accepted; or no line at all.
    """
    vectors = []
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if text := line_text(raw):
                try:
                    vectors.append(_vector(text, number, tokenizer, cfg))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{os.fspath(path)}, line {number}: {error}") from None
    if not vectors:
        raise ValueError(
            f"{os.fspath(path)} has no line: expected JSON objects with some of {_NAMES}."
        )
    return vectors


def _vector(text: bytes, line: int, tokenizer: Tokenizer, cfg: V4Config) -> Vector:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8: {error}.") from None
    if not isinstance(fields, dict) or is_too_deep(fields):
        raise ValueError(f"{shown(fields)}: expected an object with some of {_NAMES}.")
    if unknown := [key for key in fields if key not in _KEYS]:
        raise ValueError(f"unknown key {shown(unknown[0])}: expected some of {_NAMES}.")
    tokens = fields.pop("tokens", None)
    if not isinstance(tokens, list) or not tokens or any(type(t) is not int for t in tokens):
        raise ValueError(f"tokens={shown(tokens)}: expected a list of ids, not empty.")
    if wrong := [t for t in tokens if not 0 <= t < cfg.vocab_size]:
        raise ValueError(f"token {shown(wrong[0])}: expected ids in 0..{cfg.vocab_size - 1}.")
    request = parse_request(json.dumps(fields).encode(), line, Settings(), tokenizer.release)
    prompt = tokenizer.encode(request.prompt)
    if len(prompt) + len(tokens) > cfg.max_length:
        raise ValueError(
            f"{len(prompt)} tokens of prompt and {len(tokens)} of completion: expected at most "
            f"max_length={cfg.max_length}."
        )
    return Vector(line, prompt, tokens)
