"""What is said of a damaged folder, and how its JSON files are read: nothing there is trusted."""

import json
import os
import stat
from typing import Any

_MAX_MESSAGE = 2000  # characters
_MAX_JSON = 200_000_000  # bytes; an index of 150,000 tensors has 15 million


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message lists what was found wrong with it."""

    def __init__(self, message: str):
        super().__init__(shortened(message))


class ConfigError(ValueError):
    """A config.json that this implementation does not compute."""

    def __init__(self, message: str):
        super().__init__(shortened(message))


def shortened(text: str) -> str:
    """A message of bounded length that any terminal can print: files may hold anything."""
    text = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    if len(text) <= _MAX_MESSAGE:
        return text
    left = len(text) - _MAX_MESSAGE + 60
    return f"{text[: _MAX_MESSAGE - 60]} ... and {left:,} more characters."


def require_file(path: str, error: type[ValueError]) -> int:
    """Bytes of a regular file; a pipe or device would make a reader wait for ever.

    Raises:
      error: there is no such file, or it is none.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as why:
        if isinstance(why, FileNotFoundError):
            raise
        raise error(f"{path} cannot be read: {why}.") from why
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path} is not a file (a folder, pipe or device): expected a regular file.")
    return found.st_size


def read_json(path: str, error: type[ValueError]) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      error: it is no JSON in UTF-8, nested too deeply, too large, or holds something else.
    """
    size = require_file(path, error)
    if size > _MAX_JSON:
        raise error(f"{path} has {size:,} bytes: expected at most {_MAX_JSON:,}.")
    try:
        with open(path, encoding="utf-8-sig") as file:
            found = json.load(file)
    except RecursionError as why:
        raise error(f"{path}: lists and objects are nested too deeply.") from why
    except (ValueError, OSError) as why:
        raise error(f"{path} is not JSON in UTF-8: {why}.") from why
    if not isinstance(found, dict):
        raise error(f"{path} holds a {type(found).__name__}: expected an object.")
    return found
