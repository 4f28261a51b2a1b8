"""What a slice does when it is full: the engine's step by arithmetic, nothing is compiled.

    full = fullest(flash(), Slice.of("v6e:2x4"), Workload(prompt=8192, answer=1024)).full
    print(full.batch, full.sizes, full.tokens_per_second)

For every mesh of a slice: how many requests fit into a device's memory, and how long a step of so many
takes at least. The mesh that gives most tokens a second is taken.

Memory: weights as they lie on the mesh; slots and pages as `empty_slots` allocates them, with pages for
all slots at full length; the prefixes that an engine keeps; and an allowance for temporaries (below).
Slots and pages are counted from shapes, weights from those of the model.

Time is a bound: that of `roofline.py`, whose assumptions hold here too, and

* a weight is multiplied with the rows that meet it on its device: what a tensor axis does not cut, and
  what a context axis repeats in decoding, is counted on each device;
* decoding shows all rows of the devices that share experts to each of them, which writes and reads
  K copies of them; the residual streams pass 12 times a layer, and logits and counts, [slots,
  vocabulary] each, are read, and logits written;
* a collective takes at least a microsecond for each link on the longest way, and its bytes at the rate
  of all links; collectives that come one after the other add up;
* prompts are fed in the engine's largest chunks, one in each part of the batch at a time; weights are
  read for each chunk, and CSA attention computes all entries before a query under a mask;
* nothing waits: slots are always full, the host costs nothing, and prompts share no prefix.

The memory of scalars that page tables take in kernels is not looked at.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
from flax import nnx

from pallas_kernels.formats.pages import PAGE
from sharding import DECODE, PREFILL
from v4jax.config import V4Config
from v4jax.inference.engine import CHUNKS, PREFIXES
from v4jax.inference.steps import Slots, empty_slots
from v4jax.nn.cache import CacheFormat, pages_of, pool_pages, ratios_of
from v4jax.nn.layers import HashTable
from v4jax.nn.model import Transformer
from v4jax.nn.placement import check_mesh
from v4jax.planning import costs
from v4jax.planning.plan import (
    HBM_SHARE,
    Job,
    abstract_model,
    local_bytes,
    mesh_name,
    meshes,
    num_parts,
    row_bytes,
)
from v4jax.planning.roofline import STREAM_PASSES, Roofline
from v4jax.planning.topologies import Slice

CHUNK = CHUNKS[-1]  # tokens of a prompt that are fed at once
# Seconds a link takes for any message. "This is typically around 1us": How To Scale Your Model, part 3,
# "A note on ICI latency" (jax-ml/scaling-book, sharding.md), whose formula for rings this follows.
HOP_SECONDS = 1e-6
ROW_PASSES = 2  # over the K copies of rows that meet experts
VOCABULARY_PASSES = 3  # over [slots, vocabulary] in 4 bytes: logits and counts in, logits out
# Temporaries. The shares were fitted to compiled prefill and decode steps (docs/plans.md has by how
# much they are off); no step with more than one sequence a device has been compiled.
TEMPORARY_BYTES = 0.2 * 2**30  # of any step
ROW_SHARE = 2.25  # of `plan.row_bytes`, for each token of a step
SAMPLING_ARRAYS = 8  # of [slots, vocabulary] in 4 bytes: what `sample` sorts, adds up and puts back


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests that all are alike, in tokens. Without an answer: decoding at the prompt's end alone."""

    prompt: int
    answer: int = 0

    def __post_init__(self):
        if self.prompt < 1 or self.answer < 0:
            raise ValueError(
                f"{self}: expected a prompt of at least a token, and no negative answer."
            )

    @property
    def context(self) -> int:
        """Tokens that a slot has room for."""
        return self.prompt + self.answer

    @property
    def name(self) -> str:
        """ "decode at 8k" or "8k in, 1k out"."""
        if not self.answer:
            return f"decode at {_thousands(self.prompt)}"
        return f"{_thousands(self.prompt)} in, {_thousands(self.answer)} out"


