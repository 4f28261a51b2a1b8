"""The DeepSeek-V4 prompt format: messages to the text that is fed to the model.

A prompt is text with special tokens in it. Nothing, not even a space, stands between messages:

    prompt     := BOS [effort] message*
    system     := content ["\n\n" tools] ["\n\n" response_format]
    user       := USER (text | "<tool_result>" text "</tool_result>") joined by "\n\n"
    developer  := USER content ["\n\n" tools] ["\n\n" response_format]
    reminder   := LATEST_REMINDER content
    assistant  := [reasoning THINK_END] content ["\n\n" calls] EOS
    transition := ASSISTANT (THINK_START | THINK_END)

The transition that opens a reply is written at the end of the user or developer turn before it, so
a completion starts with the reasoning (thinking mode) or with the answer (chat mode). Tool results
are part of a user turn and there is no system token. `tools` and `response_format` are fields of
a system or developer message. Reasoning of turns before the last user turn is dropped, unless some
message has `tools`.

Nothing is escaped: a special token spelled out in the text of a message becomes that token. A
server has to tokenize user text with special tokens disabled, or refuse it.

Source: the encoding module released with the checkpoints (`encoding/encoding_dsv4.py`), whose
output this module reproduces byte for byte; DeepSeek-V4 report (arXiv 2606.19348), tables 2 and 3
(modes) and 5 (quick-instruction tasks).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from v4jax.text.format import (
    ASSISTANT,
    BOS,
    CALLS_END,
    CALLS_START,
    DSML,
    EOS,
    LATEST_REMINDER,
    ROLES,
    TASK_TOKENS,
    THINK_END,
    THINK_START,
    USER,
    EncodingError,
    check_thinking_mode,
    effort_prompts,
    is_too_deep,
    resolve_mode,
    shown,
    to_json,
)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A tool call of an assistant message."""

    name: str
    arguments: Mapping[str, object]
    id: str | int | None


@dataclasses.dataclass(frozen=True)
class _Block:
    """Part of a user turn: text of the user, or the result of a tool call."""

    text: str
    is_result: bool = False
    call_id: str | int | None = None


@dataclasses.dataclass
class _Turn:
    """A message ready to be rendered. One user turn may hold several user and tool messages."""

    role: str
    is_context: bool
    index: int  # of its first message
    content: str = ""
    blocks: list[_Block] = dataclasses.field(default_factory=list)  # user turns only
    reasoning: str = ""
    calls: Sequence[_Call] = ()
    tools: Sequence[Mapping[str, object]] = ()
    response_format: object = None
    task: str | None = None
    is_open: bool = False  # ends without EOS, to be continued by the model


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation as text, and how to read what the model adds to it."""

    text: str
    # How a completion begins, for the parsers of `v4jax.text.parse`: "thinking" in the reasoning,
    # "chat" in the answer.
    thinking_mode: str


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a rendered conversation: what a model writes as one message, or what it is given."""

    text: str
    message: int | None  # number of the assistant message that it is; None: it is given


def render(
    messages: Sequence[Mapping[str, object]],
    mode: str = "non-think",
    *,
    release: str = "april",
    tools: Sequence[Mapping[str, object]] | None = None,
    response_format: Mapping[str, object] | None = None,
) -> Prompt:
    """The prompt that asks a model for its next message.

    What `encode_messages` gives, with checks for what the format can write but no model answers.

    Args:
        messages: see `encode_messages`. The last one is from the user, a tool or a developer, or
            it is an assistant message with `wo_eos`, which the model continues, or it has a `task`.
            Reminders may follow it.
        mode: one of `v4jax.text.format.modes_of(release)`.
        release: whose effort texts to write; `Tokenizer.release` knows that of a checkpoint.
        tools: what the model may call; goes to the first system message, made if there is none.
        response_format: JSON schema that the model is told to adhere to; goes there too.

    Raises:
        EncodingError: a message or an argument is not one the format knows; nothing asks for a
            reply; tools or schema are given twice; or BOS is in the text of a message.
    """
    thinking_mode, effort = resolve_mode(mode, release)
    messages = with_fields(messages, tools, response_format)
    text = encode_messages(messages, thinking_mode, reasoning_effort=effort, release=release)
    require_one_bos(text)
    return Prompt(text, _completion_mode(messages, thinking_mode))


