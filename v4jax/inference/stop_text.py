"""Texts that end an answer, found while it is being written."""

from collections.abc import Sequence

from v4jax.text.format import CALLS_START, THINK_END
from v4jax.text.parse import hold_back


class StopScanner:
    """Lets a completion through, up to the first stop text of its answer.

    An answer begins after the reasoning and ends before tool calls: a stop text met elsewhere is none.
    Of several stop texts that overlap, the one that ends first counts. What may be the beginning of
    a stop text is held back. The result does not depend on how the text is cut into pieces.

    Args:
      stops: none of them empty.
      thinking_mode: "thinking" if the completion begins in the reasoning, "chat" if in the answer;
        None: a text without either, all of which is searched.

    Attributes:
      is_met: whether there was a stop text. Nothing is let through any more.
    """

    def __init__(self, stops: Sequence[str], thinking_mode: str | None):
        self.is_met = False
        self._stops = tuple(stops)
        self._is_before = thinking_mode == "thinking"  # the end of the reasoning
        self._is_over = not self._stops
        self._ends = (*self._stops, *((CALLS_START,) if thinking_mode is not None else ()))
        self._longest = max(map(len, self._ends), default=0)
        self._text = ""  # the last characters, as many as may be needed
        self._held = 0  # how many of them are held back

    def push(self, piece: str) -> str:
        """What is let through now."""
        if self.is_met:
            return ""
        if self._is_over:
            return piece
        if not self._is_before:
            return self._answer(piece)
        self._text += piece
        end = self._text.find(THINK_END)
        if end < 0:
            self._text = self._text[1 - len(THINK_END) :]
            return piece
        answer = self._text[end + len(THINK_END) :]
        self._is_before, self._text = False, ""
        return piece[: len(piece) - len(answer)] + self._answer(answer)

    def close(self) -> str:
        """What was held back, now that nothing follows."""
        if self.is_met or not self._held:
            return ""
        text, self._held = self._text[-self._held :], 0
        return text

    def _answer(self, piece: str) -> str:
        self._text += piece
        begin = len(self._text) - self._held - len(piece)
        found = [(at + len(end), at) for end in self._ends if (at := self._text.find(end)) >= 0]
        if found:
            end, at = min(found)
            self._is_over = True
            self.is_met = self._text[at:end] in self._stops
            self._held = 0
            return self._text[begin : at if self.is_met else None]
        safe = len(hold_back(self._text, *self._stops))
        let_through = self._text[begin:safe]
        self._held = len(self._text) - safe
        kept = max(self._held, self._longest - 1)
        self._text = self._text[max(0, len(self._text) - kept) :]
        return let_through
