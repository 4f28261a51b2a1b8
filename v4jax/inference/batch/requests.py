"""A line of the input, checked: what to generate from, and how."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

from v4jax.inference.sampling import Sampler, sampler_of
from v4jax.text.format import BOS, MODES
from v4jax.text.prompt import encode_messages

SEEDS = 2**32  # jax takes the low 32 bits of a seed
_MAX_MESSAGE = 500  # characters; messages of errors may quote a whole request


class RequestError(ValueError):
    """A line that is not a request; `id` is its own, if that much could be read."""

    def __init__(self, message: str, id: str | None = None):
        if len(message) > _MAX_MESSAGE:
            message = message[:_MAX_MESSAGE] + "..."
        super().__init__(message)
        self.id = id


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to generate. One value holds for every line that does not say otherwise.

    Raises:
      ValueError: a value of the wrong type or out of range.
    """

    mode: str = "non-think"  # a key of `v4jax.text.format.MODES`; of requests with messages
    temperature: float = 1.0  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int = 256
    seed: int = 0  # a line without its own uses this plus its number
    stop: str | Sequence[str] = ()  # texts that end a completion and are not part of it

    def __post_init__(self):
        _require(self, "mode", self.mode in tuple(MODES), f"one of {', '.join(MODES)}")
        is_temperature = _is_number(self.temperature) and 0 <= self.temperature < float("inf")
        _require(self, "temperature", is_temperature, "a number from 0 on")
        is_count = self.top_k is None or (_is_integer(self.top_k) and 1 <= self.top_k < 2**31)
        _require(self, "top_k", is_count, "a positive integer")
        is_probability = self.top_p is None or (_is_number(self.top_p) and 0 < self.top_p <= 1)
        _require(self, "top_p", is_probability, "a number in (0, 1]")
        is_length = _is_integer(self.max_new_tokens) and 1 <= self.max_new_tokens < 2**31
        _require(self, "max_new_tokens", is_length, "a positive integer")
        is_seed = _is_integer(self.seed) and 0 <= self.seed < SEEDS
        _require(self, "seed", is_seed, f"an integer in 0..{SEEDS - 1}")
        texts = [self.stop] if isinstance(self.stop, str) else self.stop
        is_texts = isinstance(texts, list | tuple) and all(
            isinstance(text, str) and text for text in texts
        )
        _require(self, "stop", is_texts, "a text or a list of texts, none empty")
        object.__setattr__(self, "stop", tuple(texts))
        _ = self.sampler  # refuses what does not go together

    @property
    def sampler(self) -> Sampler:
        """The strategy that temperature, top_k and top_p describe."""
        top_p = None if self.top_p is None else float(self.top_p)
        return sampler_of(float(self.temperature), self.top_k, top_p)

    def updated(self, given: Mapping[str, object]) -> "Settings":
        """With the settings that a line gives. Its top_k or top_p takes the place of either."""
        if "top_k" in given or "top_p" in given:
            given = {"top_k": None, "top_p": None, **given}
        return dataclasses.replace(self, **given)


SETTINGS = tuple(field.name for field in dataclasses.fields(Settings))
KEYS = ("id", "messages", "tools", "prompt", *SETTINGS)


@dataclasses.dataclass(frozen=True)
class Request:
    """A valid line."""

    line: int  # number in the file, from 1
    id: str
    prompt: str  # the text fed to the model, special tokens included
    thinking_mode: str | None  # of `v4jax.text.format`; None: a raw prompt
    settings: Settings  # `seed` is the request's own


def parse_request(text: bytes, line: int, defaults: Settings) -> Request:
    """The request on a line.

    Raises:
      RequestError: not JSON, an unknown key, a wrong value, or messages that cannot be rendered.
    """
    try:
        fields = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON in UTF-8: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(f"{type(fields).__name__} instead of a JSON object {{...}}.")
    id = fields.get("id", str(line))
    if not isinstance(id, str) or not _is_unicode(id):
        raise RequestError(f"id={id!r}: expected a text.")
    try:
        return _request(fields, id, line, defaults)
    except ValueError as error:
        raise RequestError(str(error), id) from error


def _request(fields: Mapping[str, object], id: str, line: int, defaults: Settings) -> Request:
    if unknown := sorted(set(fields) - set(KEYS)):
        raise ValueError(f"unknown keys {', '.join(unknown)}: expected some of {', '.join(KEYS)}.")
    if ("messages" in fields) == ("prompt" in fields):
        raise ValueError("expected exactly one of the keys messages and prompt.")
    given = {"seed": (defaults.seed + line) % SEEDS}
    given |= {key: fields[key] for key in SETTINGS if key in fields}
    settings = defaults.updated(given)
    if "messages" in fields:
        thinking_mode, effort = MODES[settings.mode]
        messages = _messages(fields)
        try:
            prompt = encode_messages(messages, thinking_mode, reasoning_effort=effort)
        except (TypeError, AttributeError) as error:  # a field of a type that no one expects
            raise ValueError(f"messages with a field of a wrong type: {error}.") from error
    else:
        if extra := [key for key in ("mode", "tools") if key in fields]:
            raise ValueError(f"{', '.join(extra)} beside prompt: that belongs to messages.")
        if not isinstance(fields["prompt"], str):
            raise ValueError(f"prompt={fields['prompt']!r}: expected a text.")
        thinking_mode, prompt = None, BOS + fields["prompt"]
    if not _is_unicode(prompt):
        raise ValueError("half of a surrogate pair in the text: it has no UTF-8 form.")
    return Request(line, id, prompt, thinking_mode, settings)


def _messages(fields: Mapping[str, object]) -> list[Mapping[str, object]]:
    """The messages, with the request's `tools` on the first system message (made if needed)."""
    messages, tools = fields["messages"], fields.get("tools")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages={messages!r}: expected a list with at least one message.")
    if "tools" not in fields:
        return messages
    if not isinstance(tools, list) or not tools:
        raise ValueError(f"tools={tools!r}: expected a list with at least one tool.")
    if any(isinstance(message, dict) and message.get("tools") for message in messages):
        raise ValueError("tools on the request and on a message: give them once.")
    for index, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "system":
            return [*messages[:index], {**message, "tools": tools}, *messages[index + 1 :]]
    return [{"role": "system", "content": "", "tools": tools}, *messages]


def _require(settings: Settings, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}={getattr(settings, name)!r}: expected {expected}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
