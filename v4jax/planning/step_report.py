"""A whole step of a full-size model, layer by layer: what the TPU compiler made of it, and how long.

    report = measure(flash(), "v6e:2x4", Job(kind="decode", context=131_072, batch=8), sizes)

A program with one layer of each kind is compiled, and for each kind one with a layer more. What the
second has more is a layer of that kind, and what is left of the first belongs to no layer: embedding,
head, sampling. So nothing is lost of what the compiler made itself and gave no scope, such as copies
of weights. A step of all layers is their sum.

Times are added up, as nothing that the core starts overlaps:

* XLA's launches: the compiler's estimated cycles, or the static schedule of those it does not estimate.
  Both are those of the first program, where the same is done in the same scope, or elsewhere;
* Pallas kernels: the longest of the static schedule, what the matrix units and what the memory needs
  for the FLOP and bytes that a kernel names (of routed experts: of those that are hit);
* collectives: bytes over all links, or the hops of a message (`capacity.HOP_SECONDS`) if that is more.

What the times leave out is in `UNKNOWN`.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

from pallas_kernels.chips import Chip
from v4jax.config import LayerSpec, V4Config
from v4jax.planning import costs, kernel_trips
from v4jax.planning.capacity import HOP_SECONDS
from v4jax.planning.compiled import Compiled, compile_apart
from v4jax.planning.hlo import Collective, collectives
from v4jax.planning.launches import COPY_BESIDE, KERNEL, SCALAR, XLA, Operation, operations
from v4jax.planning.plan import Job
from v4jax.planning.roofline import Roofline, roofline
from v4jax.planning.schedules import Schedule
from v4jax.planning.topologies import Slice

_SIZE = re.compile(r"(?<=[\[,])\d+")

ONCE = "once a step"
UNKNOWN = (
    "waits for memory inside kernels and stalls of the matrix units are in no schedule",
    "on v7x bundles are not cycles: matrix products take longer than theirs",
    "what is copied beside the core may be waited for",
    "branches that not every step takes (sampling that is not greedy) are apart",
    "loops of XLA whose trips depend on data count once",
    "of the loop over tokens one turn counts; what the compiler moved before it counts whole",
    "of v5p's two cores a kernel's schedule counts one",
)


@dataclasses.dataclass(frozen=True)
class Amount:
    """So many of something in a step, and what they take together."""

    count: float = 0
    seconds: float = 0.0
    bytes: float = 0.0  # sent by a device

    def plus(self, other: "Amount", factor: float = 1) -> "Amount":
        """The sum, of the other one `factor` times."""
        return Amount(
            self.count + factor * other.count,
            self.seconds + factor * other.seconds,
            self.bytes + factor * other.bytes,
        )


Part = tuple[str, ...]
Amounts = dict[Part, Amount]


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of a program, or of a layer."""

    other: Amounts = dataclasses.field(default_factory=dict)  # ("operations",) and the like
    xla: Amounts = dataclasses.field(default_factory=dict)  # by scope, opcode and result
    kernels: Amounts = dataclasses.field(default_factory=dict)  # by name and scope
    sent: Amounts = dataclasses.field(default_factory=dict)  # by kind, result and devices together
    branches: Amounts = dataclasses.field(
        default_factory=dict
    )  # as `xla`, of what not every step runs

    def plus(self, other: "Costs", factor: float = 1) -> "Costs":
        """The sum, of the other one `factor` times."""
        return Costs(
            _plus(self.other, other.other, factor),
            _plus(self.xla, other.xla, factor),
            _plus(self.kernels, other.kernels, factor),
            _plus(self.sent, other.sent, factor),
            _plus(self.branches, other.branches, factor),
        )

    def count(self, name: str) -> float:
        """ "operations", "scalar", "copy beside", "no time" (of XLA) or "partly timed" (kernels)."""
        return self.other.get((name,), Amount()).count

    @property
    def launches(self) -> float:
        """XLA's, kernels and collectives, as often as they run."""
        parts = (self.xla, self.kernels, self.sent)
        return sum(amount.count for part in parts for amount in part.values())

    @property
    def seconds(self) -> float:
        """All one after the other."""
        return seconds_of(self.xla) + seconds_of(self.kernels) + seconds_of(self.sent)


def seconds_of(amounts: Amounts) -> float:
    """Of all parts."""
    return sum(amount.seconds for amount in amounts.values())


def _plus(one: Amounts, other: Amounts, factor: float) -> Amounts:
    total = {
        key: one.get(key, Amount()).plus(other.get(key, Amount()), factor) for key in one | other
    }
    return {key: amount for key, amount in total.items() if amount != Amount()}


