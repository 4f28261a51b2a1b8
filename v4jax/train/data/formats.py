"""A line of a data file to token ids and loss weights, through the released prompt format.

| line                                             | example                                           |
|--------------------------------------------------|---------------------------------------------------|
| {"messages": [...], "tools": [...], "mode": ...} | a conversation; loss on what the assistant writes |
| {"prompt": ..., "completion": ...}               | the same, of texts or of lists of messages        |
| {"prompt" or "messages", "chosen", "rejected"}   | a pair of conversations                           |
| {"text": ...}                                    | BOS, the text, EOS; loss on all but BOS           |

What the assistant writes is reasoning and its end, content, calls and the end of the turn; the token that
opens its reply is given. The renderer says which pieces of a conversation these are, and every piece is
encoded by itself. Tokens of special kind stand at their borders, where the tokenizer cuts anyway, so the ids
are those of the whole text. Where none stands there (a message that follows a text without a turn), the ids
are those that an engine sees: of what is given, and then what is written.

In thinking modes without tools, the prompt of a later turn lacks the reasoning of earlier ones. Such a
conversation is one example for every user turn, each rendered as the model would be asked, with loss on the
answer to that turn.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from v4jax.text.format import EOS, EncodingError, resolve_mode, shown
from v4jax.text.prompt import Piece, encode_pieces, require_one_bos, with_bos, with_fields

if TYPE_CHECKING:
    from v4jax.text.tokenizer import Tokenizer

KINDS = ("messages", "prompt and completion", "chosen and rejected", "text")
# Keys that are read; others may be there, unless they look like one of these.
_KEYS = (
    "messages",
    "tools",
    "mode",
    "response_format",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "text",
)
_MESSAGE_KEYS = (
    *(
        "role",
        "content",
        "reasoning_content",
        "tool_calls",
        "tool_call_id",
        "tools",
        "response_format",
    ),
    *("weight", "task", "wo_eos", "name"),
)
_MEANT = {
    "reasoning": "reasoning_content",
    "thinking": "reasoning_content",
    "function_call": "tool_calls",
}
_COMMON = ("model", "models", "context")  # of other meaning than "mode" and "content"
_USERS = ("user", "tool", "developer")  # whose messages are or become user turns


@dataclasses.dataclass(frozen=True)
class Example:
    """A document to train on."""

    ids: np.ndarray  # [n] int32
    weights: np.ndarray  # [n] float32: of the loss of predicting each token; that of the first is 0
    is_text: bool = False  # it may be cut anywhere, and nothing before is needed


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two conversations that begin alike, of which the first is preferred."""

    chosen: Example
    rejected: Example


class LineError(ValueError):
    """A line that is no example."""