def _thousands(tokens: int) -> str:
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes of one device."""

    weights: float
    state: float  # slots (rings, open windows, logits, counts, options) and pages
    prefixes: float  # what is kept beside their pages
    temporary: float  # an allowance

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.state + self.prefixes + self.temporary


@dataclasses.dataclass(frozen=True)
class StateSizes:
    """Bytes of the engine's state in one part."""

    slot: float
    page: dict[int, float]  # by ratio, of all layers together
    snapshot: float  # of a slot: what a prefix keeps beside its pages

    @staticmethod
    def of(model: Transformer, format: CacheFormat = None) -> "StateSizes":
        """From the shapes of `empty_slots`, taken eight at a time: packed pools are whole tiles."""
        ratios, many = ratios_of(model.cfg), 8

        def nbytes(slots: int, pages: dict[int, int]) -> float:
            return _nbytes(_shapes(model, slots, pages, format))

        some = dict.fromkeys(ratios, many)
        whole = nbytes(many, some)
        slot = (nbytes(2 * many, some) - whole) / many
        page = {r: (nbytes(many, {**some, r: 2 * many}) - whole) / many for r in ratios}
        snapshot = _nbytes(_shapes(model, many, some, format).states) / many
        return StateSizes(slot, page, snapshot)

    def nbytes(self, slots: int, pages: dict[int, int]) -> float:
        """Of so many slots and pages by ratio."""
        return slots * self.slot + sum(n * self.page[r] for r, n in pages.items())


def _shapes(model: Transformer, slots: int, pages: dict[int, int], format: CacheFormat) -> Slots:
    """Of `empty_slots` in one part."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return jax.eval_shape(lambda: empty_slots(model, slots, pages, format))


@dataclasses.dataclass(frozen=True)
class Weights:
    """Of one device of a mesh."""

    held: float  # bytes
    experts: float  # bytes of those, of routed experts
    table: float  # bytes of the embedding table, of which a few rows are read
    met: float  # number of weights that each row meets: without routed experts and table
    head: float  # number of those, of the output head

    @staticmethod
    def of(model: Transformer, sizes: dict[str, int]) -> "Weights":
        """Under the rules of decoding, which are those of prefill."""
        held = experts = table = met = head = 0.0
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            nbytes = local_bytes(variable, DECODE, sizes)
            held += nbytes
            if "expert" in variable.axes:
                experts += nbytes
            elif path[0] == "embed":
                table += nbytes
            elif not isinstance(variable, HashTable):
                number = variable.get_value().size / num_parts(variable, DECODE, sizes)
                met += number
                head += number if path[0] == "head" else 0
        return Weights(held, experts, table, met, head)


@dataclasses.dataclass(frozen=True)
class Full:
    """A mesh of a slice with as many requests as fit, or with as many as were asked for."""

    model: str
    place: Slice
    workload: Workload
    sizes: dict[str, int]  # of the mesh axes
    slots: int  # of each part of the batch
    batch: int  # requests of all parts together
    held: Held
    limit: float  # bytes that a device may fill
    step: Roofline  # of decoding; at the middle of the answers, if there are any
    prompt: Roofline | None  # of a prompt in each part, if there are answers

    @property
    def parts(self) -> int:
        """Of the batch: each has slots and pages of its own."""
        return _num_parts(self.sizes)

    @property
    def seconds(self) -> float:
        """Of a step, or of all prompts and answers of the batch."""
        if self.prompt is None:
            return self.step.seconds
        rounds = math.ceil(self.batch / self.parts)
        return rounds * self.prompt.seconds + self.workload.answer * self.step.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all devices: generated tokens, or tokens of prompts and answers if there are answers."""
        tokens = self.workload.context if self.prompt else 1
        return self.batch * tokens / self.seconds

    @property
    def generated_per_second(self) -> float:
        """Tokens of answers alone."""
        tokens = self.workload.answer if self.prompt else 1
        return self.batch * tokens / self.seconds

    @property
    def bound(self) -> str:
        """What the step is bound by, and the prompts where they take longer than the steps."""
        if self.prompt is None or self.workload.answer * self.step.seconds > self.seconds / 2:
            return self.step.bound
        return f"{self.prompt.bound} of prompts"

    @property
    def mesh(self) -> str:
        """ "expert=4,tensor=2"; "" for one device."""
        return mesh_name(self.sizes)

    def command(self, cfg: V4Config) -> str:
        """What serves it on the slice."""
        tokens = max(self.slots * _tokens_to_reserve(cfg, self.workload), self.workload.context)
        mesh = f" --mesh {self.mesh}" if self.mesh else ""
        slots = self.slots * self.parts
        return f"v4jax serve --checkpoint DIR --slots {slots} --cache-tokens {tokens}{mesh}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The fastest mesh, and why it is."""

    full: Full
    reason: str
    others: list[Full]  # that it fits under too, the faster ones first