def require_one_bos(text: str) -> None:
    """Refuses a rendered conversation in which a message spells out BOS.

    Raises:
        EncodingError: it has several.
    """
    if text.count(BOS) > 1:
        raise EncodingError(
            f"{BOS} is in the text of a message: it begins a prompt, and stands there once. A "
            "prompt that is rendered already is continued as it is (prompt instead of messages; "
            "mode raw of the commands)."
        )


def with_fields(
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[Mapping[str, object]] | None,
    response_format: Mapping[str, object] | None = None,
) -> Sequence[Mapping[str, object]]:
    """Messages with tools and schema on the first system message, made if there is none.

    Raises:
        EncodingError: some message has them already.
    """
    for name, value in (("tools", tools), ("response_format", response_format)):
        if value:
            messages = _with_field(messages, name, value)
    return messages


def with_bos(text: str) -> str:
    """A text as a prompt that is continued as it is: after BOS, which it may have already."""
    return text if text.startswith(BOS) else BOS + text


def _with_field(
    messages: Sequence[Mapping[str, object]], name: str, value: object
) -> list[Mapping[str, object]]:
    if any(isinstance(message, Mapping) and message.get(name) for message in messages):
        raise EncodingError(f"{name} beside the messages and on one of them: give them once.")
    for index, message in enumerate(messages):
        if isinstance(message, Mapping) and message.get("role") == "system":
            return [*messages[:index], {**message, name: value}, *messages[index + 1 :]]
    return [{"role": "system", "content": "", name: value}, *messages]


def _completion_mode(messages: Sequence[Mapping[str, object]], thinking_mode: str) -> str:
    """How the completion begins: a task, or a turn to be continued, leaves no room to reason."""
    turns = _turns(messages, is_context=False)
    while turns and turns[-1].role == "latest_reminder" and turns[-1].task is None:
        turns.pop()
    last = turns[-1] if turns else None
    if last is not None and last.task is not None:
        return "chat"
    if last is not None and last.role == "assistant" and last.is_open:
        return "chat"
    if last is None or last.role not in ("user", "developer"):
        role = "none" if last is None else f"from {last.role}"
        raise EncodingError(
            f"The last message is {role}, which asks for no reply: expected one from user, tool or "
            "developer, or an assistant message with wo_eos, to be continued."
        )
    return thinking_mode


def encode_messages(
    messages: Sequence[Mapping[str, object]],
    thinking_mode: str,
    context: Sequence[Mapping[str, object]] | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: str | None = None,
    *,
    release: str = "april",
) -> str:
    """The prompt for a conversation.

    Args:
        messages: OpenAI-style messages with a `role` out of `ROLES` and a string `content`. Further
            fields: `reasoning_content`, `tool_calls` and `wo_eos` (leave the turn open) of an
            assistant message, `tools` and `response_format` of a system or developer message,
            `tool_call_id` of a tool message, `task` of any.
        thinking_mode: "chat" or "thinking".
        context: messages before `messages` whose text exists already. They are not rendered, but
            they decide what is history.
        drop_thinking: leave out the reasoning of turns before the last user turn. Has no effect
            when a message has `tools`: then all reasoning is kept.
        add_default_bos_token: start with BOS, if there is no `context`.
        reasoning_effort: a key of `EFFORT_PROMPTS[release]`; matters in thinking mode only.
        release: the model release the prompt is for. The same effort means other texts in each.

    Raises:
        EncodingError: a message or an argument is not one the format knows.
    """
    pieces = encode_pieces(
        messages,
        thinking_mode,
        context,
        drop_thinking,
        add_default_bos_token,
        reasoning_effort,
        release=release,
    )
    return "".join(piece.text for piece in pieces)


def encode_pieces(
    messages: Sequence[Mapping[str, object]],
    thinking_mode: str,
    context: Sequence[Mapping[str, object]] | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: str | None = None,
    *,
    release: str = "april",
) -> list[Piece]:
    """`encode_messages` in pieces, none empty: which of it a model writes, and which it is given.

    A model writes the whole of an assistant message: reasoning and its end, content, calls, EOS. The
    transition before it, with the token that opens the reply, is given. Args and errors as there.
    """
    check_thinking_mode(thinking_mode)
    effort_prompt = _effort_prompt(reasoning_effort, release)
    is_thinking = thinking_mode == "thinking"

    turns = _turns(context or (), is_context=True) + _turns(messages, is_context=False)
    _sort_tool_results(turns)
    is_dropping = is_thinking and drop_thinking and not any(turn.tools for turn in turns)
    last_user = _last_user(turns)
    if is_dropping:
        turns = [t for i, t in enumerate(turns) if i >= last_user or t.role != "developer"]
        last_user = _last_user(turns)

    parts = [Piece(BOS if add_default_bos_token and not context else "", None)]
    if is_thinking and turns and not turns[0].is_context:
        parts.append(Piece(effort_prompt, None))
    for index, turn in enumerate(turns):
        if turn.is_context:
            continue
        answers_task = index > 0 and turns[index - 1].task is not None
        next_role = turns[index + 1].role if index + 1 < len(turns) else None
        shows_reasoning = is_thinking and (not is_dropping or index >= last_user)
        text = _render(turn, shows_reasoning and not answers_task)
        parts.append(Piece(text, turn.index if turn.role == "assistant" else None))
        transition = _render_transition(turn, next_role, is_thinking, shows_reasoning)
        parts.append(Piece(transition, None))
    return _joined(parts)


