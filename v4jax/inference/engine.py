"""The engine: a model that serves requests, for a notebook, a terminal, a file or a server.

    engine = Engine(v4jax.load(folder), v4jax.Tokenizer(folder))
    print(engine.generate("Emma was", Sampling(temperature=0.7)).text)
    print(engine.chat("Who is Emma?", mode="think-high").content)

    request = engine.submit("Emma was", Sampling(seed=3))
    for token in engine.tokens(request): ...

It has a fixed number of slots, which requests enter and leave one by one. docs/engine.md says how.
"""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import overload

import jax
import numpy as np
from flax import nnx

from sharding import DECODE, PREFILL
from v4jax.inference import prefix_files
from v4jax.inference.grammar import Grammar, GrammarError, Matchers
from v4jax.inference.ledger import Ledger
from v4jax.inference.prefix import PIECE, Prefixes
from v4jax.inference.requests import EngineFullError, Request
from v4jax.inference.sampling import Sampling
from v4jax.inference.scheduler import Programs, Scheduler
from v4jax.inference.steps import (
    MOST_STEPS,
    NO_TOKEN,
    STOP_SLOTS,
    Slots,
    decode_step,
    empty_slots,
    prefill_step,
    slot_steps,
)
from v4jax.nn.cache import Cache, CacheFormat, empty_cache, pool_pages
from v4jax.nn.compilation import keep_programs
from v4jax.nn.model import Transformer
from v4jax.nn.placement import by_row, check_mesh, mesh_of, num_batch_parts, on_mesh, require_placed
from v4jax.text.parse import parse_partial_completion
from v4jax.text.prompt import with_bos
from v4jax.text.tokenizer import Tokenizer