def fullest(
    cfg: V4Config,
    place: Slice,
    workload: Workload,
    *,
    batch: int = 0,
    sizes: dict[str, int] | None = None,
    experts: str = "",
    cache: CacheFormat = None,
) -> Choice:
    """The mesh of a slice that gives most tokens a second, of those that divide the model.

    Args:
      batch: requests at once; 0: as many as fit.
      sizes: the one mesh that is looked at; None: all.
      experts, cache: see `plan.Job`.

    Raises:
      ValueError: it fits under no mesh, `sizes` do not divide the model, or the model takes no such
        context.
    """
    if workload.context > cfg.max_length:
        raise ValueError(
            f"context={workload.context}: expected at most {cfg.max_length} of {cfg.name}."
        )
    job = Job(kind="decode", context=workload.context, batch=1, experts=experts, cache=cache)
    found = []
    for mesh in meshes(place.devices) if sizes is None else [sizes]:
        try:
            for rules, length in ((DECODE, None), (PREFILL, CHUNK)):
                check_mesh(cfg, rules, length=length, quantized=job.experts == "fp4", sizes=mesh)
        except ValueError:
            if sizes is not None:
                raise
            continue
        server, parts = Server(cfg, place, job, mesh), _num_parts(mesh)
        fits = functools.partial(server.fits, workload=workload)
        slots = math.ceil(batch / parts) if batch else largest(fits)
        if slots and fits(slots):
            found.append(server.full(slots, batch or slots * parts, workload))
    if not found:
        many = f"{batch} requests" if batch else "a request"
        raise ValueError(
            f"{place.topology}: {many} of {workload.context:,} tokens of {cfg.name} fit under no "
            "mesh; a larger slice or a shorter context would do."
        )
    found.sort(key=lambda f: (-f.tokens_per_second, f.sizes["tensor"], f.sizes["context"]))
    best, *others = found
    if not others:
        return Choice(best, "the only mesh that it fits under", others)
    gain = best.tokens_per_second / others[0].tokens_per_second - 1
    second = others[0].mesh or "one device"
    reason = (
        f"fastest of {len(found)} meshes that it fits under, {gain:.1%} ahead of {second} "
        f"with {others[0].batch:,} requests"
    )
    return Choice(best, reason, others)


