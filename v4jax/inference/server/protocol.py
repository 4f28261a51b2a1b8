"""What the server needs of an engine: `v4jax.inference.engine.Engine`, or a stand-in of a test."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from v4jax.inference.grammar import Grammar
from v4jax.inference.sampling import Sampling
from v4jax.text.tokenizer import Tokenizer


class TokenLogprobLike(Protocol):
    """Log-probabilities at one place."""

    @property
    def logprob(self) -> float:
        """Of the token that was chosen."""

    @property
    def top(self) -> Sequence[tuple[int, float]]:
        """(id, log-probability) of the likeliest tokens, the likeliest first."""


class RequestLike(Protocol):
    """A request of the engine. Its thread changes it, and any thread may read it.

    `tokens` and `logprobs` are appended to before `finish_reason` is set, and the listener is called
    after that. It is quick and raises nothing.
    """

    @property
    def tokens(self) -> Sequence[int]:
        """What was generated so far, the stop token included."""

    @property
    def logprobs(self) -> Sequence[TokenLogprobLike]:
        """One a token, if the request asked for them."""

    @property
    def finish_reason(self) -> str | None:
        """None while it goes on, then "stop", "length", "cancelled" or "error"."""

    @property
    def error(self) -> str | None:
        """What failed."""

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were in the cache."""

    @property
    def submitted_at(self) -> float:
        """Of `time.monotonic`."""

    @property
    def first_token_at(self) -> float | None:
        """The same of the first token; None before it."""

    def cancel(self) -> None:
        """Ends the request soon; does not wait, and does nothing if it has ended."""


class EngineLike(Protocol):
    """An engine that a background thread runs."""

    cfg: Any
    tokenizer: Tokenizer | None
    adapters: Sequence[str]  # names that `submit` takes

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        *,
        listener: Callable[[Any], None] | None = None,
        grammar: Grammar | None = None,
        adapter: str | None = None,
    ) -> RequestLike:
        """Puts a request into the queue.

        Raises:
          ValueError: the request can never run.
          EngineFullError: the queue is as long as it may be.
        """

    def start(self) -> None:
        """Begins to run requests."""

    def stop(self, grace: float = 0.0) -> None:
        """Ends what still runs after `grace` seconds, and the thread."""

    def stats(self) -> Any:
        """Counts, as `v4jax.inference.engine.EngineStats` has them."""
