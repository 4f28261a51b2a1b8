"""What runs on the devices while requests are served: pure steps over one pytree of slots.

    slots         = prefill(leaves, slots, tables, tokens, counts, slot)   a chunk of one prompt
    output, slots = decode(leaves, slots, tables, count, cancelled, allowed)   up to `count` tokens a slot
    slots         = start(slots, slot, rows)                               a request begins to decode
    state         = snapshot(slots, slot);  slots = restore(slots, slot, state, lengths, adapters)
    slots         = copy_pages(slots, source, target)
    rows          = take_rows(slots, slot);  slots = put_rows(slots, slot, rows)
    pages         = read_pages(slots, tables, slot);  slots = write_pages(slots, tables, slot, pages)

Everything about a request is an array with one row a slot, so a step is compiled once for a model, a
number of slots and a width of the tables. Sampled tokens stay on the devices, where the next step finds
them. Slots lie in G parts, by which a mesh cuts a batch (1 without one); a step that is about one slot
takes G of them, one of each part, numbered within it (-1: none).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.dispatch import target_platform
from pallas_kernels.formats.pages import Pages
from sharding import DECODE, PREFILL, AxisRules, collectives
from v4jax.inference.packing import PackedStates
from v4jax.inference.sampling import (
    TOP,
    Sampling,
    SamplingRows,
    log_probabilities,
    masked,
    num_words,
    penalised,
    sample,
)
from v4jax.nn.adapter_rows import choosing
from v4jax.nn.cache import (
    Cache,
    CacheFormat,
    LayerCache,
    empty_cache,
    pages_of,
    ratios_of,
)
from v4jax.nn.compilation import jit
from v4jax.nn.cross_entropy import cross_entropy
from v4jax.nn.model import Transformer
from v4jax.nn.placement import num_batch_parts, specs

NO_TOKEN = -1  # of a row that has ended
STOP_SLOTS = 8  # stop ids of a row come in multiples of this
MOST_STEPS = 32  # of one call of decode
# On a CPU: its programs take half as long as those of the third (docs/measurements/compile_time.md).
LLVM_LEVEL = 2
PROGRAMS = 32  # steps of a kind that are kept: models of the same parts share them

Tables = dict[int, Any]  # by ratio: pages [S, n] int32


def _pytree(cls):
    names = [field.name for field in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])


@_pytree
@dataclasses.dataclass(frozen=True)
class RequestRows:
    """What slots hold of their requests; every array has a row for each."""

    seeds: jax.Array | np.ndarray  # [S] uint32
    limits: jax.Array | np.ndarray  # [S] int32 tokens that may be generated
    stop_ids: jax.Array | np.ndarray  # [S, K] int32, padded with -1
    sampling: SamplingRows

    @staticmethod
    def of(
        requests: Sequence[Sampling],
        stop_ids: Sequence[Sequence[int]],
        vocab: int,
        prompts: Sequence[Sequence[int]],
        width: int = STOP_SLOTS,
    ) -> "RequestRows":
        """NumPy arrays; `width` is the number of stop ids that there is room for."""
        stops = np.full((len(requests), width), NO_TOKEN, np.int32)
        for row, ids in zip(stops, stop_ids, strict=True):
            row[: len(ids)] = list(ids)
        seeds = np.array([request.seed for request in requests], np.uint32)
        limits = np.array([request.max_new_tokens for request in requests], np.int32)
        return RequestRows(seeds, limits, stops, SamplingRows.of(requests, vocab, prompts))


@_pytree
@dataclasses.dataclass(frozen=True)
class Slots:
    """S sequences that are being served.

    The cache is without tables, which steps are given, and without states, which lie packed.
    """

    cache: Cache
    states: PackedStates  # of the cache's layers
    logits: jax.Array  # [S, V] float32 of the next token
    steps: jax.Array  # [S] int32 tokens generated so far
    done: jax.Array  # [S] bool: nothing is decoded
    counts: jax.Array  # [S, V] int32: how often each token has been generated
    adapters: jax.Array  # [S] int32: number of the one that computes it, 0: none
    requests: RequestRows


@_pytree
@dataclasses.dataclass(frozen=True)
class Output:
    """What a call of decode has generated: N = `MOST_STEPS` columns, of which some are used."""

    tokens: jax.Array  # [S, N] int32, -1 where a row had ended
    logprobs: jax.Array  # [S, N] float32 of each token, if a row of the batch wants them
    top_ids: jax.Array  # [S, N, TOP] int32
    top_logprobs: jax.Array  # [S, N, TOP] float32


def empty_slots(
    model: Transformer,
    count: int,
    pages: dict[int, int],
    format: CacheFormat = None,
    *,
    stop_width: int = STOP_SLOTS,
) -> Slots:
    """`count` slots without a request, and `pages[ratio]` pages in the pools of each part.

    Under the mesh of the steps that it is for. To be called under jit.
    """
    vocab, parts = model.cfg.vocab_size, num_batch_parts(DECODE)
    cache = empty_cache(
        *(model.cfg, model.numerics, count, pages, {}, model.cfg.max_length, format), parts=parts
    )
    nobody = [Sampling()] * count
    requests = RequestRows.of(nobody, [()] * count, vocab, (), stop_width)
    return Slots(
        dataclasses.replace(cache, states=()),
        PackedStates.of(cache.states),
        jnp.zeros((count, vocab), jnp.float32),
        jnp.zeros(count, jnp.int32),
        jnp.ones(count, bool),
        jnp.zeros((count, vocab), jnp.int32),
        jnp.zeros(count, jnp.int32),
        jax.tree.map(jnp.asarray, requests),
    )


def decode_shapes(
    model: Transformer, batch: int, context: int, format: CacheFormat = None
) -> tuple[Slots, Tables, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Arguments of `decode_step` behind the leaves, as shapes: so many slots of so many tokens each."""
    counts = {ratio: pages_of(context, ratio) for ratio in ratios_of(model.cfg)}
    in_part = batch // num_batch_parts(DECODE)
    pages = {ratio: 1 + in_part * count for ratio, count in counts.items()}
    slots = jax.eval_shape(lambda: empty_slots(model, batch, pages, format))
    shape = jax.ShapeDtypeStruct
    tables = {ratio: shape((batch, count), jnp.int32) for ratio, count in counts.items()}
    allowed = shape((batch, num_words(model.cfg.vocab_size)), jnp.uint32)
    return slots, tables, shape((), jnp.int32), shape((batch,), jnp.bool), allowed


