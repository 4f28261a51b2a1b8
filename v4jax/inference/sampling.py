"""How the next token is drawn from logits, for every row of a batch in its own way.

The released models are meant to be sampled at temperature 1 and top-p 1 in every mode
(`generation_config.json`), which is `Sampling()`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt32

from pallas_kernels import signatures
from v4jax.text.format import shown

# Below this a draw is the most likely token in any case; float32 holds logits divided by it.
COLDEST = 1e-5
_SMALLEST_TOP_P = 1e-6  # keeps one token, as anything smaller would: no vocabulary has a million
EVERYTHING = np.uint32(2**32 - 1)  # a word of a mask that allows all its tokens
TOP = 20  # tokens whose log-probabilities a request may ask for
_HOTTEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request is sampled. Options go together: each takes away from what is left.

    Args:
      temperature: logits are divided by it; 0 (or nearly) means the most likely token.
      top_k: only the k most likely tokens.
      top_p: only the fewest most likely tokens whose probabilities reach it together.
      min_p: only tokens at least this many times as likely as the most likely one.
      repetition_penalty: what a token that the prompt or the answer has is made less likely by:
        positive logits are divided by it, negative ones multiplied (1: nothing).
      presence_penalty: taken from the logit of a token that the answer has.
      frequency_penalty: taken from it once for every time that the answer has it.
      logit_bias: added to the logits of token ids.
      logprobs: how many of the likeliest tokens' log-probabilities come with every token, besides its
        own (0: its own alone). Those of the model, before all options of this class.
      seed: of this request's draws, which depend on nothing else.
      max_new_tokens: after which the request ends.

    Raises:
      ValueError: a value of the wrong type or out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    logprobs: int | None = None
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
        ratio = _is_number(self.repetition_penalty) and 0 < self.repetition_penalty <= 100
        require("repetition_penalty", ratio, "a number in (0, 100]")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(name, _is_number(value) and -100 <= value <= 100, "a number in -100..100")
        biases = isinstance(self.logit_bias, Mapping) and all(
            _is_integer(token) and token >= 0 and _is_number(value) and -1e4 <= value <= 1e4
            for token, value in self.logit_bias.items()
        )
        require("logit_bias", biases, "token ids with numbers in -10000..10000")
        few = self.logprobs is None or (_is_integer(self.logprobs) and 0 <= self.logprobs <= TOP)
        require("logprobs", few, f"an integer in 0..{TOP}")
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
    data_fields=[
        *("temperature", "top_k", "top_p", "min_p"),
        *("repetition", "presence", "frequency", "bias", "in_prompt", "wants_logprobs"),
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """The options of every row of a batch, as arrays: a new value is no new program."""

    temperature: jax.Array | np.ndarray  # [B] float32; 0: greedy
    top_k: jax.Array | np.ndarray  # [B] int32; 2**31 - 1: all
    top_p: jax.Array | np.ndarray  # [B] float32; 1: all
    min_p: jax.Array | np.ndarray  # [B] float32; 0: all
    repetition: jax.Array | np.ndarray  # [B] float32; 1: nothing
    presence: jax.Array | np.ndarray  # [B] float32
    frequency: jax.Array | np.ndarray  # [B] float32
    bias: jax.Array | np.ndarray  # [B, V] float32
    in_prompt: jax.Array | np.ndarray  # [B, V] bool: tokens of the prompt, for `repetition`
    wants_logprobs: jax.Array | np.ndarray  # [B] bool

    @classmethod
    def of(
        cls, requests: Sequence[Sampling], vocab: int, prompts: Sequence[Sequence[int]] = ()
    ) -> "SamplingRows":
        """NumPy arrays, one row a request with its prompt (default: all are empty)."""

        def column(values, dtype) -> np.ndarray:
            return np.array(list(values), dtype)

        bias = np.zeros((len(requests), vocab), np.float32)
        in_prompt = np.zeros((len(requests), vocab), bool)
        prompts = prompts or [()] * len(requests)
        for row, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            bias[row, list(request.logit_bias)] = list(request.logit_bias.values())
            if request.repetition_penalty != 1:
                in_prompt[row, prompt] = True
        return cls(
            column((0 if r.temperature < COLDEST else r.temperature for r in requests), np.float32),
            column((r.top_k or 2**31 - 1 for r in requests), np.int32),
            column((max(r.top_p or 1, _SMALLEST_TOP_P) for r in requests), np.float32),
            column((r.min_p or 0 for r in requests), np.float32),
            column((r.repetition_penalty for r in requests), np.float32),
            column((r.presence_penalty for r in requests), np.float32),
            column((r.frequency_penalty for r in requests), np.float32),
            bias,
            in_prompt,
            column((r.logprobs is not None for r in requests), bool),
        )


@signatures.shaped
def penalised(
    logits: Float32[jax.Array, "B V"], counts: Int32[jax.Array, "B V"], rows: SamplingRows
) -> Float32[jax.Array, "B V"]:
    """Logits with bias and penalties, for answers in which tokens occur `counts` times."""

    def changed() -> jax.Array:
        new = logits + rows.bias
        ratio = rows.repetition[:, None]
        divided = jnp.where(new > 0, new / ratio, new * ratio)
        new = jnp.where(rows.in_prompt | (counts > 0), divided, new)
        new -= rows.presence[:, None] * (counts > 0)
        return new - rows.frequency[:, None] * counts

    plain = (rows.repetition == 1) & (rows.presence == 0) & (rows.frequency == 0)
    is_plain = plain & jnp.all(rows.bias == 0, axis=-1)
    return jax.lax.cond(
        jnp.all(is_plain),
        lambda: logits,
        lambda: jnp.where(is_plain[:, None], logits, changed()),
    )


def num_words(vocab: int) -> int:
    """Words of a mask of so many tokens."""
    return -(-vocab // 32)


@signatures.shaped
def masked(
    logits: Float32[jax.Array, "B V"],
    allowed: UInt32[jax.Array, "B words"],  # of 32 tokens each
) -> Float32[jax.Array, "B V"]:
    """Logits, -inf where `allowed` has no bit: of token i, bit i % 32 of word i // 32.

    Nothing is computed where every row allows everything.
    """

    def some() -> jax.Array:
        bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        bits = bits.reshape(len(allowed), -1)[:, : logits.shape[1]]
        return jnp.where(bits > 0, logits, -jnp.inf)

    return jax.lax.cond(jnp.any(allowed != EVERYTHING), some, lambda: logits)


@signatures.shaped
def log_probabilities(
    logits: Float32[jax.Array, "B V"],
    tokens: Int32[jax.Array, " B"],
    wanted: Bool[jax.Array, " B"],
) -> tuple[Float32[jax.Array, " B"], Int32[jax.Array, "B top"], Float32[jax.Array, "B top"]]:
    """Of the tokens, and the `TOP` likeliest ids with theirs.

    Zeros where no row wants any.
    """
    top = min(TOP, logits.shape[-1])

    def some():
        log_p = jax.nn.log_softmax(logits, axis=-1)
        own = jnp.take_along_axis(log_p, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
        likeliest, ids = jax.lax.top_k(log_p, top)
        return own, ids.astype(jnp.int32), likeliest

    def none():
        batch = logits.shape[0]
        return jnp.zeros(batch), jnp.zeros((batch, top), jnp.int32), jnp.zeros((batch, top))

    return jax.lax.cond(jnp.any(wanted), some, none)


@signatures.shaped
def sample(
    logits: Float32[jax.Array, "B V"], keys: jax.Array, rows: SamplingRows
) -> Int32[jax.Array, " B"]:
    """Token ids, drawn with a random key a row.

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
