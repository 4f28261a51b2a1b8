"""Which pages of the pools are free, and how many hold on to each of the others.

Pages of one ratio are numbered alike in the pools of all its layers, so a page is given away for all of
them at once. Every part of a batch (`sharding.DECODE`) has pools of its own. Page 0 belongs to nobody:
tables point there where a sequence has no page.
"""

from collections.abc import Mapping

from v4jax.nn.cache import pages_of

Held = dict[int, list[int]]  # by ratio: the pages of a sequence, in order


class Ledger:
    """Pages by part and ratio.

    Args:
      pages: by ratio, so many in each part, page 0 included.
      parts: of the batch.
    """

    def __init__(self, pages: Mapping[int, int], parts: int = 1):
        self.pages = dict(pages)
        self._free = [
            {ratio: list(range(count - 1, 0, -1)) for ratio, count in pages.items()}
            for _ in range(parts)
        ]
        self._holders = [
            {ratio: [0] * count for ratio, count in pages.items()} for _ in range(parts)
        ]

    def grow(self, pages: Mapping[int, int]) -> None:
        """More pages in every part."""
        for free, holders in zip(self._free, self._holders):
            for ratio, count in pages.items():
                free[ratio] = [*range(count - 1, self.pages[ratio] - 1, -1), *free[ratio]]
                holders[ratio] += [0] * (count - self.pages[ratio])
        self.pages = dict(pages)

    def missing(self, held: Held, tokens: int) -> dict[int, int]:
        """Pages that a sequence needs for so many tokens, besides those it has."""
        return {
            ratio: max(0, pages_of(tokens, ratio) - len(held.get(ratio, ())))
            for ratio in self.pages
        }

    def allocate(self, part: int, wanted: Mapping[int, int]) -> Held | None:
        """So many pages of each ratio, or None if one ratio has fewer: then none are taken."""
        free = self._free[part]
        if any(len(free[ratio]) < count for ratio, count in wanted.items()):
            return None
        taken = {ratio: [free[ratio].pop() for _ in range(n)] for ratio, n in wanted.items()}
        self.hold(part, taken)
        return taken

    def hold(self, part: int, pages: Held) -> None:
        """One more holder of each page."""
        for ratio, numbers in pages.items():
            for number in numbers:
                self._holders[part][ratio][number] += 1

    def release(self, part: int, pages: Held) -> None:
        """One holder less; a page that has none is free."""
        for ratio, numbers in pages.items():
            for number in numbers:
                self._holders[part][ratio][number] -= 1
                if not self._holders[part][ratio][number]:
                    self._free[part][ratio].append(number)

    @property
    def total(self) -> int:
        """Pages of all parts and ratios that can be given away."""
        return sum(count - 1 for count in self.pages.values()) * len(self._free)

    @property
    def used(self) -> int:
        """Pages that are held."""
        return self.total - sum(len(f) for free in self._free for f in free.values())