def serving_seconds(
    cfg: V4Config, place: Slice, job: Job
) -> Callable[[dict[str, int]], float] | None:
    """Of a serving job under a mesh of a slice, by the roofline; None of training.

    Decoding: of a step at the end of the context. Prefill: of whole prompts of that length.
    """
    if job.kind == "train":
        return None

    def seconds(sizes: dict[str, int]) -> float:
        server, slots = Server(cfg, place, job, sizes), math.ceil(job.batch / _num_parts(sizes))
        if job.kind == "decode":
            return server.decode(slots, job.batch, job.context).seconds
        return slots * server.prefill(job.context).seconds

    return seconds


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, if all smaller ones do; 0 if 1 does not."""
    upper = 1
    while fits(upper):
        upper *= 2
    lower = upper // 2  # fits, or is 0
    while upper - lower > 1:
        middle = (lower + upper) // 2
        lower, upper = (middle, upper) if fits(middle) else (lower, middle)
    return lower


@functools.lru_cache(maxsize=32)
def _model(cfg: V4Config, experts: str) -> Transformer:
    job = Job(kind="decode", context=1, batch=1, experts=experts)
    return abstract_model(cfg, job, scan_layers=True)


@functools.lru_cache(maxsize=32)
def _state_sizes(cfg: V4Config, experts: str, cache: CacheFormat) -> StateSizes:
    return StateSizes.of(_model(cfg, experts), cache)


@functools.lru_cache(maxsize=1024)
def _weights(cfg: V4Config, experts: str, sizes: tuple[tuple[str, int], ...]) -> Weights:
    return Weights.of(_model(cfg, experts), dict(sizes))


class Server:
    """An engine on one mesh of a slice."""

    def __init__(self, cfg: V4Config, place: Slice, job: Job, sizes: dict[str, int]):
        self.cfg, self.place, self.job, self.sizes = cfg, place, job, sizes
        self.weights = _weights(cfg, job.experts, tuple(sizes.items()))
        self.state = _state_sizes(cfg, job.experts, job.cache)
        self.limit = HBM_SHARE * place.chip.hbm

    def held(self, slots: int, workload: Workload) -> Held:
        """What a device holds with so many slots in each part, all of them at full length."""
        cfg, state = self.cfg, self.state
        tokens = slots * _tokens_to_reserve(cfg, workload)
        in_slots, with_prefixes = (
            state.nbytes(slots, pool_pages(cfg, tokens, n)) for n in (slots, slots + PREFIXES)
        )
        return Held(
            weights=self.weights.held,
            state=in_slots,
            prefixes=PREFIXES * state.snapshot + with_prefixes - in_slots,
            temporary=temporary_bytes(cfg, slots, slots * self.sizes["expert"], workload.context),
        )

    def fits(self, slots: int, workload: Workload) -> bool:
        """Whether a device may hold so many slots."""
        return self.held(slots, workload).total <= self.limit

    def full(self, slots: int, batch: int, workload: Workload) -> Full:
        """With so many slots in each part and so many requests in them."""
        context = workload.prompt + workload.answer // 2
        return Full(
            model=self.cfg.name,
            place=self.place,
            workload=workload,
            sizes=self.sizes,
            slots=slots,
            batch=batch,
            held=self.held(slots, workload),
            limit=self.limit,
            step=self.decode(slots, batch, context),
            prompt=self.prefill(workload.prompt) if workload.answer else None,
        )

    def decode(self, slots: int, batch: int, context: int) -> Roofline:
        """A step of so many slots a part. `batch` of all slots have a request; others are masked."""
        cfg, weights, moe = self.cfg, self.weights, self.cfg.moe
        expert, tensor, shared = (self.sizes[a] for a in ("expert", "tensor", "context"))
        rows = slots * expert  # that meet on the devices which share experts
        one = [costs.layer_flops(cfg, spec, context) for spec in cfg.layers]
        flops = slots * (
            2 * weights.met + sum(f.attention / tensor + f.indexer for f in one)
        ) + rows * self._expert_flops / (expert * shared * tensor)
        idle = 1 - costs.experts_hit(cfg, rows) / moe.num_experts
        caches = sum(costs.cache_bytes_read(cfg, s, context, self.job.recipe) for s in cfg.layers)
        copies = ROW_PASSES * len(cfg.layers) * moe.experts_per_token * 2 * cfg.embed_dim
        hbm = (
            *(weights.held - weights.table, -idle * weights.experts),
            slots * (caches + self._streams + VOCABULARY_PASSES * 4 * cfg.vocab_size),
            rows * copies,
        )
        wide = 4 * cfg.embed_dim  # bytes of a row in float32
        sent = [
            (rows * (wide / 2 + 8 * moe.experts_per_token), expert, 1),
            (rows * wide, expert, 1),
            (rows * wide, shared, 2),
            *self._sums(slots),
        ]
        sent = [x for x in sent for _ in cfg.layers] + [(slots * 4 * cfg.vocab_size, tensor, 1)]
        return self._roofline(flops, sum(hbm), sent, batch)

    def prefill(self, length: int) -> Roofline:
        """A prompt of `length` tokens in each part, in chunks."""
        cfg, weights, moe = self.cfg, self.weights, self.cfg.moe
        expert, tensor, context = (self.sizes[a] for a in ("expert", "tensor", "context"))
        tokens = length / context  # of a device
        whole = costs.prefill_flops(cfg, length, masked=True)
        flops = (
            tokens * (2 * (weights.met - weights.head) + self._expert_flops / tensor)
            + 2 * weights.head
            + (whole.attention / tensor + whole.indexer) / context
        )
        chunks = math.ceil(length / CHUNK)
        hbm = chunks * (weights.held - weights.table) + tokens * self._streams
        rows = tokens / chunks * moe.experts_per_token * 2 * cfg.embed_dim
        sent = [(rows, expert * context, 1)] * 2 + self._sums(tokens / chunks)
        sent = [x for x in sent for _ in range(chunks * len(cfg.layers))]
        return self._roofline(flops, hbm, sent, length * _num_parts(self.sizes))

    @property
    def _expert_flops(self) -> float:
        """Of a token's routed experts in all layers."""
        moe = self.cfg.moe
        weights = 3 * self.cfg.embed_dim * moe.expert_dim
        return 2.0 * len(self.cfg.layers) * moe.experts_per_token * weights

    @property
    def _streams(self) -> float:
        """Bytes of memory traffic for a token's residual streams in all layers."""
        return STREAM_PASSES * len(self.cfg.layers) * self.cfg.num_streams * self.cfg.embed_dim * 2

    def _sums(self, tokens: float) -> list[tuple[float, int, int]]:
        """Sums of a layer over the tensor axis: of attention, shared expert and routed experts."""
        wide, tensor = 4 * self.cfg.embed_dim, self.sizes["tensor"]
        return [
            (tokens * wide / 2, tensor, 2),
            (tokens * wide / 2, tensor, 2),
            (tokens * wide, tensor, 2),
        ]

    def _roofline(
        self, flops: float, hbm: float, sent: list[tuple[float, int, int]], tokens: int
    ) -> Roofline:
        """Collectives are bytes of the whole array, devices, and how often it goes round."""
        chip, links, ici = self.place.chip, 0.0, 0.0
        for whole, devices, times in sent:
            if devices > 1:
                part = times * whole * (devices - 1) / devices
                ici += part
                links += max(part / chip.ici, times * self.place.hops(devices) * HOP_SECONDS)
        return Roofline(flops, hbm, ici, flops / chip.flops, hbm / chip.bandwidth, links, tokens)


