"""Messages of a request to token ids, and which mode a request asks for."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from v4jax.inference.server.errors import ApiError
from v4jax.inference.server.fields import Fields
from v4jax.text.format import EXTRACTED_URL, SPECIAL_TOKENS, EncodingError, resolve_mode, shown
from v4jax.text.tokenizer import Tokenizer

# `reasoning_effort` to modes, in the order of what is tried: only some releases have think-low.
EFFORTS = {
    "none": ("non-think",),
    "minimal": ("non-think",),
    "low": ("think-low", "think-high"),
    "medium": ("think-high",),
    "high": ("think-high",),
    "xhigh": ("think-max",),
    "max": ("think-max",),
}
_CUT = "\ufdd0"  # a noncharacter: stands in no text, and says where to cut it
_LITERAL = [token for token in SPECIAL_TOKENS if token != EXTRACTED_URL]


def mode_of(fields: Fields, tokenizer: Tokenizer, default: str) -> str:
    """How much to think: `mode`, or what the fields of other servers say.

    `thinking: {"type": "disabled"}` and `chat_template_kwargs: {"thinking": false}` (or
    `enable_thinking`) mean non-think, whatever the effort; else `reasoning_effort` decides, at the top
    or in `chat_template_kwargs`; thinking without an effort is think-high.
    """
    mode = fields.of("mode", str, "text")
    kwargs = fields.sub("chat_template_kwargs")
    flags = [kwargs.boolean("thinking"), kwargs.boolean("enable_thinking")]
    kind = fields.sub("thinking").get("type")
    if kind is not None:
        if kind not in ("enabled", "disabled"):
            text = f"thinking.type={shown(kind)}: expected enabled or disabled."
            raise ApiError(400, text, param="thinking.type")
        flags.append(kind == "enabled")
    top, nested = fields.get("reasoning_effort"), kwargs.get("reasoning_effort")
    effort = nested if top is None else top
    if effort is not None and (not isinstance(effort, str) or effort not in EFFORTS):
        text = f"reasoning_effort={shown(effort)}: expected one of {', '.join(EFFORTS)}."
        raise ApiError(400, text, param="reasoning_effort")
    if mode is None:
        if False in flags:
            mode = "non-think"
        elif effort is not None:
            mode = next(name for name in EFFORTS[effort] if name in tokenizer.modes)
        else:
            mode = "think-high" if True in flags else default
    try:
        resolve_mode(mode, tokenizer.release)
    except EncodingError as error:
        raise ApiError(400, str(error), param="mode") from None
    return mode


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Any],
    mode: str,
    tools: Sequence[Any] | None,
    schema: Mapping[str, Any] | None = None,
) -> tuple[list[int], str]:
    """(token ids, thinking mode of the completion) of a conversation.

    A special token that is spelled out in a message is text here, not that token: what a user or a
    tool says cannot begin another's turn. `<｜extracted_url｜>` is a token, since callers write it.

    Raises:
      ApiError: messages or tools that cannot be rendered.
    """
    try:
        prompt = tokenizer.render(
            [_message(message) for message in messages],
            mode,
            tools=_literal(tools),
            response_format=_literal(schema),
        )
        pieces = prompt.text.split(_CUT)
        ids = [index for piece in pieces for index in tokenizer.encode(piece)]
    except (ValueError, RecursionError) as error:
        text = str(error).replace("\\ufdd0", "").replace(_CUT, "")
        raise ApiError(400, text, param="messages") from None
    return ids, prompt.thinking_mode


def _message(message: Any) -> Any:
    """A message as the prompt format has it: text instead of parts, system instead of developer."""
    if not isinstance(message, Mapping):
        return message  # refused when it is rendered
    fields = {**message}
    if fields.get("role") == "developer":
        fields["role"] = "system"
    content = fields.get("content")
    if isinstance(content, list):
        fields["content"] = "\n\n".join(map(_part, content))
    calls = fields.get("tool_calls")
    if isinstance(calls, list):
        fields["tool_calls"] = [_call(call) for call in calls]
    return {
        name: value if name in ("role", "task") else _literal(value)
        for name, value in fields.items()
    }


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(
            f"Content part {shown(part)}: expected {{'type': 'text', 'text': ...}}. The model reads "
            "text only."
        )
    return part["text"]


def _call(call: Any) -> Any:
    """A call whose arguments are written without escapes, so that tokens in them show."""
    function = call.get("function") if isinstance(call, Mapping) else None
    text = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        return call  # refused when it is rendered
    if not isinstance(text, str):
        return call
    try:
        text = json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        pass  # it is shown to the model as it stands
    return {**call, "function": {**function, "arguments": text}}


def _literal(value: Any) -> Any:
    """A value in whose texts special tokens are cut in two.

    Raises:
      ValueError: a text has the mark of a cut.
    """
    if isinstance(value, str):
        if _CUT in value:
            raise ValueError("U+FDD0 is in a text: it is no character, leave it out.")
        for token in _LITERAL:
            if token in value:
                value = value.replace(token, token[0] + _CUT + token[1:])
        return value
    if isinstance(value, Mapping):
        return {_literal(key): _literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_literal(inner) for inner in value]
    return value
