"""The first pass over the input: its lines checked, counted and put in order."""

import array
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from v4jax.inference.batch.files import JobError
from v4jax.inference.batch.requests import (
    Request,
    RequestError,
    Settings,
    line_text,
    parse_request,
)
from v4jax.text.format import resolve_mode


class Plan:
    """Which requests a file holds, and the order they are done in.

    Those that may generate the most come first, so that the last ones are short and the slots of an
    engine stay filled to the end.

    Of a request only a few numbers are kept; its text is read again when its turn comes.

    Args:
      path: JSON lines; blank ones are skipped.
      settings: for lines that do not say otherwise.
      release: whose prompts to render, see `v4jax.text.prompt.render`.
      models: that lines may name, see `parse_request`.

    Attributes:
      requests: their number; they have places 0 .. requests - 1.
      malformed: an error record for every line that is not a request.
      digest: SHA-256 of the file.
      size: its bytes.

    Raises:
      OSError: the file cannot be read.
      ValueError: the release does not have the settings' mode, or the path is that of a pipe or
        folder.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        settings: Settings,
        release: str = "april",
        models: Sequence[str] = (),
    ):
        resolve_mode(settings.mode, release)
        self.path, self.settings, self.release = path, settings, release
        self._models = models
        self.malformed: list[dict[str, Any]] = []
        lines, offsets, limits, lengths, marks = (array.array(code) for code in "qqqqQ")
        ids: set[str] = set()
        sha, self.size = hashlib.sha256(), 0
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(
                f"{path} is not a regular file: requests are read from it again later."
            )
        with open(path, "rb") as file:
            for line, text in enumerate(file, 1):
                sha.update(text)
                if line_text(text):
                    try:
                        request = self._parsed(text, line)
                        if request.id in ids:
                            raise RequestError("an earlier line has this id.", request.id)
                        ids.add(request.id)
                        lines.append(line)
                        offsets.append(self.size)
                        limits.append(request.settings.max_new_tokens)
                        lengths.append(len(request.prompt))
                        marks.append(_mark(text))
                    except RequestError as error:
                        self.malformed.append({"line": line, "id": error.id, "error": str(error)})
                self.size += len(text)
        self.digest = sha.hexdigest()
        order = np.lexsort((lines, lengths, limits))[::-1]
        self._lines, self._offsets = np.array(lines)[order], np.array(offsets)[order]
        self._marks = np.array(marks)[order]
        self.requests = len(lines)

    @property
    def count(self) -> int:
        """Lines that need a result or an error."""
        return len(self._lines) + len(self.malformed)

    @property
    def last_line(self) -> int:
        """The largest number of a line that is not blank."""
        last = int(self._lines.max(initial=0))
        return max([last, *(record["line"] for record in self.malformed[-1:])])

    def line(self, place: int) -> int:
        """Number of the line of the request at a place."""
        return int(self._lines[place])

    def request(self, place: int) -> Request:
        """The request at a place, read from the file.

        Raises:
          JobError: the file has changed since the plan was made.
        """
        with open(self.path, "rb") as file:
            file.seek(int(self._offsets[place]))
            text = file.readline()
        if _mark(text) != int(self._marks[place]):
            raise JobError(
                f"{self.path} was changed while the job was running: line {self.line(place)} is "
                "another one now. Put the old input back, and the same command goes on; or start "
                "a job with the new one and another output."
            )
        return self._parsed(text, self.line(place))

    def _parsed(self, text: bytes, line: int) -> Request:
        return parse_request(text, line, self.settings, self.release, self._models)


def _mark(text: bytes) -> int:
    """Tells a line from any other that may take its place: 64 bits of a digest."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
