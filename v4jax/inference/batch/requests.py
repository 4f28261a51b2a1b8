"""A line of the input, checked: what to generate from, and how."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from v4jax.inference.grammar import Grammar
from v4jax.inference.sampling import Sampling
from v4jax.text.format import DEEPEST, MODES, is_too_deep, shown
from v4jax.text.prompt import render, with_bos

SEEDS = 2**32  # jax takes the low 32 bits of a seed
_MAX_MESSAGE = 500  # characters; messages of errors may quote a whole request
_MARK = b"\xef\xbb\xbf"  # UTF-8 byte-order mark


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
    temperature: float = 1.0  # 0, and what is nearly that: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0  # a line without its own uses this plus its number
    stop: str | Sequence[str] = ()  # texts that end a completion and are not part of it
    json_schema: Mapping[str, Any] | None = None  # of the answer

    def __post_init__(self):
        _require(self, "mode", self.mode in tuple(MODES), f"one of {', '.join(MODES)}")
        texts = [self.stop] if isinstance(self.stop, str) else self.stop
        is_texts = isinstance(texts, list | tuple) and all(
            isinstance(text, str) and text and _is_unicode(text) for text in texts
        )
        _require(self, "stop", is_texts, "a text or a list of texts in Unicode, none empty")
        object.__setattr__(self, "stop", tuple(texts))
        schema = self.json_schema
        _require(self, "json_schema", isinstance(schema, Mapping | None), "a JSON schema")
        _ = self.sampling, self.grammar  # refuse what they do not take

    @property
    def sampling(self) -> Sampling:
        """How the request's tokens are drawn, and how many."""
        names = {field.name for field in dataclasses.fields(Sampling)} & set(SETTINGS)
        return Sampling(**{name: getattr(self, name) for name in names})

    @property
    def grammar(self) -> Grammar | None:
        """Of the answer."""
        return None if self.json_schema is None else Grammar.json_schema(self.json_schema)

    def updated(self, given: Mapping[str, Any]) -> "Settings":
        """With the settings that a line gives."""
        return dataclasses.replace(self, **given)


SETTINGS = tuple(field.name for field in dataclasses.fields(Settings))
KEYS = ("id", "messages", "tools", "prompt", "model", *SETTINGS)


@dataclasses.dataclass(frozen=True)
class Request:
    """A valid line."""

    line: int  # number in the file, from 1
    id: str
    prompt: str  # the text fed to the model, special tokens included
    thinking_mode: str | None  # of `v4jax.text.format`; None: a raw prompt
    settings: Settings  # `seed` is the request's own
    adapter: str | None = None  # name of the one that computes it; None: the model alone


def line_text(line: bytes) -> bytes:
    """A line without what says nothing: white space, and the byte-order mark of a file's start."""
    return line.strip().removeprefix(_MARK).strip()


def parse_request(
    text: bytes,
    line: int,
    defaults: Settings,
    release: str = "april",
    models: Sequence[str] = (),
) -> Request:
    """The request on a line.

    A key whose value is null or an empty list is as good as not given. Clients send such keys.

    Args:
      models: names that the key `model` may have: the model's own, then those of its adapters.

    Raises:
      RequestError: not JSON, an unknown key, a wrong value, or messages that cannot be rendered.
    """
    try:
        fields, faults = _read_json(line_text(text))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON in UTF-8: {error}") from error
    if is_too_deep(fields):
        raise RequestError(f"lists and objects in each other more than {DEEPEST} times.")
    if not isinstance(fields, dict):
        raise RequestError(f"{type(fields).__name__} instead of a JSON object {{...}}.")
    fields = {key: value for key, value in fields.items() if value is not None and value != []}
    id = fields.get("id", str(line))
    if not isinstance(id, str) or not _is_unicode(id):
        raise RequestError(f"id={shown(id)}: expected a text.")
    try:
        if faults:
            raise ValueError(faults[0])
        return _request(fields, id, line, defaults, release, models)
    except (ValueError, RecursionError) as error:
        raise RequestError(str(error), id) from error


def _read_json(text: bytes) -> tuple[object, list[str]]:
    """A value, and what is wrong with its numbers; then a number is None.

    Raises:
      ValueError: not JSON in UTF-8.
      RecursionError: nested too deep.
    """
    faults: list[str] = []

    def number(digits: str, convert: Callable[[str], float] = float) -> float | None:
        try:
            value = convert(digits)
        except ValueError:  # an integer of more than 4300 digits
            value = math.inf
        if isinstance(value, float) and not math.isfinite(value):
            faults.append(f"{shown(digits)}: expected a number that JSON and float64 have.")
            return None
        return value

    value = json.loads(
        text.decode("utf-8"),
        parse_float=number,
        parse_int=functools.partial(number, convert=int),
        parse_constant=number,
    )
    return value, faults


def _request(
    fields: Mapping[str, Any],
    id: str,
    line: int,
    defaults: Settings,
    release: str,
    models: Sequence[str],
) -> Request:
    if unknown := sorted(set(fields) - set(KEYS)):
        names = ", ".join(key if key.isidentifier() else shown(key) for key in unknown)
        raise ValueError(f"unknown keys {names}: expected some of {', '.join(KEYS)}.")
    if ("messages" in fields) == ("prompt" in fields):
        raise ValueError("expected exactly one of the keys messages and prompt.")
    given = {"seed": (defaults.seed + line) % SEEDS}
    given |= {key: fields[key] for key in SETTINGS if key in fields}
    settings = defaults.updated(given)
    if "messages" in fields:
        if wrong := [k for k in ("messages", "tools") if not isinstance(fields.get(k, []), list)]:
            raise ValueError(f"{wrong[0]}={shown(fields[wrong[0]])}: expected a list.")
        if settings.json_schema is not None and "tools" in fields:
            raise ValueError("json_schema beside tools: an answer of a schema cannot call.")
        prompt = render(
            fields["messages"],
            settings.mode,
            release=release,
            tools=fields.get("tools"),
            response_format=settings.json_schema,
        )
        text, thinking_mode = prompt.text, prompt.thinking_mode
    else:
        if extra := [key for key in ("mode", "tools") if key in fields]:
            raise ValueError(f"{', '.join(extra)} beside prompt: that belongs to messages.")
        if not isinstance(fields["prompt"], str):
            raise ValueError(f"prompt={shown(fields['prompt'])}: expected a text.")
        text, thinking_mode = with_bos(fields["prompt"]), None
    if not _is_unicode(text):
        raise ValueError("half of a surrogate pair in the text: it has no UTF-8 form.")
    adapter = _adapter(fields.get("model"), models)
    return Request(line, id, text, thinking_mode, settings, adapter)


def _adapter(model: object, models: Sequence[str]) -> str | None:
    """The adapter that a line's `model` names."""
    if model is None or model in models[:1]:
        return None
    if not isinstance(model, str) or model not in models:
        have = f"one of {', '.join(models)}" if models else "none, since the job names no models"
        raise ValueError(f"model={shown(model)}: expected {have}.")
    return model


def _require(settings: Settings, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}={shown(getattr(settings, name))}: expected {expected}.")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
