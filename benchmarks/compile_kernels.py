"""Compiles every kernel for real TPUs, on any machine, and prints what the compiler made of it.

    python -m benchmarks.compile_kernels --chip v6e --chip v7x --only attention

Needs `pip install 'v4jax[tpu]'`, no TPU. One line per case and chip:

    compile s       seconds to compile
    VMEM            MB held by the largest kernel: blocks, buffers, scratch, spilled registers
    HBM, temp       MB of arguments, results and temporaries; of these the temporaries
    around          MB of the largest array that XLA makes around the kernels (a copy, a pad)
    least us        microseconds that it takes at least: the largest of the next three. Not known: waits for
                    memory and stalls of the matrix units that a schedule does not show
    schedule        the compiler's static schedule, of the busiest core
    MXU, HBM        what the matrix units and the memory need for the algorithm
    VALU            what the vector unit needs for what was scheduled
    by              which of the three it is: s(chedule), m(atrix units), h(BM)
    ratio           schedule over the larger floor of the algorithm (matrix units or memory)
    spills          register fills and spills in the code, and how many run in 100 cycles
    XLA form        with `--xla`: what the compiler estimates for the operation without kernels; > where
                    launches have no estimate, or the data end a loop, which counts once then

`--markdown` prints a table as in docs/measurements/kernels.md, with `--read` of earlier JSON files.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from v4jax.planning import schedules

DUMP = schedules.start_dump()  # before libtpu is loaded

from benchmarks import cores, hlo, kernel_cases
from benchmarks.case import Case
from benchmarks.kernel_report import HEADER, Report, line, markdown, xla_estimate
from pallas_kernels.chips import CHIPS
from v4jax.planning.topologies import trace_on


def report(case: Case, chip_name: str, *, with_xla: bool = False) -> Report:
    """Compiles a case for a chip, and its XLA form if it is asked for.

    Raises:
      ValueError: the kernels compiled are not those the case names.
    """
    chip = CHIPS[chip_name]
    schedules.clear(DUMP)
    started = time.perf_counter()
    traced = _traced(case, chip_name, "tpu")
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
        *(_xla(case, chip_name) if with_xla else ()),
    )


def _traced(case: Case, chip_name: str, implementation: str) -> jax.stages.Traced:
    run = functools.partial(case.run, implementation=implementation)
    return trace_on(chip_name, run, *case.arguments())


def _xla(case: Case, chip_name: str) -> tuple[float, bool]:
    text = _traced(case, chip_name, "xla").lower().compile().as_text()
    return xla_estimate(text, CHIPS[chip_name].clock)


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


def _stored(row: dict) -> dict:
    """Of a row of a JSON file what a report has; the rest follows from it."""
    return {field.name: row[field.name] for field in dataclasses.fields(Report)}


def main() -> None:
    """Prints the table; exits with 1 if a case did not compile."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chip", action="append", choices=sorted(CHIPS), help="default: all")
    parser.add_argument(
        "--only", action="append", help="a case's name, or a part of names (may be repeated)"
    )
    parser.add_argument("--xla", action="store_true", help="estimate the XLA forms, too")
    parser.add_argument("--markdown", action="store_true", help="print a table of all at the end")
    parser.add_argument(
        "--read", nargs="+", type=pathlib.Path, help="JSON files to print, in place of compiling"
    )
    parser.add_argument("--json", type=pathlib.Path, help="also write the reports here")
    args = parser.parse_args()
    if args.read:
        rows = [row for path in args.read for row in json.loads(path.read_text(encoding="utf-8"))]
        print("\n".join(markdown([Report(**_stored(row)) for row in rows])))
        return
    cases = choose(args.only or [""])
    print(HEADER)
    reports, failed = [], []
    for case in cases:
        for chip in args.chip or CHIPS:
            try:
                reports.append(report(case, chip, with_xla=args.xla))
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