def parse_line(
    text: bytes | str, tokenizer: "Tokenizer", mode: str | None = None
) -> Sequence[Example | Pair]:
    """The examples of a line of JSON; more than one of a conversation that is asked turn by turn.

    Args:
      mode: of conversations that name none; default "non-think" where no message has reasoning, else the
        release's thinking mode without an effort text.

    Raises:
      LineError: it is not one of `KINDS`, or the prompt format has no words for it.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LineError(f"no JSON: {error}") from None
    if not isinstance(record, dict):
        raise LineError(f"{shown(record)}: expected an object, {{...}}")
    try:
        return _examples(record, tokenizer, mode)
    except EncodingError as error:
        raise LineError(str(error)) from None


def text_example(text: str, tokenizer: "Tokenizer", *, is_end: bool = True) -> Example:
    """A text after BOS, with EOS if it ends there."""
    ids = np.asarray(_encode(tokenizer, with_bos(text) + (EOS if is_end else "")), np.int32)
    weights = np.ones(len(ids), np.float32)
    weights[:1] = 0
    return Example(ids, weights, is_text=True)


def _require_no_slip(record: Mapping[str, Any], keys: Sequence[str], what: str) -> None:
    """Raises a LineError for a key that looks like one that is read: its content would be lost."""
    for key, value in record.items():
        if key in keys or key in _COMMON or value is None:  # null: not given
            continue
        meant = _MEANT.get(key) if keys is _MESSAGE_KEYS else None
        close = difflib.get_close_matches(key.lower(), keys, 1, cutoff=0.85)
        if meant or close:
            raise LineError(f"{what} has the key {key!r}: expected {meant or close[0]!r}")
    if keys is _KEYS and record.get("weight") is not None:
        raise LineError("the line has the key 'weight': expected it in a message")


def _examples(record: dict[str, Any], tokenizer, mode: str | None) -> Sequence[Example | Pair]:
    _require_no_slip(record, _KEYS, "the line")
    if "chosen" in record or "rejected" in record:
        return [_pair(record, tokenizer, mode)]
    if "text" in record:
        if record["text"] == "":
            raise LineError("text is '': expected text")
        return [text_example(_text(record, "text"), tokenizer)]
    if "completion" in record:
        if record.get("mode") == "raw":
            return [_continued(record, tokenizer)]
        given = _said(record, "prompt", "user")
        return _conversations(
            given, _said(record, "completion", "assistant"), record, tokenizer, mode
        )
    if "messages" in record:
        return _conversations([], _said(record, "messages", ""), record, tokenizer, mode)
    found = ", ".join(map(repr, list(record)[:8])) or "none"
    raise LineError(f"keys are {found}: expected {', or '.join(KINDS)}")


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise LineError(f"{name} is {shown(value)}: expected text")
    return value


def _said(record: dict[str, Any], name: str, role: str) -> list[Mapping[str, Any]]:
    """A list of messages, or a text that one message of a role says."""
    value = record.get(name)
    if isinstance(value, str) and role:
        if role == "assistant" and not value:
            raise LineError(f"{name} is '': expected text, there is nothing to learn")
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        kinds = "a list of messages" + (" or a text" if role else "")
        raise LineError(f"{name} is {shown(value)}: expected {kinds}")
    return value


def _continued(record: dict[str, Any], tokenizer) -> Example:
    """Mode raw: a text and what follows it, as it is."""
    given = with_bos(_text(record, "prompt"))
    return _joined(
        [Piece(given, None), Piece(_text(record, "completion") + EOS, 0)], {0}, tokenizer
    )


def _pair(record: dict[str, Any], tokenizer, mode: str | None) -> Pair:
    name = "messages" if "messages" in record else "prompt"
    given = _said(record, name, "user") if name in record else []
    sides = []
    for side in ("chosen", "rejected"):
        said = _said(record, side, "assistant" if given else "")
        # The last turn alone differs; what leads to it has no loss in either.
        sides.append(_conversations(given, said, record, tokenizer, mode)[-1])
    if np.array_equal(sides[0].ids, sides[1].ids):
        raise LineError("chosen and rejected are the same: there is nothing to prefer")
    return Pair(*sides)


def _conversations(
    given: Sequence[Mapping[str, Any]],
    said: Sequence[Mapping[str, Any]],
    record: dict[str, Any],
    tokenizer,
    mode: str | None,
) -> list[Example]:
    """Examples of a conversation, with loss on the assistant's messages in `said`."""
    tools, schema = record.get("tools"), record.get("response_format")
    messages = [*given, *said]
    plain = [m for m in messages if isinstance(m, Mapping)]
    for message in plain:
        _require_no_slip(message, _MESSAGE_KEYS, "a message")
    has_system = any(message.get("role") == "system" for message in plain)
    added = 0 if has_system or not (tools or schema) else 1  # a system message at the front
    messages = list(with_fields(messages, tools, schema))
    weighted = {i for i, m in enumerate(messages) if i >= added + len(given) and _is_weighted(m)}
    if not weighted:
        raise LineError("nothing to learn: no assistant message, or each has weight 0")
    mode = record.get("mode") or mode or _default_mode(plain, tokenizer.release)
    if not isinstance(mode, str):
        raise LineError(f"mode is {shown(mode)}: expected a name, as 'think-high'")
    thinking_mode, effort = resolve_mode(mode, tokenizer.release)
    has_tools = any(isinstance(m, Mapping) and m.get("tools") for m in messages)
    is_whole = thinking_mode == "chat" or has_tools
    found = []
    for end, learned in [(max(weighted), weighted)] if is_whole else _asked(messages, weighted):
        pieces = encode_pieces(
            messages[: end + 1],
            thinking_mode,
            reasoning_effort=effort,
            release=tokenizer.release,
        )
        require_one_bos("".join(piece.text for piece in pieces))
        found.append(_joined(pieces, learned, tokenizer))
    if not any(_says_something(messages[i]) for i in weighted):
        raise LineError("nothing to learn: the assistant's messages are empty")
    return found


def _asked(messages: Sequence[Mapping[str, Any]], weighted: set[int]) -> list[tuple[int, set[int]]]:
    """For every user turn that is answered: the end of the answer, and its messages with loss."""
    answers: dict[int, set[int]] = {}
    last_user = -1
    for index, message in enumerate(messages):
        if isinstance(message, Mapping) and message.get("role") in _USERS:
            last_user = index
        if index in weighted:
            answers.setdefault(last_user, set()).add(index)
    return [(max(learned), learned) for learned in answers.values()]


def _says_something(message: Mapping[str, Any]) -> bool:
    return any(message.get(key) for key in ("content", "reasoning_content", "tool_calls", "task"))


def _is_weighted(message: object) -> bool:
    if not isinstance(message, Mapping):
        return False  # the renderer says what is wrong with it
    role, weight = message.get("role"), message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise LineError(f"weight of a message is {shown(weight)}: expected 0 or 1")
    if role != "assistant" and weight:
        raise LineError(f"weight 1 of a {shown(role)} message: loss is on the assistant's alone")
    return role == "assistant" and weight != 0


def _default_mode(messages: Sequence[Mapping[str, Any]], release: str) -> str:
    if not any(message.get("reasoning_content") for message in messages):
        return "non-think"
    return "think-high" if release == "april" else "think-low"  # those without an effort text


def _joined(pieces: Sequence[Piece], learned: set[int], tokenizer) -> Example:
    ids, weights = [], []
    for piece in pieces:
        found = _encode(tokenizer, piece.text)
        ids += found
        weights += [float(piece.message in learned)] * len(found)
    return Example(np.asarray(ids, np.int32), np.asarray(weights, np.float32))


def _encode(tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise LineError(str(error)) from None


def marked(example: Example, tokenizer: "Tokenizer") -> str:
    """The text of an example, with what has loss between ⟦ and ⟧."""
    parts, start = [], 0
    changes = np.flatnonzero(np.diff(example.weights > 0)) + 1
    for end in (*changes, len(example.ids)):
        text = tokenizer.decode(example.ids[start:end].tolist(), keep_special=True)
        parts.append(f"⟦{text}⟧" if example.weights[start] > 0 else text)
        start = end
    return "".join(parts)
