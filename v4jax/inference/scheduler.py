"""Which request runs, which has to leave, and what the next step does.

A step of the scheduler is one turn of:

    admit    waiting requests into free slots, the highest priority and the longest waiting first; who
             finds no slot or no pages takes those of a request of lower priority
    decode   one call for all slots whose prompts are fed: one token each, or several where nobody waits
    feed     chunks of prompts, up to a budget of tokens
    read     the tokens of the call before: the device is never waited for while it has nothing to do

Pages are given as sequences grow. When there are none, the least recently used prefix is let go; after
that the request that came last, of the lowest priority, leaves its slot: what it has is copied to host
memory and put back later, so its tokens are those it would have had. The same request leaves for one of
higher priority that waits.

A request with a grammar needs its last token before it can have the next: while one is decoded, calls
give one token a slot, and a call waits for the tokens of the one before.
"""

import collections
import dataclasses
import time
from collections.abc import Collection, Iterator, Sequence

import jax
import numpy as np

from v4jax.inference.grammar import GrammarError
from v4jax.inference.holdings import Holdings
from v4jax.inference.prefix import EVERY, PIECE, digests_of, wide_tokens
from v4jax.inference.requests import Request, Stage, TokenLogprob
from v4jax.inference.sampling import EVERYTHING, num_words
from v4jax.inference.steps import MOST_STEPS, Output, RequestRows


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of decode whose tokens are not read yet."""

    output: Output
    requests: dict[int, Request]  # by slot
    count: int


class Scheduler:
    """Requests on one set of slots.

    Args:
      holdings: the slots, and what is in them.
      chunks: tokens of the compiled prefill chunks, the narrow and the wide ones, or one for both.
      budget: tokens of prompts that a step feeds.
      steps_per_call: tokens a slot that a call of decode generates at most where nobody waits.
    """

    def __init__(
        self,
        holdings: Holdings,
        *,
        chunks: Sequence[int],
        budget: int,
        steps_per_call: int,
    ):
        self.holdings, self.run = holdings, holdings.run
        self.waiting: list[Request] = []
        self.preemptions = self.steps = self.row_steps = 0
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self._chunks, self._budget = chunks, budget
        self._steps_per_call = steps_per_call
        slots, self._vocab = holdings.slots.logits.shape
        self._cancelled = np.zeros(slots, bool)
        self._everything = np.full((slots, num_words(self._vocab)), EVERYTHING)
        self._everything_placed = self.run.place(self._everything)
        self._calls: collections.deque[_Call] = collections.deque()
        self._prepared: set[int] = set()  # widths of tables that decode has been compiled for

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self._calls or any(self.holdings.in_slot))

    def step(self, cancelled: Collection[int] = ()) -> list[Request]:
        """One turn; returns the requests that got tokens or ended.

        Args:
          cancelled: numbers of requests that end with it.
        """
        events: dict[int, Request] = {}
        for request in self._cancel(cancelled):
            events[request.number] = request
        self._admit(events)
        called = self._decode(events)
        self._feed()
        self._read(events, keep=1 if called else 0)
        self.steps += 1
        return list(events.values())

    def _cancel(self, cancelled: Collection[int]) -> Iterator[Request]:
        requests = [*self.waiting, *self.holdings.in_slot]
        for request in [r for r in requests if r is not None and r.number in cancelled]:
            if request._stage is Stage.WAITING:
                self.waiting.remove(request)
            elif request._stage is Stage.DECODING:
                self._cancelled[request._slot] = True
            self._end(request, "cancelled")
            yield request

    def _admit(self, events: dict[int, Request]) -> None:
        held = self.holdings
        while self.waiting:
            self.waiting.sort(key=lambda r: r._order)  # also those that had to leave
            request = self.waiting[0]
            parts, found = range(held.parts), held.place_for(request)
            if found is not None:
                slot, prefix = found
                if held.enter(request, slot, prefix, self._first_tokens(request)):
                    self.waiting.pop(0)
                    self._has_entered(request)
                    continue
                parts = range(held.part(slot), held.part(slot) + 1)
            if not self._make_way(request, parts, events):
                return

    def _has_entered(self, request: Request) -> None:
        if request._stage is Stage.DECODING:
            self._cancelled[request._slot] = False
        else:
            self.prompt_tokens += len(request.prompt)
            self.cached_tokens += request.cached_tokens

    def _make_way(self, request: Request, parts: Sequence[int], events: dict[int, Request]) -> bool:
        """The last request in these parts leaves its slot for one that waits; False if none does.

        Only a request of lower priority, and where it is of use: without all of those in its part there
        are the pages.
        """
        tokens = self._first_tokens(request)
        useful = [part for part in parts if self.holdings.would_fit(request, part, tokens)]
        lower = [r for r in self.holdings.in_parts(useful) if r.priority < request.priority]
        if not lower:
            return False
        if self._calls:  # they may have ended a request
            self._read(events, keep=0)
            return True
        self._put_out(max(lower, key=lambda r: r._order), events)
        return True

    def _first_tokens(self, request: Request) -> int:
        """Tokens to have pages for when it enters a slot."""
        if request._held is None:
            return min(len(request.prompt) + 1, request._most)
        tokens = len(request.prompt) + len(request.tokens)
        return min(tokens + self._steps_per_call, request._most)

    def _decode(self, events: dict[int, Request]) -> bool:
        """A call for all slots that decode; False if there are none."""
        rows = self.holdings.in_stage(Stage.DECODING)
        if any(r._matcher is not None and r._in_flight for r in rows):
            self._read(events, keep=0)
            rows = self.holdings.in_stage(Stage.DECODING)
        if not rows:
            return False
        is_waited_for = self.holdings.in_stage(Stage.FEEDING) or (
            self.waiting and None in self.holdings.in_slot
        )
        has_grammar = any(r._matcher is not None for r in rows)
        count = 1 if is_waited_for or has_grammar else self._steps_per_call
        count = min(count, *(2 ** min(r._calls, 10) for r in rows), MOST_STEPS)
        for request in rows:
            if request._stage is not Stage.DECODING:
                continue  # it had to leave for another one
            while not self.holdings.reserve(request, _reach(request, count)):
                self._make_room(request, events)
                if request._stage is not Stage.DECODING:
                    break
        allowed = self._allowed(rows, events) if has_grammar else self._everything_placed
        rows = [r for r in rows if r._stage is Stage.DECODING]
        if not rows:
            return False
        held = self.holdings
        tables = held.tables_for(rows, lambda r: _reach(r, count))
        output, held.slots = self.run.decode(
            held.slots, tables, np.int32(count), self._cancelled.copy(), allowed
        )
        self._cancelled[:] = False
        for request in rows:
            request._in_flight += count
            request._calls += 1
        self._calls.append(_Call(output, {r._slot: r for r in rows}, count))
        return True

    def _allowed(self, rows: Sequence[Request], events: dict[int, Request]):
        """Masks [S, ceil(V / 32)] of what slots may decode next, on the devices.

        A request whose grammar cannot be followed ends with an error.
        """
        masks = self._everything.copy()
        for request in rows:
            if request._stage is not Stage.DECODING or request._matcher is None:
                continue
            try:
                masks[request._slot] = request._matcher.allowed()
            except GrammarError as error:
                self._cancelled[request._slot] = True
                request.error = str(error)
                self._end(request, "error")
                events[request.number] = request
        return self.run.place(masks)

    def _make_room(self, request: Request, events: dict[int, Request]) -> None:
        """The last of those that have pages in the request's part leaves its slot."""
        running = self.holdings.in_parts([self.holdings.part(request._slot)])
        self._put_out(max(running, key=lambda r: r._order), events)

    def _put_out(self, last: Request, events: dict[int, Request]) -> None:
        """A request leaves its slot and waits again; nothing that it has is lost."""
        if last._stage is Stage.DECODING:
            self._read(events, keep=0)  # what it has is known only then
            if last.is_ended:
                return
            self._cancelled[last._slot] = True  # the device decodes it no further
        else:  # its prompt is fed again, to the same bits
            self.prompt_tokens -= len(last.prompt)
            self.cached_tokens -= last.cached_tokens
        self.holdings.put_out(last)
        self.preemptions += 1
        last._stage = Stage.WAITING
        self.waiting.append(last)

    def _feed(self) -> None:
        """Chunks of the prompts in slots, those of the first request of each part together."""
        left = self._budget
        while left > 0:
            first: dict[int, Request] = {}
            size = 0
            for request in self.holdings.in_stage(Stage.FEEDING):
                size = size or self._chunk_size(request)
                if self._chunk_size(request) == size:
                    first.setdefault(self.holdings.part(request._slot), request)
            if not first:
                return
            self._feed_chunk(list(first.values()), size)
            left -= size

    def _feed_chunk(self, requests: list[Request], size: int) -> None:
        held = self.holdings
        counts = np.zeros(held.parts, np.int32)
        tokens = np.zeros((held.parts, size), np.int32)
        for request in requests:
            part = held.part(request._slot)
            piece = request.prompt[request._fed : self._next_end(request, size)]
            counts[part], tokens[part, : len(piece)] = len(piece), piece
        slot = held.one_each([r._slot for r in requests])
        self._prepare_decode(requests)
        tables = held.tables_for(requests, lambda r: len(r.prompt))
        held.slots = self.run.prefill(held.slots, tables, tokens, counts, slot)
        for request in requests:
            request._fed += int(counts[held.part(request._slot)])
            held.keep_prefix(request)
            if request._fed == len(request.prompt):
                self._start(request)

    def _prepare_decode(self, requests: Sequence[Request]) -> None:
        """Compiles decode for what is being fed, unless it has been, while prefill is compiled and runs."""
        held = self.holdings
        width = held.width(max(_reach(r, 1) for r in requests))
        if width in self._prepared:
            return
        self._prepared.add(width)
        self.run.decode.prepare(
            *(held.slots, held.tables(width), np.int32(1)),
            *(self._cancelled.copy(), self._everything_placed),
        )

    def _chunk_size(self, request: Request) -> int:
        """Of its next chunk."""
        return self._chunks[-1] if request._fed < request._wide else self._chunks[0]

    def _next_end(self, request: Request, size: int) -> int:
        """Where its next chunk ends: where a snapshot is taken, the shape changes, or with the prompt."""
        fed, length = request._fed, len(request.prompt)
        body = (length - 1) // PIECE * PIECE
        if fed >= body:
            return length
        limit = request._wide if fed < request._wide else body
        return min(limit, (fed // EVERY + 1) * EVERY, fed + size)

    def _start(self, request: Request) -> None:
        held = self.holdings
        rows = RequestRows.of(
            [request.sampling],
            [request.stop_ids],
            self._vocab,
            [request.prompt],
            held.slots.requests.stop_ids.shape[1],
        )
        slot = held.one_each([request._slot])
        held.slots = self.run.start(held.slots, slot, self.run.spread(rows))
        self._cancelled[request._slot] = False
        request._stage, request._calls = Stage.DECODING, 0

    def _read(self, events: dict[int, Request], keep: int) -> None:
        """Takes the tokens of all calls but the last `keep`."""
        while len(self._calls) > keep:
            call = self._calls.popleft()
            tokens = np.asarray(call.output.tokens)
            wanted = [r for r in call.requests.values() if r.sampling.logprobs is not None]
            logprobs = jax.device_get(call.output) if wanted else None
            self.row_steps += len(self._cancelled) * call.count
            for slot, request in call.requests.items():
                request._in_flight -= call.count
                if request.is_ended:
                    continue
                self._take(request, tokens[slot], slot, logprobs)
                events[request.number] = request

    def _take(self, request: Request, row: np.ndarray, slot: int, logprobs: Output | None) -> None:
        """Puts a row of new tokens to a request's."""
        new = [int(token) for token in row if token >= 0]
        if new and request.first_token_at is None:
            request.first_token_at = time.monotonic()
        if logprobs is not None and request.sampling.logprobs is not None:
            for n in range(len(new)):
                ids = logprobs.top_ids[slot, n, : request.sampling.logprobs]
                values = logprobs.top_logprobs[slot, n, : request.sampling.logprobs]
                top = tuple((int(i), float(p)) for i, p in zip(ids, values))
                request.logprobs.append(TokenLogprob(float(logprobs.logprobs[slot, n]), top))
        if request._matcher is not None:
            for token in new:
                request._matcher.accept(token)
        request.tokens += new
        self.generated_tokens += len(new)
        if new and new[-1] in request.stop_ids:
            self._end(request, "stop")
        elif len(request.tokens) >= request.sampling.max_new_tokens:
            self._end(request, "length")

    def _end(self, request: Request, reason: str) -> None:
        self.holdings.leave(request)
        request._stage, request._held = Stage.ENDED, None
        request.finished_at = time.monotonic()
        request.finish_reason = reason  # last: others wait for it

    def add(self, request: Request) -> None:
        """Another request that waits."""
        request._digests = digests_of(request.prompt[:-1], request._adapter.digest)
        request._wide = wide_tokens(len(request.prompt), self._chunks[-1])
        self.waiting.append(request)


def _reach(request: Request, count: int) -> int:
    """Tokens that it may have in the cache after a call of so many steps."""
    has = len(request.prompt) + len(request.tokens) + request._in_flight
    return min(has + count, request._most)
