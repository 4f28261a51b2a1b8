"""Lines of a file by number, of which only the offsets are in memory."""

import os
import pathlib

import numpy as np

from v4jax import stores

_BLOCK = 1 << 24  # bytes looked at together
PIECE = 1 << 14  # bytes of a plain text that are one document, to the next line's end
_MARK = b"\xef\xbb\xbf"  # UTF-8 byte-order mark, which some editors put before a text


class Lines:
    """The lines of a file of JSON, or pieces of some lines each of a plain text (.txt).

    Args:
      path: a file of this machine.

    Attributes:
      is_text: whether they are pieces of a text. Each has about 16 KiB and ends with a line.

    Raises:
      ValueError: it is a URL, or a kind of file that is not read.
      OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(stores.require_local(path))
        self.is_text = self.path.suffix == ".txt"
        if self.path.suffix not in (".txt", ".jsonl", ".json"):
            raise ValueError(
                f"{self.path}: expected .jsonl (an example a line) or .txt. Token ids in .npy are for "
                "TokenStream, which is `v4jax finetune --tokens`."
            )
        self._file = open(self.path, "rb")  # noqa: SIM115 - as long as this object
        self._offsets = self._find()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        begin, end = int(self._offsets[index]), int(self._offsets[index + 1])
        data = os.pread(self._file.fileno(), end - begin, begin)  # threads share the file
        return data.removeprefix(_MARK) if begin == 0 else data

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()

    def _find(self) -> np.ndarray:
        """Where lines begin, and where the last one ends: [n + 1] int64."""
        ends, at = [], 0
        while block := self._file.read(_BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at + 1)
            at += len(block)
        found = np.concatenate([np.zeros(1, np.int64), *ends, np.full(1, at, np.int64)])
        found = np.unique(found)
        if not self.is_text or len(found) < 2:
            return found
        # The first line's end in each span of PIECE bytes, so that pieces have whole lines.
        spans = np.searchsorted(found, np.arange(0, at, PIECE))
        return np.unique(np.append(found[spans], at))
