"""How the next token is drawn from logits: small frozen strategies with one method.

The released models are meant to be sampled at temperature 1 and top-p 1 in every mode
(`generation_config.json`), which is `Temperature()`.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Sampler(Protocol):
    """Hashable, so that a compiled step can depend on it."""

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """logits [V] float32 and a random key -> a token id, int32 scalar."""


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token; the lowest id among equals."""

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """See `Sampler`."""
        del key
        return jnp.argmax(logits).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """A draw from softmax(logits / temperature)."""

    temperature: float = 1.0

    def __post_init__(self):
        _require_positive("temperature", self.temperature)

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """See `Sampler`."""
        return jax.random.categorical(key, logits / self.temperature).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class TopK:
    """A draw among the k most likely tokens."""

    k: int
    temperature: float = 1.0

    def __post_init__(self):
        _require_positive("k", self.k)
        _require_positive("temperature", self.temperature)

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """See `Sampler`."""
        top, ids = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))
        return ids[jax.random.categorical(key, top / self.temperature)].astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class TopP:
    """A draw among the fewest most likely tokens whose probabilities reach `p` together."""

    p: float
    temperature: float = 1.0

    def __post_init__(self):
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p}: expected a probability in (0, 1].")
        _require_positive("temperature", self.temperature)

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """See `Sampler`."""
        ids = jnp.argsort(-logits)
        ordered = logits[ids] / self.temperature
        probs = jax.nn.softmax(ordered)
        before = jnp.cumsum(probs) - probs  # mass of the tokens ahead: the first one has none
        ordered = jnp.where(before < self.p, ordered, -jnp.inf)
        return ids[jax.random.categorical(key, ordered)].astype(jnp.int32)


def sampler_of(
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Sampler:
    """The strategy that these options of a program or a request describe.

    Args:
      temperature: 0 means greedy, with or without `top_k` or `top_p`.

    Raises:
      ValueError: both `top_k` and `top_p`, or a value that the strategy refuses.
    """
    if top_k is not None and top_p is not None:
        raise ValueError(f"{top_k=} and {top_p=} exclude each other: give one of them.")
    if temperature == 0:
        return Greedy()
    if top_k is not None:
        return TopK(top_k, temperature)
    if top_p is not None:
        return TopP(top_p, temperature)
    return Temperature(temperature)


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}={value}: expected a positive number.")
