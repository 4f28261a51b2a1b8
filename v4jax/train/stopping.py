"""Ctrl-C and SIGTERM end a run at the end of a step, with a save."""

import os
import signal
import threading
from types import FrameType
from typing import Self

import jax
import numpy as np
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal:
    """`with StopOnSignal() as stop:` notes SIGINT and SIGTERM; `stop()` says whether one has come.

    A second one ends the process as it would without this. Outside the main thread, which alone may say
    what signals do, nothing changes.
    """

    def __init__(self):
        self._received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self._received is not None

    @property
    def name(self) -> str:
        """Of the signal that came."""
        return signal.Signals(self._received).name if self._received is not None else "no signal"

    def raise_(self) -> None:
        """Ends the program as the signal that came would: status 130 of Ctrl-C, 143 of SIGTERM."""
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received is not None:
            raise SystemExit(128 + self._received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._received = number
        self._give_back()
        text = f"\n{self.name}: the run ends after this step, with a save; once more ends it at once.\n"
        os.write(2, text.encode())  # `print` may be what was interrupted

    def _give_back(self) -> None:
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before)  # type: ignore[arg-type]  # what `signal` returned


def agreed(wanted: bool) -> bool:
    """Whether any process wants it. All of them have to ask together."""
    if jax.process_count() == 1:
        return wanted
    return bool(multihost_utils.process_allgather(np.asarray(wanted)).any())
