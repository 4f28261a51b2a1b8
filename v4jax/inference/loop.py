"""Who steps a scheduler: whoever asks for tokens, or a thread of its own. One lock, one loop.

Over several processes one of them leads: its steps are done by all (`hosts.py`).
"""

import asyncio
import collections
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import jax

from v4jax.inference.hosts import Channel
from v4jax.inference.requests import Request, SlotView
from v4jax.inference.scheduler import Scheduler


class RequestLoop:
    """Requests in front of a scheduler, and the turns that it takes.

    Args:
      scheduler: stepped here and nowhere else.

    Attributes:
      before_step: called before every step, if it is set, by whoever steps.
    """

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self.before_step: Callable[[], None] | None = None
        self._inbox: collections.deque[Request] = collections.deque()
        self._turn = threading.Condition(threading.RLock())  # held by whoever steps
        self._wake = threading.Event()  # there is work, or an end
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._failure: str | None = None
        self._channel: Channel | None = None  # to processes that follow

    def _put(self, request: Request) -> None:
        """Another request for the scheduler's next step. From any thread.

        Raises:
          RuntimeError: the thread has failed.
        """
        self._require_working()
        self._inbox.append(request)
        self._wake.set()

    def _add(self, request: Request) -> None:
        """A request from the inbox to the scheduler."""
        self._scheduler.add(request)

    def _require_working(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"the engine has failed and serves no more: {self._failure}")

    def step(self) -> list[Request]:
        """One turn of the scheduler: the requests that got tokens or ended. Dispatches at most one call
        of decode and `chunks[-1]` tokens of prompts, and waits for the call before."""
        with self._turn:
            if self.before_step is not None:
                self.before_step()
            new = [self._inbox.popleft() for _ in range(len(self._inbox))]
            cancelled = [r.number for r in (*new, *self._in_scheduler()) if r._is_cancelled]
            if self._channel is not None:
                self._channel.send(new, cancelled)
            events = self._step(new, cancelled)
            if self._channel is not None:
                self._channel.add(events)
            self._turn.notify_all()
        for request in events:
            request._tell()
        return events

    def _step(self, new: Sequence[Request], cancelled: Sequence[int]) -> list[Request]:
        """A turn that begins with these requests and without those."""
        for request in new:
            self._add(request)
        return self._scheduler.step(frozenset(cancelled))

    def lead(self) -> None:
        """Makes every step of this engine one of all processes, the others of which `follow`.

        Raises:
          ValueError: this is not process 0 of several, or the engine has begun.
        """
        if jax.process_count() == 1 or jax.process_index() != 0:
            raise ValueError(
                f"process {jax.process_index()} of {jax.process_count()} cannot lead: expected process "
                "0 of several, and follow() on the others."
            )
        if self._channel is not None or self.has_work or self._scheduler.steps:
            raise ValueError("this engine has begun: call lead() before the first request.")
        self._channel = Channel.open()

    def end(self) -> None:
        """Lets the followers go. After `stop`, if the engine ran in a thread."""
        if self._channel is not None:
            self._channel.send(is_end=True)
            self._channel = None

    def follow(self) -> None:
        """Does the steps of process 0's engine, until that has called `end`.

        Raises:
          ValueError: this is process 0, or the only one.
          ProcessesDifferError: this process has read other tokens than process 0.
        """
        if jax.process_index() == 0:
            raise ValueError("process 0 has nobody to follow: it leads, see lead().")
        channel = Channel.open()
        while not (message := channel.receive()).is_end:
            with self._turn:
                if message.task is not None:
                    self._do(message.task)
                else:
                    channel.add(self._step([*map(self._prepared, message.new)], message.cancelled))

    def _together(self, task: Any, content: Any = None) -> Any:
        """A task of this process and of those that follow; the content is this one's alone."""
        with self._turn:
            if self._channel is not None:
                self._channel.send(task=task)
            return self._do(task, content)

    def _do(self, task: Any, content: Any = None) -> Any:
        """What a task is: the same on all processes."""
        raise NotImplementedError

    def _prepared(self, request: Request) -> Request:
        """A request of another process, for this one's scheduler."""
        return request

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._inbox) or self._scheduler.has_work

    @property
    def slots(self) -> tuple[SlotView, ...]:
        """What each slot does now; waits for the step that runs."""
        with self._turn:
            return tuple(map(SlotView.of, self._scheduler.holdings.in_slot))

    def run_until_idle(self) -> None:
        """Steps until every request has ended."""
        while self.has_work:
            self.step()

    def tokens(self, request: Request) -> Iterator[int]:
        """A request's tokens as they come. Runs the engine, unless a thread does (`start`)."""
        given = 0
        while True:
            while given < len(request.tokens):
                yield request.tokens[given]
                given += 1
            if request.is_ended and given == len(request.tokens):
                return
            self._advance(request, given)

    def _advance(self, request: Request, given: int) -> None:
        """Returns when a request may have more than `given` tokens."""
        if self._thread is None:
            self.step()
            return
        with self._turn:
            while len(request.tokens) == given and not request.is_ended:
                self._turn.wait(timeout=1.0)
                if self._thread is None:
                    return

    async def async_tokens(self, request: Request) -> AsyncIterator[int]:
        """As `tokens`, for asyncio. The engine has to run in its thread (`start`).

        Raises:
          RuntimeError: it does not, or no longer.
        """
        loop, woken, given = asyncio.get_running_loop(), asyncio.Event(), 0

        def wake(_: Request) -> None:
            with contextlib.suppress(
                RuntimeError
            ):  # the loop has ended, and with it who would read
                loop.call_soon_threadsafe(woken.set)

        request.listeners.append(wake)
        try:
            while True:
                woken.clear()
                is_ended = request.is_ended  # before the tokens, which are there when it is set
                while given < len(request.tokens):
                    yield request.tokens[given]
                    given += 1
                if is_ended:
                    return
                if self._thread is None:
                    raise RuntimeError(
                        "async_tokens reads an engine that runs: call start() first."
                    )
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(woken.wait(), 1.0)
        finally:
            request.listeners.remove(wake)

    def start(self) -> None:
        """Runs the engine in a thread of its own, until `stop`."""
        if self._thread is None:
            self._is_stopping = False
            self._thread = threading.Thread(target=self._loop, name="v4jax-engine", daemon=True)
            self._wake.set()
            self._thread.start()

    def stop(self, grace: float = 0.0) -> None:
        """Ends the thread; requests that run get so many seconds to end, and are cancelled then."""
        thread = self._thread
        if thread is None:
            return
        deadline = time.monotonic() + grace
        while self.has_work and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        for request in self._all_requests():
            request.cancel()
        self._is_stopping = True
        self._wake.set()
        thread.join()
        self._thread = None

    def _loop(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            try:
                while self.has_work:
                    self.step()
            except Exception as error:  # whoever waits has to hear of it
                self._fail(f"{type(error).__name__}: {error}")
                raise
            if self._is_stopping:
                return

    def _fail(self, why: str) -> None:
        """Ends all requests: the devices' arrays may be gone."""
        self._failure = why
        requests = self._all_requests()
        for request in requests:
            request.error, request.finish_reason = why, "error"
        with self._turn:
            self._turn.notify_all()
        for request in requests:
            request._tell()

    def _all_requests(self) -> list[Request]:
        return [*self._inbox, *self._in_scheduler()]

    def _in_scheduler(self) -> list[Request]:
        running = [request for request in self._scheduler.holdings.in_slot if request is not None]
        return [*self._scheduler.waiting, *running]
