"""Compiles every kernel for real TPUs, on any machine, and prints what the compiler made of it.

    python -m benchmarks.compile_kernels --chip v6e --chip v7x --only attention

Needs `pip install 'v4jax[tpu]'`, no TPU. One line per case and chip:

    compile s       seconds to compile
    VMEM            MB held by the largest kernel: blocks, buffers, scratch, spilled registers
    HBM, temp       MB of arguments, results and temporaries; of these the temporaries
    XLA             MB of the largest array that XLA makes around the kernels (a copy, a pad)
    schedule        the compiler's static schedule in microseconds; waits for memory are not in it
    MXU, HBM        microseconds the matrix units and the memory need for the algorithm
    VALU            microseconds the vector unit needs for what was scheduled
    ratio           schedule over the larger floor of the algorithm (matrix units or memory)
    spills          register fills and spills in the code, and how many run in 100 cycles
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

from benchmarks import hlo, kernel_cases
from benchmarks.case import Case
from pallas_kernels.chips import CHIPS
from v4jax.planning.topologies import compile_on


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
    compiled = compile_on(
        chip_name, lambda *a: case.run(*a, implementation="tpu"), *case.arguments()
    )
    seconds = time.perf_counter() - started
    cycles = vector = spills = spills_run = 0
    bundles = {}
    for name, trips in case.trips(chip_name).items():
        for kernel in schedules.read(DUMP, name):
            cycles += kernel.cycles(trips)
            vector += kernel.unit_cycles("VALU", trips)
            spills += kernel.spills()
            spills_run += kernel.spills(trips)
            bundles[kernel.kernel] = kernel.bundles
    mxu, hbm = case.floors(chip)
    per_us = 1e6 / chip.clock / chip.cores
    memory, text = compiled.memory_analysis(), compiled.as_text()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temp = memory.temp_size_in_bytes
    return Report(
        *(case.name, chip_name, round(seconds, 2)),
        *(max(hlo.vmem_of_kernels(text)), kept + temp, temp, hlo.largest_of_xla(text)),
        *(cycles * per_us, mxu * 1e6, hbm * 1e6, vector * per_us),
        *(spills, spills_run / cycles, bundles),
    )


HEADER = (
    f"{'case':46} {'chip':4} {'compile s':>9} {'VMEM':>6} {'HBM':>8} {'temp':>7} "
    f"{'XLA':>7} {'schedule':>10} {'MXU':>9} {'HBM':>9} {'VALU':>9} "
    f"{'ratio':>6} {'spills':>12}   (MB, us)"
)


def line(r: Report) -> str:
    """A row of the table."""
    return (
        f"{r.case:46} {r.chip:4} {r.compile_seconds:9.1f} {r.vmem_bytes / 1e6:6.1f} "
        f"{r.hbm_bytes / 1e6:8.1f} {r.temp_bytes / 1e6:7.1f} "
        f"{r.xla_bytes / 1e6:7.1f} {r.schedule_us:10.1f} {r.mxu_floor_us:9.1f} "
        f"{r.hbm_floor_us:9.1f} {r.vector_us:9.1f} "
        f"{r.ratio:6.2f} {r.spills:6} {100 * r.spills_per_cycle:5.1f}"
    )


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
        rows = [dataclasses.asdict(r) | {"ratio": round(r.ratio, 3)} for r in reports]
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if failed:
        sys.exit(f"{len(failed)} did not compile: {failed}")


if __name__ == "__main__":
    main()