CHUNKS = (128, 1024)
CACHE_TOKENS = 4096  # a slot, where nothing else is said
PREFIXES = 64  # that are kept, where nothing else is said
Prompt = str | Sequence[int]


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
    useful_row_steps: float  # share of decoded rows that gave a token


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
      host_bytes: host memory for prefixes that had to leave the devices.

    Attributes:
      before_step: called before every step, if it is set, by whoever steps.

    Raises:
      ValueError: the mesh does not suit the model, its weights do not lie as the steps read them,
        the tokenizer has ids that the model does not know, or numbers out of range.
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
    ):
        keep_programs()
        self.cfg, self.tokenizer = model.cfg, tokenizer
        self.chunks = tuple(sorted(chunks))
        self._check(slots, cache_tokens, steps_per_call)
        self._mesh, self._format, self._queue = mesh_of(model), cache, queue
        self._rows = by_row(self._mesh, DECODE)  # where arrays [S, ...] lie
        self._numerics = model.numerics
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
        self._scheduler = Scheduler(
            self._programs(),
            made,
            ledger,
            Prefixes(ledger, prefixes),
            parts=parts,
            chunks=self.chunks,
            budget=self.chunks[-1],
            steps_per_call=steps_per_call,
            max_length=self.cfg.max_length,
            host_bytes=host_bytes,
            is_shared=jax.process_count() > 1,
        )
        self.before_step: Callable[[], None] | None = None
        self._numbers = itertools.count()
        self._inbox: collections.deque[Request] = collections.deque()
        self._turn = threading.Condition(threading.RLock())  # held by whoever steps
        self._wake = threading.Event()  # there is work, or an end
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._failure: str | None = None

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

    def _programs(self) -> Programs:
        """The steps, on the mesh and with the model's arrays."""

        def bound(step: Callable, *first) -> Callable:
            def call(*args):
                with self._on_mesh():
                    return step(*first, *args)

            return call

        def placed(array: np.ndarray) -> jax.Array:
            # A copy: on a CPU jax may read the array itself, which the scheduler goes on to change.
            return jax.device_put(np.array(array), self._rows)

        steps, is_one = self._slot_steps, jax.process_count() == 1
        return Programs(
            prefill=bound(self._prefill, self.leaves),
            decode=bound(self._decode, self.leaves),
            start=bound(steps.start),
            snapshot=bound(steps.snapshot),
            restore=bound(steps.restore),
            copy_pages=bound(steps.copy_pages),
            take_rows=bound(steps.take_rows),
            put_rows=bound(steps.put_rows),
            read_pages=bound(steps.read_pages),
            write_pages=bound(steps.write_pages),
            place=placed if is_one else np.asarray,
            fetch=jax.device_get,
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

        Raises:
          ValueError: a prompt that is empty, has ids outside the vocabulary, or is too long for the
            model or the cache together with what it may generate; too many stop ids.
          GrammarError: a ValueError; the grammar cannot be used, or there is no tokenizer.
          EngineFullError: the queue is full.
          RuntimeError: the engine's thread has failed.
        """
        (ids,) = self._ids([prompt])
        stops = self._stop_ids(stop_ids)
        return self._submit(ids, sampling, stops, priority, listener, grammar)

    def _submit(
        self, ids, sampling, stops, priority=0, listener=None, grammar: Grammar | None = None
    ) -> Request:
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
        listeners = [] if listener is None else [listener]
        matcher = None if grammar is None else self._matchers.matcher(grammar, ids, stops)
        request = Request(next(self._numbers), ids, sampling, stops, priority, listeners)
        request._matcher = matcher
        self._require_working()
        self._inbox.append(request)
        self._wake.set()
        return request

    @functools.cached_property
    def _matchers(self) -> Matchers:
        if self.tokenizer is None:
            raise GrammarError(
                "a grammar needs a tokenizer: Engine(model, v4jax.Tokenizer(folder))."
            )
        return Matchers(self.tokenizer, self.cfg.vocab_size)

    def _require_working(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"the engine has failed and serves no more: {self._failure}")

    def step(self) -> list[Request]:
        """One turn of the scheduler: the requests that got tokens or ended. Dispatches at most one call
        of decode and `chunks[-1]` tokens of prompts, and waits for the call before."""
        with self._turn:
            if self.before_step is not None:
                self.before_step()
            while self._inbox:
                request = self._inbox.popleft()
                self._scheduler.add(request)
                self._grow_for(request._most)
            events = self._scheduler.step()
            self._turn.notify_all()
        for request in events:
            request._tell()
        return events

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._inbox) or self._scheduler.has_work

    def run_until_idle(self) -> None:
        """Steps until every request has ended."""
        while self.has_work:
            self.step()

    def tokens(self, request: Request) -> Iterator[int]:
        """A request's tokens as they come. Runs the engine, unless a thread does (`start`)."""
        given = 0
        while True:
            while given < len(request.tokens):
                yield request.tokens[given]
                given += 1
            if request.is_ended and given == len(request.tokens):
                return
            self._advance(request, given)

    def _advance(self, request: Request, given: int) -> None:
        """Returns when a request may have more than `given` tokens."""
        if self._thread is None:
            self.step()
            return
        with self._turn:
            while len(request.tokens) == given and not request.is_ended:
                self._turn.wait(timeout=1.0)
                if self._thread is None:
                    return

    async def async_tokens(self, request: Request) -> AsyncIterator[int]:
        """As `tokens`, for asyncio. The engine has to run in its thread (`start`).

        Raises:
          RuntimeError: it does not, or no longer.
        """
        loop, woken, given = asyncio.get_running_loop(), asyncio.Event(), 0

        def wake(_: Request) -> None:
            with contextlib.suppress(
                RuntimeError
            ):  # the loop has ended, and with it who would read
                loop.call_soon_threadsafe(woken.set)

        request.listeners.append(wake)
        try:
            while True:
                woken.clear()
                is_ended = request.is_ended  # before the tokens, which are there when it is set
                while given < len(request.tokens):
                    yield request.tokens[given]
                    given += 1
                if is_ended:
                    return
                if self._thread is None:
                    raise RuntimeError(
                        "async_tokens reads an engine that runs: call start() first."
                    )
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(woken.wait(), 1.0)
        finally:
            request.listeners.remove(wake)

    def start(self) -> None:
        """Runs the engine in a thread of its own, until `stop`."""
        if self._thread is None:
            self._is_stopping = False
            self._thread = threading.Thread(target=self._loop, name="v4jax-engine", daemon=True)
            self._wake.set()
            self._thread.start()

    def stop(self, grace: float = 0.0) -> None:
        """Ends the thread; requests that run get so many seconds to end, and are cancelled then."""
        thread = self._thread
        if thread is None:
            return
        deadline = time.monotonic() + grace
        while self.has_work and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        for request in self._all_requests():
            request.cancel()
        self._is_stopping = True
        self._wake.set()
        thread.join()
        self._thread = None

    def _loop(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            try:
                while self.has_work:
                    self.step()
            except Exception as error:  # whoever waits has to hear of it
                self._fail(f"{type(error).__name__}: {error}")
                raise
            if self._is_stopping:
                return

    def _fail(self, why: str) -> None:
        """Ends all requests: the devices' arrays may be gone."""
        self._failure = why
        requests = self._all_requests()
        for request in requests:
            request.error, request.finish_reason = why, "error"
        with self._turn:
            self._turn.notify_all()
        for request in requests:
            request._tell()

    def _all_requests(self) -> list[Request]:
        running = [request for request in self._scheduler.in_slot if request is not None]
        return [*self._inbox, *self._scheduler.waiting, *running]

    def stats(self) -> EngineStats:
        """What it is doing and has done.

        Raises:
          RuntimeError: the engine's thread has failed.
        """
        self._require_working()
        scheduler = self._scheduler
        return EngineStats(
            queued=len(self._inbox) + len(scheduler.waiting),
            running=sum(request is not None for request in scheduler.in_slot),
            slots=len(scheduler.in_slot),
            pages=scheduler.ledger.total,
            pages_used=scheduler.ledger.used,
            prefixes=len(scheduler.prefixes),
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            generated_tokens=scheduler.generated_tokens,
            preemptions=scheduler.preemptions,
            steps=scheduler.steps,
            useful_row_steps=scheduler.useful_row_steps / max(1, scheduler.row_steps),
        )

    def save_prefix(self, prompt: Prompt, path: str | os.PathLike) -> int:
        """Writes what was computed of a prompt to a file, for an engine with the same model.

        The prompt is fed first, if it is not there. Not while `start` runs the engine.

        Returns:
          how many of its tokens the file has: the multiple of 128 before the last one.

        Raises:
          ValueError: a prompt of fewer than 129 tokens, or as `submit`; several processes.
          OSError: the file cannot be written.
        """
        self._require_own_loop()
        request = self.submit(prompt, Sampling(max_new_tokens=1))
        if request.prompt_length <= PIECE:
            request.cancel()
            raise ValueError(
                f"the prompt has {request.prompt_length} tokens: expected {PIECE + 1} or more."
            )
        self.run_until_idle()
        scheduler = self._scheduler
        found = (scheduler.find_prefix(part, request) for part in range(scheduler.parts))
        part, prefix = max(enumerate(found), key=lambda one: one[1].length if one[1] else 0)
        if prefix is None:
            raise ValueError("this engine keeps no prefixes: expected prefixes=1 or more.")
        digest = request._digests[prefix.length // PIECE - 1]
        prefix_files.write(path, scheduler.store(part, prefix), digest, self._model_digest())
        return prefix.length

    def load_prefix(self, path: str | os.PathLike) -> int:
        """Makes a saved prefix one of this engine's. Not while `start` runs the engine.

        Returns:
          how many tokens it has.

        Raises:
          ValueError: no file of a prefix, one of another model, or one that has no room here.
          OSError: it cannot be read.
        """
        self._require_own_loop()
        scheduler = self._scheduler
        cache = scheduler.slots.cache
        tree = jax.tree.structure((cache.states, cache.pools))
        stored, digest = prefix_files.read(path, tree, self._model_digest())
        self._grow_for(stored.length)
        for part in range(scheduler.parts):
            if scheduler.bring_back(part, digest, stored) is None:
                raise ValueError(f"the cache has no room for the {stored.length} tokens of {path}.")
        return stored.length

    def _require_own_loop(self) -> None:
        if self._thread is not None or jax.process_count() > 1:
            raise ValueError(
                "prefixes are saved and loaded in one process, before start() or after stop()."
            )

    def _model_digest(self) -> str:
        described = f"{self.cfg} {self._numerics} {self._format} {self.chunks}"
        return prefix_files.model_digest(self.leaves, described)

    def forget_prefixes(self) -> None:
        """Lets go of all kept prefixes."""
        with self._turn:
            self._scheduler.prefixes.clear()

    def _grow_for(self, needed: int) -> None:
        """Larger pools, if so many tokens of one request are more than they have room for."""
        scheduler = self._scheduler
        if not self._grows or needed <= self._cache_tokens:
            return
        while self._cache_tokens < needed:
            self._cache_tokens *= 2
        pages = pool_pages(self.cfg, self._cache_tokens, self._sequences)
        count, parts = len(scheduler.in_slot), scheduler.parts
        shape = count, pages, dict[int, jax.Array](), self.cfg.max_length, self._format

        def grown(slots: Slots) -> Slots:
            return _filled(slots, empty_cache(self.cfg, self._numerics, *shape, parts=parts))

        with self._on_mesh():
            scheduler.slots = jax.jit(grown, out_shardings=self._rows)(scheduler.slots)
        scheduler.ledger.grow(pages)

    # Prompts of one call --------------------------------------------------------------------------

    @overload  # a text is a sequence of texts too
    def generate(  # type: ignore[overload-overlap]
        self,
        prompts: str,
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        *,
        stop_ids: Sequence[int] | None = None,
        grammar: Grammar | None = None,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        *,
        stop_ids: Sequence[int] | None = None,
        grammar: Grammar | None = None,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        *,
        stop_ids: Sequence[int] | None = None,
        grammar: Grammar | None = None,
    ) -> Completion | list[Completion]:
        """Completions of prompts: one of a text, a list of a list.

        Args:
          prompts: a text, a list of texts, or a list of lists of token ids. A text begins with BOS
            whether it says so or not.
          sampling: of all prompts, or one for each. Of several prompts with one sampling, the n-th
            draws with its seed plus n.
          stop_ids: ids that end a completion; default those of the tokenizer that end a turn, or the
            model's end-of-sentence id.
          grammar: what every completion has to be, behind its reasoning, see `submit`.

        Raises:
          ValueError, RuntimeError: see `stream`.
        """
        several = [prompts] if isinstance(prompts, str) else prompts
        stops = self._stop_ids(stop_ids)
        steps = list(self.stream(several, sampling, stop_ids=stops, grammar=grammar))
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
        grammar: Grammar | None = None,
    ) -> Reply:
        """The assistant's next turn.

        Args:
          messages: a text of the user, or messages as in docs/prompts.md.
          mode: "non-think", "think-high" or "think-max" (releases since 0731 also "think-low").
          tools: functions that the assistant may call.
          grammar: what `content` has to be; tools are not called then.

        Raises:
          ValueError: there is no tokenizer, or messages or mode that cannot be rendered; else as
            `stream`.
          RuntimeError: as `stream`.
        """
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer: Engine(model, v4jax.Tokenizer(folder)).")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        prompt = self.tokenizer.render(messages, mode, tools=tools)
        ids = self.tokenizer.encode(prompt.text)
        (completion,) = self.generate([ids], sampling, grammar=grammar)
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
        grammar: Grammar | None = None,
    ) -> Iterator[np.ndarray]:
        """As `generate`, token by token. A row depends on its own prompt and sampling alone.

        Yields:
          [B] int32 per step: each row's token, or -1 once it has ended.

        Raises:
          ValueError: a prompt that is empty, has ids outside the vocabulary, or is too long for
            the model together with what it may generate; a grammar that cannot be used.
          RuntimeError: a request ended with an error.
        """
        ids = self._ids(prompts)
        stops = self._stop_ids(stop_ids)
        requests = []
        try:
            for prompt, one in zip(ids, self._requests(sampling, len(ids))):
                requests.append(self._submit(prompt, one, stops, grammar=grammar))
            for step in itertools.count():
                for request in requests:
                    while len(request.tokens) <= step and not request.is_ended:
                        self._advance(request, step)
                if faults := [request.error for request in requests if request.error]:
                    raise RuntimeError(faults[0])
                tokens = [r.tokens[step] if step < len(r.tokens) else NO_TOKEN for r in requests]
                if all(token == NO_TOKEN for token in tokens):
                    return
                yield np.array(tokens, np.int32)
        finally:  # whoever stops reading wants no more of it
            for request in requests:
                request.cancel()

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


def _filled(slots: Slots, larger: Cache) -> Slots:
    """Slots with what their pools hold in the larger pools of an empty cache."""
    empty, tree = jax.tree.flatten(larger.pools)
    held = jax.tree.leaves(slots.cache.pools)
    filled = [
        jax.lax.dynamic_update_slice(new, old, (0,) * new.ndim) for new, old in zip(empty, held)
    ]
    cache = dataclasses.replace(slots.cache, pools=jax.tree.unflatten(tree, filled))
    return dataclasses.replace(slots, cache=cache)
