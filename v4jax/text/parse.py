"""A completion back to an assistant message: strictly, or as far as it can be read.

Source: the encoding module released with the checkpoints (`encoding/encoding_dsv4.py`), whose
results `parse_message_from_completion_text` gives.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

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
    shown,
    to_json,
)

# Tags of a tool call, cut where the strict parser looks for them.
_INVOKE_START = f"<{DSML}invoke"
_INVOKE_END = f"</{DSML}invoke"
_PARAMETER_START = f"<{DSML}parameter"
_PARAMETER_END = f"/{DSML}parameter"
_INVOKE_HEAD = re.compile(r' name="(.*?)">\n\n?', re.DOTALL)
_PARAMETER_HEAD = re.compile(r' name="(.*?)" string="(true|false)">', re.DOTALL)

# The same tags as a model may garble them, for the tolerant parser.
LOOSE_CALLS_START = re.compile(rf"\n{{0,2}}<{DSML}tool_calls")
LOOSE_INVOKE_START = re.compile(rf'<{DSML}invoke\s+name="([^"]*)"\s*>')
LOOSE_INVOKE_END = re.compile(rf"</{DSML}invoke\s*>")
LOOSE_PARAMETER_START = re.compile(
    rf'<{DSML}parameter\s+name="([^"]*)"(?:\s+string="([^"]*)")?\s*>'
)
LOOSE_PARAMETER_END = re.compile(rf"</{DSML}parameter\s*>")


def parse_message_from_completion_text(text: str, thinking_mode: str) -> dict[str, Any]:
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
    calls: list[dict[str, Any]] = []
    if stop == CALLS_START:
        calls, position = _read_calls(text, position)
        position += len(EOS) if text.startswith(EOS, position) else 0
    if position != len(text):
        raise EncodingError(f"Text after the end of the completion: {text[position:][:80]!r}.")
    for token in (BOS, EOS, THINK_START, THINK_END, DSML):
        if token in content or token in reasoning:
            raise EncodingError(f"The special token {token} is in the content or the reasoning.")
    return _assistant_message(content, reasoning, calls)


def parse_partial_completion(
    text: str, thinking_mode: str, *, is_complete: bool = False
) -> dict[str, Any]:
    """The assistant message as far as it can be read from any text: cut off, or malformed.

    Equal to `parse_message_from_completion_text` where that accepts the text. Otherwise text after
    EOS or after the start of a block of tool calls is not content; calls count once they are
    closed, and whitespace in their tags does not matter. Without `</think>` all is reasoning, but
    for calls that the text ends with: a model that calls has done thinking, tag or no tag.

    For streaming, an ending that may be the start of a tag is held back until the next characters
    decide, so content and reasoning only ever grow, and so does the list of calls.

    Args:
        text: what the model has written so far, after the prompt.
        thinking_mode: "thinking" if it begins in the reasoning, "chat" if in the answer.
        is_complete: nothing follows, because the model was stopped; then nothing is held back. A
            text with EOS is complete in any case.
    """
    check_thinking_mode(thinking_mode)
    if is_complete and EOS not in text:
        text += EOS
    try:
        return parse_message_from_completion_text(text, thinking_mode)
    except EncodingError:
        text, eos, _ = text.partition(EOS)
    is_complete = bool(eos)
    reasoning, answer = "", text
    if thinking_mode == "thinking":
        reasoning, end, answer = text.partition(THINK_END)
        if not end:
            block = LOOSE_CALLS_START.search(text)
            calls = _loose_calls(text, block.end()) if block else []
            if block and (calls or not is_complete):  # until the end THINK_END may come after them
                return _assistant_message("", text[: block.start()], calls if is_complete else [])
            return _assistant_message("", text if is_complete else hold_back(text, *_ENDS), [])
    block = LOOSE_CALLS_START.search(answer)
    if block:
        calls = _loose_calls(answer, block.end())
        return _assistant_message(answer[: block.start()], reasoning, calls)
    content = answer if is_complete else hold_back(answer, *_ENDS[1:])
    return _assistant_message(content, reasoning, [])


# What may end the reasoning, and but for the first the content; for `hold_back`.
_ENDS = (THINK_END, EOS, CALLS_START, CALLS_START[1:], CALLS_START[2:])


def _loose_calls(text: str, position: int) -> list[dict[str, Any]]:
    """The closed calls after a position, as a model may garble them."""
    calls = []
    for call, body in _elements(text[position:], LOOSE_INVOKE_START, LOOSE_INVOKE_END):
        parameters = _elements(body, LOOSE_PARAMETER_START, LOOSE_PARAMETER_END)
        arguments = {head.group(1): (head.group(2) or "", value) for head, value in parameters}
        calls.append(_tool_call(call.group(1), arguments))
    return calls


def _elements(
    text: str, start: re.Pattern[str], end: re.Pattern[str]
) -> Iterator[tuple[re.Match[str], str]]:
    """(opening tag, text up to the first closing tag) of every closed element; in linear time."""
    position = 0
    while head := start.search(text, position):
        tail = end.search(text, head.end())
        if not tail:
            return
        yield head, text[head.end() : tail.start()]
        position = tail.end()


def hold_back(text: str, *tags: str) -> str:
    """`text` without an ending with which one of `tags` begins."""
    for size in range(min(len(text), max(map(len, tags))), 0, -1):
        if any(tag.startswith(text[-size:]) for tag in tags):
            return text[:-size]
    return text


def _read_until(text: str, start: int, *stops: str) -> tuple[str, str, int]:
    """The text before the first of `stops`, which one, and where it ends; all and "" if none."""
    found = _any_of(stops).search(
        text, start
    )  # one pass: looking for each would read on to the end
    if not found:
        return text[start:], "", len(text)
    return text[start : found.start()], found.group(), found.end()


@functools.cache
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)))


def _read_calls(text: str, position: int) -> tuple[list[dict[str, Any]], int]:
    """The calls of a block whose opening tag was read, and where the block ends."""
    calls: list[dict[str, Any]] = []
    while True:
        gap, stop, position = _read_until(text, position, _INVOKE_START, CALLS_END)
        _expect_line_end(gap, stop)
        if stop == CALLS_END:
            return calls, position
        head, stop, position = _read_until(text, position, _PARAMETER_START, _INVOKE_END)
        invoke = _INVOKE_HEAD.fullmatch(head)
        if not invoke or not stop:
            raise EncodingError(f'{shown(head)}: expected name="..." and a closed call.')
        arguments = {}
        while stop == _PARAMETER_START:
            element, _, position = _read_until(text, position, _PARAMETER_END)
            parameter = _PARAMETER_HEAD.match(element)
            if not parameter or not element.endswith("<", parameter.end()):
                raise EncodingError(
                    f'Parameter {shown(element)}: expected name="..." string="true|false">value<.'
                )
            name, flag = parameter.groups()
            value = element[parameter.end() : -1]
            if name in arguments:
                raise EncodingError(f"Parameter {shown(name)} is given twice in one call.")
            arguments[name] = (flag, value)
            gap, stop, position = _read_until(text, position, _PARAMETER_START, _INVOKE_END)
            _expect_line_end(gap, stop)
        calls.append(_tool_call(invoke.group(1), arguments))


def _expect_line_end(gap: str, stop: str) -> None:
    if gap != ">\n" or not stop:
        raise EncodingError(f"{shown(gap)} between the tags of a tool call: expected '>\\n'.")


def _tool_call(name: str, arguments: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """A call from the (string flag, value) of each parameter."""
    items = (
        f"{to_json(key)}: {value if flag == 'false' else to_json(value)}"
        for key, (flag, value) in arguments.items()
    )
    text = "{" + ", ".join(items) + "}"
    return {"type": "function", "function": {"name": name, "arguments": text}}


def _assistant_message(content: str, reasoning: str, calls: list) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": calls,
    }