@dataclasses.dataclass(frozen=True)
class StepReport:
    """A step of all layers."""

    model: str
    topology: str
    chips: int
    job: Job
    mesh: dict[str, int]
    layers: dict[str, int]  # kind -> how many
    once: Costs
    kinds: dict[str, Costs]  # of one layer
    bound: Roofline
    temp: float  # bytes, of the program with one layer of each kind
    has_schedules: bool  # False: kernels take their floors

    @property
    def total(self) -> Costs:
        """Of the whole step."""
        return _with_layers(self.once, self.kinds, self.layers)


def measure(
    cfg: V4Config,
    topology: str,
    job: Job,
    sizes: dict[str, int],
    held: Mapping[str, float],
    *,
    has_code: bool = True,
    say: Callable[[str], None] = print,
) -> StepReport:
    """Compiles the programs and takes their differences.

    Args:
      sizes: of the mesh axes.
      held: `Program.held` of the whole model.
      has_code: compile one program to the end, for the kernels' schedules; else they take their floors.

    Raises:
      ValueError: see `compile_apart`.
    """
    place, kinds = Slice.of(topology), representatives(cfg)

    def compiled(more: Iterable[LayerSpec], has_code: bool) -> Compiled:
        layers = (*kinds.values(), *more)
        names = ", ".join(spec.kind for spec in layers)
        say(f"compiling {job.kind} with layers {names} for {topology} ...")
        short = dataclasses.replace(cfg, layers=layers)
        return compile_apart(short, topology, job, sizes, has_code=has_code)

    base = compiled((), has_code)
    reader = Reader.of(cfg, place, job, sizes, base)
    whole = reader.costs(base.text)
    layers = {
        kind: reader.costs(compiled((spec,), False).text).plus(whole, -1)
        for kind, spec in kinds.items()
    }
    return assemble(cfg, place, job, sizes, held, whole, layers, base)


def assemble(
    cfg: V4Config,
    place: Slice,
    job: Job,
    sizes: dict[str, int],
    held: Mapping[str, float],
    whole: Costs,
    layers: dict[str, Costs],
    base: Compiled,
) -> StepReport:
    """The report, from a program with one layer of each kind (`whole`) and from single layers."""
    counts = collections.Counter(spec.kind for spec in cfg.layers)
    once = _with_layers(whole, layers, dict.fromkeys(layers, -1))
    total = _with_layers(once, layers, counts)
    sent = [
        Collective(kind, result, int(group), int(amount.count), amount.bytes)
        for (kind, result, group), amount in total.sent.items()
    ]
    return StepReport(
        model=cfg.name,
        topology=place.topology,
        chips=place.chips,
        job=job,
        mesh=sizes,
        layers=dict(counts),
        once=once,
        kinds=layers,
        bound=roofline(cfg, job, place.chip, sizes, dict(held), sent),
        temp=base.temp,
        has_schedules=bool(base.schedules),
    )


def _with_layers(costs: Costs, kinds: Mapping[str, Costs], counts: Mapping[str, int]) -> Costs:
    """With so many layers of each kind beside them."""
    for kind, layer in kinds.items():
        costs = costs.plus(layer, counts[kind])
    return costs


def representatives(cfg: V4Config) -> dict[str, LayerSpec]:
    """For each kind of layer, in order, the form that most layers of the kind have.

    Layers that use others' rows or picks come last, and use those of these, by their place among them.
    """
    found: dict[str, collections.Counter[LayerSpec]] = {}
    for spec in cfg.layers:
        found.setdefault(spec.kind, collections.Counter())[spec] += 1
    specs = {kind: counts.most_common(1)[0][0] for kind, counts in found.items()}

    def borrowed(kind: str) -> int:  # nothing, rows, or picks too
        is_own = specs[kind].own_compressor == specs[kind].compressor
        return 0 if is_own else 1 if specs[kind].own_indexer else 2

    specs = {kind: specs[kind] for kind in sorted(specs, key=borrowed)}
    places = {kind: place for place, kind in enumerate(specs)}

    def at(source: int | None) -> int | None:
        return None if source is None else places[cfg.layers[source].kind]

    return {
        kind: dataclasses.replace(
            spec, entries_from=at(spec.entries_from), selection_from=at(spec.selection_from)
        )
        for kind, spec in specs.items()
    }


