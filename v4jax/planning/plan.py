"""Full-size jobs, compiled ahead of time: which mesh, what a device holds, the program.

    cfg, job = flash(), Job(kind="decode", context=131_072, batch=16)
    choice = choose_mesh(cfg, CHIPS["v6e"], 16, job)
    mesh = make_mesh(devices=topology_devices("v6e:4x4"), **choice.sizes)
    compiled = program(cfg, job, mesh).lower().compile()

Nothing of a model is allocated: arrays are shapes with shardings.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.formats.quantize import QuantizedArray
from sharding import AXES, DECODE, PREFILL, TRAIN, AxisRules, kept_axis
from v4jax.config import V4Config
from v4jax.inference.steps import chunk_step, decode_shapes, decode_step
from v4jax.nn.cache import CacheFormat
from v4jax.nn.lora import LoRA, add_lora
from v4jax.nn.model import Stage, Transformer
from v4jax.nn.numerics import plain, released
from v4jax.nn.placement import FP4_BLOCK, check_mesh, is_rounded, specs
from v4jax.nn.quantization import Chosen, to_float, to_released
from v4jax.nn.remat import require_policy
from v4jax.planning import costs
from v4jax.train.indexer_warmup import IndexerWarmup
from v4jax.train.optimizers import adamw
from v4jax.train.step import TrainStep, trained_by
from v4jax.train.trainer import TRAINABLE, is_adapter

EXPERTS = {"prefill": ("fp4", "float"), "decode": ("fp4", "float"), "train": ("float",)}
_RULES = {"prefill": PREFILL, "decode": DECODE, "train": TRAIN}
TRAINED: dict[str, Chosen] = {**TRAINABLE, "lora": is_adapter}
HBM_SHARE = 0.97  # of a device's memory that estimates may fill


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is run.

    `experts`: "fp4", everything as the released checkpoints store it; "float", no quantised weight
    (bfloat16 when serving, float32 in training). `cache`: of `init_cache`; None is what serving takes,
    packed for "fp4". `trainable`: "all"; "no-experts", the experts stay as released; "indexer", the warm-up
    of indexers; or "lora", adapters like `lora`. What does not train stays as released. `remat`: what layers
    keep for the backward pass (`v4jax.nn.remat`).
    """

    kind: str  # "prefill", "decode" or "train"
    context: int  # tokens a sequence; when serving, what its cache has room for
    batch: int  # sequences
    chunk: int = 4096  # tokens of a sequence that prefill feeds at once
    experts: str = ""  # default: the first of `EXPERTS[kind]`
    cache: CacheFormat = None
    trainable: str = "all"
    lora: LoRA = dataclasses.field(default_factory=LoRA)
    remat: str = "layers"

    def __post_init__(self):
        require_policy(self.remat)
        if self.remat != "layers" and self.kind != "train":
            raise ValueError(
                f"remat={self.remat!r}: expected it for kind='train', and this is {self.kind!r}."
            )
        if self.trainable not in TRAINED or (self.trainable != "all" and self.kind != "train"):
            raise ValueError(
                f"trainable={self.trainable!r}: expected one of {tuple(TRAINED)}, for kind='train'."
            )
        if self.kind not in EXPERTS:
            raise ValueError(f"kind={self.kind!r}: expected one of {tuple(EXPERTS)}.")
        if not self.experts:
            object.__setattr__(self, "experts", EXPERTS[self.kind][0])
        if self.experts not in EXPERTS[self.kind]:
            raise ValueError(
                f"experts={self.experts!r}: expected one of {EXPERTS[self.kind]} for {self.kind}."
            )
        if self.kind == "prefill" and self.context < self.chunk:
            object.__setattr__(self, "chunk", self.context)
        for name in ("context", "batch", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number.")

    @property
    def recipe(self) -> costs.Recipe:
        """What serving holds weights and caches in."""
        if self.experts != "fp4":
            return costs.BFLOAT16
        return costs.RELEASED_WIDE_CACHE if self.cache == "float" else costs.RELEASED

    @property
    def rules(self) -> AxisRules:
        """How arrays are spread."""
        return _RULES[self.kind]

    @property
    def length(self) -> int:
        """Tokens of a sequence that one step works on."""
        return {"prefill": self.chunk, "decode": 1, "train": self.context}[self.kind]

    def check(self, cfg: V4Config, sizes: dict[str, int]) -> None:
        """Raises ValueError, with the sizes that would do, if a mesh does not suit the job."""
        if not self.context <= cfg.max_length:
            raise ValueError(
                f"context={self.context}: expected at most {cfg.max_length} of {cfg.name}."
            )
        check_mesh(
            *(cfg, self.rules),
            batch=self.batch,
            length=None if self.kind == "decode" else self.length,
            quantized=self.experts == "fp4" or self.trainable in ("lora", "indexer"),
            sizes=sizes,
        )
        if self.trainable != "no-experts":
            return
        for axis, name, whole in (
            ("expert_embed", "embed_dim", cfg.embed_dim),
            ("expert_dim", "moe.expert_dim", cfg.moe.expert_dim),
        ):
            parts = math.prod(sizes[a] for a in self.rules.mesh_axes(axis))
            if parts > 1 and whole // parts % FP4_BLOCK:
                raise ValueError(
                    f"the mesh cuts {name}={whole} of packed experts into {parts} parts: expected "
                    f"multiples of {FP4_BLOCK}."
                )


def abstract_model(cfg: V4Config, job: Job, *, scan_layers: bool) -> Transformer:
    """The job's model with shapes in the place of arrays, MTP block only in training."""

    def make() -> Transformer:
        if job.kind == "train":
            numerics = plain(jnp.bfloat16)
            model = Transformer(cfg, numerics, job.rules, scan_layers=scan_layers, rngs=nnx.Rngs(0))
            is_trained = trained_by(TRAINED[job.trainable])
            stays = lambda path, variable: not is_trained(path.split("."), variable)
            model = to_released(model, stays) if job.trainable != "all" else model
            return add_lora(model, job.lora) if job.trainable == "lora" else model
        trunk = dataclasses.replace(cfg, mtp_layers=())
        numerics = released() if job.experts == "fp4" else plain(jnp.bfloat16)
        model = Transformer(trunk, numerics, job.rules, scan_layers=scan_layers, rngs=nnx.Rngs(0))
        return to_released(model) if job.experts == "fp4" else to_float(model, jnp.bfloat16)

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return nnx.eval_shape(make)


# Programs -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted step and its abstract arguments, for a mesh."""

    step: jax.stages.Wrapped
    arguments: tuple
    mesh: jax.sharding.Mesh
    held: dict[str, float]  # bytes on one device: "parameters", "optimizer", "cache"

    def lower(self) -> jax.stages.Lowered:
        """Traces the step."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(*self.arguments)


def program(cfg: V4Config, job: Job, mesh: jax.sharding.Mesh) -> Program:
    """The job's step on a mesh.

    Raises:
      ValueError: the mesh does not suit the job.
    """
    job.check(cfg, dict(mesh.shape))
    model = abstract_model(cfg, job, scan_layers=job.kind == "train")
    with jax.set_mesh(mesh):
        build = {"train": _train, "decode": _decode, "prefill": _prefill}[job.kind]
        step, arguments, held = build(model, job, mesh)
    return Program(step, arguments, mesh, {name: device_bytes(x) for name, x in held.items()})


def _train(model, job, mesh):
    loss = IndexerWarmup() if job.trainable == "indexer" else None
    trainable = TRAINED[job.trainable]
    rule, rules = adamw(1e-4), job.rules
    train = TrainStep(model, rule, rules=rules, trainable=trainable, loss=loss, remat=job.remat)
    state = jax.eval_shape(train.init)
    place = functools.partial(_place_variables, rules=job.rules, mesh=mesh)
    state = jax.tree.map(
        lambda x: place(x) if isinstance(x, nnx.State) else _placed(x, jax.P(), mesh),
        state,
        is_leaf=lambda x: isinstance(x, nnx.State),
    )
    tokens = jax.ShapeDtypeStruct((job.batch, job.context), jnp.int32)
    tokens = _placed(tokens, job.rules.tokens, mesh)
    held = {"parameters": (state.params, state.fixed), "optimizer": state.opt_state}
    return train.compiled_step, (state, tokens, tokens, tokens), held


def _decode(model, job, mesh):
    leaves, rows = _leaves(model, job, mesh), job.rules.spec("batch")

    slots, tables, count, *by_slot = decode_shapes(model, job.batch, job.context, job.cache)
    slots, tables, by_slot = jax.tree.map(
        lambda x: _placed(x, rows, mesh), (slots, tables, by_slot)
    )
    held = {"parameters": leaves, "cache": (slots.cache, slots.states)}
    arguments = (leaves, slots, tables, _placed(count, jax.P(), mesh), *by_slot)
    return decode_step(model, job.rules), arguments, held


def _prefill(model, job, mesh):
    leaves, rows = _leaves(model, job, mesh), job.rules.spec("batch")
    tokens = jax.ShapeDtypeStruct((job.batch, job.chunk), jnp.int32)
    counts = jax.ShapeDtypeStruct((job.batch,), jnp.int32)
    by_row = jax.tree.map(
        lambda x: _placed(x, rows, mesh),
        (counts, *jax.eval_shape(lambda: _cache_and_logits(model, job))),
    )
    held = {"parameters": leaves, "cache": by_row[1]}
    arguments = (leaves, _placed(tokens, job.rules.tokens, mesh), *by_row)
    return chunk_step(model, job.rules), arguments, held


def _cache_and_logits(model, job):
    cache = model.init_cache(job.batch, job.context, job.cache)
    return cache, jnp.zeros((job.batch, model.cfg.vocab_size), jnp.float32)


def _leaves(model, job, mesh) -> list[jax.ShapeDtypeStruct]:
    return jax.tree.leaves(_place_variables(nnx.split(model)[1], rules=job.rules, mesh=mesh))


def _place_variables(state: nnx.State, rules: AxisRules, mesh) -> nnx.State:
    where = jax.tree.leaves(specs(state, rules), is_leaf=lambda s: isinstance(s, jax.P))
    leaves, tree = jax.tree.flatten(state)
    placed = [_placed(x, spec, mesh) for x, spec in zip(leaves, where, strict=True)]
    return jax.tree.unflatten(tree, placed)


def _placed(x, spec: jax.P, mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))


def device_bytes(tree) -> float:
    """Bytes of a tree of placed shapes on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


# Choosing a mesh ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on one device by arithmetic, before anything is compiled."""

    parameters: float
    optimizer: float = 0.0  # and gradients
    cache: float = 0.0
    transient: float = 0.0  # gathered weights and activations: a rough guess

    @property
    def total(self) -> float:
        """All of it."""
        return self.parameters + self.optimizer + self.cache + self.transient


@dataclasses.dataclass(frozen=True)
class MeshChoice:
    """Mesh sizes, what a device holds under them, and why they were chosen."""

    sizes: dict[str, int]
    estimate: Estimate
    fits: bool  # by the estimate
    reasons: tuple[str, ...]


class WithMemory(Protocol):
    """A chip, or another kind of device of which this is known."""

    @property
    def hbm(self) -> float:
        """Bytes of a device's memory."""


def choose_mesh(
    cfg: V4Config,
    chip: WithMemory,
    num_devices: int,
    job: Job,
    seconds: Callable[[dict[str, int]], float] | None = None,
) -> MeshChoice:
    """The mesh of `num_devices` devices for a job: of those that fit, the one it prefers.

    Serving prefers what is fastest by `seconds`, and few copies of a sequence's work (tensor, then context)
    where no time is known; training what sends least. If none fits by the estimate, the one that needs least
    memory is taken.

    Args:
      seconds: of the job under a mesh, by its sizes (`capacity.serving_seconds`).

    Raises:
      ValueError: no mesh of that many devices divides the model and the batch.
    """
    model, limit = abstract_model(cfg, job, scan_layers=True), HBM_SHARE * chip.hbm
    cache = _cache_bytes(model, job) if job.kind != "train" else (0.0, 0.0)
    candidates = []
    for sizes in meshes(num_devices):
        try:
            job.check(cfg, sizes)
        except ValueError:
            continue
        if _is_sensible(sizes, job):
            parts = _parameter_parts(model, job, sizes)
            preference = _preference(cfg, job, sizes, parts)
            candidates.append(
                (
                    preference if seconds is None else (seconds(sizes), *preference),
                    sizes,
                    _estimate(model, job, sizes, parts, cache),
                )
            )
    if not candidates:
        raise ValueError(
            f"no mesh of {num_devices} devices suits {cfg.name} with batch={job.batch}: expected a "
            "batch that is a multiple of fsdp * expert, experts and heads that the axes divide; "
            "another batch or slice would do."
        )
    fitting = [candidate for candidate in candidates if candidate[2].total <= limit]
    fitting.sort(key=lambda candidate: candidate[0])
    advantage = ""
    if fitting:
        _, sizes, held = fitting[0]
        advantage = _advantage(job, fitting, has_times=seconds is not None)
    else:
        _, sizes, held = min(candidates, key=lambda candidate: (candidate[2].total, candidate[0]))
    reasons = _reasons(cfg, job, sizes, held, limit, len(fitting), len(candidates), advantage)
    return MeshChoice(sizes, held, bool(fitting), tuple(reasons))


def meshes(num_devices: int) -> Iterator[dict[str, int]]:
    """All sizes of the axes with that product."""
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    for fsdp in divisors:
        for expert in (n for n in divisors if num_devices % (fsdp * n) == 0):
            rest = num_devices // (fsdp * expert)
            for tensor in (n for n in divisors if rest % n == 0):
                yield dict(zip(AXES, (fsdp, expert, tensor, rest // tensor)))


def _is_sensible(sizes: dict[str, int], job: Job) -> bool:
    """Leaves out meshes that repeat work or that the expert exchange has no ragged form for."""
    if job.kind == "decode":  # a context axis repeats a sequence's cache and attention
        return sizes["context"] == 1 or job.batch == sizes["fsdp"] * sizes["expert"]
    if job.kind == "prefill":
        return sizes["expert"] == 1 or sizes["context"] == 1
    return True


def _cache_bytes(model: Transformer, job: Job) -> tuple[float, float]:
    """Of a sequence, and of the pages that are nobody's, which decoding has once on a device."""
    one = dataclasses.replace(job, batch=1)
    cache = jax.eval_shape(lambda: _cache_and_logits(model, one)[0]).nbytes
    if job.kind != "decode":
        return cache, 0.0
    slots = decode_shapes(model, 1, job.context, job.cache)[0]
    return cache, slots.cache.nbytes + slots.states.nbytes - cache


def _estimate(
    model: Transformer,
    job: Job,
    sizes: dict[str, int],
    parts: "_Parts",
    cache: tuple[float, float],
) -> Estimate:
    """What a device holds; `cache` is that of `_cache_bytes`."""
    cfg, tokens = model.cfg, _local_tokens(job, sizes)
    if job.kind != "train":
        sequence, nobody = cache
        sequences = job.batch / (sizes["fsdp"] * sizes["expert"])
        return Estimate(
            parts.held, cache=sequence * sequences + nobody, transient=tokens * row_bytes(cfg)
        )
    heads = cfg.num_heads * cfg.head_dim / sizes["tensor"]
    rows = cfg.moe.experts_per_token * (cfg.embed_dim + cfg.moe.expert_dim / sizes["tensor"])
    # Arrays of a scanned body that live at once, as the compiler's memory reports show them.
    body = 2 * (20 * cfg.num_streams * cfg.embed_dim + 30 * heads + 12 * rows)
    saved = costs.kept_by_layers(cfg, job.length, job.remat, tensor=sizes["tensor"])
    if saved is None:  # 0.43 of 3.5 MB in one compiled step (docs/measurements/training_memory.md)
        saved = len(cfg.layers) * body / 8
    transient = parts.largest_gathered + tokens * (saved + body)
    return Estimate(parts.held, optimizer=3 * parts.trained, transient=transient)


def row_bytes(cfg: V4Config) -> int:
    """Activations of a token when serving: residual streams, and queries and outputs of its heads."""
    return 4 * cfg.embed_dim * cfg.num_streams + 8 * cfg.num_heads * cfg.head_dim


def _local_tokens(job: Job, sizes: dict[str, int]) -> float:
    """Tokens that a device works on in a step."""
    cut = sizes["fsdp"] * sizes["expert"] * (1 if job.kind == "decode" else sizes["context"])
    return job.batch * job.length / cut


@dataclasses.dataclass(frozen=True)
class _Parts:
    held: float  # bytes of parameters on a device
    trained: float  # of those that gradients change
    gathered: float  # bytes that all parameters have as they are gathered, of those that are
    scattered: float  # and their gradients
    largest_gathered: float  # of both, what the largest layer has


def local_bytes(variable: nnx.Variable, rules: AxisRules, sizes: dict[str, int]) -> float:
    """Bytes of a variable on each device of a mesh; an axis that `sizes` does not name has one."""
    return _nbytes(variable.get_value()) / num_parts(variable, rules, sizes)


def num_parts(variable: nnx.Variable, rules: AxisRules, sizes: dict[str, int]) -> int:
    """The number of parts that a mesh cuts a variable into."""
    axes = [axis for name in variable.axes if name for axis in rules.mesh_axes(name)]
    return math.prod(sizes.get(axis, 1) for axis in axes)


def _parameter_parts(model: Transformer, job: Job, sizes: dict[str, int]) -> _Parts:
    rules, chosen = job.rules, trained_by(TRAINED[job.trainable])
    held = trained = gathered = scattered = 0.0
    bodies: dict[tuple, float] = {}
    stages: dict[tuple, Stage] = {
        ("stages", index): stage for index, stage in enumerate(model.stages)
    }
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        local = local_bytes(variable, rules, sizes)
        held += local
        is_trained = job.kind == "train" and chosen(path, variable)
        trained += local if is_trained else 0
        apart = kept_axis(variable.axes)
        joined = math.prod(sizes[axis] for axis in rules.mesh_axes(apart)) if apart else 1
        if joined > 1 and path[0] != "embed":
            whole = local * joined
            sent = whole / 2 if is_trained and is_rounded(variable) else whole
            returned = whole if is_trained else 0
            gathered, scattered = gathered + sent, scattered + returned
            stage = stages.get(path[:2])
            layer, repeats = (path[:4], stage.repeats) if stage else (path[:2], 1)
            bodies[layer] = bodies.get(layer, 0) + (sent + returned) / repeats
    return _Parts(held, trained, gathered, scattered, max(bodies.values(), default=0.0))


def _nbytes(value) -> int:
    return value.nbytes if isinstance(value, QuantizedArray) else value.size * value.dtype.itemsize


def _preference(cfg: V4Config, job: Job, sizes: dict[str, int], parts: _Parts) -> tuple[float, ...]:
    """What is smallest for the mesh to take among those that fit.

    For training the bytes that a device sends in a step, roughly: sums over tensor after attention,
    shared and routed experts; rows to experts and back; weights gathered, and once more for the
    backward pass, and their gradients scattered.
    """
    if job.kind != "train":
        return (sizes["tensor"], sizes["context"], sizes["fsdp"])
    rows = _local_tokens(job, sizes) * len(cfg.layers) * 2 * cfg.embed_dim
    tensor, expert = sizes["tensor"], sizes["expert"]
    sums = 3 * 2 * (tensor - 1) / tensor
    exchange = 2 * cfg.moe.experts_per_token * (expert - 1) / expert
    sent = 3 * rows * (sums + exchange) + 2 * parts.gathered + parts.scattered
    return (sent, sizes["context"], tensor)


def mesh_name(sizes: dict[str, int]) -> str:
    """As `--mesh` takes it: "expert=4,tensor=2"; "" for one device."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)


def _advantage(job: Job, fitting: list, *, has_times: bool) -> str:
    """What the first of the meshes that fit does better than the others."""
    if not has_times:
        return "sends least" if job.kind == "train" else "repeats least work"
    (first, *_), what = fitting[0][0], "a step" if job.kind == "decode" else "all prompts"
    if len(fitting) == 1:
        return f"takes {first * 1e3:.3g} ms for {what} by the roofline"
    (second, *_), sizes, _ = fitting[1]
    other = f"{mesh_name(sizes)} {second * 1e3:.3g}"
    return f"is fastest by the roofline: {first * 1e3:.3g} ms for {what}, {other}"


def _reasons(
    cfg, job, sizes, held: Estimate, limit, num_fitting, num_candidates, advantage
) -> Iterator[str]:
    gib = 2**30
    experts = math.prod(sizes[axis] for axis in job.rules.mesh_axes("expert"))
    if sizes["expert"] > 1 or experts > 1:
        yield (
            f"{' x '.join(a for a in job.rules.mesh_axes('expert') if sizes[a] > 1)}: "
            f"{cfg.moe.num_experts // experts} of {cfg.moe.num_experts} experts on a device; "
            + (
                "rows of all sequences are shown to all devices"
                if job.rules.dispatch == "gather"
                else "rows travel to their experts"
            )
        )
    sequences = job.batch // (sizes["fsdp"] * sizes["expert"])
    yield f"fsdp x expert: {sequences} of {job.batch} sequences on a device"
    for name, what in (("embed", "other weights"), ("expert_embed", "experts")):
        axes = [axis for axis in job.rules.mesh_axes(name) if sizes[axis] > 1]
        if axes:
            yield (
                f"{' x '.join(axes)}: {what} and their optimizer state lie in "
                f"{math.prod(sizes[axis] for axis in axes)} parts, gathered layer by layer"
            )
    if sizes["fsdp"] > 1 and job.kind != "train":
        yield f"fsdp={sizes['fsdp']}: copies of the model, each with its own sequences"
    if sizes["tensor"] > 1:
        yield (
            f"tensor={sizes['tensor']}: heads, hidden widths and vocabulary are cut, so that a "
            "device holds less of what the other axes repeat"
        )
    if sizes["context"] > 1 and job.kind != "decode":
        yield (
            f"context={sizes['context']}: {job.length // sizes['context']:,} of {job.length:,} "
            "positions on a device"
        )
    if sizes["context"] > 1 and job.kind == "decode":
        yield f"context={sizes['context']}: fewer sequences than devices, experts still spread"
    parts = {
        "parameters": held.parameters,
        "optimizer and gradients": held.optimizer,
        "cache": held.cache,
        "activations (guess)": held.transient,
    }
    shown = " + ".join(f"{name} {size / gib:.1f}" for name, size in parts.items() if size)
    if num_fitting:
        yield (
            f"estimate {shown} = {held.total / gib:.1f} GiB of {limit / gib:.1f} a device may fill; "
            f"of the {num_fitting} meshes that fit (of {num_candidates}) it {advantage}"
        )
    else:
        yield (
            f"estimate {shown} = {held.total / gib:.1f} GiB: more than the {limit / gib:.1f} a "
            f"device may fill, and none of {num_candidates} meshes needs less"
        )
