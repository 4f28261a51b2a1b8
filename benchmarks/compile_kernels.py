"""Compiles every kernel for real TPUs, on any machine, and prints what the compiler made of it.

    python -m benchmarks.compile_kernels --chip v6e --chip v7x --only attention

Needs `pip install 'v4jax[tpu]'`, no TPU. One line per case and chip:

    compile s       seconds to compile
    VMEM            MB held by the largest kernel: blocks, buffers, scratch, spilled registers
    HBM, temp       MB of arguments, results and temporaries; of these the temporaries
    XLA             MB of the largest array that XLA makes around the kernels (a copy, a pad)
    least us        microseconds that it takes at least: the largest of the next three. Not known: waits for
                    memory and stalls of the matrix units that a schedule does not show
    schedule        the compiler's static schedule, of the busiest core
    MXU, HBM        what the matrix units and the memory need for the algorithm
    VALU            what the vector unit needs for what was scheduled
    by              which of the three it is: s(chedule), m(atrix units), h(BM)
    ratio           schedule over the larger floor of the algorithm (matrix units or memory)
    spills          register fills and spills in the code, and how many run in 100 cycles

`--markdown` prints rows of a table as in docs/measurements/kernels.md.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from v4jax.planning import schedules

DUMP = schedules.start_dump()  # before libtpu is loaded

from benchmarks import cores, hlo, kernel_cases
from benchmarks.case import Case
from pallas_kernels.chips import CHIPS
from v4jax.planning.topologies import trace_on


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of one case on one chip. Times in microseconds."""

    case: str
    chip: str
    compile_seconds: float
    vmem_bytes: int  # of the largest kernel
    hbm_bytes: int  # arguments, results and temporaries
    temp_bytes: int  # HBM beside arguments and results
    xla_bytes: int  # of the largest array made outside of the kernels
    schedule_us: float
    mxu_floor_us: float
    hbm_floor_us: float
    vector_us: float  # what the vector unit needs for what was scheduled
    spills: int  # fills and spills in the code
    spills_per_cycle: float  # as often as they run
    bundles: dict[str, int]  # kernel -> static length

    @property
    def least_us(self) -> float:
        """No device is faster, whatever the schedule says."""
        return max(self.schedule_us, self.mxu_floor_us, self.hbm_floor_us)

    @property
    def bound(self) -> str:
        """What `least_us` is: "schedule", "mxu" or "hbm"."""
        of = {"schedule": self.schedule_us, "mxu": self.mxu_floor_us, "hbm": self.hbm_floor_us}
        return max(of, key=lambda name: of[name])

    @property
    def ratio(self) -> float:
        """Schedule over the algorithm's floor."""
        return self.schedule_us / max(self.mxu_floor_us, self.hbm_floor_us)


def report(case: Case, chip_name: str) -> Report:
    """Compiles a case for a chip.

    Raises:
      ValueError: the kernels compiled are not those the case names.
    """
    chip = CHIPS[chip_name]
    schedules.clear(DUMP)
    started = time.perf_counter()
    traced = trace_on(chip_name, lambda *a: case.run(*a, implementation="tpu"), *case.arguments())
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - started
    parts = cores.busiest(traced.jaxpr.jaxpr, chip.cores)
    cycles = alone = vector = spills = spills_run = 0.0
    bundles = {}
    for name, trips in case.trips(chip_name).items():
        for kernel in schedules.read(DUMP, name):
            part = cores.part_of(parts, kernel.kernel)
            cycles += kernel.cycles(trips)
            alone += part * kernel.cycles(trips)
            vector += part * kernel.unit_cycles("VALU", trips)
            spills += kernel.spills()
            spills_run += kernel.spills(trips)
            bundles[kernel.kernel] = kernel.bundles
    mxu, hbm = case.floors(chip)
    per_us = 1e6 / chip.clock
    memory, text = compiled.memory_analysis(), compiled.as_text()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temp = memory.temp_size_in_bytes
    return Report(
        *(case.name, chip_name, round(seconds, 2)),
        *(max(hlo.vmem_of_kernels(text)), kept + temp, temp, hlo.largest_of_xla(text)),
        *(alone * per_us, mxu * 1e6, hbm * 1e6, vector * per_us),
        *(int(spills), spills_run / cycles, bundles),
    )


