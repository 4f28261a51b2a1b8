"""Fields of a request's JSON object, read with their types. A null is as good as nothing."""

import json
import math
from collections.abc import Mapping
from typing import Any

from v4jax.inference.server.errors import ApiError
from v4jax.text.format import DEEPEST, is_too_deep, shown


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body, without what is null.

    Raises:
      ApiError: it is none, or nested too deep.
    """
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON in UTF-8: {error}.") from None
    if is_too_deep(value):
        raise ApiError(400, f"The body has lists and objects in each other over {DEEPEST} times.")
    if not isinstance(value, dict):
        raise ApiError(400, f"The body is {type(value).__name__}: expected a JSON object.")
    return {name: field for name, field in value.items() if field is not None}


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


class Fields:
    """Reads fields by name, and remembers which were read.

    Args:
      values: without nulls.
      path: of the object that they are in, for messages: "" or such as "stream_options.".
    """

    def __init__(self, values: Mapping[str, Any], path: str = ""):
        self._values, self._path = values, path
        self._read: set[str] = set()

    @property
    def unread(self) -> list[str]:
        """Names of fields that nothing has asked for."""
        return [name for name in self._values if name not in self._read]

    def get(self, name: str) -> Any:
        """The value, whatever it is; None if there is none."""
        self._read.add(name)
        return self._values.get(name)

    def error(self, name: str, expected: str, code: str | None = None) -> ApiError:
        """That a field has another value than expected."""
        text = f"{self._path}{name}={shown(self._values.get(name))}: expected {expected}."
        return ApiError(400, text, param=self._path + name, code=code)

    def of(self, name: str, kind: type, expected: str) -> Any:
        """A value of one Python type."""
        value = self.get(name)
        if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
            return value
        raise self.error(name, expected)

    def boolean(self, name: str) -> bool | None:
        """True or false."""
        value = self.get(name)
        if value is None or isinstance(value, bool):
            return value
        raise self.error(name, "true or false")

    def integer(self, name: str, low: int, high: int) -> int | None:
        """An integer in low..high; 3.0 is one, as some clients write it."""
        value = self.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise self.error(name, f"an integer in {low}..{high}")

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number in [low, high]."""
        value = self.get(name)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and low <= value <= high:
            return float(value)
        above = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"from {low:g} on"
        raise self.error(name, f"a number {above}")

    def sub(self, name: str) -> "Fields":
        """The fields of an object; of an empty one if it is not given."""
        value = self.of(name, dict, "an object") or {}
        given = {key: field for key, field in value.items() if field is not None}
        return Fields(given, f"{self._path}{name}.")
