"""Text generation: prefill in chunks, decode token by token, stream what comes out.

Programs are compiled for a short list of shapes: a prompt is fed in chunks of `CHUNKS` tokens (the
last one padded), and a cache's capacity is rounded up to a power of two. Prompts of a batch may
have different lengths.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sharding import DECODE, PREFILL, AxisRules, collectives
from v4jax.inference.sampling import Greedy, Sampler
from v4jax.nn.cache import Cache, CacheFormat
from v4jax.nn.model import Transformer
from v4jax.nn.placement import check_mesh, num_batch_parts, specs

CHUNKS = (16, 128, 1024)
MIN_CAPACITY = 256


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated for one prompt."""

    tokens: tuple[int, ...]  # the stop token included, if there was one
    finish_reason: str  # "stop" or "length"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "logits", "keys", "done", "steps"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch that is being generated."""

    cache: Cache
    logits: jax.Array  # [B, V] of the next token
    keys: jax.Array  # [B] random keys, one per sequence
    done: jax.Array  # [B] bool
    steps: jax.Array  # [] int32 tokens generated so far


def prefill_step(model: Transformer, rules: AxisRules = PREFILL) -> Callable:
    """Compiled on first use: (leaves, tokens [B, T], counts [B], cache, logits [B, V]) -> cache, logits.

    `leaves` are those of the model's parameters; cache and logits are donated. Rows without a token
    in the chunk keep their logits.
    """
    merged, leaf_specs = _parameters(model, rules)
    rows = rules.spec("batch")

    def on_device(leaves, tokens, counts, cache, logits):
        model = merged(leaves)
        streams, cache = model.extend(tokens, counts, cache)
        last = collectives.row_at(streams, jnp.maximum(counts - 1, 0), "seq")
        new = model.logits(model.hidden(last[:, None]))[:, 0]
        return cache, jnp.where((counts > 0)[:, None], new, logits)

    step = collectives.per_device(
        on_device, rules, (leaf_specs, rules.tokens, rows, rows, rows), (rows, rows)
    )
    return jax.jit(step, donate_argnums=(3, 4))


def decode_step(model: Transformer, rules: AxisRules = DECODE) -> Callable:
    """Compiled on first use: (leaves, state, sampler, stop_ids) -> tokens [B] and the new state.

    The state is donated; sampler and stop ids are static.
    """
    merged, leaf_specs = _parameters(model, rules)
    rows = rules.spec("batch")
    state_specs = DecodeState(rows, rows, rows, rows, jax.P())

    def on_device(sampler, stop_ids, leaves, state):
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.steps)
        tokens = jnp.where(state.done, -1, jax.vmap(sampler)(state.logits, keys))
        done = state.done | jnp.isin(tokens, jnp.array(stop_ids, jnp.int32))
        counts = jnp.where(done, 0, 1).astype(jnp.int32)
        model = merged(leaves)
        streams, cache = model.extend(jnp.maximum(tokens, 0)[:, None], counts, state.cache)
        logits = model.logits(model.hidden(streams))[:, 0]
        everywhere = collectives.all_gather(
            tokens, "batch", axis=0
        )  # every process reads all of them
        return everywhere, DecodeState(cache, logits, state.keys, done, state.steps + 1)

    def step(leaves, state, sampler, stop_ids):
        one = functools.partial(on_device, sampler, stop_ids)
        specs = (leaf_specs, state_specs), (jax.P(), state_specs)
        return collectives.per_device(one, rules, *specs)(leaves, state)

    return jax.jit(step, static_argnums=(2, 3), donate_argnums=(1,))


def _parameters(model: Transformer, rules: AxisRules):
    """A function from the leaves of the model's parameters to the model, and their specs.

    Steps take leaves: flattening a module costs milliseconds of host time in every call.
    """
    graphdef, params = nnx.split(model)
    treedef = jax.tree.structure(params)

    def merged(leaves) -> Transformer:
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))

    return merged, jax.tree.leaves(specs(params, rules), is_leaf=lambda s: isinstance(s, jax.P))