@dataclasses.dataclass(frozen=True)
class Reader:
    """Gives the operations of a program their times."""

    place: Slice
    job: Job
    visited: float  # experts of a device that a step reads
    hit: float  # their share
    kernels: dict[Part, Schedule]  # by name and operands
    cycles: dict[Part, float]  # of XLA's launches, by scope, opcode and result, and without scope

    @property
    def chip(self) -> Chip:
        """Of the slice."""
        return self.place.chip

    @staticmethod
    def of(
        cfg: V4Config, place: Slice, job: Job, sizes: dict[str, int], base: Compiled
    ) -> "Reader":
        """Reads estimates and schedules of a program that has code, if it has.

        The compiler estimates once the HLO is scheduled, so programs without code have no estimates.
        """
        tokens = job.batch / sizes["fsdp"] * job.length / sizes["context"]
        hit = costs.experts_hit(cfg, tokens) / cfg.moe.num_experts
        experts = cfg.moe.num_experts / sizes["expert"]
        kernels: dict[Part, Schedule] = {}
        cycles: dict[Part, list[float]] = collections.defaultdict(list)
        for one in operations(base.code or base.text):
            found = base.schedules.get(one.name)
            if one.kernel is not None:
                kernels |= {_key(one): found} if found else {}
                continue
            known: float | None = one.cycles
            if known is None and found is not None:
                known = found.least_cycles
            if known is not None:
                cycles[_key(one)].append(known)
                cycles[one.opcode, one.result].append(known)
                cycles[_of_any_size(one)].append(known)
        means = {key: sum(several) / len(several) for key, several in cycles.items()}
        return Reader(place, job, hit * experts, hit, kernels, means)

    def costs(self, text: str) -> Costs:
        """Of a program."""
        other: dict[str, int] = collections.Counter()
        xla: Amounts = {}
        branches: Amounts = {}
        kernels: Amounts = {}
        for one in operations(text):
            other["operations"] += 1
            if one.kind in (SCALAR, COPY_BESIDE):
                other[one.kind] += one.times
            elif one.kind == XLA:
                seconds = self._xla_seconds(one)
                other["no time"] += one.times * (seconds is None)
                key = one.scope, one.opcode, one.result
                _add(branches if one.in_branch else xla, key, one.times, seconds or 0.0)
            elif one.kind == KERNEL and one.kernel is not None:
                seconds, is_whole = self._kernel_seconds(one)
                other["partly timed"] += one.times * (not is_whole)
                _add(kernels, (one.kernel.name, one.scope), one.times, seconds)
        sent: Amounts = {}
        for c in collectives(text):
            hops = c.count * self.place.hops(c.group) * HOP_SECONDS
            seconds = max(c.sent_bytes / self.chip.ici, hops)
            amount = Amount(c.count, seconds, c.sent_bytes)
            key = c.kind, c.result, str(c.group)
            sent[key] = sent.get(key, Amount()).plus(amount)
        return Costs({(k,): Amount(n) for k, n in other.items() if n}, xla, kernels, sent, branches)

    def _xla_seconds(self, one: Operation) -> float | None:
        # Arrays that layers share are larger in a program with one layer more.
        alike = self.cycles.get((one.opcode, one.result), self.cycles.get(_of_any_size(one)))
        cycles = self.cycles.get(_key(one), alike) if one.cycles is None else one.cycles
        return None if cycles is None else cycles / self.chip.clock

    def _kernel_seconds(self, one: Operation) -> tuple[float, bool]:
        """Of one run, and whether all of its loops count as often as they turn."""
        kernel = one.kernel
        assert kernel is not None
        is_expert = "moe/experts" in one.scope and kernel.name.startswith("grouped")
        read = kernel.bytes * (self.hit if is_expert else 1)
        floor = max(kernel.flops / self.chip.flops, read / self.chip.bandwidth)
        found = self.kernels.get(_key(one))
        if found is None:
            return floor, False
        trips = kernel_trips.trips(
            kernel, found, self.chip.name, self.visited if is_expert else None
        )
        cycles = found.least_cycles if trips is None else found.cycles(trips)
        return max(cycles / self.chip.clock, floor), trips is not None


def _key(one: Operation) -> Part:
    if one.kernel is not None:
        return one.kernel.name, str(one.kernel.operands)
    return one.scope, one.opcode, one.result


def _of_any_size(one: Operation) -> Part:
    """Alike but for sizes, and for how many arrays there are after the first."""
    first = one.result.removeprefix("(").split("]")[0]
    return one.scope, one.opcode, _SIZE.sub("n", first)


def _add(amounts: Amounts, key: Part, times: int, seconds: float) -> None:
    amounts[key] = amounts.get(key, Amount()).plus(Amount(1, seconds), times)
