"""What the compiler made of a program: the collectives in the text of its HLO.

Bytes are what one device sends, by the usual algorithms (a ring of n devices): of an all-gather of
R bytes (n - 1) / n R, of an all-reduce twice that, of a reduce-scatter to r bytes (n - 1) r, of an
exchange (n - 1) / n of the buffer, of a permutation all of it. A ragged exchange counts with its
whole result buffer, which is more than the rows that exist.

Bodies of loops count as often as they run: what the compiler says, or the bound that the condition
compares its counter with (a scan counts from 0). Loops whose trips depend on data count once, but
rounds of the expert exchange that only an uneven load takes do not count.
"""

import collections
import dataclasses
import math
import re

from sharding.expert_parallel import UNEVEN_ROUNDS

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    "collective-permute",
)
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(
    rf" = (?P<result>.*?) (?P<kind>{'|'.join(sorted(KINDS, key=len, reverse=True))})(?:-start)?\("
)
_START = re.compile(
    rf"%?(?P<name>[\w.\-]+) = (?P<result>.*?) "
    rf"(?P<kind>{'|'.join(sorted(KINDS, key=len, reverse=True))})-start\("
)
_ASYNC = re.compile(r"%?(?P<name>[\w.\-]+) = .* async-start\(.*calls=%?(?P<called>[\w.\-]+)")
_ASYNC_DONE = re.compile(r" async-done\(%?([\w.\-]+)\)")
_PRODUCT = re.compile(r" (?:convolution|dot)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|async_computation)"
    r"=%?([\w.\-]+)|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_BOUND = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind, result and group size, over all times they run in a program."""

    kind: str
    result: str  # such as "bf16[16,1,4096]"
    group: int  # devices that take part together
    count: int
    sent_bytes: float  # by one device, all `count` together


def collectives(text: str) -> list[Collective]:
    """The collectives in compiled HLO, those that send most first."""
    bodies, entry = computations(text)
    times = executions(bodies, entry)
    counts: dict[tuple[str, str, int], int] = collections.Counter()
    for name, lines in bodies.items():
        for line in lines:
            if times[name] and (match := _COLLECTIVE.search(line)):
                result = _result(match["kind"], match["result"])
                counts[match["kind"], result, _group_size(line)] += times[name]
    found = [
        Collective(kind, result, group, count, count * _sent(kind, array_bytes(result), group))
        for (kind, result, group), count in counts.items()
    ]
    return sorted(found, key=lambda c: -c.sent_bytes)


def array_bytes(shape: str) -> float:
    """Bytes of an array by its HLO type: `array_bytes("bf16[16,4096]") == 131072`."""
    ((dtype, dims),) = _ARRAY.findall(shape)
    width = _BITS[dtype] if dtype in _BITS else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(n) for n in dims.split(",") if n) * width / 8


@dataclasses.dataclass(frozen=True)
class Exchange:
    """An asynchronous collective, and the work that is scheduled between its start and its end."""

    kind: str
    result: str
    count: int  # how often it runs
    work: tuple[str, ...]  # scopes of kernels and matrix products, in order


def exchanges(text: str) -> list[Exchange]:
    """The asynchronous collectives of scheduled HLO, in the order in which they start.

    Raises:
      ValueError: the HLO is not scheduled.
    """
    if "is_scheduled=true" not in text.split("\n", 1)[0]:
        raise ValueError("the HLO is not scheduled: expected the text of a compiled program.")
    bodies, entry = computations(text)
    times = executions(bodies, entry)
    with_products = {name for name, lines in bodies.items() if any(map(_PRODUCT.search, lines))}
    found = []
    for name, lines in bodies.items():
        for i, line in enumerate(lines):
            if not times[name] or "-start(" not in line or not (start := _START.search(line)):
                continue
            done = re.compile(rf" {start['kind']}-done\(%?{re.escape(start['name'])}\)")
            end = next((j for j in range(i + 1, len(lines)) if done.search(lines[j])), i)
            work = [scope_of(one) for one in lines[i + 1 : end] if _works(one, with_products)]
            result = _result(start["kind"], start["result"])
            found.append(Exchange(start["kind"], result, times[name], tuple(work)))
    return found


def _works(line: str, with_products: set[str]) -> bool:
    if _PRODUCT.search(line) or 'custom_call_target="tpu_custom_call"' in line:
        return True
    return any(one in with_products for one, _ in _CALLED.findall(line))