HEADER = (
    f"{'case':46} {'chip':4} {'compile s':>9} {'VMEM':>6} {'HBM':>8} {'temp':>7} "
    f"{'XLA':>7} {'least us':>10} {'by':>2} {'schedule':>10} {'MXU':>9} {'HBM':>9} {'VALU':>9} "
    f"{'ratio':>6} {'spills':>12}   (MB, us)"
)


def line(r: Report) -> str:
    """A row of the table."""
    return (
        f"{r.case:46} {r.chip:4} {r.compile_seconds:9.1f} {r.vmem_bytes / 1e6:6.1f} "
        f"{r.hbm_bytes / 1e6:8.1f} {r.temp_bytes / 1e6:7.1f} "
        f"{r.xla_bytes / 1e6:7.1f} {r.least_us:10.1f} {r.bound[0]:>2} {r.schedule_us:10.1f} {r.mxu_floor_us:9.1f} "
        f"{r.hbm_floor_us:9.1f} {r.vector_us:9.1f} "
        f"{r.ratio:6.2f} {r.spills:6} {100 * r.spills_per_cycle:5.1f}"
    )


def markdown(reports: list[Report]) -> list[str]:
    """A line a case, a column a chip: least us, what binds, ratio, fills and spills in 100 cycles."""
    chips = sorted({r.chip for r in reports}, key=list(CHIPS).index)
    lines = [f"| case | VMEM MB | {' | '.join(chips)} |", "|---" * (2 + len(chips)) + "|"]
    of = {(r.case, r.chip): r for r in reports}
    for case in dict.fromkeys(r.case for r in reports):
        found = [of.get((case, chip)) for chip in chips]
        cells = ["failed" if r is None else _cell(r) for r in found]
        held = " / ".join(f"{r.vmem_bytes / 1e6:.0f}" for r in found[-2:] if r is not None)
        lines.append(f"| {case} | {held} | {' | '.join(cells)} |")
    return lines


def _cell(r: Report) -> str:
    digits = 0 if r.least_us >= 100 else 1
    bound = r.bound[0]
    return f"{r.least_us:.{digits}f} {bound} · {r.ratio:.2f} · {100 * r.spills_per_cycle:.0f}"


def choose(only: list[str]) -> list[Case]:
    """The cases of these names, or whose names contain these parts."""
    cases = {case.name: case for case in kernel_cases.all_cases()}
    found = {}
    for part in only:
        names = [part] if part in cases else [name for name in cases if part in name]
        if not names:
            sys.exit("\n  ".join([f"no case contains {part!r}; there are", *cases]))
        found |= {name: cases[name] for name in names}
    return list(found.values())


def main() -> None:
    """Prints the table; exits with 1 if a case did not compile."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chip", action="append", choices=sorted(CHIPS), help="default: all")
    parser.add_argument(
        "--only", action="append", help="a case's name, or a part of names (may be repeated)"
    )
    parser.add_argument("--markdown", action="store_true", help="print a table of all at the end")
    parser.add_argument("--json", type=pathlib.Path, help="also write the reports here")
    args = parser.parse_args()
    cases = choose(args.only or [""])
    print(HEADER)
    reports, failed = [], []
    for case in cases:
        for chip in args.chip or CHIPS:
            try:
                reports.append(report(case, chip))
                print(line(reports[-1]), flush=True)
            except Exception as error:  # noqa: BLE001 - the compiler's types are not public
                failed.append((case.name, chip))
                print(f"{case.name:46} {chip:4} FAILED: {str(error)[:300]}", flush=True)
    if args.json:
        more = lambda r: {"ratio": round(r.ratio, 3), "least_us": r.least_us, "bound": r.bound}
        rows = [dataclasses.asdict(r) | more(r) for r in reports]
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if args.markdown:
        print("\n".join(markdown(reports)))
    if failed:
        sys.exit(f"{len(failed)} did not compile: {failed}")


if __name__ == "__main__":
    main()
