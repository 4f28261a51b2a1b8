"""The DeepSeek-V4 prompt format: messages to text, and a completion back to a message.

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
import re
from collections.abc import Mapping, Sequence

# Special tokens. The bar is U+FF5C and the low block U+2581, not their ASCII look-alikes.
BOS = "<｜begin▁of▁sentence｜>"  # once, at the very start
EOS = "<｜end▁of▁sentence｜>"  # ends every assistant turn
PAD = "<｜▁pad▁｜>"  # never written by this module
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"  # inside the tags of a tool call: "<" DSML "invoke ..."
LATEST_REMINDER = "<｜latest_reminder｜>"  # date and locale
TASK_TOKENS = {  # quick instructions: the `task` field of a message, and the token it appends
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}
EXTRACTED_URL = "<｜extracted_url｜>"  # written by the caller, in the text of a read_url task
# Every token of the format. A tokenizer trained with this list gets ids 0, 1, 2, ... in this order.
SPECIAL_TOKENS = (
    *(BOS, EOS, PAD, USER, ASSISTANT, THINK_START, THINK_END, DSML, LATEST_REMINDER),
    *TASK_TOKENS.values(),
    EXTRACTED_URL,
)

# The three modes of the report -> (thinking_mode, reasoning_effort) of `encode_messages`.
MODES: dict[str, tuple[str, str | None]] = {
    "non-think": ("chat", None),
    "think-high": ("thinking", "high"),
    "think-max": ("thinking", "max"),
}

APRIL_MAX_EFFORT = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve \
the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and \
adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, \
considered alternative, and rejected hypothesis to ensure absolutely no assumption is left \
unchecked.

"""
JULY_MAX_EFFORT = """\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: \
exhaustively decompose the problem into its most fundamental components, trace every causal chain \
to its root, and resolve the underlying cause rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and \
are certain that no assumption remains unchecked and no error remains undiscovered.

"""
# What each release writes after BOS for a reasoning effort, in thinking mode.
EFFORT_PROMPTS: dict[str, dict[str | None, str]] = {
    "april": {None: "", "high": "", "max": APRIL_MAX_EFFORT},
    "0731": {None: "", "low": "", "high": APRIL_MAX_EFFORT, "max": JULY_MAX_EFFORT},
}

THINKING_MODES = ("chat", "thinking")
ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")

# Tags of a tool call, cut where the strict parser looks for them.
_CALLS_START = f"\n\n<{DSML}tool_calls"
_CALLS_END = f"</{DSML}tool_calls>"
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


