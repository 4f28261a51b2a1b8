"""A request: what a user asked for, and what has come of it so far."""

import dataclasses
import enum
import time
from collections.abc import Callable
from typing import Any

from v4jax.inference.grammar import Grammar, Matcher
from v4jax.inference.ledger import Held
from v4jax.inference.sampling import Sampling


class EngineFullError(RuntimeError):
    """The queue has no room for another request."""


@dataclasses.dataclass(frozen=True)
class AdapterRow:
    """An adapter of an engine."""

    number: int = 0  # in `v4jax.nn.adapter_rows`; 0: none
    digest: bytes = b""  # of its files: with it prefixes begin


class Stage(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    FEEDING = "feeding"  # in a slot, its prompt being fed
    DECODING = "decoding"
    ENDED = "ended"


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a generated token, and of the likeliest ones in its place."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (id, log-probability), the likeliest first


@dataclasses.dataclass(eq=False)
class Request:
    """Made by `Engine.submit`. Fields that begin with _ are the scheduler's."""

    number: int  # of the engine's requests
    prompt: list[int]
    sampling: Sampling
    stop_ids: tuple[int, ...]
    priority: int = 0  # the largest first
    listeners: list[Callable[["Request"], None]] = dataclasses.field(default_factory=list)
    grammar: Grammar | None = None  # what the answer has to be
    adapter: str | None = None  # name of the one that computes it; None: the model alone
    tokens: list[int] = dataclasses.field(default_factory=list)  # the stop token included
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length", "cancelled" or "error"
    error: str | None = None
    cached_tokens: int = 0  # of the prompt, that were there already
    submitted_at: float = dataclasses.field(default_factory=time.monotonic)
    first_token_at: float | None = None
    finished_at: float | None = None

    _stage: Stage = Stage.WAITING
    _is_cancelled: bool = False  # by somebody; the next step begins with it
    _slot: int = -1  # none
    _fed: int = 0  # tokens of the prompt that are in the cache
    _in_flight: int = 0  # tokens that calls may generate whose results are not read
    _pages: Held = dataclasses.field(default_factory=dict)
    _held: Any = None  # what was in its slot when it had to leave it
    _matcher: Matcher | None = None  # of its grammar
    _adapter: AdapterRow = AdapterRow()
    _wide: int = 0  # tokens of the prompt that go in wide chunks
    _digests: list[bytes] = dataclasses.field(default_factory=list)
    _calls: int = 0  # of decode since it began

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)

    @property
    def is_ended(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None

    def cancel(self) -> None:
        """Ends it at the next step of the engine. From any thread; nothing if it has ended."""
        self._is_cancelled = True

    def _tell(self) -> None:
        """Calls the listeners."""
        for listener in (*self.listeners,):
            listener(self)

    @property
    def _context(self) -> int:
        """Tokens that are in the cache, as far as their reading has come."""
        return self._fed if self._stage is Stage.FEEDING else len(self.prompt) + len(self.tokens)

    @property
    def _most(self) -> int:
        """Tokens that it can have in the cache."""
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def _order(self) -> tuple[int, int]:
        """The smallest is served first."""
        return -self.priority, self.number


@dataclasses.dataclass(frozen=True)
class SlotView:
    """What a slot of an engine did when it was looked at."""

    state: str = "free"  # or "prefill" or "decode"
    request: Request | None = None  # None: of a free slot
    cached: int = 0  # tokens of prompt and answer that are in the cache
    generated: int = 0  # tokens of the answer

    @staticmethod
    def of(request: Request | None) -> "SlotView":
        """Of the slot that a request is in."""
        if request is None:
            return SlotView()
        state = "prefill" if request._stage is Stage.FEEDING else "decode"
        return SlotView(state, request, request._context, len(request.tokens))
