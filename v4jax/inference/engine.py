"""The engine: a model that generates, for a notebook, a terminal or a file of requests.

    engine = Engine(v4jax.load(folder), v4jax.Tokenizer(folder))
    print(engine.generate("Emma was", Sampling(temperature=0.7)).text)
    print(engine.chat("Who is Emma?", mode="think-high").content)

Programs are compiled for a short list of shapes: a prompt is fed in chunks of `CHUNKS` tokens (the
last one padded), a batch is padded to one of `BATCHES` rows, and a cache's capacity to one of
`CAPACITIES`. Prompts of a batch may have different lengths, and each its own sampling.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sharding import DECODE, PREFILL
from v4jax.inference.sampling import Sampling
from v4jax.inference.steps import Slots, decode_step, prefill_step, request_rows
from v4jax.nn.cache import Cache, CacheFormat
from v4jax.nn.compilation import keep_programs
from v4jax.nn.model import Transformer
from v4jax.nn.placement import check_mesh, mesh_of, num_batch_parts, on_mesh, require_placed
from v4jax.text.parse import parse_partial_completion
from v4jax.text.prompt import with_bos
from v4jax.text.tokenizer import Tokenizer

CHUNKS = (128, 1024)
BATCHES = (1, 8, 32, 128, 512)
CAPACITIES = (4096, 32_768, 262_144, 1_048_576)
Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated for one prompt."""

    tokens: tuple[int, ...]  # the stop token included, if there was one
    finish_reason: str  # "stop" or "length"
    text: str | None = None  # without the stop token; None if the engine has no tokenizer


@dataclasses.dataclass(frozen=True)
class Reply:
    """An assistant's turn."""

    content: str
    reasoning: str
    tool_calls: list[dict]
    tokens: tuple[int, ...]
    finish_reason: str  # "stop" or "length"

    @property
    def message(self) -> dict:
        """The turn as a message, to be put behind the others."""
        message: dict[str, object] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message


