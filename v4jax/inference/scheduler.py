"""Which request is in which slot, and what the next step does.

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
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from v4jax.inference.ahead import CompiledAhead
from v4jax.inference.grammar import GrammarError
from v4jax.inference.ledger import Ledger
from v4jax.inference.prefix import (
    EVERY,
    PIECE,
    HostPrefixes,
    Prefix,
    Prefixes,
    Stored,
    digests_of,
    wide_tokens,
)
from v4jax.inference.requests import Request, Stage, TokenLogprob
from v4jax.inference.sampling import EVERYTHING, num_words
from v4jax.inference.steps import MOST_STEPS, Output, RequestRows, Slots, Tables
from v4jax.inference.tables import PageTables
from v4jax.nn.cache import pages_of


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled steps of an engine, with the model's arrays bound."""

    prefill: Callable[..., Slots]  # (slots, tables, tokens, counts, slot)
    decode: CompiledAhead  # (slots, tables, count, cancelled, allowed) -> Output, slots
    start: Callable[..., Slots]
    snapshot: Callable[..., Any]
    restore: Callable[..., Slots]
    copy_pages: Callable[..., Slots]
    take_rows: Callable[..., Slots]
    put_rows: Callable[..., Slots]
    read_pages: Callable[..., Any]
    write_pages: Callable[..., Slots]
    place: Callable[[np.ndarray], Any]  # an array with a row a slot, on the devices
    fetch: Callable[[Any], Any]  # arrays of the devices as NumPy


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of decode whose tokens are not read yet."""

    output: Output
    requests: dict[int, Request]  # by slot
    count: int


class Scheduler:
    """Requests on one set of slots.

    Args:
      slots: on the devices.
      parts: that they lie in.
      chunks: tokens of the compiled prefill chunks, the narrow and the wide ones, or one for both.
      budget: tokens of prompts that a step feeds.
      steps_per_call: tokens a slot that a call of decode generates at most where nobody waits.
      host_bytes: host memory for prefixes that leave the devices.
      is_shared: whether several processes run these steps, so that nothing can be copied to a host.
    """

    def __init__(
        self,
        programs: Programs,
        slots: Slots,
        ledger: Ledger,
        prefixes: Prefixes,
        *,
        parts: int,
        chunks: Sequence[int],
        budget: int,
        steps_per_call: int,
        max_length: int,
        host_bytes: int = 0,
        is_shared: bool = False,
    ):
        self.run, self.slots, self.ledger, self.prefixes = programs, slots, ledger, prefixes
        self.waiting: list[Request] = []
        self.in_slot: list[Request | None] = [None] * len(slots.done)
        self.preemptions = self.steps = self.row_steps = 0
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.parts, self._chunks, self._budget = parts, chunks, budget
        self._steps_per_call, self._is_shared = steps_per_call, is_shared
        self._per_part = len(self.in_slot) // parts
        self._tables = PageTables(len(self.in_slot), [*ledger.pages], max_length, programs.place)
        self._cancelled = np.zeros(len(self.in_slot), bool)
        self._everything = np.full(
            (len(self.in_slot), num_words(slots.logits.shape[1])), EVERYTHING
        )
        self._everything_placed = programs.place(self._everything)
        self._calls: collections.deque[_Call] = collections.deque()
        self._empty_state = None
        self._prepared: set[int] = set()  # widths of tables that decode has been compiled for
        self.host = HostPrefixes(0 if is_shared else host_bytes)
        if self.host.takes_any:
            prefixes.leaving = lambda part, digest, prefix: self.host.add(
                digest, self.store(part, prefix)
            )

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self._calls or any(self.in_slot))

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

    # Slots and pages ------------------------------------------------------------------------------

    def _requests(self, stage: Stage) -> list[Request]:
        found = [r for r in self.in_slot if r is not None and r._stage is stage]
        return sorted(found, key=lambda r: r._order)

    def _part(self, slot: int) -> int:
        return slot // self._per_part

    def _one_each(self, slots: Sequence[int]) -> np.ndarray:
        """Slots, at most one of each part, as steps take them."""
        found = np.full(self.parts, -1, np.int32)
        for slot in slots:
            found[self._part(slot)] = slot % self._per_part
        return found

    def _leave(self, request: Request) -> None:
        """Frees its slot and pages."""
        slot = request._slot
        if slot < 0:
            return
        self.ledger.release(self._part(slot), request._pages)
        self._tables.clear(slot)
        self.in_slot[slot], request._slot, request._pages = None, -1, {}

    def _set_pages(self, request: Request, pages: dict[int, list[int]]) -> None:
        request._pages = pages
        self._tables.put(request._slot, pages)

    def _reserve(self, request: Request, tokens: int) -> bool:
        """Pages for so many tokens of a request in a slot; False if there are none even so."""
        part = self._part(request._slot)
        wanted = self.ledger.missing(request._pages, tokens)
        if not any(wanted.values()):
            return True
        new = self._allocate(part, wanted)
        if new is None:
            return False
        pages = {ratio: [*request._pages.get(ratio, ()), *new[ratio]] for ratio in new}
        self._set_pages(request, pages)
        return True

    def _tables_for(self, requests: Sequence[Request], tokens: Callable[[Request], int]) -> Tables:
        """Tables that are wide enough, on the devices."""
        return self._tables.of_width(self._tables.width(max(map(tokens, requests))))

    # Turns ----------------------------------------------------------------------------------------

    def _cancel(self, cancelled: Collection[int]) -> Iterator[Request]:
        requests = [*self.waiting, *self.in_slot]
        for request in [r for r in requests if r is not None and r.number in cancelled]:
            if request._stage is Stage.WAITING:
                self.waiting.remove(request)
            elif request._stage is Stage.DECODING:
                self._cancelled[request._slot] = True
            self._end(request, "cancelled")
            yield request

    def _admit(self, events: dict[int, Request]) -> None:
        while self.waiting:
            self.waiting.sort(key=lambda r: r._order)  # also those that had to leave
            request = self.waiting[0]
            found = self._place_for(request)
            if found is None:
                parts = range(self.parts)
            else:
                slot, prefix = found
                request._slot, self.in_slot[slot] = slot, request
                if self._enter(request, prefix):
                    self.waiting.pop(0)
                    continue
                self._leave(request)
                parts = range(self._part(slot), self._part(slot) + 1)
            if not self._make_way(request, parts, events):
                return

    def _make_way(self, request: Request, parts: Sequence[int], events: dict[int, Request]) -> bool:
        """The last request in these parts leaves its slot for one that waits; False if none does.

        Only a request of lower priority, and where it is of use: without all of those in its part there
        are the pages.
        """
        if self._is_shared:
            return False
        useful = [part for part in parts if self._would_fit(request, part)]
        lower = [r for r in self._running(useful) if r.priority < request.priority]
        if not lower:
            return False
        if self._calls:  # they may have ended a request
            self._read(events, keep=0)
            return True
        self._put_out(max(lower, key=lambda r: r._order), events)
        return True

    def _would_fit(self, request: Request, part: int) -> bool:
        """Whether a part has its pages without prefixes and all requests of lower priority."""
        kept = [r._pages for r in self._running([part]) if r.priority >= request.priority]
        needed = self.ledger.missing({}, self._first_tokens(request))
        return all(
            count
            < self.ledger.pages[ratio] - len({n for pages in kept for n in pages.get(ratio, ())})
            for ratio, count in needed.items()
        )

    def _running(self, parts: Sequence[int]) -> list[Request]:
        """Those in slots of these parts."""
        return [r for r in self.in_slot if r is not None and self._part(r._slot) in parts]

    def _place_for(self, request: Request) -> tuple[int, Prefix | None] | None:
        """A free slot, in the part that has the longest prefix of it, or else the most free slots."""
        free: dict[int, list[int]] = {}  # by part
        for slot, other in enumerate(self.in_slot):
            if other is None:
                free.setdefault(self._part(slot), []).append(slot)
        if not free:
            return None
        emptiest = max(free.values(), key=len)
        best: tuple[int, Prefix | None] = emptiest[0], None
        if request._held is not None:
            return best
        for part, slots in free.items():
            prefix = self.find_prefix(part, request)
            if prefix and (best[1] is None or prefix.length > best[1].length):
                best = slots[0], prefix
        return best

    def find_prefix(self, part: int, request: Request) -> Prefix | None:
        """The longest prefix of its prompt, brought back from host memory if need be."""
        found = self.prefixes.find(part, request._digests, request._wide)
        length = found.length if found else 0
        stored = self.host.find(request._digests, request._wide, length)
        if stored is None:
            return found
        digest = request._digests[stored.length // PIECE - 1]
        back = self.bring_back(part, digest, stored)  # which may have let go of the other
        return back or self.prefixes.find(part, request._digests, request._wide)

    def store(self, part: int, prefix: Prefix) -> Stored:
        """A copy of a part's prefix in host memory."""
        tables, slot = self._tables_of_pages(part, prefix.pages, prefix.length)
        pages = self.run.read_pages(self.slots, tables, slot)
        return Stored(prefix.length, prefix.wide, *self._own(part, (prefix.state, pages)))

    def _own(self, part: int, arrays):
        """A part's rows of arrays [G, ...], in host memory: [1, ...]."""
        return jax.tree.map(lambda x: x[part : part + 1], self.run.fetch(arrays))

    def _for_all(self, arrays):
        """The inverse, for steps that take the row of whichever part they write to."""
        return jax.tree.map(lambda x: np.repeat(x, self.parts, axis=0), arrays)

    def bring_back(self, part: int, digest: bytes, stored: Stored) -> Prefix | None:
        """The inverse: a prefix of a part again; None if there are no pages for it."""
        wanted = {ratio: pages_of(stored.length, ratio) for ratio in self.ledger.pages}
        pages = self._allocate(part, wanted)
        if pages is None:
            return None
        tables, slot = self._tables_of_pages(part, pages, stored.length)
        state, content = self._for_all((stored.state, stored.pages))
        self.slots = self.run.write_pages(self.slots, tables, slot, content)
        prefix = Prefix(stored.length, stored.wide, pages, state)
        self.prefixes.add(part, digest, prefix)
        self.ledger.release(part, pages)  # the prefix holds them
        return prefix

    def _tables_of_pages(self, part: int, pages, length: int) -> tuple[Tables, np.ndarray]:
        """Tables with these pages in the first slot of a part, and that slot."""
        slot = part * self._per_part
        return self._tables.of_pages(slot, pages, length), self._one_each([slot])

    def _enter(self, request: Request, prefix: Prefix | None) -> bool:
        """Gives a request what it begins with; False if there are no pages for it now."""
        slot = self._one_each([request._slot])
        if request._held is not None:
            if not self._reserve(request, self._first_tokens(request)):
                return False
            width, *held = request._held
            rows, pages = self._for_all(held)
            tables = self._tables.of_width(width)
            self.slots = self.run.write_pages(self.slots, tables, slot, pages)
            self.slots = self.run.put_rows(self.slots, slot, rows)
            request._held, request._stage = None, Stage.DECODING
            self._cancelled[request._slot] = False
            return True
        if not self._take_pages(request, prefix):
            return False
        length = prefix.length if prefix else 0
        state = prefix.state if prefix else self._new_state()
        lengths = np.full(self.parts, length, np.int32)
        adapters = np.full(self.parts, request._adapter.number, np.int32)
        self.slots = self.run.restore(self.slots, slot, state, lengths, adapters)
        request._fed = request.cached_tokens = length
        request._stage = Stage.FEEDING
        self.prompt_tokens += len(request.prompt)
        self.cached_tokens += length
        return True

    def _take_pages(self, request: Request, prefix: Prefix | None) -> bool:
        """Pages of the whole prompt, those of a prefix among them; False if there are too few.

        A page that the prefix fills in part is copied, since others write behind it.
        """
        part, length = self._part(request._slot), prefix.length if prefix else 0
        pages = {ratio: numbers[:] for ratio, numbers in prefix.pages.items()} if prefix else {}
        partly = {ratio: int(length % (ratio * PIECE) > 0) for ratio in self.ledger.pages}
        missing = self.ledger.missing(pages, self._first_tokens(request))
        self.ledger.hold(part, pages)  # before anything is evicted
        wanted = {ratio: missing[ratio] + partly[ratio] for ratio in missing}
        new = self._allocate(part, wanted)
        if new is None:
            self.ledger.release(part, pages)
            return False
        if any(partly.values()):
            none = np.zeros(self.parts, np.int32)
            source, target = ({ratio: none.copy() for ratio in new} for _ in range(2))
            for ratio in (ratio for ratio, copied in partly.items() if copied):
                source[ratio][part], target[ratio][part] = pages[ratio][-1], new[ratio][0]
                self.ledger.release(part, {ratio: [pages[ratio].pop()]})
            self.slots = self.run.copy_pages(self.slots, source, target)
        self._set_pages(request, {r: [*pages.get(r, ()), *new[r]] for r in new})
        return True

    def _allocate(self, part: int, wanted: dict[int, int]) -> dict[int, list[int]] | None:
        """Pages, prefixes being let go for them; None if there are too few even so."""
        while (new := self.ledger.allocate(part, wanted)) is None:
            if not self.prefixes.evict(part):
                return None
        return new

    def _new_state(self):
        """The state of a slot that has seen no token: nobody has been in the slots that it is of."""
        if self._empty_state is None:
            every = np.zeros(self.parts, np.int32)
            self._empty_state = self.run.snapshot(self.slots, every)
        return self._empty_state

    def _needed(self, request: Request, tokens: int) -> int:
        """Tokens to have pages for: all at once where nobody can leave its slot later."""
        return request._most if self._is_shared else min(tokens, request._most)

    def _first_tokens(self, request: Request) -> int:
        """Tokens to have pages for when it enters a slot."""
        if request._held is None:
            return self._needed(request, len(request.prompt) + 1)
        tokens = len(request.prompt) + len(request.tokens)
        return self._needed(request, tokens + self._steps_per_call)

    def _decode(self, events: dict[int, Request]) -> bool:
        """A call for all slots that decode; False if there are none."""
        rows = self._requests(Stage.DECODING)
        if any(r._matcher is not None and r._in_flight for r in rows):
            self._read(events, keep=0)
            rows = self._requests(Stage.DECODING)
        if not rows:
            return False
        is_waited_for = self._requests(Stage.FEEDING) or (self.waiting and None in self.in_slot)
        has_grammar = any(r._matcher is not None for r in rows)
        count = 1 if is_waited_for or has_grammar else self._steps_per_call
        count = min(count, *(2 ** min(r._calls, 10) for r in rows), MOST_STEPS)
        for request in rows:
            if request._stage is not Stage.DECODING:
                continue  # it had to leave for another one
            while not self._reserve(request, self._needed(request, _reach(request, count))):
                self._make_room(request, events)
                if request._stage is not Stage.DECODING:
                    break
        allowed = self._allowed(rows, events) if has_grammar else self._everything_placed
        rows = [r for r in rows if r._stage is Stage.DECODING]
        if not rows:
            return False
        tables = self._tables_for(rows, lambda r: min(_reach(r, count), r._most))
        output, self.slots = self.run.decode(
            self.slots, tables, np.int32(count), self._cancelled.copy(), allowed
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
        running = self._running([self._part(request._slot)])
        self._put_out(max(running, key=lambda r: r._order), events)

    def _put_out(self, last: Request, events: dict[int, Request]) -> None:
        """A request leaves its slot and waits again; nothing that it has is lost."""
        part = self._part(last._slot)
        if last._stage is Stage.DECODING:
            self._read(events, keep=0)  # what it has is known only then
            if last.is_ended:
                return
            tokens = len(last.prompt) + len(last.tokens)
            width = self._tables.width(tokens)
            slot = self._one_each([last._slot])
            pages = self.run.read_pages(self.slots, self._tables.of_width(width), slot)
            rows = self.run.take_rows(self.slots, slot)
            last._held = width, *self._own(part, (rows, pages))
            self._cancelled[last._slot] = True  # the device decodes it no further
        else:  # its prompt is fed again, to the same bits
            self.prompt_tokens -= len(last.prompt)
            self.cached_tokens -= last.cached_tokens
        self.preemptions += 1
        self._leave(last)
        last._stage = Stage.WAITING
        self.waiting.append(last)

    def _feed(self) -> None:
        """Chunks of the prompts in slots, those of the first request of each part together."""
        left = self._budget
        while left > 0:
            first: dict[int, Request] = {}
            size = 0
            for request in self._requests(Stage.FEEDING):
                size = size or self._chunk_size(request)
                if self._chunk_size(request) == size:
                    first.setdefault(self._part(request._slot), request)
            if not first:
                return
            self._feed_chunk(list(first.values()), size)
            left -= size

    def _feed_chunk(self, requests: list[Request], size: int) -> None:
        counts = np.zeros(self.parts, np.int32)
        for request in requests:
            counts[self._part(request._slot)] = self._next_end(request, size) - request._fed
        tokens = np.zeros((self.parts, size), np.int32)
        for request in requests:
            part = self._part(request._slot)
            piece = request.prompt[request._fed : request._fed + counts[part]]
            tokens[part, : len(piece)] = piece
        slot = self._one_each([r._slot for r in requests])
        self._prepare_decode(requests)
        tables = self._tables_for(requests, lambda r: len(r.prompt))
        self.slots = self.run.prefill(self.slots, tables, tokens, counts, slot)
        for request in requests:
            request._fed += int(counts[self._part(request._slot)])
            self._keep_prefix(request)
            if request._fed == len(request.prompt):
                self._start(request)

    def _prepare_decode(self, requests: Sequence[Request]) -> None:
        """Compiles decode for what is being fed, unless it has been, while prefill is compiled and runs."""
        width = self._tables.width(max(min(_reach(r, 1), r._most) for r in requests))
        if width in self._prepared:
            return
        self._prepared.add(width)
        self.run.decode.prepare(
            *(self.slots, self._tables.of_width(width), np.int32(1)),
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

    def _keep_prefix(self, request: Request) -> None:
        fed, length = request._fed, len(request.prompt)
        is_end = fed == (length - 1) // PIECE * PIECE
        if not fed or fed % PIECE or not (is_end or fed % EVERY == 0):
            return
        part, digest = self._part(request._slot), request._digests[fed // PIECE - 1]
        wide = min(fed, request._wide)
        if self.prefixes.wants(part, digest, wide):
            state = self.run.snapshot(self.slots, self._one_each([request._slot]))
            pages = {
                ratio: numbers[: pages_of(fed, ratio)] for ratio, numbers in request._pages.items()
            }
            self.prefixes.add(part, digest, Prefix(fed, wide, pages, state))

    def _start(self, request: Request) -> None:
        rows = RequestRows.of(
            [request.sampling],
            [request.stop_ids],
            self.slots.logits.shape[1],
            [request.prompt],
            self.slots.requests.stop_ids.shape[1],
        )
        slot = self._one_each([request._slot])
        self.slots = self.run.start(self.slots, slot, self._for_all(rows))
        self._cancelled[request._slot] = False
        request._stage, request._calls = Stage.DECODING, 0

    def _read(self, events: dict[int, Request], keep: int) -> None:
        """Takes the tokens of all calls but the last `keep`."""
        while len(self._calls) > keep:
            call = self._calls.popleft()
            tokens = np.asarray(call.output.tokens)
            wanted = [r for r in call.requests.values() if r.sampling.logprobs is not None]
            logprobs = self.run.fetch(call.output) if wanted else None
            self.row_steps += len(self.in_slot) * call.count
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
        self._leave(request)
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
    return len(request.prompt) + len(request.tokens) + request._in_flight + count
