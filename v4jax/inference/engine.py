"""The engine: a model that serves requests, for a notebook, a terminal, a file or a server.

    engine = Engine(v4jax.load(folder), v4jax.Tokenizer(folder))
    print(engine.generate("Emma was", Sampling(temperature=0.7)).text)
    print(engine.chat("Who is Emma?", mode="think-high").content)

    request = engine.submit("Emma was", Sampling(seed=3))
    for token in engine.tokens(request): ...

It has a fixed number of slots, which requests enter and leave one by one. docs/engine.md says how.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sharding import DECODE, PREFILL
from v4jax.checkpoint.adapters import Adapter, load_adapter
from v4jax.inference import prefix_files
from v4jax.inference.ahead import CompiledAhead
from v4jax.inference.completions import Completions, Prompt
from v4jax.inference.grammar import Grammar, GrammarError, Matchers
from v4jax.inference.holdings import Holdings
from v4jax.inference.ledger import Ledger
from v4jax.inference.parts import place, shared, spread
from v4jax.inference.prefix import PIECE, Prefixes, Stored
from v4jax.inference.programs import Programs
from v4jax.inference.requests import AdapterRow, EngineFullError, Request
from v4jax.inference.sampling import Sampling
from v4jax.inference.scheduler import Scheduler
from v4jax.inference.steps import (
    MOST_STEPS,
    STOP_SLOTS,
    Slots,
    decode_step,
    empty_slots,
    prefill_step,
    slot_steps,
)
from v4jax.nn.adapter_rows import with_adapters
from v4jax.nn.cache import Cache, CacheFormat, empty_cache, pool_pages
from v4jax.nn.compilation import keep_programs
from v4jax.nn.model import Transformer
from v4jax.nn.placement import by_row, check_mesh, mesh_of, num_batch_parts, on_mesh, require_placed
from v4jax.text.tokenizer import Tokenizer

CHUNKS = (128, 1024)
CACHE_TOKENS = 4096  # a slot, where nothing else is said
PREFIXES = 64  # that are kept, where nothing else is said


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What an engine is doing and has done."""

    queued: int
    running: int
    slots: int
    pages: int  # of all ratios and parts
    pages_used: int
    prefixes: int
    prompt_tokens: int
    cached_tokens: int  # of the prompts', that prefixes had
    generated_tokens: int
    preemptions: int
    steps: int
    row_steps: int  # decoded rows, those of slots without a request included
    useful_row_steps: float  # share of them that gave a token