def scope_of(line: str) -> str:
    """What an instruction was made from: the part of its name that the program's scopes give."""
    name = re.search(r'op_name="([^"]*)"', line)
    return re.sub(r"jit\([^)]*\)/|shard_map/|/pallas_call", "", name[1]) if name else "unnamed"


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation, and the name of the one that is run."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = bodies.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        elif current is not None:
            current.append(line)
    return {name: _unwrapped(lines, bodies) for name, lines in bodies.items()}, entry


def _unwrapped(lines: list[str], bodies: dict[str, list[str]]) -> list[str]:
    """Instructions in which asynchronous collectives are plain ones, not calls of a computation.

    `async-start(...), calls=%c` becomes what `%c` does: the HLO that the compiler writes before it
    makes code has the one form, a compiled program the other.
    """
    kinds: dict[str, str] = {}
    out = []
    for line in lines:
        if " async-start(" in line and (start := _ASYNC.search(line)):
            inner = _collective_in(start["called"], bodies)
            if inner is not None:
                kinds[start["name"]] = inner["kind"]
                groups = re.search(r"replica_groups=[^ ]*", inner.string)
                line = line.replace(f"calls=%{start['called']}", groups[0] if groups else "")
                line = line.replace(" async-start(", f" {kinds[start['name']]}-start(")
        elif (done := _ASYNC_DONE.search(line)) and done[1] in kinds:
            line = line.replace(" async-done(", f" {kinds[done[1]]}-done(")
        out.append(line)
    return out


def _collective_in(name: str, bodies: dict[str, list[str]]) -> re.Match[str] | None:
    """The collective of a computation that was made for one; a SparseCore's calls another in turn."""
    for line in bodies.get(name, []):
        if found := _COLLECTIVE.search(line):
            return found
        for called, _ in _CALLED.findall(line):
            if found := _collective_in(called, bodies):
                return found
    return None


def executions(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs, by its name; all branches of a condition count."""
    calls: dict[str, list[tuple[str, int]]] = {name: [] for name in bodies}
    for name, lines in bodies.items():
        for line in lines:
            trips = _trips(line, bodies)
            trips = 1 if trips is None else trips
            for one, several in _CALLED.findall(line):
                for called in [one] if one else re.findall(r"[\w.\-]+", several):
                    if called in bodies:
                        calls[name].append((called, trips))
    times: dict[str, int] = collections.Counter()
    # HLO prints what is called before its callers, so callers come first in reverse.
    times[entry] = 1
    for name in reversed(bodies):
        for called, trips in calls[name]:
            times[called] += times[name] * trips
    return times


def loops_on_data(text: str) -> int:
    """Loops of compiled HLO whose trips are not known, and which `executions` counts once."""
    bodies, _ = computations(text)
    return sum(_trips(line, bodies) is None for lines in bodies.values() for line in lines)


def _trips(line: str, bodies: dict[str, list[str]]) -> int | None:
    """How often an instruction runs what it calls; None if it is a loop that the data end."""
    if " while(" not in line:
        return 1
    if f"/{UNEVEN_ROUNDS}/" in line:
        return 0
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = re.search(r" while\(.* condition=%?([\w.\-]+)", line)
    lines = bodies.get(condition[1], []) if condition else []
    bounds = [match[1] for text in lines if (match := _BOUND.search(text))]
    # A comparison with 0 is not one of a counter: the loop runs while something is left to do.
    return int(bounds[0]) or None if len(bounds) == 1 else None


def _group_size(line: str) -> int:
    """Devices of a replica group: `{{0,1},{2,3}}` or `[2,2]<=[4]`."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    return 2  # a permutation: source and target


def _result(kind: str, result: str) -> str:
    """The array that arrives. A start's tuple has operands too: then it is the largest.

    But a reduce-scatter's operand is larger; and of a ragged exchange's rows and the buffer they go
    into, the smaller bounds what travels.
    """
    arrays = [f"{match[1]}[{match[2]}]" for match in _ARRAY.finditer(result)]
    arrays.sort(key=array_bytes)
    if kind in ("ragged-all-to-all", "reduce-scatter"):
        dtype = arrays[-1].partition("[")[0]
        return next(array for array in arrays if array.partition("[")[0] == dtype)
    return arrays[-1]


def _sent(kind: str, result: float, group: int) -> float:
    match kind:
        case "all-reduce":
            return 2 * result * (group - 1) / group
        case "reduce-scatter":
            return result * (group - 1)
        case "collective-permute":
            return result
        case _:
            return result * (group - 1) / group
