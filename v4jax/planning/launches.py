"""What a TPU core starts one after the other in a step: the launches in scheduled HLO.

An operation is an instruction that does something: no parameter, constant, tuple or bitcast, and of an
asynchronous pair only the start. Instructions inside fusions are part of the fusion. A launch is an
operation that runs on the core's vector and matrix units: a fusion, a copy, a sort, a kernel ...
What makes single numbers runs on the scalar unit, asynchronous copies beside the core, and
collectives on the links; `while` and `conditional` are what they run.

Cycles are the compiler's own estimate of a launch (`estimated_cycles`), which has its fixed cost of
about 2,000 cycles in it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from v4jax.planning.hlo import KINDS, computations, executions, scope_of

KERNEL, XLA, COLLECTIVE, COPY_BESIDE, SCALAR, CONTROL = (
    *("kernel", "XLA", "collective", "copy beside", "scalar", "control"),
)
UNNAMED = "unnamed"  # as `hlo.scope_of` says it
_NUMBERED = re.compile(
    r"(^|/)[\w\-]+\.\d+$"
)  # names that the compiler gave, and numbers anew each time
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<result>\(.*?\)|\S+) (?P<opcode>[\w\-]+)\("
)
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "domain"}
_CONTROL = {"while", "conditional", "call"}
# What runs on the vector unit though it makes one number: all that has an estimate then.
_VECTOR = {
    *(
        "fusion",
        "slice",
        "broadcast",
        "reduce",
        "reduce-window",
        "gather",
        "scatter",
        "sort",
        "pad",
    ),
    *("concatenate", "dynamic-slice", "dynamic-update-slice", "custom-call", "iota", "transpose"),
}
_BESIDE = {"copy-start", "slice-start", "async-start"}
_RUN = re.compile(
    r"(?:body|condition|true_computation|false_computation|to_apply)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')
_OPERANDS = re.compile(
    r"operand_layout_constraints=\{(.*?)\}, (?:output|frontend|metadata|backend)"
)
_LAYOUT = re.compile(r"\{[^{}]*\}")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


Array = tuple[str, tuple[int, ...]]  # dtype in HLO's words, and shape


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel of a program. `flops` and `bytes` are what it told the compiler; 0: nothing."""

    name: str  # of the `pallas_call`
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a program."""

    name: str
    opcode: str
    kind: str  # `KERNEL`, `XLA`, `COLLECTIVE`, `COPY_BESIDE`, `SCALAR` or `CONTROL`
    scope: str  # of the model's code, as far as the compiler kept it
    result: str  # types without layouts
    times: int  # how often a step runs it
    in_branch: bool  # of a condition: not every step runs it
    cycles: int | None  # the compiler's estimate of one run
    kernel: Kernel | None = None


def operations(text: str) -> list[Operation]:
    """The operations of compiled HLO.

    Bodies of loops count as often as `hlo.executions` says.
    """
    bodies, entry = computations(text)
    times = executions(bodies, entry)
    return [
        found
        for name, in_branch in _run(bodies, entry)
        for line in bodies[name]
        if (found := _operation(line, times[name], in_branch)) is not None
    ]


def _run(bodies: dict[str, list[str]], entry: str) -> Iterator[tuple[str, bool]]:
    """The computations that are run as they stand, and whether a condition chooses them.

    These are the entry, loops and branches, but no fusions.
    """
    seen, waiting = {entry}, [(entry, False)]
    while waiting:
        name, in_branch = waiting.pop()
        yield name, in_branch
        for line in bodies[name]:
            found = _INSTRUCTION.match(line)
            if not found or found["opcode"] not in _CONTROL:
                continue
            chosen = in_branch or found["opcode"] == "conditional"
            for one, several in _RUN.findall(line):
                for called in [one] if one else re.findall(r"[\w.\-]+", several):
                    if called in bodies and called not in seen:
                        seen.add(called)
                        waiting.append((called, chosen))


def _operation(line: str, times: int, in_branch: bool) -> Operation | None:
    found = _INSTRUCTION.match(line)
    if not found or found["opcode"] in _FREE or found["opcode"].endswith("-done"):
        return None
    opcode, result = found["opcode"], _LAYOUT.sub("", found["result"])
    cycles = _CYCLES.search(line)
    kind, kernel = XLA, None
    if 'custom_call_target="tpu_custom_call"' in line:
        kind, kernel = KERNEL, _kernel(line, found["name"], result)
    elif opcode.removesuffix("-start") in KINDS:
        kind = COLLECTIVE
    elif opcode in _BESIDE:
        kind = COPY_BESIDE
    elif opcode in _CONTROL:
        kind = CONTROL
    elif opcode not in _VECTOR and all(math.prod(shape) == 1 for _, shape in _arrays(result)):
        kind = SCALAR
    return Operation(
        name=found["name"],
        opcode=opcode,
        kind=kind,
        scope=UNNAMED if _NUMBERED.search(scope_of(line)) else scope_of(line),
        result=result,
        times=times,
        in_branch=in_branch,
        cycles=int(cycles[1]) if cycles else None,
        kernel=kernel,
    )


def _kernel(line: str, name: str, result: str) -> Kernel:
    cost, operands = _COST.search(line), _OPERANDS.search(line)
    return Kernel(
        name=re.sub(r"\.\d+$", "", name),
        operands=_arrays(operands[1] if operands else ""),
        results=_arrays(result),
        flops=float(cost[1]) if cost else 0.0,
        bytes=float(cost[2]) if cost else 0.0,
    )


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        (dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(text)
    )