class Engine:
    """A model's arrays and its compiled steps.

    Args:
      model: best built with `scan_layers=False` (as `v4jax.load` does): slices of stacked weights
        are copied in every step. If it lies on a mesh, the steps run there.
      tokenizer: for prompts that are texts, and for `chat`.
      cache: how rows are held, see `v4jax.nn.cache.CacheFormat`.
      chunks: numbers of tokens that prefill is compiled for, increasing. Under a mesh with a context
        axis, its multiples.

    Raises:
      ValueError: the mesh does not suit the model, its weights do not lie as the steps read them,
        or the tokenizer has ids that the model does not know.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        cache: CacheFormat = None,
        chunks: Sequence[int] = CHUNKS,
    ):
        keep_programs()
        self.cfg, self.tokenizer = model.cfg, tokenizer
        self.chunks = tuple(sorted(chunks))
        if tokenizer is not None and tokenizer.vocab_size > model.cfg.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model "
                f"vocab_size={model.cfg.vocab_size}: they do not belong together."
            )
        self._mesh = mesh_of(model)
        with self._on_mesh():
            check_mesh(model.cfg, DECODE)
            check_mesh(model.cfg, PREFILL, length=math.gcd(*self.chunks))
            _, params = nnx.split(model)
            require_placed(params, DECODE)
            self._batch_parts = num_batch_parts(DECODE)
            self._keys = jax.jit(jax.vmap(jax.random.key), out_shardings=self._by_row())
            self._init_cache = jax.jit(
                functools.partial(model.init_cache, format=cache),
                static_argnums=(0, 1),
                out_shardings=self._by_row(),
            )
            self.leaves = jax.tree.leaves(params)
            self._prefill, self._decode = prefill_step(model), decode_step(model)

    @overload  # a text is a sequence of texts too
    def generate(  # type: ignore[overload-overlap]
        self,
        prompts: str,
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        *,
        stop_ids: Sequence[int] | None = None,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        *,
        stop_ids: Sequence[int] | None = None,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        *,
        stop_ids: Sequence[int] | None = None,
    ) -> Completion | list[Completion]:
        """Completions of prompts: one of a text, a list of a list.

        Args:
          prompts: a text, a list of texts, or a list of lists of token ids. A text begins with BOS
            whether it says so or not.
          sampling: of all prompts, or one for each. Of several prompts with one sampling, the n-th
            draws with its seed plus n.
          stop_ids: ids that end a completion; default those of the tokenizer that end a turn, or the
            model's end-of-sentence id.

        Raises:
          ValueError: see `stream`.
        """
        several = [prompts] if isinstance(prompts, str) else prompts
        stops = self._stop_ids(stop_ids)
        steps = list(self.stream(several, sampling, stop_ids=stops))
        completions = []
        for row in np.stack(steps, axis=1) if steps else ():
            tokens = tuple(int(token) for token in row[row >= 0])
            is_stopped = bool(tokens) and tokens[-1] in stops
            text = None
            if self.tokenizer is not None:
                text = self.tokenizer.decode(tokens[:-1] if is_stopped else tokens)
            completions.append(Completion(tokens, "stop" if is_stopped else "length", text))
        return completions[0] if isinstance(prompts, str) else completions

    def chat(
        self,
        messages: str | Sequence[Mapping],
        mode: str = "non-think",
        sampling: Sampling = Sampling(),
        *,
        tools: Sequence[Mapping] | None = None,
    ) -> Reply:
        """The assistant's next turn.

        Args:
          messages: a text of the user, or messages as in docs/prompts.md.
          mode: "non-think", "think-high" or "think-max" (releases since 0731 also "think-low").
          tools: functions that the assistant may call.

        Raises:
          ValueError: there is no tokenizer, or messages or mode that cannot be rendered.
        """
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer: Engine(model, v4jax.Tokenizer(folder)).")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        prompt = self.tokenizer.render(messages, mode, tools=tools)
        (completion,) = self.generate([self.tokenizer.encode(prompt.text)], sampling)
        text = completion.text or ""
        message = parse_partial_completion(text, prompt.thinking_mode, is_complete=True)
        return Reply(
            message["content"],
            message.get("reasoning_content") or "",
            message.get("tool_calls") or [],
            completion.tokens,
            completion.finish_reason,
        )

    def stream(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        *,
        stop_ids: Sequence[int] | None = None,
    ) -> Iterator[np.ndarray]:
        """As `generate`, token by token. A row depends on its own prompt and sampling alone.

        Yields:
          [B] int32 per step: each row's token, or -1 once it has ended.

        Raises:
          ValueError: a prompt that is empty, has ids outside the vocabulary, or is too long for
            the model together with what it may generate.
        """
        prompts = self._ids(prompts)
        if not prompts:
            return
        requests, stops = self._requests(sampling, len(prompts)), self._stop_ids(stop_ids)
        previous, slots = self.step(self.fill(prompts, requests, stops))
        left = np.array([request.max_new_tokens for request in requests])
        ended = np.zeros(len(prompts), bool)
        for remaining in range(int(left.max()) - 1, -1, -1):
            if remaining:  # the next step is under way before this one's tokens are read
                following, slots = self.step(slots)
            tokens = np.asarray(previous)[: len(prompts)]
            left -= 1
            ended |= np.isin(tokens, stops) | (left <= 0)
            yield tokens
            if ended.all() or not remaining:
                return
            previous = following

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache with room for at least `capacity` tokens a sequence.

        Raises:
          ValueError: more than the model's max_length.
        """
        if capacity > self.cfg.max_length:
            raise ValueError(
                f"{capacity} tokens are more than max_length={self.cfg.max_length} of "
                f"{self.cfg.name}: shorten the prompt or generate fewer tokens."
            )
        with self._on_mesh():
            return self._init_cache(batch, min(_bucket(CAPACITIES, capacity), self.cfg.max_length))

    def prefill(self, prompts: Sequence[Sequence[int]], cache: Cache) -> tuple[Cache, jax.Array]:
        """Feeds token ids behind what the cache holds.

        Returns:
          the new cache and the logits [B, V] after each sequence's last token.

        Raises:
          ValueError: an empty prompt, an id outside the vocabulary, or another batch size.
          CacheFullError: the cache has no room; nothing was written.
        """
        prompts = self._ids(prompts)
        if len(prompts) != cache.lengths.shape[0]:
            raise ValueError(f"{len(prompts)} prompts for a cache of {cache.lengths.shape[0]}.")
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        cache.require_room(lengths)
        with self._on_mesh():
            shape = (len(prompts), self.cfg.vocab_size)
            logits = jnp.zeros(shape, jnp.float32, device=self._by_row())
            start = 0
            for size in self._chunk_sizes(int(lengths.max())):
                chunk = np.zeros((len(prompts), size), np.int32)
                for row, prompt in zip(chunk, prompts):
                    piece = prompt[start : start + size]
                    row[: len(piece)] = piece
                counts = np.clip(lengths - start, 0, size).astype(np.int32)
                cache, logits = self._prefill(self.leaves, chunk, counts, cache, logits)
                start += size
        return cache, logits

    def fill(self, prompts: list[list[int]], requests: list[Sampling], stop_ids) -> Slots:
        """Slots with prompts in the first rows; the others have one token and have ended."""
        rows = _bucket(BATCHES, -(-len(prompts) // self._batch_parts) * self._batch_parts)
        rows += -rows % self._batch_parts
        padding = rows - len(prompts)
        capacity = max(len(p) + r.max_new_tokens for p, r in zip(prompts, requests))
        requests = [*requests, *[Sampling(max_new_tokens=1)] * padding]
        sampling, seeds, limits, stops = request_rows(requests, stop_ids)
        cache = self.init_cache(rows, capacity)
        cache, logits = self.prefill([*prompts, *[[0]] * padding], cache)
        done = np.arange(rows) >= len(prompts)
        with self._on_mesh():
            place = functools.partial(jnp.asarray, device=self._by_row())
            steps = place(np.zeros(rows, np.int32))
            sampling, limits, stops, done = jax.tree.map(place, (sampling, limits, stops, done))
            return Slots(cache, logits, self._keys(seeds), steps, limits, stops, done, sampling)

    def step(self, slots: Slots) -> tuple[jax.Array, Slots]:
        """One more token of each row [B], -1 if it has ended, and the new slots; donates the old."""
        with self._on_mesh():
            return self._decode(self.leaves, slots)

    def _chunk_sizes(self, length: int) -> Iterator[int]:
        """Largest chunks first; what is left goes into the smallest that holds it."""
        while length > 0:
            size = next((c for c in self.chunks if c >= length), self.chunks[-1])
            smaller = [c for c in self.chunks if c <= length]
            # A padded chunk must not cost more than the chunks it replaces.
            if smaller and size > 2 * length:
                size = smaller[-1]
            yield size
            length -= size

    def _ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of prompts, checked."""
        if isinstance(prompts, str):
            raise ValueError(  # noqa: TRY004 - as other wrong prompts
                f"prompts={prompts[:40]!r}: expected a list of prompts."
            )
        checked = []
        for number, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                if self.tokenizer is None:
                    raise ValueError(
                        f"prompt {number} is a text: expected token ids, or an engine with a "
                        "tokenizer: Engine(model, v4jax.Tokenizer(folder))."
                    )
                prompt = self.tokenizer.encode(with_bos(prompt))
            ids = np.asarray(prompt)
            if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
                raise ValueError(
                    f"prompt {number} is {str(prompt)[:40]}: expected a list of token ids; prompts "
                    "are a list of such lists."
                )
            if not ids.size:
                raise ValueError(f"prompt {number} is empty: it needs a token.")
            if ids.min() < 0 or ids.max() >= self.cfg.vocab_size:
                raise ValueError(
                    f"prompt {number} has token ids in {ids.min()}..{ids.max()}: expected "
                    f"0..{self.cfg.vocab_size - 1}."
                )
            checked.append(ids.tolist())
        return checked

    def _requests(self, sampling, count: int) -> list[Sampling]:
        if isinstance(sampling, Sampling):
            seeds = [(sampling.seed + n) % 2**32 for n in range(count)]
            return [dataclasses.replace(sampling, seed=seed) for seed in seeds]
        if len(sampling) != count:
            raise ValueError(f"{len(sampling)} samplings for {count} prompts.")
        return list(sampling)

    def _stop_ids(self, given: Sequence[int] | None) -> tuple[int, ...]:
        if given is not None:
            return tuple(int(token) for token in given)
        return (self.cfg.eos_id,) if self.tokenizer is None else tuple(self.tokenizer.stop_ids)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return on_mesh(self._mesh)

    def _by_row(self) -> jax.NamedSharding | None:
        """Where arrays [B, ...] lie; None without a mesh."""
        return None if self._mesh is None else jax.NamedSharding(self._mesh, DECODE.spec("batch"))


def _bucket(sizes: Sequence[int], needed: int) -> int:
    """The smallest size that is enough; a multiple of the largest beyond."""
    return next((n for n in sizes if n >= needed), -(-needed // sizes[-1]) * sizes[-1])