def _joined(parts: list[Piece]) -> list[Piece]:
    """What is given between two messages of the model, in one piece."""
    found: list[Piece] = []
    for part in filter(lambda part: part.text, parts):
        if part.message is None and found and found[-1].message is None:
            found[-1] = Piece(found[-1].text + part.text, None)
        else:
            found.append(part)
    return found


def _effort_prompt(effort: str | None, release: str) -> str:
    prompts = effort_prompts(release)
    if (effort is not None and not isinstance(effort, str)) or effort not in prompts:
        raise EncodingError(
            f"reasoning_effort={shown(effort)}: release {release!r} expects one of "
            f"{tuple(prompts)}."
        )
    return prompts[effort]


def _turns(messages: Sequence[Mapping[str, Any]], is_context: bool) -> list[_Turn]:
    """One turn per message, where runs of user and tool messages share a user turn.

    A user message does not join a turn that has a `task`; a tool message does. A message that joins
    gives only its content.
    """
    turns: list[_Turn] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise EncodingError(
                f"Message {shown(message)}: expected a dict with a 'role' from {ROLES}."
            )
        role = message["role"]
        turn = _Turn("user" if role == "tool" else role, is_context, index)
        if role in ("user", "tool"):
            call_id = _field(message, "tool_call_id", (str, int))
            block = _Block(_content(message), role == "tool", call_id)
            if turns and turns[-1].role == "user" and (role == "tool" or turns[-1].task is None):
                turns[-1].blocks.append(block)
                continue
            turn.blocks.append(block)
        else:
            turn.content = _content(message)
            turn.reasoning = _field(message, "reasoning_content", (str,)) or ""
            turn.calls = [
                _call(call) for call in _field(message, "tool_calls", (list, tuple)) or ()
            ]
            turn.tools = _field(message, "tools", (list, tuple)) or ()
            turn.response_format = message.get("response_format")
            turn.is_open = bool(message.get("wo_eos"))
        if role != "tool":
            turn.task = _field(message, "task", (str,))
        turns.append(turn)
    return turns


def _field(message: Mapping[str, Any], name: str, kinds: tuple[type, ...]) -> Any:
    """A field of one of these `kinds`, that may be missing or null.

    Raises:
        EncodingError: it has a value of another kind.
    """
    value = message.get(name)
    if value is None or (isinstance(value, kinds) and not isinstance(value, bool)):
        return value
    names = " or ".join("text" if kind is str else kind.__name__ for kind in kinds)
    raise EncodingError(
        f"{name}={shown(value)} of a {message.get('role', 'call')} message: a field of a wrong "
        f"type, expected {names} or null."
    )


def _content(message: Mapping[str, object]) -> str:
    """The text of a message. What may be missing or null depends on the role."""
    role = message["role"]
    content = message.get("content", "" if role in ("user", "tool") else None)
    if content is None and role in ("system", "assistant"):
        return ""
    if role == "tool" and isinstance(content, list):
        return "\n\n".join(_part_text(part) for part in content)
    if not isinstance(content, str) or (role == "developer" and not content):
        raise EncodingError(
            f"The content of a {role} message is {shown(content)}: expected text. "
            "Join a list of content parts into one string first."
        )
    return content


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or (kind == "text" and not isinstance(part.get("text"), str)):
        raise EncodingError(
            f"Content part {shown(part)}: expected {{'type': 'text', 'text': ...}}."
        )
    return part["text"] if kind == "text" else f"[Unsupported {kind}]"