def prefill_step(model: Transformer, rules: AxisRules = PREFILL) -> Callable:
    """Compiled on first use: (leaves, slots, tables, tokens [G, T], counts [G], slot [G]) -> slots.

    The slots are donated. `leaves` are those of the model's parameters.
    """
    return _prefill_step(_Parts.of(model, rules))


@functools.lru_cache(maxsize=PROGRAMS)
def _prefill_step(parts: "_Parts") -> Callable:
    rules = parts.rules
    rows = rules.spec("batch")

    def on_device(leaves, slots, tables, tokens, counts, slot):
        cache = slots.cache
        pick, put = _row(slot)
        one = dataclasses.replace(
            cache,
            states=jax.tree.map(pick, slots.states).apart(),
            tables=jax.tree.map(pick, tables),
            lengths=pick(cache.lengths),
        )
        counts = jnp.where(slot >= 0, counts, 0)
        model = choosing(parts.merged(leaves), pick(slots.adapters))
        logits, one = _chunk(model, tokens, counts, one, pick(slots.logits))
        lengths = put(cache.lengths, one.lengths)
        return dataclasses.replace(
            slots,
            cache=dataclasses.replace(cache, pools=one.pools, lengths=lengths),
            states=jax.tree.map(put, slots.states, PackedStates.of(one.states)),
            logits=put(slots.logits, logits),
        )

    step = parts.per_device(on_device, (rows, rows, rules.tokens, rows, rows), rows)
    return jit(step, level=LLVM_LEVEL, donate_argnums=(1,))


def decode_step(model: Transformer, rules: AxisRules = DECODE) -> Callable:
    """Compiled on first use: (leaves, slots, tables, count, cancelled [S], allowed) -> Output and slots.

    Up to `count` tokens of every slot, fewer if all have ended. The slots are donated. Every process
    gets the tokens of all slots. `allowed` [S, ceil(V / 32)] uint32 masks the tokens of every step, see
    `sampling.masked`.
    """
    return _decode_step(_Parts.of(model, rules))


