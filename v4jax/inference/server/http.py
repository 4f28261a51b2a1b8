"""Pieces of HTTP: bodies with a limit, clients that leave, streams of events."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from v4jax.inference.server.errors import ApiError

_DRAINED = 4  # times the limit, of a body that is read to its end before it is refused

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client has closed the connection: nobody is there to answer to."""


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request.

    Raises:
      ApiError: it has more than `limit` bytes, or is not declared as JSON.
      ClientGoneError: it breaks off.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no page of another site can send unasked
        raise ApiError(400, f"Content-Type is {kind!r}: expected application/json.")
    too_large = ApiError(
        413,
        f"The body has more than {limit} bytes, which this server takes.",
        code="request_too_large",
    )
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > _DRAINED * limit:
        raise too_large
    data, size = bytearray(), 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size <= limit:
                data += piece
            elif size > _DRAINED * limit:
                break
    except ClientDisconnect:
        raise ClientGoneError from None
    if size > limit:
        raise too_large
    return bytes(data)


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
      ClientGoneError: it has left.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A response of server-sent events, as an ASGI application.

    Args:
      events: bytes, as they are sent.
      headers: besides those of every stream.
      on_end: called in any case, also when the client leaves before anything is sent.
    """

    def __init__(
        self, events: AsyncIterator[bytes], headers: dict[str, str], on_end: Callable[[], None]
    ):
        self._events, self._on_end = events, on_end
        self._headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # or a proxy in front would collect
            **headers,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all events, unless the client leaves."""
        try:
            await unless_gone(self._send_all(send), receive)
        except (ClientGoneError, OSError):
            pass
        finally:
            self._on_end()

    async def _send_all(self, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