class EncodingError(ValueError):
    """A message that cannot be rendered, or a completion that is not in the format."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """A tool call of an assistant message."""

    name: str
    arguments: Mapping[str, object]
    id: str | None


@dataclasses.dataclass(frozen=True)
class _Block:
    """Part of a user turn: text of the user, or the result of a tool call."""

    text: str
    is_result: bool = False
    call_id: str | None = None


@dataclasses.dataclass
class _Turn:
    """A message ready to be rendered. One user turn may hold several user and tool messages."""

    role: str
    is_context: bool
    content: str = ""
    blocks: list[_Block] = dataclasses.field(default_factory=list)  # user turns only
    reasoning: str = ""
    calls: Sequence[_Call] = ()
    tools: Sequence[Mapping[str, object]] = ()
    response_format: object = None
    task: str | None = None
    is_open: bool = False  # ends without EOS, to be continued by the model


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
    _check_thinking_mode(thinking_mode)
    effort_prompt = _effort_prompt(reasoning_effort, release)
    is_thinking = thinking_mode == "thinking"

    turns = _turns(context or (), is_context=True) + _turns(messages, is_context=False)
    _sort_tool_results(turns)
    is_dropping = is_thinking and drop_thinking and not any(turn.tools for turn in turns)
    last_user = _last_user(turns)
    if is_dropping:
        turns = [t for i, t in enumerate(turns) if i >= last_user or t.role != "developer"]
        last_user = _last_user(turns)

    parts = [BOS] if add_default_bos_token and not context else []
    if is_thinking and turns and not turns[0].is_context:
        parts.append(effort_prompt)
    for index, turn in enumerate(turns):
        if turn.is_context:
            continue
        answers_task = index > 0 and turns[index - 1].task is not None
        next_role = turns[index + 1].role if index + 1 < len(turns) else None
        shows_reasoning = is_thinking and (not is_dropping or index >= last_user)
        parts.append(_render(turn, shows_reasoning and not answers_task))
        parts.append(_render_transition(turn, next_role, is_thinking, shows_reasoning))
    return "".join(parts)


def _check_thinking_mode(thinking_mode: str) -> None:
    if thinking_mode not in THINKING_MODES:
        raise EncodingError(
            f"thinking_mode={thinking_mode!r}: expected one of {THINKING_MODES}. "
            "MODES has the modes of the report, such as 'think-high'."
        )


def _effort_prompt(effort: str | None, release: str) -> str:
    if release not in EFFORT_PROMPTS:
        raise EncodingError(f"release={release!r}: expected one of {tuple(EFFORT_PROMPTS)}.")
    prompts = EFFORT_PROMPTS[release]
    if effort not in prompts:
        raise EncodingError(
            f"reasoning_effort={effort!r}: release {release!r} expects one of {tuple(prompts)}."
        )
    return prompts[effort]


def _turns(messages: Sequence[Mapping[str, object]], is_context: bool) -> list[_Turn]:
    """One turn per message, where runs of user and tool messages share a user turn.

    A user message does not join a turn that has a `task`; a tool message does. A message that joins
    gives only its content.
    """
    turns: list[_Turn] = []
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise EncodingError(f"Message {message!r}: expected a dict with a 'role' from {ROLES}.")
        role = message["role"]
        turn = _Turn("user" if role == "tool" else role, is_context)
        if role in ("user", "tool"):
            block = _Block(_content(message), role == "tool", message.get("tool_call_id"))
            if turns and turns[-1].role == "user" and (role == "tool" or turns[-1].task is None):
                turns[-1].blocks.append(block)
                continue
            turn.blocks.append(block)
        else:
            turn.content = _content(message)
            turn.reasoning = message.get("reasoning_content") or ""
            turn.calls = [_call(call) for call in message.get("tool_calls") or ()]
            turn.tools = message.get("tools") or ()
            turn.response_format = message.get("response_format")
            turn.is_open = bool(message.get("wo_eos"))
        if role != "tool":
            turn.task = message.get("task")
        turns.append(turn)
    return turns


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
            f"The content of a {role} message is {content!r}: expected text. "
            "Join a list of content parts into one string first."
        )
    return content


def _part_text(part: object) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or (kind == "text" and not isinstance(part.get("text"), str)):
        raise EncodingError(f"Content part {part!r}: expected {{'type': 'text', 'text': ...}}.")
    return part["text"] if kind == "text" else f"[Unsupported {kind}]"


def _call(call: object) -> _Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    text = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(text, str) or not isinstance(function.get("name"), str):
        raise EncodingError(
            f"Tool call {call!r}: expected {{'function': {{'name': ..., 'arguments': ...}}}} with "
            "the arguments as a JSON string; use json.dumps(arguments)."
        )
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = {"arguments": text}  # a call the model got wrong is shown as it was
    if not isinstance(arguments, dict):
        raise EncodingError(f"Tool call arguments {text!r}: expected a JSON object, {{...}}.")
    return _Call(function["name"], arguments, call.get("id") or function.get("id"))


def _sort_tool_results(turns: list[_Turn]) -> None:
    """Puts the results in each user turn in the order of the calls they answer, text untouched."""
    order: dict[str, int] = {}
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
            f"{_to_json(turn.response_format)}"
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
            raise EncodingError(f"task={turn.task!r}: expected one of {tuple(TASK_TOKENS)}.")
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
            flag, text = ("true", value) if isinstance(value, str) else ("false", _to_json(value))
            lines.append(f'<{DSML}parameter name="{name}" string="{flag}">{text}</{DSML}parameter>')
        parameters = "\n".join(lines)  # no arguments: one empty line
        invokes.append(f'<{DSML}invoke name="{call.name}">\n{parameters}\n</{DSML}invoke>')
    return "\n".join([f"{_CALLS_START}>", *invokes, _CALLS_END])


def _render_tools(tools: Sequence[Mapping[str, object]]) -> str:
    for tool in tools:
        if not isinstance(tool, Mapping) or "function" not in tool:
            raise EncodingError(f"Tool {tool!r}: expected {{'function': {{'name': ..., ...}}}}.")
    schemas = "\n".join(_to_json(tool["function"]) for tool in tools)
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


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def parse_message_from_completion_text(text: str, thinking_mode: str) -> dict[str, object]:
    """The assistant message in a complete completion: its text after the prompt, with EOS.

    Calls have no id, that is for the server to give. Their arguments are assembled as text: a
    value the model marked as JSON is passed on as it stands, valid or not.

    Returns:
        `role`, `content`, `reasoning_content` and `tool_calls`; the last three may be empty.

    Raises:
        EncodingError: the text is not exactly in the format; `parse_partial_completion` takes any.
    """
    _check_thinking_mode(thinking_mode)
    reasoning, position = "", 0
    if thinking_mode == "thinking":
        reasoning, stop, position = _read_until(text, position, THINK_END, _CALLS_START)
        if stop != THINK_END:
            raise EncodingError(f"Reasoning not closed by {THINK_END}: ...{text[-80:]!r}.")
    content, stop, position = _read_until(text, position, EOS, _CALLS_START)
    if not stop:
        raise EncodingError(f"Neither {EOS} nor tool calls after the content: ...{text[-80:]!r}.")
    calls = []
    if stop == _CALLS_START:
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
    _check_thinking_mode(thinking_mode)
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
        tags = (EOS, _CALLS_START, _CALLS_START[1:], _CALLS_START[2:])
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
        gap, stop, position = _read_until(text, position, _INVOKE_START, _CALLS_END)
        _expect_line_end(gap, stop)
        if stop == _CALLS_END:
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
        f"{_to_json(key)}: {value if flag == 'false' else _to_json(value)}"
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
