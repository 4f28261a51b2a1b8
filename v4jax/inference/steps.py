"""What runs on the devices while a batch is generated: pure steps over one pytree of slots.

    slots = prefill(leaves, tokens, counts, slots)      a chunk of every row's prompt
    tokens, slots = decode(leaves, slots)               one more token of every row

Everything about a request is an array with one row a slot: how it is sampled, what ends it, how much
it may generate. So a step is compiled once for a model, a number of slots and a capacity, and a row
can be put in or taken out without another program. Sampled tokens stay on the devices, where the
next step finds them in the logits.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.dispatch import target_platform
from sharding import DECODE, PREFILL, AxisRules, collectives
from v4jax.inference.sampling import Sampling, SamplingRows, sample
from v4jax.nn.cache import Cache
from v4jax.nn.cross_entropy import cross_entropy
from v4jax.nn.model import Transformer
from v4jax.nn.placement import specs

NO_TOKEN = -1  # of a row that has ended
STOP_SLOTS = 8  # stop ids of a row come in multiples of this


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "logits", "keys", "steps", "limits", "stop_ids", "done", "sampling"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Slots:
    """A batch that is being generated; every array has a row for each of its B slots."""

    cache: Cache
    logits: jax.Array  # [B, V] float32 of the next token
    keys: jax.Array  # [B] random keys
    steps: jax.Array  # [B] int32 tokens generated so far
    limits: jax.Array  # [B] int32 tokens that may be generated
    stop_ids: jax.Array  # [B, S] int32, padded with -1
    done: jax.Array  # [B] bool
    sampling: SamplingRows


def request_rows(
    requests: Sequence[Sampling], stop_ids: Sequence[int]
) -> tuple[SamplingRows, np.ndarray, np.ndarray, np.ndarray]:
    """What slots hold of requests, as NumPy: sampling, seeds [B], limits [B], stop ids [B, S]."""
    width = -(-max(len(stop_ids), 1) // STOP_SLOTS) * STOP_SLOTS
    stops = np.full((len(requests), width), NO_TOKEN, np.int32)
    stops[:, : len(stop_ids)] = list(stop_ids)
    seeds = np.array([request.seed for request in requests], np.uint32)
    limits = np.array([request.max_new_tokens for request in requests], np.int32)
    return SamplingRows.of(requests), seeds, limits, stops


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
    return jax.jit(step, donate_argnums=(3, 4), compiler_options=_compiler_options())


def decode_step(model: Transformer, rules: AxisRules = DECODE) -> Callable:
    """Compiled on first use: (leaves, slots) -> tokens [B] (-1: the row has ended) and the new slots.

    The slots are donated. Every process gets the tokens of all rows.
    """
    merged, leaf_specs = _parameters(model, rules)
    rows = rules.spec("batch")

    def on_device(leaves, slots):
        keys = jax.vmap(jax.random.fold_in)(slots.keys, slots.steps)
        tokens = sample(slots.logits, keys, slots.sampling)
        tokens = jnp.where(slots.done, NO_TOKEN, tokens)
        steps = slots.steps + ~slots.done
        is_stop = jnp.any(tokens[:, None] == slots.stop_ids, axis=-1)
        done = slots.done | is_stop | (steps >= slots.limits)
        counts = jnp.where(done, 0, 1).astype(jnp.int32)
        model = merged(leaves)
        streams, cache = model.extend(jnp.maximum(tokens, 0)[:, None], counts, slots.cache)
        logits = model.logits(model.hidden(streams))[:, 0]
        new = dataclasses.replace(slots, cache=cache, logits=logits, steps=steps, done=done)
        return collectives.all_gather(tokens, "batch", axis=0), new

    step = collectives.per_device(on_device, rules, (leaf_specs, rows), (jax.P(), rows))
    return jax.jit(step, donate_argnums=(1,), compiler_options=_compiler_options())


def _compiler_options() -> dict[str, int] | None:
    """Of XLA, on a CPU: LLVM's second level, whose programs take half as long as those of the third.

    docs/measurements/compile_time.md has the figures. None where jax asks for less anyway.
    """
    if target_platform() != "cpu" or jax.config.values["jax_disable_most_optimizations"]:
        return None
    return {"xla_backend_optimization_level": 2}


def whole_step(model: Transformer, count: int, rules: AxisRules = PREFILL) -> Callable:
    """Compiled on first use: (leaves, tokens [B, T], first [B]) -> logits [B, count, V].

    Of whole sequences without a cache, after `count` tokens from each row's `first` on.
    """
    merged, leaf_specs = _parameters(model, rules)
    rows = rules.spec("batch")

    def on_device(leaves, tokens, first):
        model = merged(leaves)
        streams, _ = model.trunk(tokens)
        few = [collectives.row_at(streams, first + i, "seq") for i in range(count)]
        return model.logits(model.hidden(jnp.stack(few, axis=1)))

    return jax.jit(collectives.per_device(on_device, rules, (leaf_specs, rules.tokens, rows), rows))


def losses_step(model: Transformer, rules: AxisRules = PREFILL) -> Callable:
    """Compiled on first use: (leaves, tokens [B, T], following [B, T], cache) -> losses [B, T].

    -log p of each following token, `tokens` being a chunk after what the cache holds.
    """
    merged, leaf_specs = _parameters(model, rules)
    rows = rules.spec("batch")

    def on_device(leaves, tokens, following, cache):
        model = merged(leaves)
        length = collectives.psum(jnp.int32(tokens.shape[1]), "seq")
        streams, _ = model.extend(tokens, jnp.full(tokens.shape[0], length), cache)
        return cross_entropy(model, model.hidden(streams), following)

    specs = (leaf_specs, rules.tokens, rules.tokens, rows)
    return jax.jit(collectives.per_device(on_device, rules, specs, rules.tokens))


def _parameters(model: Transformer, rules: AxisRules):
    """A function from the leaves of the model's parameters to the model, and their specs.

    Steps take leaves: flattening a module costs milliseconds of host time in every call.
    """
    graphdef, params = nnx.split(model)
    treedef = jax.tree.structure(params)

    def merged(leaves) -> Transformer:
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))

    return merged, jax.tree.leaves(specs(params, rules), is_leaf=lambda s: isinstance(s, jax.P))
