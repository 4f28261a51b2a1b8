"""Serves an application until a signal ends it."""

import asyncio
import signal
import socket

import uvicorn
from starlette.applications import Starlette

_SLACK = 5  # seconds for answers to be written once the grace time is over


class GracefulServer(uvicorn.Server):
    """Ends in steps: takes no connections, lets requests finish, cancels them after `grace` seconds.

    Args:
      app: from `make_app`.
      host: to listen at.
      port: 0: any that is free.
      grace: seconds.
    """

    def __init__(self, app: Starlette, host: str, port: int, grace: float):
        self._service, self._grace = app.state.service, grace
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=int(grace) + _SLACK,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What uvicorn does once it should end."""
        self._service.drain()
        timer = asyncio.get_running_loop().call_later(self._grace, self._service.cancel_all)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def bind(host: str, port: int) -> socket.socket:
    """A socket with that address, which `serve` begins to listen at.

    Raises:
      OSError: the address is taken, or not this machine's.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        text = str(error).rstrip(".")
        raise OSError(f"cannot listen at {host} port {port}: {text}.") from None
    return sock


def serve(app: Starlette, sock: socket.socket, grace: float) -> None:
    """Serves until SIGTERM or Ctrl-C, at the second of which it ends at once."""
    host, port = sock.getsockname()[:2]
    server = GracefulServer(app, host, port, grace)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it is done
    server.run(sockets=[sock])
