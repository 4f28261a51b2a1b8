"""A completion to reasoning, content and tool calls while it is being written.

What `v4jax.text.parse.parse_partial_completion` reads from a whole text, in pieces and in time linear
in the text. Reasoning and content are the same. Of tool calls that function gives those that are
closed; here a call begins with its name and its arguments follow as they are written, so a call that
the model leaves open has been begun.
"""

import dataclasses
import re
from typing import Literal

from v4jax.text.format import CALLS_START, DSML, THINK_END, check_thinking_mode, to_json
from v4jax.text.parse import (
    LOOSE_CALLS_START,
    LOOSE_INVOKE_END,
    LOOSE_INVOKE_START,
    LOOSE_PARAMETER_END,
    LOOSE_PARAMETER_START,
    hold_back,
    parse_partial_completion,
)

_CALLS_STARTS = (CALLS_START, CALLS_START[1:], CALLS_START[2:])  # as models garble it
_INVOKE = f"<{DSML}invoke"
_CALL_TAGS = (f"<{DSML}parameter", f"</{DSML}invoke")
_VALUE_END = f"</{DSML}parameter"
_OPEN_VALUE_END = re.compile(rf"{_VALUE_END}\s*\Z")
_LONGEST_TAG = 4096  # characters; what goes on for longer without a ">" is no tag

Kind = Literal["reasoning", "content", "call", "arguments", "end"]


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a piece of a completion adds to the message."""

    kind: Kind  # "call": a call begins; "arguments": of the last call; "end": that call is closed
    text: str  # the name, of a call that begins; "" of its end


class CompletionStream:
    """Reads a completion piece by piece.

    Args:
      thinking_mode: "thinking" if the completion begins in the reasoning, "chat" if in the answer.
    """

    def __init__(self, thinking_mode: str):
        check_thinking_mode(thinking_mode)
        self._read = self._reasoning if thinking_mode == "thinking" else self._content
        self._pending = ""  # read, and not yet decided
        self._searched = 0  # characters of `_pending` that hold no end of the reasoning
        self._is_first = True  # of a call's parameters
        self._is_text = True  # of a parameter's value

    @property
    def is_reasoning(self) -> bool:
        """Whether the reasoning goes on."""
        return self._read in (self._reasoning, self._undecided)

    def push(self, piece: str) -> list[Delta]:
        """What the piece adds; its text without the end-of-sentence token."""
        self._pending += piece
        deltas: list[Delta] = []
        while self._read(deltas):
            pass
        return deltas

    def close(self) -> list[Delta]:
        """What was held back, now that nothing follows."""
        rest, self._pending = self._pending, ""
        deltas: list[Delta] = []
        if self._read == self._reasoning:
            _add(deltas, "reasoning", rest)
        elif self._read == self._content:
            _add(deltas, "content", rest)
        elif self._read == self._undecided:
            message = parse_partial_completion(rest, "thinking", is_complete=True)
            _add(deltas, "reasoning", message["reasoning_content"])
            for call in message["tool_calls"]:
                deltas.append(Delta("call", call["function"]["name"]))
                _add(deltas, "arguments", call["function"]["arguments"])
                deltas.append(Delta("end", ""))
        return deltas

    # Each of these reads on from one place of the format, and returns whether it got to another.

    def _reasoning(self, deltas: list[Delta]) -> bool:
        end = self._pending.find(THINK_END)
        block = LOOSE_CALLS_START.search(self._pending)
        if block and not 0 <= end < block.start():
            _add(deltas, "reasoning", self._cut(block.start(), block.start()))
            self._read, self._searched = self._undecided, 0
            return True
        if end < 0:
            self._let_go(deltas, "reasoning", hold_back(self._pending, THINK_END, *_CALLS_STARTS))
            return False
        _add(deltas, "reasoning", self._cut(end, end + len(THINK_END)))
        self._read = self._content
        return True

    def _undecided(self, deltas: list[Delta]) -> bool:
        """A block of calls within the reasoning: it is one if the reasoning has no end."""
        end = self._pending.find(THINK_END, self._searched)
        if end < 0:
            self._searched = max(0, len(self._pending) - len(THINK_END) + 1)
            return False
        _add(deltas, "reasoning", self._cut(end, end + len(THINK_END)))
        self._read = self._content
        return True

    def _content(self, deltas: list[Delta]) -> bool:
        block = LOOSE_CALLS_START.search(self._pending)
        if not block:
            self._let_go(deltas, "content", hold_back(self._pending, *_CALLS_STARTS))
            return False
        _add(deltas, "content", self._cut(block.start(), block.end()))
        self._read = self._between_calls
        return True

    def _between_calls(self, deltas: list[Delta]) -> bool:
        head = LOOSE_INVOKE_START.search(self._pending)
        if not head:
            self._keep_tag(_INVOKE)
            return False
        self._cut(0, head.end())
        deltas += [Delta("call", head.group(1)), Delta("arguments", "{")]
        self._is_first, self._read = True, self._in_call
        return True

    def _in_call(self, deltas: list[Delta]) -> bool:
        head = LOOSE_PARAMETER_START.search(self._pending)
        end = LOOSE_INVOKE_END.search(self._pending)
        if end and not (head and head.start() < end.start()):
            self._cut(0, end.end())
            deltas += [Delta("arguments", "}"), Delta("end", "")]
            self._read = self._between_calls
            return True
        if not head:
            self._keep_tag(*_CALL_TAGS)
            return False
        self._cut(0, head.end())
        self._is_text = head.group(2) != "false"
        before = "" if self._is_first else ", "
        opening = f"{before}{to_json(head.group(1))}: " + '"' * self._is_text
        deltas.append(Delta("arguments", opening))
        self._is_first, self._read = False, self._in_value
        return True

    def _in_value(self, deltas: list[Delta]) -> bool:
        end = LOOSE_PARAMETER_END.search(self._pending)
        if end:
            value = self._value(self._cut(end.start(), end.end()))
            _add(deltas, "arguments", value + '"' * self._is_text)
            self._read = self._in_call
            return True
        tag = _OPEN_VALUE_END.search(self._pending)
        is_tag = tag and len(self._pending) - tag.start() < _LONGEST_TAG
        safe = self._pending[: tag.start()] if tag else hold_back(self._pending, _VALUE_END)
        safe = safe if is_tag or not tag else self._pending
        self._cut(0, len(safe))
        _add(deltas, "arguments", self._value(safe))
        return False

    def _value(self, text: str) -> str:
        return to_json(text)[1:-1] if self._is_text else text

    def _keep_tag(self, *tags: str) -> None:
        """Drops what cannot be the start of one of `tags`: between tags nothing counts."""
        starts = [at for at in (self._pending.find(tag) for tag in tags) if at >= 0]
        at = min(starts, default=len(hold_back(self._pending, *tags)))
        if len(self._pending) - at > _LONGEST_TAG:
            at += 1
        self._cut(0, at)

    def _let_go(self, deltas: list[Delta], kind: Kind, safe: str) -> None:
        self._cut(0, len(safe))
        _add(deltas, kind, safe)

    def _cut(self, end: int, rest: int) -> str:
        """The pending text up to `end`; what is from `rest` on stays pending."""
        text, self._pending = self._pending[:end], self._pending[rest:]
        return text


def _add(deltas: list[Delta], kind: Kind, text: str) -> None:
    if text:
        deltas.append(Delta(kind, text))