def temporary_bytes(
    cfg: V4Config, slots: int, rows: int, context: int, chunk: int = CHUNK
) -> float:
    """An allowance for what a step holds beside its arguments, on a device.

    The larger of decoding, with so many slots and so many rows that meet experts, and of a chunk of a
    prompt: its activations, and the entries of one layer, packed side by side and in bfloat16.
    """
    moe, activations = cfg.moe, ROW_SHARE * row_bytes(cfg)
    copies = rows * moe.experts_per_token * 2 * (2 * cfg.embed_dim + moe.expert_dim)
    decode = slots * (activations + SAMPLING_ARRAYS * 4 * cfg.vocab_size) + copies
    ratio = min(ratios_of(cfg), default=context)
    entries = context / ratio * (costs.kv_row_bytes(cfg) + 2 * cfg.head_dim)
    prefill = chunk * activations + entries
    return TEMPORARY_BYTES + max(decode, prefill)


def _tokens_to_reserve(cfg: V4Config, workload: Workload) -> int:
    """Tokens a slot for which `pool_pages` gives every slot the pages of a whole context."""
    pages = {ratio: pages_of(workload.context, ratio) for ratio in ratios_of(cfg)}
    return max(((count - 1) * ratio * PAGE for ratio, count in pages.items()), default=0)


def _num_parts(sizes: dict[str, int]) -> int:
    return math.prod(sizes[axis] for axis in DECODE.mesh_axes("batch"))


def _nbytes(tree) -> float:
    return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)))
