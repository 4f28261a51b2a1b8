"""What requests hold: a slot, pages, the state of the slot, and the prefixes that they share.

    enter      a request gets a slot, and in it a prefix that is there, an empty state, or what it had
    reserve    more pages, prefixes being let go for them
    put_out    what is in its slot goes to host memory, with the request
    leave      slot and pages are free again

Which request enters, and which has to leave, is the scheduler's affair.
"""

from collections.abc import Callable, Sequence

import numpy as np

from v4jax.inference.ledger import Held, Ledger
from v4jax.inference.parts import fetch_row
from v4jax.inference.prefix import EVERY, PIECE, HostPrefixes, Prefix, Prefixes, Stored
from v4jax.inference.programs import Programs
from v4jax.inference.requests import Request, Stage
from v4jax.inference.steps import Slots, Tables
from v4jax.inference.tables import PageTables
from v4jax.nn.cache import pages_of


class Holdings:
    """The slots of one engine and what is in them.

    Args:
      slots: on the devices.
      parts: that they lie in.
      max_length: of the model, in tokens.
      host_bytes: host memory for prefixes that leave the devices.

    Attributes:
      slots: as the last step left them.
      in_slot: the request of each slot.
    """

    def __init__(
        self,
        programs: Programs,
        slots: Slots,
        ledger: Ledger,
        prefixes: Prefixes,
        *,
        parts: int,
        max_length: int,
        host_bytes: int = 0,
    ):
        self.run, self.slots, self.ledger, self.prefixes = programs, slots, ledger, prefixes
        self.in_slot: list[Request | None] = [None] * len(slots.done)
        self.parts, self._per_part = parts, len(self.in_slot) // parts
        self._tables = PageTables(len(self.in_slot), [*ledger.pages], max_length, programs.place)
        self._empty_state = None
        self.host = HostPrefixes(host_bytes)
        if self.host.takes_any:
            prefixes.leaving = lambda part, digest, prefix: self.host.add(
                digest, self.store(part, prefix)
            )

    # Slots ----------------------------------------------------------------------------------------

    def part(self, slot: int) -> int:
        """The part that a slot lies in."""
        return slot // self._per_part

    def one_each(self, slots: Sequence[int]) -> np.ndarray:
        """Slots, at most one of each part, as steps take them."""
        found = np.full(self.parts, -1, np.int32)
        for slot in slots:
            found[self.part(slot)] = slot % self._per_part
        return found

    def in_stage(self, stage: Stage) -> list[Request]:
        """Those in slots, in the order in which they are served."""
        found = [r for r in self.in_slot if r is not None and r._stage is stage]
        return sorted(found, key=lambda r: r._order)

    def in_parts(self, parts: Sequence[int]) -> list[Request]:
        """Those in slots of these parts."""
        return [r for r in self.in_slot if r is not None and self.part(r._slot) in parts]

    def place_for(self, request: Request) -> tuple[int, Prefix | None] | None:
        """A free slot, in the part that has the longest prefix of it, or else the most free slots."""
        free: dict[int, list[int]] = {}  # by part
        for slot, other in enumerate(self.in_slot):
            if other is None:
                free.setdefault(self.part(slot), []).append(slot)
        if not free:
            return None
        emptiest = max(free.values(), key=len)
        best: tuple[int, Prefix | None] = emptiest[0], None
        if request._held is not None:
            return best
        for part, slots in free.items():
            prefix = self.find_prefix(part, request._digests, request._wide)
            if prefix and (best[1] is None or prefix.length > best[1].length):
                best = slots[0], prefix
        return best

    def enter(self, request: Request, slot: int, prefix: Prefix | None, tokens: int) -> bool:
        """Gives a request a slot, pages for so many tokens, and what it begins with.

        Returns:
          False if there are no pages for it now: then it has nothing.
        """
        request._slot, self.in_slot[slot] = slot, request
        one = self.one_each([slot])
        if request._held is not None:
            if not self.reserve(request, tokens):
                self.leave(request)
                return False
            width, *held = request._held
            rows, pages = self.run.spread(held)
            self.slots = self.run.write_pages(self.slots, self._tables.of_width(width), one, pages)
            self.slots = self.run.put_rows(self.slots, one, rows)
            request._held, request._stage = None, Stage.DECODING
            return True
        if not self._take_pages(request, prefix, tokens):
            self.leave(request)
            return False
        length = prefix.length if prefix else 0
        state = prefix.state if prefix else self._new_state()
        lengths = np.full(self.parts, length, np.int32)
        adapters = np.full(self.parts, request._adapter.number, np.int32)
        self.slots = self.run.restore(self.slots, one, state, lengths, adapters)
        request._fed = request.cached_tokens = length
        request._stage = Stage.FEEDING
        return True

    def _new_state(self):
        """The state of a slot that has seen no token: nobody has been in the slots that it is of."""
        if self._empty_state is None:
            every = np.zeros(self.parts, np.int32)
            self._empty_state = self.run.snapshot(self.slots, every)
        return self._empty_state

    def put_out(self, request: Request) -> None:
        """A request leaves its slot, and takes what it has decoded along, in host memory."""
        if request._stage is Stage.DECODING:
            slot = self.one_each([request._slot])
            width = self._tables.width(len(request.prompt) + len(request.tokens))
            pages = self.run.read_pages(self.slots, self._tables.of_width(width), slot)
            rows = self.run.take_rows(self.slots, slot)
            request._held = width, *fetch_row((rows, pages), self.part(request._slot))
        self.leave(request)

    def leave(self, request: Request) -> None:
        """Frees its slot and pages."""
        slot = request._slot
        if slot < 0:
            return
        self.ledger.release(self.part(slot), request._pages)
        self._tables.clear(slot)
        self.in_slot[slot], request._slot, request._pages = None, -1, {}

    # Pages ----------------------------------------------------------------------------------------

    def width(self, tokens: int) -> int:
        """Of the tables that have room for so many tokens."""
        return self._tables.width(tokens)

    def tables(self, width: int) -> Tables:
        """Tables of that width, on the devices."""
        return self._tables.of_width(width)

    def tables_for(self, requests: Sequence[Request], tokens: Callable[[Request], int]) -> Tables:
        """Tables that are wide enough, on the devices."""
        return self.tables(self.width(max(map(tokens, requests))))

    def reserve(self, request: Request, tokens: int) -> bool:
        """Pages for so many tokens of a request in a slot; False if there are none even so."""
        wanted = self.ledger.missing(request._pages, tokens)
        if not any(wanted.values()):
            return True
        new = self._allocate(self.part(request._slot), wanted)
        if new is None:
            return False
        pages = {ratio: [*request._pages.get(ratio, ()), *new[ratio]] for ratio in new}
        self._set_pages(request, pages)
        return True

    def would_fit(self, request: Request, part: int, tokens: int) -> bool:
        """Whether a part has pages for so many tokens without prefixes and requests of lower priority."""
        kept = [r._pages for r in self.in_parts([part]) if r.priority >= request.priority]
        needed = self.ledger.missing({}, tokens)
        return all(
            count
            < self.ledger.pages[ratio] - len({n for pages in kept for n in pages.get(ratio, ())})
            for ratio, count in needed.items()
        )

    def _take_pages(self, request: Request, prefix: Prefix | None, tokens: int) -> bool:
        """Pages of so many tokens, those of a prefix among them; False if there are too few.

        A page that the prefix fills in part is copied, since others write behind it.
        """
        part, length = self.part(request._slot), prefix.length if prefix else 0
        pages = {ratio: numbers[:] for ratio, numbers in prefix.pages.items()} if prefix else {}
        partly = {ratio: int(length % (ratio * PIECE) > 0) for ratio in self.ledger.pages}
        missing = self.ledger.missing(pages, tokens)
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

    def _allocate(self, part: int, wanted: dict[int, int]) -> Held | None:
        """Pages, prefixes being let go for them; None if there are too few even so."""
        while (new := self.ledger.allocate(part, wanted)) is None:
            if not self.prefixes.evict(part):
                return None
        return new

    def _set_pages(self, request: Request, pages: Held) -> None:
        request._pages = pages
        self._tables.put(request._slot, pages)

    # Prefixes -------------------------------------------------------------------------------------

    def find_prefix(self, part: int, digests: Sequence[bytes], wide: int) -> Prefix | None:
        """The longest prefix of a prompt (`Request._digests`, `_wide`), from host memory if need be."""
        found = self.prefixes.find(part, digests, wide)
        stored = self.host.find(digests, wide, found.length if found else 0)
        if stored is None:
            return found
        digest = digests[stored.length // PIECE - 1]
        back = self.bring_back(part, digest, stored)  # which may have let go of the other
        return back or self.prefixes.find(part, digests, wide)

    def keep_prefix(self, request: Request) -> None:
        """Keeps what has been fed of its prompt, where snapshots are taken."""
        fed, length = request._fed, len(request.prompt)
        is_end = fed == (length - 1) // PIECE * PIECE
        if fed in (0, length) or fed % PIECE or not (is_end or fed % EVERY == 0):
            return  # a prefix ends before the last token, whose logits are wanted
        part, digest = self.part(request._slot), request._digests[fed // PIECE - 1]
        wide = min(fed, request._wide)
        if self.prefixes.wants(part, digest, wide):
            state = self.run.snapshot(self.slots, self.one_each([request._slot]))
            pages = {
                ratio: numbers[: pages_of(fed, ratio)] for ratio, numbers in request._pages.items()
            }
            self.prefixes.add(part, digest, Prefix(fed, wide, pages, state))

    def store(self, part: int, prefix: Prefix) -> Stored:
        """A copy of a part's prefix in host memory."""
        tables, slot = self._tables_of_pages(part, prefix.pages, prefix.length)
        pages = self.run.read_pages(self.slots, tables, slot)
        return Stored(prefix.length, prefix.wide, *fetch_row((prefix.state, pages), part))

    def bring_back(self, part: int, digest: bytes, stored: Stored) -> Prefix | None:
        """The inverse: a prefix of a part again; None if there are no pages for it."""
        wanted = {ratio: pages_of(stored.length, ratio) for ratio in self.ledger.pages}
        pages = self._allocate(part, wanted)
        if pages is None:
            return None
        tables, slot = self._tables_of_pages(part, pages, stored.length)
        state, content = self.run.spread((stored.state, stored.pages))
        self.slots = self.run.write_pages(self.slots, tables, slot, content)
        prefix = Prefix(stored.length, stored.wide, pages, state)
        self.prefixes.add(part, digest, prefix)
        self.ledger.release(part, pages)  # the prefix holds them
        return prefix

    def _tables_of_pages(self, part: int, pages: Held, length: int) -> tuple[Tables, np.ndarray]:
        """Tables with these pages in the first slot of a part, and that slot."""
        slot = part * self._per_part
        return self._tables.of_pages(slot, pages, length), self.one_each([slot])
