"""A completion back to an assistant message: strictly, or as far as it can be read.

Source: the encoding module released with the checkpoints (`encoding/encoding_dsv4.py`), whose
results `parse_message_from_completion_text` gives.
"""

import re
from collections.abc import Mapping

from v4jax.text.format import (
    BOS,
    CALLS_END,
    CALLS_START,
    DSML,
    EOS,
    THINK_END,
    THINK_START,
    EncodingError,
    check_thinking_mode,
    to_json,
)

# Tags of a tool call, cut where the strict parser looks for them.
_INVOKE_START = f"<{DSML}invoke"
_INVOKE_END = f"</{DSML}invoke"
_PARAMETER_START = f"<{DSML}parameter"
_PARAMETER_END = f"/{DSML}parameter"
_INVOKE_HEAD = re.compile(r' name="(.*?)">\n\n?', re.DOTALL)
_PARAMETER = re.compile(r' name="(.*?)" string="(true|false)">(.*)<', re.DOTALL)

# The same tags as a model may garble them, for the tolerant parser.
_LOOSE_CALLS_START = re.compile(rf"\n{{0,2}}<{DSML}tool_calls")
_LOOSE_INVOKE = re.compile(rf'<{DSML}invoke\s+name="([^"]*)"\s*>(.*?)</{DSML}invoke\s*>', re.DOTALL)
_LOOSE_PARAMETER = re.compile(
    rf'<{DSML}parameter\s+name="([^"]*)"(?:\s+string="([^"]*)")?\s*>(.*?)</{DSML}parameter\s*>',
    re.DOTALL,
)


def parse_message_from_completion_text(text: str, thinking_mode: str) -> dict[str, object]:
    """The assistant message in a complete completion: its text after the prompt, with EOS.

    Calls have no id, that is for the server to give. Their arguments are assembled as text: a
    value the model marked as JSON is passed on as it stands, valid or not.

    Returns:
        `role`, `content`, `reasoning_content` and `tool_calls`; the last three may be empty.

    Raises:
        EncodingError: the text is not exactly in the format; `parse_partial_completion` takes any.
    """
    check_thinking_mode(thinking_mode)
    reasoning, position = "", 0
    if thinking_mode == "thinking":
        reasoning, stop, position = _read_until(text, position, THINK_END, CALLS_START)
        if stop != THINK_END:
            raise EncodingError(f"Reasoning not closed by {THINK_END}: ...{text[-80:]!r}.")
    content, stop, position = _read_until(text, position, EOS, CALLS_START)
    if not stop:
        raise EncodingError(f"Neither {EOS} nor tool calls after the content: ...{text[-80:]!r}.")
    calls = []
    if stop == CALLS_START:
        calls, position = _read_calls(text, position)
        position += len(EOS) if text.startswith(EOS, position) else 0
    if position != len(text):
        raise EncodingError(f"Text after the end of the completion: {text[position:][:80]!r}.")
    for token in (BOS, EOS, THINK_START, THINK_END, DSML):
        if token in content or token in reasoning:
            raise EncodingError(f"The special token {token} is in the content or the reasoning.")
    return _assistant_message(content, reasoning, calls)


def parse_partial_completion(text: str, thinking_mode: str) -> dict[str, object]:
    """The assistant message as far as it can be read from any text: cut off, or malformed.

    Equal to `parse_message_from_completion_text` where that accepts the text. Otherwise: without
    `</think>` all is reasoning; text after EOS or after the start of a block of tool calls is not
    content; calls count once they are closed, and whitespace in their tags does not matter.

    For streaming, an ending that may be the start of a tag is held back until the next characters
    decide, so content and reasoning only ever grow.
    """
    check_thinking_mode(thinking_mode)
    try:
        return parse_message_from_completion_text(text, thinking_mode)
    except EncodingError:
        text, eos, _ = text.partition(EOS)
    reasoning = ""
    if thinking_mode == "thinking":
        reasoning, end, text = text.partition(THINK_END)
        if not end:
            reasoning = reasoning if eos else _hold_back(reasoning, THINK_END, EOS)
            return _assistant_message("", reasoning, [])
    block = _LOOSE_CALLS_START.search(text)
    if not block:
        tags = (EOS, CALLS_START, CALLS_START[1:], CALLS_START[2:])
        content = text if eos else _hold_back(text, *tags)
        return _assistant_message(content, reasoning, [])
    calls = []
    for name, body in _LOOSE_INVOKE.findall(text, block.end()):
        parameters = _LOOSE_PARAMETER.findall(body)
        calls.append(_tool_call(name, {key: (flag, value) for key, flag, value in parameters}))
    return _assistant_message(text[: block.start()], reasoning, calls)


def _hold_back(text: str, *tags: str) -> str:
    """`text` without an ending with which one of `tags` begins."""
    for size in range(min(len(text), max(map(len, tags))), 0, -1):
        if any(tag.startswith(text[-size:]) for tag in tags):
            return text[:-size]
    return text


def _read_until(text: str, start: int, *stops: str) -> tuple[str, str, int]:
    """The text before the first of `stops`, which one, and where it ends; all and "" if none."""
    found = [(at, stop) for stop in stops if (at := text.find(stop, start)) >= 0]
    if not found:
        return text[start:], "", len(text)
    at, stop = min(found)
    return text[start:at], stop, at + len(stop)


def _read_calls(text: str, position: int) -> tuple[list[dict[str, object]], int]:
    """The calls of a block whose opening tag was read, and where the block ends."""
    calls = []
    while True:
        gap, stop, position = _read_until(text, position, _INVOKE_START, CALLS_END)
        _expect_line_end(gap, stop)
        if stop == CALLS_END:
            return calls, position
        head, stop, position = _read_until(text, position, _PARAMETER_START, _INVOKE_END)
        invoke = _INVOKE_HEAD.fullmatch(head)
        if not invoke or not stop:
            raise EncodingError(f'{head!r}: expected name="..." and a closed call.')
        arguments = {}
        while stop == _PARAMETER_START:
            element, _, position = _read_until(text, position, _PARAMETER_END)
            parameter = _PARAMETER.fullmatch(element)
            if not parameter:
                raise EncodingError(
                    f'Parameter {element!r}: expected name="..." string="true|false">value<.'
                )
            name, flag, value = parameter.groups()
            if name in arguments:
                raise EncodingError(f"Parameter {name!r} is given twice in one call.")
            arguments[name] = (flag, value)
            gap, stop, position = _read_until(text, position, _PARAMETER_START, _INVOKE_END)
            _expect_line_end(gap, stop)
        calls.append(_tool_call(invoke.group(1), arguments))


def _expect_line_end(gap: str, stop: str) -> None:
    if gap != ">\n" or not stop:
        raise EncodingError(f"{gap!r} between the tags of a tool call: expected '>\\n'.")


def _tool_call(name: str, arguments: Mapping[str, tuple[str, str]]) -> dict[str, object]:
    """A call from the (string flag, value) of each parameter."""
    items = (
        f"{to_json(key)}: {value if flag == 'false' else to_json(value)}"
        for key, (flag, value) in arguments.items()
    )
    text = "{" + ", ".join(items) + "}"
    return {"type": "function", "function": {"name": name, "arguments": text}}


def _assistant_message(content: str, reasoning: str, calls: list) -> dict[str, object]:
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": calls,
    }
