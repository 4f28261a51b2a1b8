"""One choice: tokens of an engine's request to pieces of a message, up to a stop text."""

import dataclasses

from v4jax.inference.server.errors import ApiError
from v4jax.inference.server.protocol import RequestLike, TokenLogprobLike
from v4jax.inference.server.requests import Asked
from v4jax.inference.stop_text import StopScanner
from v4jax.text.parse import parse_partial_completion
from v4jax.text.stream import CompletionStream, Delta
from v4jax.text.tokenizer import StreamDecoder, Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenInfo:
    """A token and its log-probabilities."""

    token: int
    is_reasoning: bool
    logprob: TokenLogprobLike


@dataclasses.dataclass
class Update:
    """What a choice has got since it was last looked at."""

    deltas: list[Delta] = dataclasses.field(default_factory=list)
    logprobs: list[TokenInfo] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length" or "tool_calls", once


class Choice:
    """Reads one request of the engine.

    Args:
      index: among the choices of the HTTP request.
      asked: what was asked for.
      tokenizer: of the engine.

    Attributes:
      finish_reason: None while it goes on.
      completion_tokens: read so far, a stop token included.
      reasoning_tokens: those of them until the reasoning ended.
    """

    def __init__(self, index: int, asked: Asked, tokenizer: Tokenizer):
        self.index = index
        self.finish_reason: str | None = None
        self.completion_tokens = self.reasoning_tokens = 0
        self._asked, self._stop_ids = asked, tokenizer.stop_ids
        self._decoder = StreamDecoder(tokenizer)
        self._scanner = StopScanner(asked.stops, asked.thinking_mode)
        self._stream = None
        if asked.thinking_mode is not None:
            self._stream = CompletionStream(asked.thinking_mode)
        self._calls = self._closed_calls = 0
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """All text so far, without a stop text."""
        return "".join(self._texts)

    def message(self) -> dict:
        """The whole message, once the choice has ended; as `Engine.chat` reads it."""
        mode = self._asked.thinking_mode or "chat"
        message = parse_partial_completion(self.text, mode, is_complete=True)
        if not self._asked.has_parallel_calls:
            message["tool_calls"] = message["tool_calls"][:1]
        return message

    def advance(self, request: RequestLike) -> Update:
        """Reads what is new. A choice that a stop text ends cancels its request.

        Raises:
          ApiError: the engine ended the request without an answer.
        """
        update = Update()
        if self.finish_reason is not None:
            return update
        ended = request.finish_reason  # before the tokens, which are there when it is set
        count = len(request.tokens)
        if self._asked.top_logprobs is not None:
            count = min(count, len(request.logprobs))
        for place in range(self.completion_tokens, count):
            if self._take(request, place, update):
                request.cancel()
                ended = "stop"
                break
        if ended in ("cancelled", "error"):
            raise _failure(ended, request.error)
        if ended is not None:
            self._finish(ended, update)
        return update

    def _take(self, request: RequestLike, place: int, update: Update) -> bool:
        """Reads one token; returns whether the choice ends with it."""
        token = request.tokens[place]
        is_reasoning = self._stream is not None and self._stream.is_reasoning
        self.completion_tokens += 1
        self.reasoning_tokens += is_reasoning
        if token in self._stop_ids:
            return True
        if self._asked.top_logprobs is not None:
            update.logprobs.append(TokenInfo(token, is_reasoning, request.logprobs[place]))
        self._read(self._scanner.push(self._decoder.push(token)), update)
        has_called = self._closed_calls and not self._asked.has_parallel_calls
        return self._scanner.is_met or bool(has_called)

    def _read(self, text: str, update: Update) -> None:
        if not text:
            return
        self._texts.append(text)
        if self._stream is None:
            update.deltas.append(Delta("content", text))
        else:
            self._add(self._stream.push(text), update)

    def _add(self, deltas: list[Delta], update: Update) -> None:
        for delta in deltas:
            self._calls += delta.kind == "call"
            if self._asked.has_parallel_calls or self._calls < 2:
                update.deltas.append(delta)
            self._closed_calls += delta.kind == "end"

    def _finish(self, reason: str, update: Update) -> None:
        self._read(self._scanner.push(self._decoder.close()) + self._scanner.close(), update)
        if self._stream is not None:
            self._add(self._stream.close(), update)
        if self._closed_calls and reason == "stop":
            reason = "tool_calls"
        self.finish_reason = update.finish_reason = reason


def _failure(reason: str, error: str | None) -> ApiError:
    if reason == "cancelled":
        return ApiError(503, "The request was cancelled: the server ends.", code="cancelled")
    return ApiError(500, f"The engine failed: {error}.", code="engine_error")
