"""Whether a model with its weights computes the right thing on this machine: the checks of `v4jax verify`.

| check       | what has to hold                                                                      |
|-------------|---------------------------------------------------------------------------------------|
| tokenizer   | texts come back from their ids, special tokens are single ids                         |
| prompts     | conversations become the released texts, and those the special ids                    |
| prefill     | a prompt fed in chunks gives the logits of the whole sequence without a cache         |
| decode      | so do its last tokens, one at a time                                                  |
| batch       | greedy tokens of a request do not depend on what else is in the batch                 |
| perplexity  | the same tokens are not worse predicted with more context, and far better than chance |
| vectors     | greedy completions are those of a file, if there is one                               |

Prefill and decode say that this installation agrees with itself, perplexity that what it computes makes
sense of text, vectors that it agrees with another implementation.

**Tolerances.** The difference of two logits [V] is the largest one of their values, over the largest
magnitude among them. `LOGITS` says how much it may be, by numerics and dtype. Chunks sum in another
order than whole sequences. In plain float32 nothing else differs (1e-6 to 1e-5). In bfloat16 every layer
rounds what differs by one sum to neighbours 0.4 % apart; and `released` numerics round it to FP8 and FP4,
where neighbours are 6 % and more apart, in float32 too, and an indexer's choice may then fall on another
entry. The likeliest token has to agree as well, unless the lead that one of both gives it is within the
bound. On nano's prompt of 381 tokens the largest differences are 9e-7 (plain, float32), 8e-7 (released,
float32), 5e-3 (plain, bfloat16) and 5e-2 (released, bfloat16); models of more layers come nearer to the
bounds.

Perplexity may rise by `MAX_RISE` from a context to the next longer one. `nano` was trained on 512 tokens
at a time and does get worse at 32,768: `MAX_RISES` has its own.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from sharding import PREFILL
from v4jax.config import HCA, V4Config
from v4jax.inference.engine import CACHE_TOKENS, CHUNKS, Engine
from v4jax.inference.feeding import Feeder
from v4jax.inference.findings import SKIPPED, Finding, Row, run_check
from v4jax.inference.sampling import Sampling
from v4jax.inference.steps import losses_step, whole_step
from v4jax.inference.verify_text import Vector, check_prompts, check_tokenizer
from v4jax.nn.cache import Cache, CacheFormat
from v4jax.nn.model import Transformer
from v4jax.nn.placement import mesh_of, num_batch_parts, on_mesh
from v4jax.text.format import BOS
from v4jax.text.tokenizer import Tokenizer

TEXT = pathlib.Path(__file__).parents[1] / "assets" / "text" / "mansfield_park.txt"
LENGTHS = (2048, 8192, 32_768)  # tokens of context for perplexity
MAX_PROMPT = 4608  # tokens, of the prompt that prefill and decode are compared on
LEAST_PROMPT = 256

LOGITS = {  # largest difference, over the largest magnitude
    ("plain", "float32"): 2e-3,
    ("plain", "bfloat16"): 0.05,
    ("released", "float32"): 0.1,
    ("released", "bfloat16"): 0.15,
}
SLOTS = 8  # of the engine
DECODED = 8  # tokens of the prompt that are fed one at a time
GENERATED = 16  # tokens of the requests that run alone and together
SCORED = 512  # tokens whose perplexity is taken
MAX_RISE = 0.05  # of perplexity, from a context to the next longer one
MAX_RISES = {"nano": 0.4}  # by name of the model


def prompt_length(cfg: V4Config, most: int = MAX_PROMPT) -> int:
    """Tokens of the prompt of prefill and decode, an odd number.

    More than the window, and more than indexers select (`ratio * topk`), so that they have to choose; ends
    shortly before an entry of 128 tokens is complete, which the decoded tokens then are the last of.
    """
    picked = [spec.ratio * spec.indexer.topk for spec in cfg.layers if spec.indexer]
    needed = max(cfg.window, *picked, HCA.ratio)
    room = min(most, cfg.max_length - DECODED)
    periods = min(-(-needed // HCA.ratio) + 1, (room - (HCA.ratio - 3)) // HCA.ratio)
    return periods * HCA.ratio + HCA.ratio - 3 if periods >= 0 else (room - 1) | 1


@dataclasses.dataclass(frozen=True)
class Options:
    """What is checked.

    Attributes:
      lengths: tokens of context for perplexity, increasing.
      length: the prompt of prefill and decode is no longer than this.
      vectors: greedy completions to compare with.
      text: the file that prompts and perplexity are taken from.
    """

    lengths: Sequence[int] = LENGTHS
    length: int = MAX_PROMPT
    vectors: Sequence[Vector] = ()
    text: pathlib.Path = TEXT

    def __post_init__(self):
        if self.length < LEAST_PROMPT:
            raise ValueError(f"length={self.length}: expected at least {LEAST_PROMPT} tokens.")
        if not self.lengths or min(self.lengths) <= SCORED:
            raise ValueError(
                f"lengths={','.join(map(str, self.lengths))}: expected numbers of tokens above "
                f"{SCORED}, such as {','.join(map(str, LENGTHS))}."
            )


def needed_room(cfg: V4Config, options: Options) -> tuple[int, int]:
    """(tokens a sequence, sequences) of the largest cache that the checks need."""
    longest = [n for n in options.lengths if n <= cfg.max_length]
    longest += [len(vector.prompt) + len(vector.tokens) for vector in options.vectors]
    prompt = prompt_length(cfg, options.length) + GENERATED
    needed = max(CACHE_TOKENS, prompt, *(-(-n // SLOTS) for n in longest))
    return min(needed, cfg.max_length), SLOTS


def verify(
    model: Transformer,
    tokenizer: Tokenizer,
    options: Options = Options(),
    *,
    cache: CacheFormat = None,
) -> Iterator[Row]:
    """Runs the checks, and gives each row when it is there.

    Raises:
      ValueError: the model lies on its mesh otherwise than an engine needs it.
    """
    yield run_check("tokenizer", check_tokenizer, tokenizer, model.cfg)
    yield run_check("prompts", check_prompts, tokenizer)
    checks = Checks(model, tokenizer, options, cache)
    yield run_check("prefill", checks.prefill)
    yield run_check("decode", checks.decode)
    yield run_check("batch", checks.batch)
    for length in sorted(set(options.lengths)):
        yield run_check(f"perplexity {length}", checks.perplexity, length)
    for vector in options.vectors:
        yield run_check(f"vectors line {vector.line}", checks.vector, vector)
    if options.vectors:
        yield run_check("vectors", checks.all_vectors)


class Checks:
    """The checks that run the model. They share its programs and some results."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, options: Options, cache: CacheFormat
    ):
        self.model, self.cfg, self.options = model, model.cfg, options
        self.engine, self.feeder = (
            Engine(model, slots=SLOTS, cache=cache),
            Feeder(model, cache=cache),
        )
        self.bound = LOGITS[model.numerics.name, str(model.numerics.dtype)]
        text = options.text.read_text(encoding="utf-8")
        self.bos, self.text = tokenizer.encode(BOS), tokenizer.encode(text)
        most = min(options.length, len(self.text) - DECODED)
        self.length = prompt_length(self.cfg, most)
        self.tokens = [*self.bos, *self.text][: self.length + DECODED]
        with on_mesh(mesh_of(model)):
            self._rows = num_batch_parts(PREFILL)
        self._perplexities: dict[int, float] = {}
        self._matches: dict[int, float] = {}

    @functools.cached_property
    def whole(self) -> np.ndarray:
        """Logits [DECODED + 1, V] after the last tokens of the prompt: one pass without a cache."""
        padded = np.zeros((self._rows, -(-len(self.tokens) // HCA.ratio) * HCA.ratio), np.int32)
        padded[:, : len(self.tokens)] = self.tokens  # causal: padding changes nothing
        first = np.full(self._rows, self.length - 1, np.int32)
        with on_mesh(mesh_of(self.model)):
            step = whole_step(self.model, DECODED + 1)
            return np.array(step(self.feeder.leaves, padded, first))[0]

    def prefill(self) -> Finding:
        """The prompt in the engine's chunks, and cut at an odd place as well."""
        cut = self.length // 3 | 1
        logits = [
            self._fed([self.tokens[: self.length]]),
            self._fed([self.tokens[:cut], self.tokens[cut:]]),
        ]
        return self._compared(logits, self.whole[[0, DECODED]], "in chunks", "whole")

    def decode(self) -> Finding:
        """The last tokens of the prompt one at a time, as decoding feeds them."""
        cache = self.feeder.init_cache(self._rows, len(self.tokens))
        cache, _ = self._feed(self.tokens[: self.length], cache)
        logits = []
        for token in self.tokens[self.length :]:
            cache, found = self.feeder.feed([[token]] * self._rows, cache, chunk=1)
            logits.append(np.array(found)[0])
        return self._compared(logits, self.whole[1:], "decoded", "whole")

    def batch(self) -> Finding:
        """Greedy tokens of requests alone, and in one batch with others of other lengths."""
        pieces = (self.tokens[: self.length], self.text[700:707], self.text[1000:1150])
        prompts = [list(piece) for piece in pieces if len(piece)]
        greedy = Sampling(temperature=0, max_new_tokens=GENERATED)
        together = self.engine.generate(prompts, greedy, stop_ids=[])
        problems, equal, ties = [], 0, 0
        for prompt, both in zip(prompts, together):
            (alone,) = self.engine.generate([prompt], greedy, stop_ids=[])
            same = _common(alone.tokens, both.tokens)
            equal += same == GENERATED
            if same == GENERATED:
                continue
            ours, theirs = alone.tokens[same], both.tokens[same]
            lead = self._lead([*prompt, *alone.tokens[:same]], ours, theirs)
            if lead <= self.bound:
                ties += 1
                continue
            problems.append(
                f"prompt of {len(prompt)} tokens: token {same} is {ours} alone and {theirs} in the "
                f"batch, though the first leads by {lead:.1e}"
            )
        note = f"{ties} part where two tokens are within {self.bound:g}" if ties else ""
        figure = f"{equal} of {len(prompts)} requests equal"
        return Finding.of(problems, figure, note, equal=equal, requests=len(prompts))

    def perplexity(self, length: int) -> Finding:
        """Of the text's last tokens, after BOS and as much of the text before them as `length` says."""
        if length > self.cfg.max_length:
            return Finding(SKIPPED, reason=f"max_length={self.cfg.max_length}")
        if length > len(self.text):
            return Finding(SKIPPED, reason=f"the text has {len(self.text)} tokens")
        inputs = [*self.bos, *self.text[-length:-1]]
        losses = self._losses(inputs[:-SCORED], inputs[-SCORED:], self.text[-SCORED:])
        found = float(np.exp(losses.mean()))
        shorter = max(self._perplexities, default=None)
        before = None if shorter is None else self._perplexities[shorter]
        self._perplexities[length] = found
        problems, limit = [], math.sqrt(self.cfg.vocab_size)
        if not found <= limit:
            problems.append(
                f"expected at most {limit:.1f}, half the bits of a guess among all tokens"
            )
        rise = MAX_RISES.get(self.cfg.name, MAX_RISE)
        if before is not None and not found <= before * (1 + rise):
            problems.append(
                f"more than {rise:.0%} above the {before:.3f} at {shorter} tokens: more context should "
                "help, unless the model was trained on short sequences"
            )
        note = f"of the same {SCORED} tokens"
        return Finding.of(problems, f"{found:.3f}", note, perplexity=found, tokens=SCORED)

    def vector(self, vector: Vector) -> Finding:
        """How much of a completion is what the file says."""
        greedy = Sampling(temperature=0, max_new_tokens=len(vector.tokens))
        (completion,) = self.engine.generate([vector.prompt], greedy, stop_ids=[])
        same, count = _common(completion.tokens, vector.tokens), len(vector.tokens)
        self._matches[vector.line] = same / count
        problems = []
        if same < count:
            ours, theirs = completion.tokens[same], vector.tokens[same]
            lead = self._lead([*vector.prompt, *vector.tokens[:same]], ours, theirs)
            problems.append(
                f"token {same} is {ours}, expected {theirs}; it leads by {lead:.1e} of the largest "
                "logit"
            )
        return Finding.of(problems, f"{same} of {count} tokens", common=same, tokens=count)

    def all_vectors(self) -> Finding:
        """The share of each completion before it differs, over all of the file."""
        shares = [self._matches.get(vector.line, 0.0) for vector in self.options.vectors]
        figure = f"min {min(shares):.1%}, mean {np.mean(shares):.1%}"
        differ = sum(share < 1 for share in shares)
        problems = [f"{differ} of {len(shares)} completions differ"] if differ else []
        return Finding.of(problems, figure, min=min(shares), mean=float(np.mean(shares)))

    def _fed(self, pieces: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits [V] after pieces of one sequence."""
        cache = self.feeder.init_cache(self._rows, sum(map(len, pieces)))
        for piece in pieces:
            cache, logits = self._feed(piece, cache)
        return np.array(logits)[0]

    def _feed(self, piece: Sequence[int], cache: Cache) -> tuple[Cache, jax.Array]:
        """A piece behind what is there, in the engine's chunks."""
        chunk = next((size for size in CHUNKS if size >= len(piece)), CHUNKS[-1])
        return self.feeder.feed([piece] * self._rows, cache, chunk=chunk)

    def _losses(self, before: list[int], tokens: list[int], following: list[int]) -> np.ndarray:
        """-log p [T] of what follows each of `tokens`, after what was before them."""
        longest = max(
            n for n in self.options.lengths if n <= min(len(self.text), self.cfg.max_length)
        )
        cache = self.feeder.init_cache(self._rows, longest)  # of one size: one program
        cache, _ = self._feed(before, cache)
        chunks = [np.array([ids] * self._rows, np.int32) for ids in (tokens, following)]
        with on_mesh(mesh_of(self.model)):
            return np.array(self._losses_step(self.feeder.leaves, *chunks, cache), np.float64)[0]

    @functools.cached_property
    def _losses_step(self) -> Callable:
        return losses_step(self.model)

    def _lead(self, tokens: list[int], first: int, second: int) -> float:
        """How far one next token is before another, over the largest logit."""
        logits = self._fed([tokens])
        return float((logits[first] - logits[second]) / np.abs(logits).max())

    def _compared(self, found, expected, one: str, other: str) -> Finding:
        """Two lists of logits [V], see the tolerances above."""
        problems, largest, agree = [], 0.0, 0
        for position, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            scale = np.abs(theirs).max()
            difference = float(np.abs(ours - theirs).max() / scale)
            largest = math.nan if math.isnan(difference) else max(largest, difference)
            a, b = int(ours.argmax()), int(theirs.argmax())
            agree += a == b
            lead = min(ours[a] - ours[b], theirs[b] - theirs[a]) / scale
            if a != b and not lead <= self.bound:
                problems.append(f"position {position}: {a} is likeliest {one}, {b} {other}")
        if not largest <= self.bound:
            problems.insert(0, f"expected at most {self.bound:g}")
        figure = f"{largest:.1e}, {agree} of {len(expected)} likeliest equal"
        note = f"{self.length} tokens; at most {self.bound:g}"
        return Finding.of(
            problems, figure, note, difference=largest, bound=self.bound, tokens=self.length
        )


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    pairs = zip(first, second)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