@functools.lru_cache(maxsize=PROGRAMS)
def _decode_step(parts: "_Parts") -> Callable:
    rules = parts.rules
    rows = rules.spec("batch")

    def on_device(leaves, slots, tables, count, cancelled, allowed):
        slots = dataclasses.replace(slots, done=slots.done | cancelled)
        shape = (slots.done.shape[0], MOST_STEPS)
        top = min(TOP, slots.logits.shape[1])
        output = Output(
            jnp.full(shape, NO_TOKEN, jnp.int32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, top), jnp.int32),
            jnp.zeros((*shape, top), jnp.float32),
        )

        is_tpu = target_platform() == "tpu"

        def more(state):
            step, slots, *_ = state
            some = collectives.pmax(jnp.any(~slots.done).astype(jnp.int32), "batch")
            return (step < count) & (some > 0)

        def body(state):
            step, slots, states, output = state
            here = leaves
            if is_tpu:
                # In the loop, or XLA keeps what it makes of every layer's weights all the while.
                step, here = jax.lax.optimization_barrier((step, leaves))
            model = choosing(parts.merged(here), slots.adapters)
            new, slots, states = _decode_one(model, slots, states, tables, allowed)
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=step, axis=1)
            return step + 1, slots, states, jax.tree.map(put, output, new)

        # Apart through the loop: XLA writes what lies together piece by piece.
        states = slots.states.apart()
        slots = dataclasses.replace(slots, states=PackedStates((), None, None, ()))
        start = jnp.zeros((), jnp.int32), slots, states, output
        _, slots, states, output = jax.lax.while_loop(more, body, start)
        slots = dataclasses.replace(slots, states=PackedStates.of(states))
        gather = functools.partial(collectives.all_gather, axis=0)
        return jax.tree.map(lambda x: gather(x, "batch"), output), slots

    step = parts.per_device(on_device, (rows, rows, jax.P(), rows, rows), (jax.P(), rows))
    return jit(step, level=LLVM_LEVEL, donate_argnums=(1,))


def _decode_one(
    model: Transformer,
    slots: Slots,
    states: tuple[LayerCache, ...],
    tables: Tables,
    allowed: jax.Array,
) -> tuple[Output, Slots, tuple[LayerCache, ...]]:
    """One more token of every slot that has not ended; the output is without the axis of steps.

    Args:
      states: those of the slots, apart. The new ones are the last result, and not in the slots.
    """
    requests, vocab = slots.requests, slots.logits.shape[1]
    keys = jax.vmap(jax.random.key)(requests.seeds)
    keys = jax.vmap(jax.random.fold_in)(keys, slots.steps)
    logits = masked(penalised(slots.logits, slots.counts, requests.sampling), allowed)
    drawn = sample(logits, keys, requests.sampling)
    tokens = jnp.where(slots.done, NO_TOKEN, drawn)
    wants = jnp.asarray(requests.sampling.wants_logprobs) & ~slots.done
    output = Output(tokens, *log_probabilities(slots.logits, tokens, wants))

    row = jnp.arange(len(tokens))
    counts = slots.counts.at[row, jnp.where(slots.done, vocab, drawn)].add(1, mode="drop")
    steps = slots.steps + ~slots.done
    is_stop = jnp.any(tokens[:, None] == requests.stop_ids, axis=-1)
    done = slots.done | is_stop | (steps >= requests.limits)
    cache = dataclasses.replace(slots.cache, tables=tables, states=states)
    streams, cache = model.extend(
        jnp.maximum(tokens, 0)[:, None], jnp.where(done, 0, 1).astype(jnp.int32), cache
    )
    logits = model.logits(model.hidden(streams))[:, 0]
    states = cache.states
    cache = dataclasses.replace(cache, tables={}, states=())
    # What has ended keeps its logits: a slot whose prompt is being fed has those of its last chunk.
    logits = jnp.where(done[:, None], slots.logits, logits)
    new = dataclasses.replace(
        slots, cache=cache, logits=logits, steps=steps, done=done, counts=counts
    )
    return output, new, states


def _row(slot: jax.Array):
    """Functions that take row `slot` [1] of arrays [S, ...] and that write it, if it is not -1."""
    at = jnp.maximum(slot[0], 0)

    def pick(x):
        return jax.lax.dynamic_slice_in_dim(x, at, 1)

    def put(x, new):
        new = jnp.where(slot[0] >= 0, new, pick(x))
        return jax.lax.dynamic_update_slice_in_dim(x, new, at, axis=0)

    return pick, put


def slot_steps(rules: AxisRules = DECODE) -> "SlotSteps":
    """Those of the ambient mesh."""
    return _slot_steps(rules, jax.sharding.get_abstract_mesh())


@functools.lru_cache(maxsize=PROGRAMS)
def _slot_steps(rules: AxisRules, mesh) -> "SlotSteps":
    del mesh  # the ambient one
    return SlotSteps(rules)


