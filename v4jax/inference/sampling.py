"""How the next token is drawn from logits, for every row of a batch in its own way.

The released models are meant to be sampled at temperature 1 and top-p 1 in every mode
(`generation_config.json`), which is `Sampling()`.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.text.format import shown

# Below this a draw is the most likely token in any case; float32 holds logits divided by it.
COLDEST = 1e-5
_SMALLEST_TOP_P = 1e-6  # keeps one token, as anything smaller would: no vocabulary has a million
_HOTTEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request is sampled. Options go together: each takes away from what is left.

    Args:
      temperature: logits are divided by it; 0 (or nearly) means the most likely token.
      top_k: only the k most likely tokens.
      top_p: only the fewest most likely tokens whose probabilities reach it together.
      min_p: only tokens at least this many times as likely as the most likely one.
      seed: of this request's draws, which depend on nothing else.
      max_new_tokens: after which the request ends.

    Raises:
      ValueError: a value of the wrong type or out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    max_new_tokens: int = 256

    def __post_init__(self):
        def require(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"{name}={shown(getattr(self, name))}: expected {expected}.")

        number = _is_number(self.temperature) and 0 <= self.temperature <= _HOTTEST
        require("temperature", number, "a number from 0 on that float32 has")
        count = self.top_k is None or (_is_integer(self.top_k) and 1 <= self.top_k < 2**31)
        require("top_k", count, "a positive integer")
        share = self.top_p is None or (_is_number(self.top_p) and 0 < self.top_p <= 1)
        require("top_p", share, "a number in (0, 1]")
        ratio = self.min_p is None or (_is_number(self.min_p) and 0 <= self.min_p <= 1)
        require("min_p", ratio, "a number in [0, 1]")
        require(
            "seed",
            _is_integer(self.seed) and 0 <= self.seed < 2**32,
            f"an integer in 0..{2**32 - 1}",
        )
        length = _is_integer(self.max_new_tokens) and 1 <= self.max_new_tokens < 2**31
        require("max_new_tokens", length, "a positive integer")


def _is_number(value) -> bool:
    is_number = isinstance(value, int | float | np.floating | np.integer)
    return is_number and not isinstance(value, bool)


def _is_integer(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "min_p"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """The options of every row of a batch, as arrays [B]: a new value is no new program."""

    temperature: jax.Array | np.ndarray  # float32; 0: greedy
    top_k: jax.Array | np.ndarray  # int32; 2**31 - 1: all
    top_p: jax.Array | np.ndarray  # float32; 1: all
    min_p: jax.Array | np.ndarray  # float32; 0: all

    @classmethod
    def of(cls, requests: Sequence[Sampling]) -> "SamplingRows":
        """NumPy arrays, one element a request."""

        def column(values, dtype) -> np.ndarray:
            return np.array(list(values), dtype)

        return cls(
            column((0 if r.temperature < COLDEST else r.temperature for r in requests), np.float32),
            column((r.top_k or 2**31 - 1 for r in requests), np.int32),
            column((max(r.top_p or 1, _SMALLEST_TOP_P) for r in requests), np.float32),
            column((r.min_p or 0 for r in requests), np.float32),
        )


def sample(logits: jax.Array, keys: jax.Array, rows: SamplingRows) -> jax.Array:
    """Logits [B, V] float32 and a random key a row -> token ids [B] int32.

    The lowest id wins among equals where a row is greedy. Rows are sorted only if one of them
    restricts the tokens it draws from.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    vocab = logits.shape[-1]

    def restricted() -> jax.Array:
        ids = jnp.argsort(-scaled, axis=-1)  # stable: the lowest id first among equals
        ordered = jnp.take_along_axis(scaled, ids, axis=-1)
        ordered = jnp.where(jnp.arange(vocab) < rows.top_k[:, None], ordered, -jnp.inf)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # mass of the tokens ahead; of the first, none
        kept = (before < rows.top_p[:, None]) & (probs >= rows.min_p[:, None] * probs[:, :1])
        kept = kept.at[:, 0].set(True) & (ordered > -jnp.inf)
        kept = jnp.take_along_axis(kept, jnp.argsort(ids, axis=-1), axis=-1)  # by token id again
        return jnp.where(kept | ~restricts[:, None], scaled, -jnp.inf)

    restricts = (rows.temperature > 0) & (
        (rows.top_k < vocab) | (rows.top_p < 1) | (rows.min_p > 0)
    )
    # Noise belongs to a token id, sorted or not: a row's draw does not depend on the other rows.
    left = jax.lax.cond(jnp.any(restricts), restricted, lambda: scaled)
    drawn = jax.vmap(jax.random.categorical)(keys, left).astype(jnp.int32)
    return jnp.where(rows.temperature > 0, drawn, best)
