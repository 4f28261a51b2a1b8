"""Folders that the TPU compiler writes to, which go when the process ends.

Not before: a compilation that is left alone writes on, and makes its folder again if it is gone.
"""

import atexit
import os
import shutil
import tempfile
from typing import NoReturn

_folders: list[str] = []


def folder(prefix: str) -> str:
    """A new temporary folder, until the process ends."""
    _folders.append(tempfile.mkdtemp(prefix=prefix))
    return _folders[-1]


@atexit.register
def remove() -> None:
    """All of them, for processes that end otherwise: those of `multiprocessing` run no `atexit`."""
    while _folders:
        shutil.rmtree(_folders.pop(), ignore_errors=True)


def end_process(status: int) -> NoReturn:
    """Ends it without waiting for a compilation that was left alone."""
    remove()
    os._exit(status)
