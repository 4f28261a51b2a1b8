"""An OpenAI-compatible HTTP server on top of an engine. docs/serving.md is its guide.

app = make_app(engine, ServerSettings(model="nano"))
serve(app, bind("127.0.0.1", 8000), grace=30)
"""

try:
    import prometheus_client  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:  # pragma: no cover - depends on the installation
    raise ImportError(
        "The server needs starlette, uvicorn and prometheus-client: pip install 'v4jax[serve]'."
    ) from error

from v4jax.inference.server.app import make_app
from v4jax.inference.server.requests import ServerSettings
from v4jax.inference.server.run import bind, serve

__all__ = ["ServerSettings", "bind", "make_app", "serve"]
