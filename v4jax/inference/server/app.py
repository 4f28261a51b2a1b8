"""The HTTP application: routes, and what a request goes through."""

import asyncio
import contextlib
import hmac
import importlib.resources
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from v4jax.inference.server.errors import ApiError, json_response, to_json
from v4jax.inference.server.exchange import Exchange
from v4jax.inference.server.fields import read_object
from v4jax.inference.server.http import ClientGoneError, EventStream, read_body, unless_gone
from v4jax.inference.server.metrics import Metrics
from v4jax.inference.server.protocol import EngineLike
from v4jax.inference.server.requests import (
    Asked,
    ServerSettings,
    context_of,
    read_chat,
    read_completion,
)
from v4jax.inference.server.responses import Answer
from v4jax.text.format import shown

_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_LONGEST_HEADER = 200  # characters

Reader = Callable[[Mapping[str, Any], EngineLike, ServerSettings], Asked]


class Service:
    """What the routes share.

    Args:
      engine: with a tokenizer; the application starts and stops it.
      settings: of the server.
    """

    def __init__(self, engine: EngineLike, settings: ServerSettings):
        if engine.tokenizer is None:
            raise ValueError("a server needs a tokenizer: Engine(model, v4jax.Tokenizer(folder)).")
        self.engine, self.settings, self.tokenizer = engine, settings, engine.tokenizer
        self.metrics = Metrics(engine)
        self.began = int(time.time())
        self._is_draining = False
        self._live: set[Exchange] = set()

    def drain(self) -> None:
        """From now on requests are refused; those that run go on."""
        self._is_draining = True

    def cancel_all(self) -> None:
        """Ends what runs. Its clients get an error."""
        self.drain()
        for exchange in self._live:
            exchange.cancel()

    async def chat(self, request: Request) -> Response | EventStream:
        """POST /v1/chat/completions."""
        return await self._answer(request, read_chat)

    async def complete(self, request: Request) -> Response | EventStream:
        """POST /v1/completions."""
        return await self._answer(request, read_completion)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        names = self.settings.model, *self.engine.adapters
        return json_response({"object": "list", "data": [*map(self._model, names)]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        if name not in (self.settings.model, *self.engine.adapters):
            text = f"The model {shown(name)} does not exist: see /v1/models."
            raise ApiError(404, text, param="model", code="model_not_found")
        return json_response(self._model(name))

    async def health(self, request: Request) -> Response:
        """GET /health: whether requests are taken."""
        self._require_open()
        try:
            await run_in_threadpool(self.engine.stats)
        except RuntimeError as error:
            raise ApiError(503, f"The engine has ended: {error}") from None
        return json_response({"status": "ok"})

    async def read_metrics(self, request: Request) -> Response:
        """GET /metrics."""
        text = await run_in_threadpool(self.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        """GET /: a page to chat in."""
        text = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"content-security-policy": _PAGE_POLICY})

    def require_key(self, headers: Mapping[str, str]) -> None:
        """Refuses a request without the server's key.

        Raises:
          ApiError: there is a key, and these headers do not have it.
        """
        if self.settings.api_key is None:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given, expected = key.strip().encode("utf-8", "replace"), self.settings.api_key.encode()
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, expected):
            text = "Authorization is missing or wrong: expected Bearer and this server's API key."
            raise ApiError(401, text, code="invalid_api_key")

    def _require_open(self) -> None:
        if self._is_draining:
            raise ApiError(503, "The server is about to end.", code="shutting_down")

    def _model(self, name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": self.began,
            "owned_by": "v4jax",
            "parent": None if name == self.settings.model else self.settings.model,
            "max_model_len": context_of(self.engine, self.settings),
            "modes": list(self.tokenizer.modes),
        }

    async def _answer(self, request: Request, read: Reader) -> Response | EventStream:
        deadline = time.monotonic() + self.settings.timeout
        self._require_open()
        try:
            async with asyncio.timeout(self.settings.timeout):
                body = await read_body(request, self.settings.max_body_bytes)
        except TimeoutError:
            raise ApiError(503, "The body did not come in time.", code="timeout") from None
        asked = await run_in_threadpool(self._read, body, read)
        self._require_open()
        exchange = Exchange(asked, self.engine, self.metrics, deadline)
        self._live.add(exchange)
        is_handed_over = False
        try:
            await run_in_threadpool(exchange.submit)
            answer = Answer(asked, self.tokenizer)
            headers = _ignored(asked)
            if asked.is_streamed:
                is_handed_over = True
                events = self._events(exchange, answer)
                return EventStream(events, headers, lambda: self._close(exchange))
            updates = await unless_gone(exchange.collect(), request.receive)
            whole = answer.whole(exchange.choices, updates, exchange.usage())
            return json_response(whole, headers=headers)
        finally:
            if not is_handed_over:
                self._close(exchange)

    def _read(self, body: bytes, read: Reader) -> Asked:
        return read(read_object(body), self.engine, self.settings)

    def _close(self, exchange: Exchange) -> None:
        exchange.close()
        self._live.discard(exchange)

    async def _events(self, exchange: Exchange, answer: Answer) -> AsyncIterator[bytes]:
        try:
            for chunk in answer.start():
                yield _event(chunk)
            async for news in exchange.updates():
                chunks = [c for choice, new in news for c in answer.chunks(choice.index, new)]
                yield b"".join(map(_event, chunks)) if news else b": waiting\n\n"
            if exchange.asked.includes_usage:
                yield _event(answer.usage_chunk(exchange.usage()))
        except ApiError as error:
            yield _event(error.body)
        yield b"data: [DONE]\n\n"


class _KeyGuard:
    """Asks for the API key before anything else of a request below /v1 is looked at."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            try:
                self._service.require_key(Request(scope).headers)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def make_app(engine: EngineLike, settings: ServerSettings) -> Starlette:
    """An ASGI application, whose `state.service` is its `Service`.

    Raises:
      ValueError: the engine has no tokenizer, the mode of `settings` is not one of its release, or the
        model has the name of an adapter.
    """
    service = Service(engine, settings)
    if settings.model in engine.adapters:
        raise ValueError(
            f"model={settings.model!r}: an adapter has that name. Give one of them another."
        )
    if settings.mode not in service.tokenizer.modes:
        names = ", ".join(service.tokenizer.modes)
        raise ValueError(f"mode={settings.mode!r}: this checkpoint's release has {names}.")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await run_in_threadpool(engine.stop)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/completions", service.complete, methods=["POST"]),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.model),
            Route("/health", service.health),
            Route("/metrics", service.read_metrics),
            Route("/", service.page),
        ],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientGoneError: _gone,
            Exception: _failure,
        },
        lifespan=lifespan,
    )
    app.add_middleware(_KeyGuard, service=service)
    app.state.service = service
    return app


def _event(value: object) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def _ignored(asked: Asked) -> dict[str, str]:
    """The header that names the fields which were not looked at."""
    names = [name for name in asked.ignored if name.isascii() and name.isidentifier()]
    text = ", ".join(names)[:_LONGEST_HEADER]
    return {"x-v4jax-ignored": text} if text else {}


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Of the routes: no such path, or no such method."""
    assert isinstance(error, HTTPException)
    path = shown(request.url.path)
    text = f"There is no {request.method} {path}. The paths are /v1/chat/completions, "
    text += "/v1/completions, /v1/models, /health, /metrics and /."
    response = ApiError(error.status_code, text).response()
    response.headers.update(error.headers or {})
    return response


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failure(request: Request, error: Exception) -> Response:
    return ApiError(500, "The server failed; its log says where.").response()