class Engine(Completions):
    """A model's arrays, its compiled steps, and the requests that it serves.

    Args:
      model: best built with `scan_layers=False` (as `v4jax.load` does): slices of stacked weights
        are copied in every step. If it lies on a mesh, the steps run there.
      tokenizer: for prompts that are texts, and for `chat`.
      slots: requests that are decoded together; rounded up to a multiple of the parts that a mesh cuts
        them into. A step costs about as much with one request as with all of them.
      cache: how rows are held, see `v4jax.nn.cache.CacheFormat`.
      cache_tokens: tokens of context that all requests and kept prefixes have room for together, in
        each part. None: 4,096 a slot, and more as soon as a request needs it.
      chunks: numbers of tokens that prefill is compiled for: one, or a small and a large one; multiples
        of 128, and of a mesh's context axis.
      steps_per_call: tokens that a slot generates between two looks of the host, where nobody waits.
      queue: requests that may wait; None: any number.
      prefixes: that are kept for requests which begin with the same tokens; 0: none.
      host_bytes: host memory for prefixes that had to leave the devices, of every process alike.
      adapters: by name, folders of LoRA adapters that requests may have (`v4jax.checkpoint.adapters`).
        All are on the devices, and a step computes every row with its own (`v4jax.nn.adapter_rows`).

    Attributes:
      adapters: their names.
      before_step: called before every step, if it is set, by whoever steps.

    Raises:
      ValueError: the mesh does not suit the model, its weights do not lie as the steps read them,
        the tokenizer has ids that the model does not know, numbers out of range, or adapters beside
        a model that has one already (`with_adapters`).
      FileNotFoundError, CheckpointError: see `load_adapter`.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 8,
        cache: CacheFormat = None,
        cache_tokens: int | None = None,
        chunks: Sequence[int] = CHUNKS,
        steps_per_call: int = 8,
        queue: int | None = None,
        prefixes: int = PREFIXES,
        host_bytes: int = 0,
        adapters: Mapping[str, str | os.PathLike] | None = None,
    ):
        keep_programs()
        self.cfg, self.tokenizer = model.cfg, tokenizer
        self.chunks = tuple(sorted(chunks))
        self._check(slots, cache_tokens, steps_per_call)
        self._mesh, self._format, self._queue = mesh_of(model), cache, queue
        self._rows = by_row(self._mesh, DECODE)  # where arrays [S, ...] lie
        self._numerics = model.numerics
        self._base = jax.tree.leaves(nnx.split(model)[1])  # without the engine's adapters
        opened = {name: Adapter(folder) for name, folder in (adapters or {}).items()}
        self._adapters: dict[str | None, AdapterRow] = {None: AdapterRow()}
        for number, (name, adapter) in enumerate(opened.items(), 1):
            self._adapters[name] = AdapterRow(number, adapter.digest)
        self.adapters: Sequence[str] = tuple(opened)
        if opened:
            adapted = [load_adapter(model, adapter) for adapter in opened.values()]
            model = with_adapters(model, adapted)
        with self._on_mesh():
            check_mesh(model.cfg, DECODE)
            check_mesh(model.cfg, PREFILL, length=math.gcd(*self.chunks))
            _, params = nnx.split(model)
            require_placed(params, DECODE)
            parts = num_batch_parts(DECODE)
            self.leaves = jax.tree.leaves(params)
            self._prefill, self._decode = prefill_step(model), decode_step(model)
            self._slot_steps = slot_steps()
        slots += -slots % parts
        self._grows = cache_tokens is None
        self._cache_tokens = cache_tokens or min(CACHE_TOKENS, self.cfg.max_length) * slots // parts
        self._sequences = slots // parts + prefixes
        pages = pool_pages(self.cfg, self._cache_tokens, self._sequences)
        with self._on_mesh():
            empty = functools.partial(empty_slots, model, slots, pages, cache)
            made = jax.jit(empty, out_shardings=self._rows)()
        ledger = Ledger(pages, parts)
        self._holdings = Holdings(
            *(self._programs(parts), made, ledger, Prefixes(ledger, prefixes)),
            parts=parts,
            max_length=self.cfg.max_length,
            host_bytes=host_bytes,
        )
        scheduler = Scheduler(
            self._holdings,
            chunks=self.chunks,
            budget=self.chunks[-1],
            steps_per_call=steps_per_call,
        )
        super().__init__(scheduler)
        self._numbers = itertools.count()

    def _check(self, slots: int, cache_tokens: int | None, steps_per_call: int) -> None:
        if self.tokenizer is not None and self.tokenizer.vocab_size > self.cfg.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model "
                f"vocab_size={self.cfg.vocab_size}: they do not belong together."
            )
        if slots < 1:
            raise ValueError(f"slots={slots}: expected at least 1.")
        if cache_tokens is not None and cache_tokens < 1:
            raise ValueError(f"cache_tokens={cache_tokens}: expected a positive number, or None.")
        if not 1 <= steps_per_call <= MOST_STEPS:
            raise ValueError(f"steps_per_call={steps_per_call}: expected 1..{MOST_STEPS}.")
        if not self.chunks or any(size < 1 or size % PIECE for size in self.chunks):
            raise ValueError(f"chunks={self.chunks}: expected multiples of {PIECE} tokens.")
        if len(self.chunks) > 2:
            raise ValueError(f"chunks={self.chunks}: expected one or two sizes.")

    def _programs(self, parts: int) -> Programs:
        """The steps, on the mesh and with the model's arrays."""

        def bound(step: Callable, *first) -> Callable:
            def call(*args):
                with self._on_mesh():
                    return step(*first, *args)

            return call

        steps, rows = self._slot_steps, self._rows
        return Programs(
            prefill=bound(self._prefill, self.leaves),
            decode=CompiledAhead(self._decode, self._on_mesh, self.leaves),
            start=bound(steps.start),
            snapshot=bound(steps.snapshot),
            restore=bound(steps.restore),
            copy_pages=bound(steps.copy_pages),
            take_rows=bound(steps.take_rows),
            put_rows=bound(steps.put_rows),
            read_pages=bound(steps.read_pages),
            write_pages=bound(steps.write_pages),
            place=functools.partial(place, rows=rows),
            spread=functools.partial(spread, parts=parts, rows=rows),
        )

    # Requests -------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling = Sampling(),
        *,
        stop_ids: Sequence[int] | None = None,
        priority: int = 0,
        listener: Callable[[Request], None] | None = None,
        grammar: Grammar | None = None,
        adapter: str | None = None,
    ) -> Request:
        """Puts a request in the queue. From any thread.

        Args:
          prompt: a text, which begins with BOS whether it says so or not, or token ids.
          stop_ids: ids that end the completion; default those of the tokenizer that end a turn, or the
            model's end-of-sentence id.
          priority: the largest is served first; among equals, the one that came first.
          listener: called with the request when it has got tokens or has ended, by whoever runs the
            engine.
          grammar: what the answer has to be. It ends where the grammar may end; `max_new_tokens` may cut
            it before.
          adapter: name of the engine's adapter that computes it; None: the model alone.

        Raises:
          ValueError: a prompt that is empty, has ids outside the vocabulary, or is too long for the
            model or the cache together with what it may generate; too many stop ids; no such adapter.
          GrammarError: a ValueError; the grammar cannot be used, or there is no tokenizer.
          EngineFullError: the queue is full.
          RuntimeError: the engine's thread has failed.
        """
        (ids,) = self._ids([prompt])
        stops = self._stop_ids(stop_ids)
        self._check_request(ids, sampling, stops)
        listeners = [] if listener is None else [listener]
        request = Request(
            *(next(self._numbers), ids, sampling, stops, priority, listeners, grammar, adapter)
        )
        self._put(self._prepared(request))
        return request

    def _prepared(self, request: Request) -> Request:
        if request.adapter not in self._adapters:
            have = f"one of {', '.join(self.adapters)}, or None" if self.adapters else "None"
            raise ValueError(f"adapter={request.adapter!r}: this engine has {have}.")
        request._adapter = self._adapters[request.adapter]
        if request.grammar is not None:
            request._matcher = self._matchers.matcher(
                request.grammar, request.prompt, request.stop_ids
            )
        return request

    def _check_request(self, ids: list[int], sampling: Sampling, stops: Sequence[int]) -> None:
        """Whether it can ever be served, and may wait for it."""
        needed = len(ids) + sampling.max_new_tokens
        if needed > self.cfg.max_length:
            raise ValueError(
                f"{needed} tokens are more than max_length={self.cfg.max_length} of "
                f"{self.cfg.name}: shorten the prompt or generate fewer tokens."
            )
        if not self._grows and needed > self._cache_tokens:
            raise ValueError(
                f"{needed} tokens are more than the cache_tokens={self._cache_tokens} of this engine: "
                "shorten the prompt, generate fewer tokens, or make the engine with more."
            )
        if len(stops) > STOP_SLOTS:
            raise ValueError(f"{len(stops)} stop ids: expected at most {STOP_SLOTS}.")
        if any(token >= self.cfg.vocab_size for token in sampling.logit_bias):
            raise ValueError(
                f"logit_bias has token ids up to {max(sampling.logit_bias)}: expected "
                f"0..{self.cfg.vocab_size - 1}."
            )
        queued = len(self._inbox) + len(self._scheduler.waiting)
        if self._queue is not None and queued >= self._queue:
            raise EngineFullError(
                f"{queued} requests are waiting, which is all that may: try later."
            )

    @functools.cached_property
    def _matchers(self) -> Matchers:
        if self.tokenizer is None:
            raise GrammarError(
                "a grammar needs a tokenizer: Engine(model, v4jax.Tokenizer(folder))."
            )
        return Matchers(self.tokenizer, self.cfg.vocab_size)

    def stats(self) -> EngineStats:
        """What it is doing and has done.

        Raises:
          RuntimeError: the engine's thread has failed.
        """
        self._require_working()
        scheduler, held = self._scheduler, self._holdings
        return EngineStats(
            queued=len(self._inbox) + len(scheduler.waiting),
            running=sum(request is not None for request in held.in_slot),
            slots=len(held.in_slot),
            pages=held.ledger.total,
            pages_used=held.ledger.used,
            prefixes=len(held.prefixes),
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            generated_tokens=scheduler.generated_tokens,
            preemptions=scheduler.preemptions,
            steps=scheduler.steps,
            row_steps=scheduler.row_steps,
            useful_row_steps=scheduler.generated_tokens / max(1, scheduler.row_steps),
        )

    def save_prefix(
        self, prompt: Prompt, path: str | os.PathLike, *, adapter: str | None = None
    ) -> int:
        """Writes what was computed of a prompt to a file, for an engine with the same model.

        The prompt is fed first, if it is not there. Not while `start` runs the engine. With an adapter
        it is for requests that have the same one, whatever its name.

        Returns:
          how many of its tokens the file has: the multiple of 128 before the last one.

        Raises:
          ValueError: a prompt of fewer than 129 tokens, or as `submit`; several processes, and this
            engine does not lead them.
          OSError: the file cannot be written.
        """
        self._require_own_loop()
        request = self.submit(prompt, Sampling(max_new_tokens=1), adapter=adapter)
        if request.prompt_length <= PIECE:
            request.cancel()
            raise ValueError(
                f"the prompt has {request.prompt_length} tokens: expected {PIECE + 1} or more."
            )
        self.run_until_idle()
        digests = [digest.hex() for digest in request._digests]
        stored = self._together({"save": digests, "wide": request._wide})
        if stored is None:
            raise ValueError("this engine keeps no prefixes: expected prefixes=1 or more.")
        digest = request._digests[stored.length // PIECE - 1]
        prefix_files.write(path, stored, digest, self._model_digest())
        return stored.length

    def load_prefix(self, path: str | os.PathLike) -> int:
        """Makes a saved prefix one of this engine's. Not while `start` runs the engine.

        Returns:
          how many tokens it has.

        Raises:
          ValueError: no file of a prefix, one of another model, or one that has no room here.
          OSError: it cannot be read.
        """
        self._require_own_loop()
        stored, digest = prefix_files.read(path, self._tree, self._model_digest())
        leaves = jax.tree.leaves((stored.state, stored.pages))
        task = {
            "load": digest.hex(),
            "length": stored.length,
            "wide": stored.wide,
            "arrays": [(leaf.shape, str(leaf.dtype)) for leaf in leaves],
        }
        if not self._together(task, leaves):
            raise ValueError(f"the cache has no room for the {stored.length} tokens of {path}.")
        return stored.length

    @property
    def _tree(self) -> Any:
        """Structure of the state and pages of a prefix."""
        slots = self._holdings.slots
        return jax.tree.structure((slots.states, slots.cache.pools))

    def _do(self, task: Any, content: Any = None) -> Any:
        """Finds a prefix to save, gives every part one that was read, or lets go of all."""
        held = self._holdings
        match task:
            case {"save": hexadecimal, "wide": wide}:
                digests = [bytes.fromhex(digest) for digest in hexadecimal]
                found = (held.find_prefix(part, digests, wide) for part in range(held.parts))
                part, prefix = max(enumerate(found), key=lambda one: one[1].length if one[1] else 0)
                return None if prefix is None else held.store(part, prefix)
            case {"load": digest, "length": length, "wide": wide, "arrays": arrays}:
                if jax.process_count() > 1:
                    described = [(shape, jnp.dtype(dtype)) for shape, dtype in arrays]
                    content = shared(content, described)
                stored = Stored(length, wide, *jax.tree.unflatten(self._tree, content))
                self._grow_for(length)
                name, parts = bytes.fromhex(digest), range(held.parts)
                return all(held.bring_back(part, name, stored) is not None for part in parts)
            case "forget":
                held.prefixes.clear()

    def _require_own_loop(self) -> None:
        if self._thread is not None:
            raise ValueError("prefixes are saved and loaded before start() or after stop().")
        if jax.process_count() > 1 and self._channel is None:
            raise ValueError(
                "of several processes the one that leads saves and loads prefixes: call lead() first."
            )

    def _model_digest(self) -> str:
        described = f"{self.cfg} {self._numerics} {self._format} {self.chunks}"
        return prefix_files.model_digest(self._base, described)

    def _add(self, request: Request) -> None:
        super()._add(request)
        self._grow_for(request._most)

    def forget_prefixes(self) -> None:
        """Lets go of all kept prefixes."""
        self._together("forget")

    def _grow_for(self, needed: int) -> None:
        """Larger pools, if so many tokens of one request are more than they have room for."""
        held = self._holdings
        if not self._grows or needed <= self._cache_tokens:
            return
        while self._cache_tokens < needed:
            self._cache_tokens *= 2
        pages = pool_pages(self.cfg, self._cache_tokens, self._sequences)
        count, parts = len(held.in_slot), held.parts
        shape = count, pages, dict[int, jax.Array](), self.cfg.max_length, self._format

        def grown(slots: Slots) -> Slots:
            return _filled(slots, empty_cache(self.cfg, self._numerics, *shape, parts=parts))

        with self._on_mesh():
            held.slots = jax.jit(grown, out_shardings=self._rows)(held.slots)
        held.ledger.grow(pages)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return on_mesh(self._mesh)


def _filled(slots: Slots, larger: Cache) -> Slots:
    """Slots with what their pools hold in the larger pools of an empty cache."""
    empty, tree = jax.tree.flatten(larger.pools)
    held = jax.tree.leaves(slots.cache.pools)
    filled = [
        jax.lax.dynamic_update_slice(new, old, (0,) * new.ndim) for new, old in zip(empty, held)
    ]
    cache = dataclasses.replace(slots.cache, pools=jax.tree.unflatten(tree, filled))
    return dataclasses.replace(slots, cache=cache)
