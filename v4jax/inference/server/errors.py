"""Errors as OpenAI's API writes them: `{"error": {"message", "type", "param", "code"}}`."""

import json

from starlette.responses import Response

_LONGEST = 1000  # characters of a message, which may quote a whole request
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """What a request ends with instead of an answer.

    Args:
      status: of HTTP.
      message: says what was given, what is accepted and what to do.
      param: the field that is at fault.
      code: for programs, such as "context_length_exceeded".
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        message = message if len(message) <= _LONGEST else message[:_LONGEST] + "..."
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, object]:
        """The JSON object that clients read."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def response(self) -> Response:
        """The same as a response. Who is told to come again is told when."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.body, self.status, headers)


def json_response(
    value: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """A response of one JSON value."""
    return Response(to_json(value), status, headers, media_type="application/json")


def to_json(value: object) -> bytes:
    """UTF-8 of a JSON value, as short as it gets."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
