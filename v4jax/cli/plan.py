"""Compiles a full-size job ahead of time for a TPU slice, and says what a device holds and does.

    v4jax plan --model flash --topology v6e:4x4 --job decode --context 131072 --batch 16
    v4jax plan --model flash --topology v6e:2x4,tpu7x:2x2x1 --job serve
    v4jax plan --model flash --topology v6e:2x4 --job decode --context 131072 --batch 8 --step

Needs `pip install 'v4jax[tpu]'`, no TPU; of the model nothing but shapes is made. Without `--mesh` a
mesh is chosen, and the choice explained. `--layers 5` gives a quick look at a shorter model.

`--step` says what the compiler made of a whole step, by kind of layer: operations, launches, and how
long XLA's part, the kernels and the collectives take. It compiles one short model to the end and, for
each kind of layer, one with a layer more up to the schedule.

`--job serve` compiles nothing and needs seconds: by arithmetic it says how many requests a slice holds
when it is full, how long a step of so many takes at least, and which mesh is fastest.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence

import jax

from pallas_kernels.chips import CHIPS, Chip
from sharding import AXES, make_mesh
from v4jax.cli import full_slices, step_table
from v4jax.cli.errors import one_message
from v4jax.cli.options import command_parser
from v4jax.config import VARIANTS, V4Config
from v4jax.nn.lora import PRESETS, LoRA
from v4jax.nn.remat import POLICIES
from v4jax.planning import costs
from v4jax.planning.capacity import Workload, serving_seconds
from v4jax.planning.compiled import peak_of, schedule
from v4jax.planning.hlo import Collective, Exchange, array_bytes, collectives, exchanges
from v4jax.planning.leftovers import end_process
from v4jax.planning.plan import EXPERTS, TRAINED, Job, MeshChoice, choose_mesh, program
from v4jax.planning.policies import PolicyCosts, by_policy
from v4jax.planning.roofline import Roofline, roofline
from v4jax.planning.step_report import StepReport, measure
from v4jax.planning.topologies import COMPILER_OPTIONS, Slice, chip_of, topology_devices

GiB = 2**30
SERVE = "serve"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, from the compiled program."""

    parameters: float
    optimizer: float
    cache: float
    temp: float  # activations, gathered weights, gradients
    peak: float
    limit: float

    @property
    def fits(self) -> bool:
        """Whether the peak is within the device's memory."""
        return self.peak <= self.limit


