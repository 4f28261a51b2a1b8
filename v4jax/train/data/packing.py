"""Documents into rows of a fixed number of tokens: one behind the other, or one a row.

First fit: a document goes into the first of the last `OPEN_ROWS` rows that has room for it, at the next
multiple of `align` tokens (`nn/documents.py` says why), and else opens a row. What comes out depends on the
lengths and their order alone.
"""

import array
import dataclasses

import numpy as np

OPEN_ROWS = 32  # that a document may still go into; more fill rows better and take longer


@dataclasses.dataclass(frozen=True)
class Rows:
    """What every row holds: part `p` of row r for `begins[r] <= p < begins[r + 1]`."""

    begins: np.ndarray  # [R + 1] int64
    documents: np.ndarray  # [P] which document a part is of
    offsets: np.ndarray  # [P] its first token in the document
    places: np.ndarray  # [P] and in the row

    def __len__(self) -> int:
        return len(self.begins) - 1

    def parts(self, row: int) -> list[tuple[int, int, int]]:
        """(document, offset, place) of every part of a row, in order."""
        span = slice(int(self.begins[row]), int(self.begins[row + 1]))
        columns = (x[span].tolist() for x in (self.documents, self.offsets, self.places))
        return list(zip(*columns))


def pack(
    lengths: np.ndarray,  # [N] inputs of each document, at least 1
    order: np.ndarray,  # [M] documents, in the order in which they are taken
    seq_len: int,
    align: int,
    *,
    shares_rows: bool = True,
    is_cut: np.ndarray | None = None,  # [N] bool: goes on in further rows, if longer than one
) -> Rows:
    """Places documents into rows of `seq_len` tokens.

    A document that is longer than a row is cut: what is behind the row's end comes in further rows, as
    documents of their own, or not at all.
    """
    numbers, documents, offsets, places = (array.array("q") for _ in range(4))
    open_rows: list[tuple[int, int]] = []  # with room left: number, and first free place
    count = 0  # of rows
    for document in order:
        length = int(lengths[document])
        last = (length - 1) // seq_len if is_cut is not None and is_cut[document] else 0
        for offset in range(0, (last + 1) * seq_len, seq_len):
            size = min(length - offset, seq_len)
            fits = (i for i, (_, free) in enumerate(open_rows) if free + size <= seq_len)
            place = next(fits, None)
            number, free = (count, 0) if place is None else open_rows.pop(place)
            if place is None:
                count, place = count + 1, len(open_rows)
            numbers.append(number)
            documents.append(document)
            offsets.append(offset)
            places.append(free)
            free = _aligned(free + size, align)
            if shares_rows and free < seq_len:
                open_rows.insert(place, (number, free))
                del open_rows[:-OPEN_ROWS]
    by_row = np.argsort(np.array(numbers), kind="stable")
    begins = np.searchsorted(np.array(numbers)[by_row], np.arange(count + 1))
    return Rows(begins, *(np.array(column)[by_row] for column in (documents, offsets, places)))


def _aligned(place: int, align: int) -> int:
    return -(-place // align) * align
