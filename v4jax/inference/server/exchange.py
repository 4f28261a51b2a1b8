"""An HTTP request's requests to the engine: submitted together, read as they grow, cancelled."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from v4jax.inference.grammar import GrammarError
from v4jax.inference.requests import EngineFullError
from v4jax.inference.server.choice import Choice, Update
from v4jax.inference.server.errors import ApiError
from v4jax.inference.server.metrics import Metrics
from v4jax.inference.server.protocol import EngineLike, RequestLike
from v4jax.inference.server.requests import Asked
from v4jax.inference.server.responses import usage

HEARTBEAT = 15.0  # seconds without a token, after which a stream shows that it lives


class Exchange:
    """Made in the event loop, which also reads it; the engine's thread only wakes it.

    Args:
      asked: what was asked for.
      engine: runs it.
      metrics: told of tokens and ends.
      deadline: of `time.monotonic`, when it is given up.
    """

    def __init__(self, asked: Asked, engine: EngineLike, metrics: Metrics, deadline: float):
        assert engine.tokenizer is not None
        self.asked = asked
        self.choices = [Choice(i, asked, engine.tokenizer) for i in range(len(asked.samplings))]
        self._engine, self._metrics, self._deadline = engine, metrics, deadline
        self._requests: list[RequestLike] = []
        self._is_closed = False
        self._loop, self._woken = asyncio.get_running_loop(), asyncio.Event()
        self._seen = [(0, 0.0)] * len(self.choices)  # tokens that have come, and when

    def submit(self) -> None:
        """Puts everything into the engine's queue, or nothing. May wait for the engine.

        Raises:
          ApiError: the engine does not take it.
        """
        try:
            for index, sampling in enumerate(self.asked.samplings):
                prompt = self.asked.prompts[index // self.asked.n]
                listener = self._listener(index)
                request = self._engine.submit(
                    prompt,
                    sampling,
                    listener=listener,
                    grammar=self.asked.grammar,
                    adapter=self.asked.adapter,
                )
                self._requests.append(request)
        except GrammarError as error:
            field = self.asked.grammar_field
            raise ApiError(400, f"{field}: {error}", param=field) from None
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        except EngineFullError as error:
            raise ApiError(429, f"{error} Try again later.", code="rate_limit_exceeded") from None
        except RuntimeError as error:
            raise ApiError(503, f"The engine takes no requests: {error}") from None

    async def updates(self) -> AsyncIterator[list[tuple[Choice, Update]]]:
        """What choices get, as it comes, until all have ended; nothing after `HEARTBEAT` seconds.

        Raises:
          ApiError: the engine failed, or the time is up.
        """
        while True:
            self._woken.clear()
            news = []
            for choice, request in zip(self.choices, self._requests):
                update = choice.advance(request)
                if update.deltas or update.logprobs or update.finish_reason:
                    news.append((choice, update))
                if update.finish_reason:
                    self._metrics.ended(request, update.finish_reason, time.monotonic())
            if news:
                yield news
            if all(choice.finish_reason for choice in self.choices):
                return
            if not await self._wait():
                yield []

    async def collect(self) -> list[Update]:
        """All log-probabilities of each choice, once all have ended.

        Raises:
          ApiError: as `updates`.
        """
        wholes = [Update() for _ in self.choices]
        async for news in self.updates():
            for choice, update in news:
                wholes[choice.index].logprobs += update.logprobs
        return wholes

    def usage(self) -> dict:
        """Tokens so far."""
        firsts = self._requests[:: self.asked.n]
        prompt = sum(map(len, self.asked.prompts))
        return usage(prompt, sum(request.cached_tokens for request in firsts), self.choices)

    def cancel(self) -> None:
        """Ends what still runs in the engine; who reads it then sees an error."""
        for request in self._requests:
            request.cancel()

    def close(self) -> None:
        """Ends what still runs: nobody reads any more."""
        if self._is_closed:
            return
        self._is_closed = True
        for choice, request in zip(self.choices, self._requests):
            if choice.finish_reason is None:
                outcome = "error" if request.finish_reason == "error" else "cancelled"
                self._metrics.ended(request, outcome, time.monotonic())
        self.cancel()

    async def _wait(self) -> bool:
        """Waits for news; false if there was none for `HEARTBEAT` seconds."""
        left = self._deadline - time.monotonic()
        try:
            await asyncio.wait_for(self._woken.wait(), min(HEARTBEAT, max(left, 0.0)))
        except TimeoutError:
            if left <= HEARTBEAT:
                text = "The request took longer than this server allows, and was given up."
                raise ApiError(503, text, code="timeout") from None
            return False
        return True

    def _listener(self, index: int) -> Callable[[RequestLike], None]:
        def listen(request: RequestLike) -> None:
            now, count = time.monotonic(), len(request.tokens)
            try:
                self._loop.call_soon_threadsafe(self._arrived, index, count, now)
            except RuntimeError:
                pass  # the loop has ended, and with it who would read

        return listen

    def _arrived(self, index: int, count: int, now: float) -> None:
        before, at = self._seen[index]
        if before and count > before:
            self._metrics.tokens(count - before, now - at)
        if count > before:
            self._seen[index] = count, now
        self._woken.set()
