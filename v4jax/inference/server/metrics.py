"""What Prometheus reads from `/metrics`."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from v4jax.inference.server.protocol import EngineLike, RequestLike

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
_GAUGES = {
    "queued": ("requests_queued", "Requests that wait for a slot"),
    "running": ("requests_running", "Requests in a slot"),
    "slots": ("slots", "Requests that can run together"),
    "pages": ("pages", "Pages of the cache"),
    "pages_used": ("pages_used", "Pages of the cache that are taken"),
}
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts, cached ones included"),
    "cached_tokens": ("prefix_hit_tokens", "Tokens of prompts that were in the cache"),
    "generated_tokens": ("generated_tokens", "Tokens generated"),
    "preemptions": ("preemptions", "Requests that had to leave their slot for a while"),
    "steps": ("steps", "Steps of the engine"),
}


class Metrics:
    """Counts of an engine and times of requests.

    Args:
      engine: asked whenever the metrics are read.
    """

    def __init__(self, engine: EngineLike):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self._outcomes = Counter(
            *("v4jax_requests", "Choices that have ended, by how"),
            ["outcome"],
            registry=self._registry,
        )
        self._first = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token", _SECONDS
        )
        self._gap = self._histogram(
            "time_between_tokens_seconds", "From one token to the next", _GAPS
        )
        self._whole = self._histogram("request_seconds", "From arrival to the end", _SECONDS)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"v4jax_{name}", text, buckets=buckets, registry=self._registry)

    def tokens(self, count: int, seconds: float) -> None:
        """So many tokens of a request came, so long after the one before."""
        for _ in range(count):
            self._gap.observe(seconds / count)

    def ended(self, request: RequestLike, outcome: str, now: float) -> None:
        """A choice has ended: "stop", "length", "tool_calls", "cancelled" or "error"."""
        self._outcomes.labels(outcome).inc()
        if request.first_token_at is not None:
            self._first.observe(request.first_token_at - request.submitted_at)
        self._whole.observe(now - request.submitted_at)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine: EngineLike):
        self._engine = engine

    def describe(self) -> list[Metric]:
        return []  # so that registering does not ask the engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for field, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"v4jax_{name}", text, value=getattr(stats, field))
        for field, (name, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"v4jax_{name}", text, value=getattr(stats, field))
