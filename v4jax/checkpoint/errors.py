"""What is said of a damaged folder, and how its JSON files are read: nothing there is trusted."""

import json
from typing import Any

from v4jax import stores
from v4jax.stores import CheckpointError, shortened

__all__ = ["CheckpointError", "ConfigError", "read_json", "shortened"]

_MAX_JSON = 200_000_000  # bytes; an index of 150,000 tensors has 15 million


class ConfigError(ValueError):
    """A config.json that this implementation does not compute."""

    def __init__(self, message: str):
        super().__init__(shortened(message))


def read_json(path: str, error: type[ValueError]) -> dict[str, Any]:
    """The object that a JSON file holds, here or in a store.

    Raises:
      FileNotFoundError: there is no such file.
      error: it is no JSON in UTF-8, nested too deeply, too large, or holds something else.
      CheckpointError: a store does not give it.
    """
    file = stores.open_file(path, error)
    if file.size > _MAX_JSON:
        raise error(f"{path} has {file.size:,} bytes: expected at most {_MAX_JSON:,}.")
    data = file.read(0, file.size)
    try:
        found = json.loads(str(data, "utf-8-sig"))
    except RecursionError as why:
        raise error(f"{path}: lists and objects are nested too deeply.") from why
    except ValueError as why:
        raise error(f"{path} is not JSON in UTF-8: {why}.") from why
    if not isinstance(found, dict):
        raise error(f"{path} holds a {type(found).__name__}: expected an object.")
    return found