@dataclasses.dataclass(frozen=True)
class Report:
    """All that a plan says."""

    command: str
    model: str
    layers: int
    topology: str
    devices: int
    chips: int
    job: Job
    mesh: dict[str, int]
    memory: Memory
    fits: bool
    error: str  # the compiler's, if the program needs more memory than there is
    collectives: list[Collective]
    exchanges: list[Exchange]  # asynchronous ones that carry rows of experts
    roofline: Roofline | None
    policies: list[PolicyCosts]  # of training
    lower_seconds: float
    compile_seconds: float
    has_code: bool  # False: compilation was stopped once memory was assigned and the HLO scheduled


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = command_parser("plan", __doc__)
    parser.add_argument(
        "--model", choices=sorted(VARIANTS), default="flash", help="the architecture"
    )
    slices = ", ".join(name for chip in CHIPS.values() for name in chip.slices[:2])
    parser.add_argument(
        "--topology", required=True, help=f"a slice: {slices} ...; serve: several, with commas"
    )
    parser.add_argument(
        "--job", choices=sorted([*EXPERTS, SERVE]), required=True, help="what is run"
    )
    parser.add_argument(
        "--context",
        type=lambda text: tuple(map(int, text.split(","))),
        metavar="TOKENS",
        help="tokens of a sequence; serve: several, with commas (default: 8k, 32k, 128k and 1M, and "
        "8k with an answer of 1k)",
    )
    parser.add_argument(
        "--answer", type=int, default=0, help="serve: tokens generated behind --context tokens"
    )
    parser.add_argument(
        "--batch", type=int, default=0, help="sequences; default one a device, serve: what fits"
    )
    parser.add_argument("--chunk", type=int, default=4096, help="prefill: tokens fed at once")
    parser.add_argument("--mesh", default="", help="such as fsdp=4,expert=16 (default: chosen)")
    parser.add_argument(
        "--experts",
        choices=("fp4", "float"),
        default="",
        help="serving: fp4, as released; float, no quantized weight (default: fp4)",
    )
    parser.add_argument(
        "--trainable",
        choices=sorted(TRAINED),
        default="all",
        help="train: what trains; the rest stays as released. indexer: the warm-up of indexers",
    )
    parser.add_argument("--lora-rank", type=int, default=16, help="lora: columns of an adapter")
    parser.add_argument(
        "--lora-targets", choices=sorted(PRESETS), default="attention", help="lora: which matrices"
    )
    parser.add_argument(
        "--remat",
        choices=list(POLICIES),
        default="layers",
        help="train: what layers keep for the backward pass, from most memory to least",
    )
    parser.add_argument(
        "--cache",
        choices=("packed", "float"),
        help="KV cache in FP8 and FP4, or in floats (default: packed where it is exact)",
    )
    parser.add_argument("--layers", type=int, default=0, help="only the first layers")
    parser.add_argument(
        "--schedule", action="store_true", help="stop once the program is scheduled, without code"
    )
    parser.add_argument(
        "--step", action="store_true", help="what a step is made of, by kind of layer"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args()
    if args.layers < 0 or args.batch < 0 or args.answer < 0:
        parser.error("--layers, --batch and --answer: expected positive numbers")
    if args.job == SERVE:
        if args.answer and not args.context:
            parser.error("--answer: expected --context, the tokens before it")
        if args.mesh and "," in args.topology:
            parser.error("--mesh: expected one --topology")
        if args.schedule or args.step:
            parser.error("--schedule, --step: --job serve compiles nothing")
    elif len(args.context or ()) != 1 or args.answer:
        parser.error(f"--job {args.job}: expected one --context, and no --answer")
    return args


def mesh_sizes(text: str, num_devices: int) -> dict[str, int]:
    """ "fsdp=2,expert=8" -> sizes of all axes.

    Raises:
      ValueError: an unknown axis, no number, or another number of devices.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.isdigit() or int(size) < 1:
            raise ValueError(f"--mesh {part!r}: expected AXIS=SIZE with an axis of {AXES}.")
        sizes[axis] = int(size)
    product = math.prod(sizes.values())
    if product != num_devices:
        raise ValueError(f"--mesh {text}: {product} devices, but there are {num_devices}.")
    return sizes


def memory_of(peak: float, held: dict[str, float], chip: Chip) -> Memory:
    """What a device holds at a peak that the compiler says."""
    parameters, optimizer = held.get("parameters", 0.0), held.get("optimizer", 0.0)
    cache = held.get("cache", 0.0)
    temp = max(peak - (parameters + optimizer + cache), 0.0)
    return Memory(parameters, optimizer, cache, temp, peak, chip.hbm)


def memory_of_error(message: str, held: dict[str, float], chip: Chip) -> Memory:
    """The same from the compiler's out-of-memory error.

    Raises:
      ValueError: the message is of something else.
    """
    found = re.search(r"total memory required for \D*\(([\d.]+)([KMGT])\) exceeds", message)
    found = found or re.search(r"Used ([\d.]+)([KMGT]) of", message)
    if not found:
        raise ValueError(message)
    return memory_of(float(found[1]) * 1024 ** (" KMGT".index(found[2])), held, chip)


def plan(
    cfg: V4Config, topology: str, job: Job, mesh_text: str, *, has_code: bool = True, say=print
) -> Report:
    """Chooses or reads a mesh, compiles, and reports.

    Args:
      has_code: compile to the end, not only to the schedule.

    Raises:
      ValueError: the topology is unknown, or the mesh does not suit the job.
    """
    chip, devices = chip_of(topology), topology_devices(topology)
    sizes = chosen_sizes(cfg, Slice.of(topology), job, mesh_text, say)
    started = time.monotonic()
    mesh = make_mesh(devices=devices, **sizes)
    planned = program(cfg, job, mesh)
    lowered = planned.lower()
    lowering = time.monotonic() - started
    say(f"lowered in {lowering:.0f} s; compiling for {len(devices)} devices ...")
    started, error, sent, beside, bound = time.monotonic(), "", [], [], None
    try:
        if has_code:
            compiled = lowered.compile(COMPILER_OPTIONS)
            text, peak = compiled.as_text() or "", peak_of(compiled)
        else:
            text, peak = schedule(lowered)
        memory = memory_of(peak, planned.held, chip)
        sent = collectives(text)
        beside = [one for one in exchanges(text) if one.kind == "ragged-all-to-all"]
        bound = roofline(cfg, job, chip, sizes, planned.held, sent)
    except jax.errors.JaxRuntimeError as failure:
        error = str(failure)
        memory = memory_of_error(error, planned.held, chip)
    seconds = time.monotonic() - started
    say(f"{'compiled' if has_code else 'scheduled'} in {seconds:.0f} s")
    return Report(
        command=" ".join(["v4jax plan", *sys.argv[1:]]),
        model=cfg.name,
        layers=len(cfg.layers),
        topology=topology,
        devices=len(devices),
        chips=len(devices) // chip.devices_per_chip,
        job=job,
        mesh=sizes,
        memory=memory,
        fits=not error and memory.fits,
        error=error[:2000],
        collectives=sent,
        exchanges=beside,
        roofline=bound,
        policies=by_policy(cfg, job, sizes) if job.kind == "train" else [],
        lower_seconds=round(lowering, 1),
        compile_seconds=round(seconds, 1),
        has_code=has_code,
    )


def chosen_sizes(
    cfg: V4Config, place: Slice, job: Job, mesh_text: str, say=print
) -> dict[str, int]:
    """Of the mesh that `--mesh` gives, else of the one that is chosen, which is explained.

    Raises:
      ValueError: see `mesh_sizes` and `choose_mesh`.
    """
    if mesh_text:
        return mesh_sizes(mesh_text, place.devices)
    seconds = serving_seconds(cfg, place, job)
    choice = choose_mesh(cfg, place.chip, place.devices, job, seconds)
    say(describe_choice(choice))
    return choice.sizes


def plan_step(
    cfg: V4Config, topology: str, job: Job, mesh_text: str, *, has_code: bool = True, say=print
) -> StepReport:
    """Chooses or reads a mesh for the whole model, and measures a step under it.

    Raises:
      ValueError: see `plan` and `step_report.measure`.
    """
    devices = topology_devices(topology)
    sizes = chosen_sizes(cfg, Slice.of(topology), job, mesh_text, say)
    held = program(cfg, job, make_mesh(devices=devices, **sizes)).held
    return measure(cfg, topology, job, sizes, held, has_code=has_code, say=say)


def describe_choice(choice: MeshChoice) -> str:
    """A mesh and why."""
    sizes = ", ".join(f"{axis}={n}" for axis, n in choice.sizes.items() if n > 1)
    return "\n".join([f"mesh {sizes or 'of one device'}", *[f"  {r}" for r in choice.reasons]])


def describe(report: Report, cfg: V4Config) -> str:
    """The report for people."""
    chip, memory = chip_of(report.topology), report.memory
    unit = "device (half a chip)" if chip.devices_per_chip == 2 else "chip"
    rows = {
        "parameters": memory.parameters,
        "optimizer state": memory.optimizer,
        "cache": memory.cache,
        "temporary": memory.temp,
        "peak": memory.peak,
        "memory there is": memory.limit,
    }
    lines = [f"memory per {unit}, GiB"]
    for name, size in rows.items():
        per_chip = ""
        if chip.devices_per_chip > 1:
            per_chip = f"   per chip {size * chip.devices_per_chip / GiB:9.2f}"
        lines += [f"  {name:18} {size / GiB:9.2f}{per_chip}"] if size else []
    lines.append("fits" if report.fits else "DOES NOT FIT")
    lines += describe_policies(report.policies, report.job.remat)
    bound = report.roofline
    if bound is None:  # the program was not compiled to its end
        return "\n".join([*lines, report.error.split("\n")[0]])
    lines.append("collectives per device and step: kind, devices together, count, MB sent, result")
    for c in report.collectives[:16]:
        lines.append(
            f"  {c.kind:18} {c.group:4} {c.count:6} {c.sent_bytes / 1e6:12.2f}  {c.result}"
        )
    if len(report.collectives) > 16:
        rest = report.collectives[16:]
        sent = sum(c.sent_bytes for c in rest)
        lines.append(
            f"  {len(rest)} others          {sum(c.count for c in rest)} {sent / 1e6:12.2f}"
        )
    if moved := [c for c in report.collectives if c.kind == "ragged-all-to-all"]:
        beside = [one for one in report.exchanges if one.work]
        covered = sum(one.count * array_bytes(one.result) for one in beside)
        share = covered / sum(c.count * array_bytes(c.result) for c in moved)
        lines.append(
            f"rows of experts: {sum(one.count for one in beside)} of {sum(c.count for c in moved)} "
            f"exchanges, {share:.0%} of their bytes, run beside kernels or matrix products"
        )
    lines += [
        "roofline of a step, per device (assumptions: v4jax/planning/roofline.py)",
        f"  compute {bound.flops / 1e12:10.3f} TFLOP {bound.compute * 1e3:10.3f} ms",
        f"  HBM     {bound.hbm_bytes / 1e9:10.3f} GB    {bound.memory * 1e3:10.3f} ms",
        f"  ICI     {bound.ici_bytes / 1e9:10.3f} GB    {bound.links * 1e3:10.3f} ms",
        f"  at most {bound.tokens_per_second:,.0f} tokens/s on {report.chips} chips: {bound.bound}",
    ]
    return "\n".join([*lines, *_kinds(cfg, report.job)])


def describe_policies(policies: Sequence[PolicyCosts], chosen: str) -> list[str]:
    """What --remat would change, a line each; nothing of jobs that do not train."""
    if not policies:
        return []
    title = "GiB that layers keep for the backward pass, and TFLOP, of a device by arithmetic"
    lines = [f"--remat (here {chosen}): {title}"]
    for one in policies:
        kept = "everything" if one.kept is None else f"{one.kept / GiB:10.2f}"
        host = f"   on the host {one.host / GiB:.2f}" if one.host else ""
        lines.append(f"  {one.name:10} {kept:>10} {one.flops / 1e12:10.3f}{host}")
    return lines


def _kinds(cfg: V4Config, job: Job) -> list[str]:
    """What one token costs at the end of the context, by kind of layer."""
    lines = ["one token at the end of the context: layers, GFLOP, MB of weights, MB of cache read"]
    for kind in costs.by_kind(cfg, job.context, job.recipe):
        lines.append(
            f"  {kind.layers:3} {kind.kind:18} {kind.flops.total / 1e9:9.3f} "
            f"{kind.weight_bytes / 1e6:9.1f} {kind.cache_bytes_read / 1e6:9.3f}"
        )
    return lines


def serve(cfg: V4Config, args: argparse.Namespace) -> bool:
    """Prints what slices do when they are full; whether something fits everywhere."""
    places = [Slice.of(name) for name in args.topology.split(",")]
    contexts = args.context or full_slices.CONTEXTS
    workloads = [Workload(context, args.answer) for context in contexts]
    if not args.context:
        workloads.append(Workload(contexts[0], full_slices.ANSWER))
    found, refused = full_slices.choices(
        *(cfg, places, workloads),
        batch=args.batch,
        sizes=mesh_sizes(args.mesh, places[0].devices) if args.mesh else None,
        experts=args.experts,
        cache=args.cache,
    )
    others = [] if args.layers else full_slices.comparisons(cfg, places)
    if args.json:
        print(full_slices.as_json(cfg, found, others))
    else:
        print(full_slices.describe(cfg, found, refused, others))
    return not refused


def main() -> None:
    """Prints the plan; exits with 1 if it does not fit."""
    args = parse_args()
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # none of this machine's devices is used
    jax.config.update("jax_enable_compilation_cache", False)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", file=sys.stderr, flush=True)

    cfg = VARIANTS[args.model]()
    if args.layers:
        cfg = dataclasses.replace(cfg, layers=cfg.layers[: args.layers])
    if args.job == SERVE:
        sys.exit(0 if serve(cfg, args) else 1)
    chip_of(args.topology)
    devices = len(topology_devices(args.topology))
    job = Job(
        kind=args.job,
        context=args.context[0],
        batch=args.batch or devices,
        chunk=args.chunk,
        experts=args.experts,
        cache=args.cache,
        trainable=args.trainable,
        lora=LoRA(rank=args.lora_rank, targets=args.lora_targets),
        remat=args.remat,
    )
    if args.step:
        step = plan_step(cfg, args.topology, job, args.mesh, has_code=not args.schedule, say=say)
        print(step_table.as_json(step) if args.json else step_table.describe(step))
        return
    report = plan(cfg, args.topology, job, args.mesh, has_code=not args.schedule, say=say)
    if args.json:
        print(json.dumps(dataclasses.asdict(report), indent=1))
    else:
        print(describe(report, cfg))
    sys.stdout.flush()
    end_process(0 if report.fits else 1)


if __name__ == "__main__":
    with one_message():
        main()