class SlotSteps:
    """Steps that move what slots hold, without the model. Compiled on first use; slots are donated."""

    def __init__(self, rules: AxisRules):
        rows = rules.spec("batch")

        def step(fn: Callable, arguments: int, donated: tuple[int, ...] = (0,)) -> Callable:
            mapped = collectives.per_device(fn, rules, (rows,) * arguments, rows)
            return jax.jit(mapped, donate_argnums=donated)

        self.start = step(_start, 3)  # (slots, slot [G], RequestRows [G]) -> slots
        self.snapshot = step(_snapshot, 2, ())  # (slots, slot [G]) -> states [G]
        self.restore = step(_restore, 5)  # (slots, slot, states, lengths, adapters), [G] -> slots
        self.copy_pages = step(_copy_pages, 3)  # (slots, source, target), by ratio [G] -> slots
        self.take_rows = step(_take_rows, 2, ())  # (slots, slot [G]) -> rows
        self.put_rows = step(_put_rows, 3)  # (slots, slot [G], rows) -> slots
        self.read_pages = step(_read_pages, 3, ())  # (slots, tables, slot [G]) -> pages
        self.write_pages = step(_write_pages, 4)  # (slots, tables, slot [G], pages) -> slots


def _start(slots: Slots, slot: jax.Array, rows: RequestRows) -> Slots:
    """A request whose prompt is in the cache begins to decode."""
    pick, put = _row(slot)
    return dataclasses.replace(
        slots,
        steps=put(slots.steps, jnp.zeros(1, jnp.int32)),
        done=put(slots.done, jnp.zeros(1, bool)),
        counts=put(slots.counts, jnp.zeros_like(pick(slots.counts))),
        requests=jax.tree.map(put, slots.requests, rows),
    )


def _snapshot(slots: Slots, slot: jax.Array) -> PackedStates:
    """What a slot has that does not grow."""
    return jax.tree.map(_row(slot)[0], slots.states)


def _restore(
    slots: Slots, slot: jax.Array, states: PackedStates, lengths: jax.Array, adapters: jax.Array
) -> Slots:
    """A slot with such a state after so many tokens, that such an adapter has computed."""
    _, put = _row(slot)
    return dataclasses.replace(
        slots,
        cache=dataclasses.replace(slots.cache, lengths=put(slots.cache.lengths, lengths)),
        states=jax.tree.map(put, slots.states, states),
        adapters=put(slots.adapters, adapters),
    )


def _copy_pages(slots: Slots, source: Tables, target: Tables) -> Slots:
    """One page of every ratio copied to another (page 0 to itself: none)."""

    def copy(pool, ratio):
        content = Pages(pool, source[ratio][:, None]).contiguous()
        return Pages(pool, target[ratio][:, None]).replaced(content)

    return _holding(slots, _of_pools(slots, copy))


def _take_rows(slots: Slots, slot: jax.Array) -> Slots:
    """A slot's row of every array, without pages."""
    return jax.tree.map(_row(slot)[0], _holding(slots, ()))


def _put_rows(slots: Slots, slot: jax.Array, rows: Slots) -> Slots:
    """The inverse, into any slot."""
    new = jax.tree.map(_row(slot)[1], _holding(slots, ()), rows)
    return _holding(new, slots.cache.pools)


def _read_pages(slots: Slots, tables: Tables, slot: jax.Array) -> tuple:
    """What is in the pages of a slot's tables, layer by layer."""
    pick, _ = _row(slot)
    return _of_pools(slots, lambda pool, ratio: Pages(pool, pick(tables[ratio])).contiguous())


def _write_pages(slots: Slots, tables: Tables, slot: jax.Array, pages: tuple) -> Slots:
    """The inverse, into the pages of any slot's tables; page 0 keeps what it has."""
    pick, _ = _row(slot)
    tables = {ratio: jnp.where(slot[0] >= 0, pick(table), 0) for ratio, table in tables.items()}

    def write(pool, ratio, content):
        return Pages(pool, tables[ratio]).replaced(content)

    return _holding(slots, _of_pools(slots, write, pages))


def _of_pools(slots: Slots, fn: Callable, *others: tuple) -> tuple:
    """`fn(pool, ratio, *parts of others)` of every pool, layer by layer."""
    cache = slots.cache
    return tuple(
        jax.tree.map(lambda pool, *x, r=ratio: fn(pool, r, *x), *layer, is_leaf=_is_rows)
        for ratio, *layer in zip(cache.ratios, cache.pools, *others, strict=True)
    )


