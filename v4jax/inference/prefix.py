"""Prefixes of prompts that were computed and can be used again.

A prefix of L tokens, L a multiple of 128, is the pages of its compressed KV and a snapshot of what does
not grow: the ring of the last 128 rows and the open windows of the compressors. At such an L the windows
of CSA and HCA are empty but for CSA's overlap, so a snapshot is as small as it can be (3.6 MB for Flash).
Snapshots are taken every `EVERY` tokens of a prompt and at its last multiple of 128.

Pages are shared. The last one of each ratio may be partly filled: whoever goes on from the prefix copies
it first, and the one that filled it goes on writing behind the prefix's rows.

Prefixes are found by a chain of digests of pieces of 128 tokens, and by how many of their tokens were
computed in wide chunks: the last bits of a chunk depend on its shape (not on where it begins), so a
prompt takes only what has the bits that it would compute itself (`wide_tokens`). The chain begins with the
adapter that the request has; all else that decides the numbers, checkpoint, numerics and cache format, is
one engine's. The least recently used leaves first: to
host memory, if there is room for prefixes, and else for good. `prefix_files.py` keeps single ones on a
disk.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from v4jax.inference.ledger import Held, Ledger

PIECE = 128  # tokens
EVERY = 1024  # tokens between snapshots
_Key = tuple[int, bytes, int]  # part, digest, tokens in wide chunks


def digests_of(tokens: Sequence[int], adapter: bytes = b"") -> list[bytes]:
    """One for every prefix of whole pieces, the shortest first.

    Args:
      adapter: digest of the adapter that computes them, without which they begin.
    """
    whole = len(tokens) // PIECE * PIECE
    pieces = np.asarray(tokens[:whole], "<i4").reshape(-1, PIECE)
    found, last = [], adapter
    for piece in pieces:
        last = hashlib.blake2b(last + piece.tobytes(), digest_size=16).digest()
        found.append(last)
    return found


def wide_tokens(length: int, chunk: int) -> int:
    """How many tokens of a prompt of `length` are fed in wide chunks of so many, from its first on.

    Whole ones, and all that is before the last multiple of 128 if more than half a chunk is left. The
    rest goes in chunks of 128. So the shape in which a token is computed depends on its place and on
    the length of the prompt, not on what was cached.
    """
    body = (length - 1) // PIECE * PIECE
    whole = body // chunk * chunk
    return body if body - whole > chunk // 2 else whole


@dataclasses.dataclass(frozen=True)
class Prefix:
    """L tokens that are in the cache."""

    length: int
    wide: int  # of them, those that were computed in wide chunks
    pages: Held
    state: Any  # of `SlotSteps.snapshot`


@dataclasses.dataclass(frozen=True)
class Stored:
    """A prefix in host memory: NumPy arrays of one part, with a leading axis of 1."""

    length: int
    wide: int
    state: Any  # of `SlotSteps.snapshot`
    pages: Any  # of `SlotSteps.read_pages`

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.state, self.pages)))


class HostPrefixes:
    """Prefixes in host memory, whichever part they come from.

    Args:
      most_bytes: of their arrays; 0: none.
    """

    def __init__(self, most_bytes: int):
        self._most, self.nbytes = most_bytes, 0
        self._kept: collections.OrderedDict[tuple[bytes, int], Stored] = collections.OrderedDict()

    def add(self, digest: bytes, stored: Stored) -> None:
        """Keeps a prefix; the least recently used leave for it."""
        self._kept.pop((digest, stored.wide), None)
        self._kept[digest, stored.wide] = stored
        self.nbytes = sum(one.nbytes for one in self._kept.values())
        while self.nbytes > self._most:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def find(self, digests: Sequence[bytes], wide: int, longer_than: int) -> Stored | None:
        """The longest prefix of a prompt, if it has more tokens than so many."""
        for count, digest in reversed(list(enumerate(digests, 1))):
            key = digest, min(count * PIECE, wide)
            if count * PIECE > longer_than and key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        return None

    @property
    def takes_any(self) -> bool:
        """Whether there is room for any."""
        return self._most > 0


class Prefixes:
    """The prefixes of one engine.

    Args:
      ledger: of their pages.
      most: prefixes that are kept; 0: none.

    Attributes:
      leaving: called with a part, a digest and a prefix that is about to be let go.
    """

    def __init__(self, ledger: Ledger, most: int):
        self._ledger, self._most = ledger, most
        self.leaving: Callable[[int, bytes, Prefix], None] | None = None
        self._kept: collections.OrderedDict[_Key, Prefix] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, part: int, digests: Sequence[bytes], wide: int) -> Prefix | None:
        """The longest prefix that a part has of a prompt: its digests, and its `wide_tokens`."""
        for count, digest in reversed(list(enumerate(digests, 1))):
            key = part, digest, min(count * PIECE, wide)
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        return None

    def wants(self, part: int, digest: bytes, wide: int) -> bool:
        """Whether a prefix is to be added: there is none like it."""
        return self._most > 0 and (part, digest, wide) not in self._kept

    def add(self, part: int, digest: bytes, prefix: Prefix) -> None:
        """Keeps a prefix, holding its pages; lets go of the oldest if there are too many."""
        self._ledger.hold(part, prefix.pages)
        same = self._kept.pop((part, digest, prefix.wide), None)
        if same is not None:
            self._ledger.release(part, same.pages)
        self._kept[part, digest, prefix.wide] = prefix
        while len(self._kept) > self._most:
            self._drop(next(iter(self._kept)))

    def evict(self, part: int) -> bool:
        """Lets go of a part's least recently used prefix; False if it has none."""
        oldest = next((key for key in self._kept if key[0] == part), None)
        if oldest is None:
            return False
        self._drop(oldest)
        return True

    def clear(self) -> None:
        """Lets go of all of them for good."""
        for key, prefix in self._kept.items():
            self._ledger.release(key[0], prefix.pages)
        self._kept.clear()

    def _drop(self, key: _Key) -> None:
        if self.leaving is not None:
            self.leaving(key[0], key[1], self._kept[key])
        self._ledger.release(key[0], self._kept.pop(key).pages)