def _call(call: Any) -> _Call:
    function: Any = call.get("function") if isinstance(call, Mapping) else None
    text = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(text, str) or not isinstance(function.get("name"), str):
        raise EncodingError(
            f"Tool call {shown(call)}: expected {{'function': {{'name': ..., 'arguments': ...}}}} with "
            "the arguments as a JSON string; use json.dumps(arguments)."
        )
    try:
        arguments = json.loads(text)
        is_json = not is_too_deep(arguments)
    except (ValueError, RecursionError):
        is_json = False
    if not is_json:
        arguments = {"arguments": text}  # a call the model got wrong is shown as it was
    if not isinstance(arguments, dict):
        raise EncodingError(f"Tool call arguments {shown(text)}: expected a JSON object, {{...}}.")
    id = _field(call, "id", (str, int)) or _field(function, "id", (str, int))
    return _Call(function["name"], arguments, id)


def _sort_tool_results(turns: list[_Turn]) -> None:
    """Puts the results in each user turn in the order of the calls they answer, text untouched."""
    order: dict[str | int | None, int] = {}
    for turn in turns:
        if turn.calls:
            order = {call.id: i for i, call in enumerate(turn.calls) if call.id}
        elif turn.role == "user" and order:
            results = [block for block in turn.blocks if block.is_result]
            results.sort(key=lambda block: order.get(block.call_id, 0))
            ordered = iter(results)
            turn.blocks = [next(ordered) if block.is_result else block for block in turn.blocks]


def _last_user(turns: list[_Turn]) -> int:
    return max((i for i, t in enumerate(turns) if t.role in ("user", "developer")), default=-1)


def _render(turn: _Turn, shows_reasoning: bool) -> str:
    if turn.role == "user":
        texts = (
            f"<tool_result>{b.text}</tool_result>" if b.is_result else b.text for b in turn.blocks
        )
        return USER + "\n\n".join(texts)
    if turn.role == "latest_reminder":
        return LATEST_REMINDER + turn.content
    if turn.role == "assistant":
        reasoning = turn.reasoning + THINK_END if shows_reasoning else ""
        calls = _render_calls(turn.calls) if turn.calls else ""
        return reasoning + turn.content + calls + ("" if turn.is_open else EOS)
    text = turn.content if turn.role == "system" else USER + turn.content
    if turn.tools:
        text += "\n\n" + _render_tools(turn.tools)
    if turn.response_format:
        text += (
            "\n\n## Response Format:\n\n"
            "You MUST strictly adhere to the following schema to reply:\n"
            f"{to_json(turn.response_format)}"
        )
    return text


def _render_transition(
    turn: _Turn, next_role: str | None, is_thinking: bool, shows_reasoning: bool
) -> str:
    """What makes the model reply after `turn`: nothing where another message is about to follow."""
    if next_role not in (None, "assistant", "latest_reminder"):
        return ""
    if turn.task is not None:
        if turn.task not in TASK_TOKENS:
            raise EncodingError(f"task={shown(turn.task)}: expected one of {tuple(TASK_TOKENS)}.")
        if turn.task != "action":
            return TASK_TOKENS[turn.task]
        return ASSISTANT + (THINK_START if is_thinking else THINK_END) + TASK_TOKENS["action"]
    if turn.role not in ("user", "developer"):
        return ""
    return ASSISTANT + (THINK_START if shows_reasoning else THINK_END)


def _render_calls(calls: Sequence[_Call]) -> str:
    invokes = []
    for call in calls:
        lines = []
        for name, value in call.arguments.items():
            flag, text = ("true", value) if isinstance(value, str) else ("false", to_json(value))
            lines.append(f'<{DSML}parameter name="{name}" string="{flag}">{text}</{DSML}parameter>')
        parameters = "\n".join(lines)  # no arguments: one empty line
        invokes.append(f'<{DSML}invoke name="{call.name}">\n{parameters}\n</{DSML}invoke>')
    return "\n".join([f"{CALLS_START}>", *invokes, CALLS_END])


def _render_tools(tools: Sequence[Mapping[str, object]]) -> str:
    for tool in tools:
        if not isinstance(tool, Mapping) or not isinstance(tool.get("function"), Mapping):
            raise EncodingError(
                f"Tool {shown(tool)}: expected {{'function': {{'name': ..., ...}}}}."
            )
    schemas = "\n".join(to_json(tool["function"]) for tool in tools)
    return f"""\
## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types \
(numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK_START}), you MUST output your complete reasoning \
inside {THINK_START}...{THINK_END} BEFORE any tool calls or final response.

Otherwise, output directly after {THINK_END} with tool calls or final response.

### Available Tool Schemas

{schemas}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