def _holding(slots: Slots, pools: tuple) -> Slots:
    """These slots with other pools."""
    return dataclasses.replace(slots, cache=dataclasses.replace(slots.cache, pools=pools))


def _is_rows(x) -> bool:
    """Whether it is a pool, in any format."""
    return hasattr(x, "shape")


def chunk_step(model: Transformer, rules: AxisRules = PREFILL) -> Callable:
    """Compiled on first use: (leaves, tokens [B, T], counts [B], cache, logits [B, V]) -> cache, logits.

    A chunk of every sequence of a cache that has its tables. Cache and logits are donated. Rows
    without a token in the chunk keep their logits.
    """
    return _chunk_step(_Parts.of(model, rules))


@functools.lru_cache(maxsize=PROGRAMS)
def _chunk_step(parts: "_Parts") -> Callable:
    rules = parts.rules
    rows = rules.spec("batch")

    def on_device(leaves, tokens, counts, cache, logits):
        logits, cache = _chunk(parts.merged(leaves), tokens, counts, cache, logits)
        return cache, logits

    step = parts.per_device(on_device, (rules.tokens, rows, rows, rows), (rows, rows))
    return jit(step, level=LLVM_LEVEL, donate_argnums=(3, 4))


def _chunk(model: Transformer, tokens, counts, cache: Cache, logits):
    """Logits after the last of `counts` tokens, and the cache."""
    streams, cache = model.extend(tokens, counts, cache)
    last = collectives.row_at(streams, jnp.maximum(counts - 1, 0), "seq")
    new = model.logits(model.hidden(last[:, None]))[:, 0]
    return jnp.where((counts > 0)[:, None], new, logits), cache


def whole_step(model: Transformer, count: int, rules: AxisRules = PREFILL) -> Callable:
    """Compiled on first use: (leaves, tokens [B, T], first [B]) -> logits [B, count, V].

    Of whole sequences without a cache, after `count` tokens from each row's `first` on.
    """
    return _whole_step(_Parts.of(model, rules), count)


@functools.lru_cache(maxsize=PROGRAMS)
def _whole_step(parts: "_Parts", count: int) -> Callable:
    rules = parts.rules
    rows = rules.spec("batch")

    def on_device(leaves, tokens, first):
        model = parts.merged(leaves)
        streams, _ = model.trunk(tokens)
        few = [collectives.row_at(streams, first + i, "seq") for i in range(count)]
        return model.logits(model.hidden(jnp.stack(few, axis=1)))

    return jit(parts.per_device(on_device, (rules.tokens, rows), rows))


def losses_step(model: Transformer, rules: AxisRules = PREFILL) -> Callable:
    """Compiled on first use: (leaves, tokens [B, T], following [B, T], cache) -> losses [B, T].

    -log p of each following token, `tokens` being a chunk after what the cache holds.
    """
    return _losses_step(_Parts.of(model, rules))


@functools.lru_cache(maxsize=PROGRAMS)
def _losses_step(parts: "_Parts") -> Callable:
    rules = parts.rules
    rows = rules.spec("batch")

    def on_device(leaves, tokens, following, cache):
        model = parts.merged(leaves)
        length = collectives.psum(jnp.int32(tokens.shape[1]), "seq")
        streams, _ = model.extend(tokens, jnp.full(tokens.shape[0], length), cache)
        return cross_entropy(model, model.hidden(streams), following)

    placed = (rules.tokens, rules.tokens, rows)
    return jit(parts.per_device(on_device, placed, rules.tokens))


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a step is made of, but for the arrays: models that agree in it share their programs."""

    graphdef: Any
    treedef: Any
    leaf_specs: tuple[jax.P, ...]
    rules: AxisRules
    mesh: Any  # the ambient one

    @staticmethod
    def of(model: Transformer, rules: AxisRules) -> "_Parts":
        graphdef, params = nnx.split(model)
        placed = jax.tree.leaves(specs(params, rules), is_leaf=lambda s: isinstance(s, jax.P))
        mesh = jax.sharding.get_abstract_mesh()
        return _Parts(graphdef, jax.tree.structure(params), tuple(placed), rules, mesh)

    def merged(self, leaves) -> Transformer:
        """The model with these leaves of its parameters.

        Steps take leaves: flattening a module costs milliseconds of host time in every call.
        """
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))

    def per_device(self, fn: Callable, arguments: tuple, results) -> Callable:
        """`fn(leaves, ...)` on every device; `arguments`, `results`: specs of what is not leaves."""
        placed = (list(self.leaf_specs), *arguments)
        return collectives.per_device(fn, self.rules, placed, results)