class Generator:
    """A model's arrays and its compiled steps.

    Args:
      model: best built with `scan_layers=False` (as `checkpoint.load` does): slices of stacked
        weights are copied in every step.
      cache: how rows are held, see `v4jax.nn.cache.CacheFormat`.
      chunks: numbers of tokens that prefill is compiled for, increasing. Under a mesh with a context
        axis, its multiples.
      rules: how prefill and decoding are spread over the ambient mesh, if there is one; the model's
        parameters should have been placed by the same rules.

    Under a mesh (`with jax.set_mesh(mesh):`, here and around every call) a batch is padded to a
    multiple of the devices that sequences are cut over.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        cache: CacheFormat = None,
        chunks: Sequence[int] = CHUNKS,
        rules: tuple[AxisRules, AxisRules] = (PREFILL, DECODE),
    ):
        self.cfg = model.cfg
        self.chunks = tuple(sorted(chunks))
        self._rules = rules
        for one in rules:
            check_mesh(model.cfg, one)
        check_mesh(model.cfg, rules[0], length=math.gcd(*self.chunks))
        self._batch_parts = num_batch_parts(rules[1])
        self._place_keys = jax.jit(jax.random.wrap_key_data, out_shardings=self._by_row())
        self._init_cache = jax.jit(
            functools.partial(model.init_cache, format=cache),
            static_argnums=(0, 1),
            out_shardings=self._by_row(),
        )
        _, params = nnx.split(model)
        self._leaves = jax.tree.leaves(params)
        self._prefill, self._decode = prefill_step(model, rules[0]), decode_step(model, rules[1])

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
        rounded = min(max(MIN_CAPACITY, 1 << (capacity - 1).bit_length()), self.cfg.max_length)
        return self._init_cache(batch, rounded)

    def _by_row(self) -> jax.NamedSharding | None:
        """Where arrays [B, ...] lie; None without a mesh."""
        if jax.sharding.get_abstract_mesh().empty:
            return None
        return jax.NamedSharding(jax.sharding.get_mesh(), self._rules[1].spec("batch"))

    def prefill(self, prompts: Sequence[Sequence[int]], cache: Cache) -> tuple[Cache, jax.Array]:
        """Feeds token ids behind what the cache holds.

        Returns:
          the new cache and the logits [B, V] after each sequence's last token.

        Raises:
          ValueError: an empty prompt, an id outside the vocabulary, or another batch size.
          CacheFullError: the cache has no room; nothing was written.
        """
        if len(prompts) != cache.lengths.shape[0]:
            raise ValueError(f"{len(prompts)} prompts for a cache of {cache.lengths.shape[0]}.")
        lengths = np.array([len(p) for p in prompts], np.int32)
        if (lengths == 0).any():
            raise ValueError(f"prompt {int(np.argmin(lengths))} is empty: it needs a token.")
        tokens = np.zeros((len(prompts), lengths.max()), np.int32)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = prompt
        if tokens.min() < 0 or tokens.max() >= self.cfg.vocab_size:
            raise ValueError(
                f"token ids are in {tokens.min()}..{tokens.max()}: expected "
                f"0..{self.cfg.vocab_size - 1}."
            )
        cache.require_room(lengths)
        shape = (len(prompts), self.cfg.vocab_size)
        logits = jnp.zeros(shape, jnp.float32, device=self._by_row())
        start = 0
        for size in self._chunk_sizes(int(lengths.max())):
            chunk = np.zeros((len(prompts), size), np.int32)
            piece = tokens[:, start : start + size]
            chunk[:, : piece.shape[1]] = piece
            counts = np.clip(lengths - start, 0, size).astype(np.int32)
            cache, logits = self._prefill(self._leaves, chunk, counts, cache, logits)
            start += size
        return cache, logits

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

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampler: Sampler = Greedy(),
        max_new_tokens: int = 256,
        stop_ids: Sequence[int] | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Iterator[np.ndarray]:
        """Generates for a batch of prompts of token ids.

        Args:
          prompts: non-empty lists of token ids.
          sampler: a strategy of `v4jax.inference.sampling`.
          stop_ids: ids that end a sequence; default the model's end-of-sentence id.
          seed: one for the batch, or one per prompt. A sequence depends on its own seed only.

        Yields:
          [B] int32 per step: each sequence's token, or -1 once it has ended.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1.")
        batch = len(prompts)
        seeds = [seed + i for i in range(batch)] if isinstance(seed, int) else list(seed)
        if len(seeds) != batch:
            raise ValueError(f"{len(seeds)} seeds for {batch} prompts.")
        padding = -batch % self._batch_parts
        prompts = [*prompts, *[prompts[-1]] * padding] if batch else prompts
        seeds += seeds[-1:] * padding
        stop_ids = (self.cfg.eos_id,) if stop_ids is None else tuple(stop_ids)
        longest = max((len(p) for p in prompts), default=0)
        cache = self.init_cache(len(prompts), longest + max_new_tokens)
        cache, logits = self.prefill(prompts, cache)
        keys = self._place_keys(np.stack([jax.random.key_data(jax.random.key(s)) for s in seeds]))
        done = jnp.zeros(len(prompts), bool, device=self._by_row())
        state = DecodeState(cache, logits, keys, done, jnp.zeros((), jnp.int32))
        ended = np.zeros(batch, bool)
        previous, state = self._decode(self._leaves, state, sampler, stop_ids)
        for remaining in range(max_new_tokens - 1, -1, -1):
            if remaining:  # the next step is under way before this one's tokens are read
                following, state = self._decode(self._leaves, state, sampler, stop_ids)
            tokens = np.asarray(previous)[:batch]
            ended |= np.isin(tokens, stop_ids)
            yield tokens
            if ended.all() or not remaining:
                return
            previous = following

    def generate(self, prompts: Sequence[Sequence[int]], **options) -> list[Completion]:
        """As `stream`, collected: one `Completion` per prompt."""
        steps = np.stack(list(self.stream(prompts, **options)), axis=1)  # [B, steps]
        stop_ids = options.get("stop_ids")
        stop_ids = (self.cfg.eos_id,) if stop_ids is None else stop_ids
        completions = []
        for row in steps:
            tokens = tuple(int(t) for t in row[row >= 0])
            reason = "stop" if tokens and tokens[-1] in stop_ids else "length"
            completions.append(Completion(tokens, reason))
        return completions
