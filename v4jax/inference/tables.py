"""Tables of pages: which page of the pools holds which part of a slot's context. Host memory.

A step gets tables that are only as wide as it needs, in a few widths, since each width is a program.
"""

from collections.abc import Callable, Sequence

import numpy as np

from v4jax.inference.ledger import Held
from v4jax.inference.steps import Tables
from v4jax.nn.cache import pages_of

WIDTHS = (4096, 32_768, 262_144, 1_048_576)  # tokens that a step's tables are wide enough for


class PageTables:
    """A table [S, pages] a ratio, with zeros where a slot has no page.

    Args:
      slots: S.
      ratios: of the layers.
      max_length: of the model, in tokens.
      place: puts an array with a row a slot on the devices.
    """

    def __init__(
        self,
        slots: int,
        ratios: Sequence[int],
        max_length: int,
        place: Callable[[np.ndarray], object],
    ):
        self._widths = [*(width for width in WIDTHS if width < max_length), max_length]
        self._tables = {
            ratio: np.zeros((slots, pages_of(max_length, ratio)), np.int32) for ratio in ratios
        }
        self._place = place
        self._placed: dict[int, Tables] = {}  # tables on the devices, by width

    def put(self, slot: int, pages: Held) -> None:
        """The pages of a slot, those that it had before among them."""
        for ratio, numbers in pages.items():
            self._tables[ratio][slot, : len(numbers)] = numbers
        self._placed.clear()

    def clear(self, slot: int) -> None:
        """Takes all pages from a slot."""
        for table in self._tables.values():
            table[slot] = 0
        self._placed.clear()

    def width(self, tokens: int) -> int:
        """The smallest width that has room for so many."""
        return next(width for width in self._widths if width >= tokens)

    def of_width(self, width: int) -> Tables:
        """The tables of so many tokens, on the devices."""
        if width not in self._placed:
            self._placed[width] = {
                ratio: self._place(table[:, : pages_of(width, ratio)])
                for ratio, table in self._tables.items()
            }
        return self._placed[width]

    def of_pages(self, slot: int, pages: Held, tokens: int) -> Tables:
        """Tables of so many tokens on the devices, in which one slot has these pages and others none."""
        width, tables = self.width(tokens), {}
        for ratio, numbers in pages.items():
            table = np.zeros((len(self._tables[ratio]), pages_of(width, ratio)), np.int32)
            table[slot, : len(numbers)] = numbers
            tables[ratio] = self._place(table)
        return tables
