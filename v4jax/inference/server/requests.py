"""Bodies of `/v1/chat/completions` and `/v1/completions` to what the engine is asked for."""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from v4jax.inference.grammar import Grammar, GrammarError
from v4jax.inference.sampling import Sampling
from v4jax.inference.server.errors import ApiError
from v4jax.inference.server.fields import Fields
from v4jax.inference.server.prompts import encode_chat, mode_of
from v4jax.inference.server.protocol import EngineLike
from v4jax.inference.tool_grammar import call_grammar, is_strict
from v4jax.text.format import shown
from v4jax.text.prompt import with_bos
from v4jax.text.tokenizer import Tokenizer

MOST_CHOICES = 64  # of a request: prompts times n
MOST_STOPS, LONGEST_STOP = 16, 1000  # texts, and characters of one
MOST_LOGPROBS = 20
# Fields that say nothing about the answer.
_NO_MATTER = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Fields that would change the answer, and the values with which they do not.
_NOT_THERE: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server answers.

    Raises:
      ValueError: a value out of range.
    """

    model: str  # the name that requests give
    api_key: str | None = None  # what requests have to show; None: nothing
    mode: str = "non-think"  # of requests that ask for none
    max_new_tokens: int = 32_768  # of requests that ask for none, if the context has room
    max_context: int | None = None  # tokens of prompt and answer; None: what the model takes
    max_body_bytes: int = 16 * 2**20
    timeout: float = 3600.0  # seconds of a request, waiting included

    def __post_init__(self):
        for name in ("max_new_tokens", "max_context", "max_body_bytes", "timeout"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value}: expected a number above 0.")
        if not self.model:
            raise ValueError("model='': expected a name.")
        if self.api_key is not None and not self.api_key.isascii():
            raise ValueError("the API key has characters that are not ASCII: headers have none.")
        if self.api_key == "":
            raise ValueError("the API key is empty: give a key, or none.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A request that has been understood. Its choices are those of the first prompt, then others'."""

    model: str  # the name that it gave, or the server's
    adapter: str | None  # of that name; None: the model alone
    prompts: list[list[int]]  # token ids
    samplings: list[Sampling]  # one a choice
    n: int  # choices of a prompt
    thinking_mode: str | None  # of the completion; None: a text that is continued
    stops: tuple[str, ...]
    grammar: Grammar | None  # what each answer has to be
    grammar_field: str  # that asked for it
    is_streamed: bool
    includes_usage: bool  # at the end of a stream
    top_logprobs: int | None  # None: no log-probabilities
    has_parallel_calls: bool  # else the first call ends the answer
    ignored: list[str]  # fields that are not known


def context_of(engine: EngineLike, settings: ServerSettings) -> int:
    """Tokens of prompt and answer that a request may have."""
    longest = engine.cfg.max_length
    return min(longest, settings.max_context or longest)


def read_chat(values: Mapping[str, Any], engine: EngineLike, settings: ServerSettings) -> Asked:
    """The body of `/v1/chat/completions`.

    Raises:
      ApiError: a field of a wrong type or value, or messages that cannot be rendered or are too
        long.
    """
    fields, tokenizer = Fields(values), _tokenizer(engine)
    messages = fields.of("messages", list, "a list of messages")
    if not messages:
        raise fields.error("messages", "a list of messages, one at least")
    parallel = fields.boolean("parallel_tool_calls")
    tools, calls = _tools(fields, tokenizer, parallel is not False)
    schema, grammar = _response_format(fields)
    if grammar is not None and tools:
        text = (
            "response_format beside tools: expected tool_choice none, or no tools. An answer of a "
        )
        raise ApiError(400, text + "schema cannot call.", param="response_format")
    mode = mode_of(fields, tokenizer, settings.mode)
    has_logprobs = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, MOST_LOGPROBS)
    if top is not None and not has_logprobs:
        raise fields.error("top_logprobs", "logprobs=true beside it")
    ids, thinking_mode = encode_chat(tokenizer, messages, mode, tools, schema)
    return _asked(
        fields,
        engine,
        settings,
        prompts=[ids],
        thinking_mode=thinking_mode,
        limit_names=("max_completion_tokens", "max_tokens"),
        top_logprobs=(top or 0) if has_logprobs else None,
        has_parallel_calls=parallel is not False,
        grammar=calls or grammar,
        grammar_field="tools" if calls else "response_format",
    )


