"""What the server needs of an engine: `v4jax.inference.engine.Engine`, or a stand-in of a test."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

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

    prompt_length: int
    tokens: list[int]
    finish_reason: str | None
    error: str | None
    cached_tokens: int
    submitted_at: float | None
    first_token_at: float | None
    finished_at: float | None

    @property
    def logprobs(self) -> Sequence[TokenLogprobLike]:
        """One a token, if the request asked for them."""

    def cancel(self) -> None:
        """Ends the request soon; does not wait, and does nothing if it has ended."""


class StatsLike(Protocol):
    """Counts of an engine; those of tokens, preemptions and steps since it began."""

    queued: int
    running: int
    slots: int
    pages: int
    pages_used: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    steps: int


class EngineLike(Protocol):
    """An engine that a background thread runs."""

    cfg: Any
    tokenizer: Tokenizer | None

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        *,
        listener: Callable[[Any], None] | None = None,
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

    def stats(self) -> StatsLike:
        """Counts, at this moment."""