def read_completion(
    values: Mapping[str, Any], engine: EngineLike, settings: ServerSettings
) -> Asked:
    """The body of `/v1/completions`: prompts that are continued as they are.

    Raises:
      ApiError: a field of a wrong type or value, or a prompt that is too long.
    """
    fields = Fields(values)
    return _asked(
        fields,
        engine,
        settings,
        prompts=_prompts(fields, _tokenizer(engine), engine.cfg.vocab_size),
        thinking_mode=None,
        limit_names=("max_tokens",),
        top_logprobs=fields.integer("logprobs", 0, MOST_LOGPROBS),
        has_parallel_calls=True,
        grammar=_response_format(fields)[1],
        grammar_field="response_format",
    )


def _asked(
    fields: Fields,
    engine: EngineLike,
    settings: ServerSettings,
    *,
    prompts: list[list[int]],
    thinking_mode: str | None,
    limit_names: Sequence[str],
    top_logprobs: int | None,
    has_parallel_calls: bool,
    grammar: Grammar | None,
    grammar_field: str,
) -> Asked:
    model = _model(fields, engine, settings)
    n = fields.integer("n", 1, MOST_CHOICES) or 1
    if n * len(prompts) > MOST_CHOICES:
        raise fields.error("n", f"at most {MOST_CHOICES} choices of all {len(prompts)} prompts")
    streamed = bool(fields.boolean("stream"))
    options = fields.sub("stream_options")
    limit = None
    for name in limit_names:
        given = fields.integer(name, 1, 2**31 - 1)
        limit = given if limit is None else limit
    drawn = _sampling(fields, engine.cfg.vocab_size)
    seed = fields.integer("seed", -(2**63), 2**63 - 1)
    seed = secrets.randbits(32) if seed is None else seed
    if top_logprobs is not None:
        drawn["logprobs"] = top_logprobs
    samplings: list[Sampling] = []
    for prompt in prompts:
        tokens = _limit(prompt, limit, engine, settings, thinking_mode)
        for _ in range(n):
            index = len(samplings)
            try:
                samplings.append(
                    Sampling(**drawn, seed=(seed + index) % 2**32, max_new_tokens=tokens)
                )
            except ValueError as error:
                raise ApiError(400, str(error), param=str(error).partition("=")[0]) from None
    stops = _stops(fields)
    for name, harmless in _NOT_THERE.items():
        value = fields.get(name)
        if value is not None and not any(value == h for h in harmless):
            raise fields.error(name, "no such field: this server does not have it")
    for name in _NO_MATTER:
        fields.get(name)
    return Asked(
        model=model,
        adapter=None if model == settings.model else model,
        prompts=prompts,
        samplings=samplings,
        n=n,
        thinking_mode=thinking_mode,
        stops=stops,
        grammar=grammar,
        grammar_field=grammar_field,
        is_streamed=streamed,
        includes_usage=bool(options.boolean("include_usage")),
        top_logprobs=top_logprobs,
        has_parallel_calls=has_parallel_calls,
        ignored=fields.unread,
    )


def _tools(
    fields: Fields, tokenizer: Tokenizer, is_parallel: bool
) -> tuple[list[Any] | None, Grammar | None]:
    """The tools that the model gets to see, and the grammar of its calls if they are bound to one."""
    tools = fields.of("tools", list, "a list of tools")
    choice = fields.get("tool_choice")
    is_named = isinstance(choice, dict)
    if not is_named and choice not in (None, "none", "auto", "required"):
        raise fields.error("tool_choice", "none, auto, required, or a function of tools")
    is_required = is_named or choice == "required"
    if is_required and not tools:
        raise fields.error("tool_choice", "tools beside it")
    if choice == "none" or not tools:
        return None, None
    name = None
    if is_named:
        names = _names(tools)
        asked = fields.sub("tool_choice")
        if asked.get("type") != "function":
            raise asked.error("type", "function")
        function = asked.sub("function")
        name = function.get("name")
        if name not in names:
            raise function.error("name", f"one of {', '.join(names)}")
    if not is_required and not any(map(is_strict, tools)):
        return tools, None
    try:
        grammar = call_grammar(
            tools, tokenizer, name=name, is_required=is_required, is_parallel=is_parallel
        )
    except GrammarError as error:
        raise ApiError(400, f"tools: {error}", param="tools") from None
    return tools, grammar


def _names(tools: list[Any]) -> list[str]:
    """Of the functions."""
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return [name for name in names if isinstance(name, str)]


def _response_format(fields: Fields) -> tuple[Mapping[str, Any] | None, Grammar | None]:
    """The schema of the answer, and its grammar; neither for a text."""
    form = fields.sub("response_format")
    kind = form.get("type")
    if kind in (None, "text"):
        return None, None
    try:
        if kind == "json_object":
            return None, Grammar.json_object()
        if kind == "json_schema":
            described = form.sub("json_schema")
            schema = described.of("schema", dict, "a JSON schema")
            if schema is None:
                raise described.error("schema", "a JSON schema")
            return schema, Grammar.json_schema(schema)
    except GrammarError as error:
        raise ApiError(400, f"response_format: {error}", param="response_format") from None
    text = f"response_format.type={shown(kind)}: expected text, json_object or json_schema."
    raise ApiError(400, text, param="response_format.type")


def _sampling(fields: Fields, vocab_size: int) -> dict[str, Any]:
    """Arguments of `Sampling`; only those that are given."""
    top_k = fields.integer("top_k", -1, 2**31 - 1)
    given: dict[str, Any] = {
        "temperature": fields.number("temperature", 0.0, 1e30),
        "top_p": fields.number("top_p", 0.0, 1.0),
        "top_k": None if top_k in (-1, 0) else top_k,  # as other servers write "all"
        "min_p": fields.number("min_p", 0.0, 1.0),
        "presence_penalty": fields.number("presence_penalty", -2.0, 2.0),
        "frequency_penalty": fields.number("frequency_penalty", -2.0, 2.0),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100.0),
    }
    biases = {}
    for key, bias in (fields.of("logit_bias", dict, "an object of token ids") or {}).items():
        is_id = key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not is_id or not is_number or not -100 <= bias <= 100:
            expected = f"token ids in 0..{vocab_size - 1}, each with a number in [-100, 100]"
            raise fields.error("logit_bias", expected)
        biases[int(key)] = float(bias)
    given["logit_bias"] = biases or None
    return {name: value for name, value in given.items() if value is not None}


def _limit(
    prompt: list[int],
    limit: int | None,
    engine: EngineLike,
    settings: ServerSettings,
    thinking_mode: str | None,
) -> int:
    """Tokens to generate at most.

    Raises:
      ApiError: the prompt and they are more than the model's context.
    """
    context, asked = context_of(engine, settings), limit or 1
    if len(prompt) + asked > context:
        raise ApiError(
            400,
            f"This server's maximum context length is {context} tokens. However, you requested "
            f"{len(prompt) + asked} tokens ({len(prompt)} in the prompt, {asked} in the "
            "completion): shorten the prompt or generate fewer tokens.",
            param="prompt" if thinking_mode is None else "messages",
            code="context_length_exceeded",
        )
    return limit or min(settings.max_new_tokens, context - len(prompt))


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    texts = [value] if isinstance(value, str) else [] if value is None else value
    is_texts = isinstance(texts, list) and len(texts) <= MOST_STOPS
    if not is_texts or not all(isinstance(t, str) and 0 < len(t) <= LONGEST_STOP for t in texts):
        expected = (
            f"a text or at most {MOST_STOPS} texts, none empty or over {LONGEST_STOP} characters"
        )
        raise fields.error("stop", expected)
    return tuple(texts)


def _prompts(fields: Fields, tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    """Token ids of a text, of ids, or of a list of either."""
    value = fields.get("prompt")
    is_one = isinstance(value, str) or (
        isinstance(value, list) and value and all(isinstance(token, int) for token in value)
    )
    several = [value] if is_one else value
    if not isinstance(several, list) or not 0 < len(several) <= MOST_CHOICES:
        expected = f"a text, a list of token ids, or 1..{MOST_CHOICES} of either in a list"
        raise fields.error("prompt", expected)
    prompts = []
    for prompt in several:
        if isinstance(prompt, str):
            try:
                prompts.append(tokenizer.encode(with_bos(prompt)))
            except ValueError as error:
                raise ApiError(400, str(error), param="prompt") from None
        elif isinstance(prompt, list) and prompt and all(_is_id(t, vocab_size) for t in prompt):
            prompts.append(prompt)
        else:
            raise fields.error("prompt", f"texts, or lists of token ids in 0..{vocab_size - 1}")
    return prompts


def _is_id(token: Any, vocab_size: int) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocab_size


def _model(fields: Fields, engine: EngineLike, settings: ServerSettings) -> str:
    """The model that is asked for: the server's, or the name of an adapter."""
    names = settings.model, *engine.adapters
    name = fields.of("model", str, "a text")
    if name is None:
        return settings.model
    if name not in names:
        have = ", ".join(map(repr, names))
        text = f"The model {shown(name)} does not exist: this server has {have}."
        raise ApiError(404, text, param="model", code="model_not_found")
    return name


def _tokenizer(engine: EngineLike) -> Tokenizer:
    assert engine.tokenizer is not None  # `make_app` refuses such an engine
    return engine.tokenizer
