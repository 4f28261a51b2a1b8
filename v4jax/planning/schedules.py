"""The TPU compiler's static schedule of a Pallas kernel: cycles without a TPU.

libtpu writes, for every kernel, the VLIW bundles it scheduled and what each uses. One bundle is one
cycle of straight-line code; waits for memory are not in it. Bundles are marked with the loops they
lie in, so given how often each loop turns (`trips`, in the order the loops appear; the first is the
kernel's grid), the cycles of the whole kernel follow. Predicated regions (`pl.when`) count as taken.
Trips that the compiler knew stand in the code it wrote; those that depend on data do not.

`start_dump` must be called before libtpu is loaded. Format: found by reading the dumps of
libtpu 0.0.42.
"""

import dataclasses
import glob
import os
import re
import shutil

from v4jax.planning import leftovers

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*(>*)\s*\{")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test")
_USAGE = "final_hlo-static-per-bundle-utilization.txt"
_ANY = re.compile(rf"^\d+-(.+)-\d+-{re.escape(_USAGE)}$")
UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL")


@dataclasses.dataclass(frozen=True)
class Region:
    """Bundles that lie in the same loops."""

    loops: tuple[int, ...]  # indices of the loops around it, outermost first
    bundles: int
    used: dict[str, int]  # unit -> slots filled


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the compiler scheduled for one kernel."""

    kernel: str
    regions: tuple[Region, ...]
    num_loops: int
    capacity: dict[str, int]  # unit -> slots of one bundle
    fixed_trips: tuple[int | None, ...] = ()  # of each loop; None: it depends on data

    @property
    def bundles(self) -> int:
        """Static length: every bundle once."""
        return sum(region.bundles for region in self.regions)

    def cycles(self, trips: tuple[float, ...]) -> float:
        """Bundles times the trips of the loops around them.

        Raises:
          ValueError: `trips` does not name every loop.
        """
        return sum(r.bundles * self._times(r, trips) for r in self.regions)

    @property
    def least_trips(self) -> tuple[int, ...]:
        """Of each loop; 1 where they depend on data."""
        return tuple(trips or 1 for trips in self.fixed_trips)

    @property
    def least_cycles(self) -> float:
        """Cycles if every loop whose trips depend on data turns once."""
        return self.cycles(self.least_trips)

    @property
    def depends_on_data(self) -> bool:
        """Whether some loop turns as often as the data say."""
        return None in self.fixed_trips

    def unit_cycles(self, unit: str, trips: tuple[float, ...]) -> float:
        """Cycles that `unit` alone would need."""
        used = sum(r.used[unit] * self._times(r, trips) for r in self.regions)
        return used / self.capacity[unit]

    def spills(self, trips: tuple[float, ...] | None = None) -> float:
        """Register fills and spills; with `trips`, counted as often as they run."""
        return sum(
            (r.used["VLOAD:FILL"] + r.used["VSTORE:SPILL"])
            * (1 if trips is None else self._times(r, trips))
            for r in self.regions
        )

    def _times(self, region: Region, trips: tuple[float, ...]) -> float:
        if len(trips) != self.num_loops:
            raise ValueError(
                f"{self.kernel} has {self.num_loops} loops, but trips={trips} names {len(trips)}."
            )
        times: float = 1
        for loop in region.loops:
            times *= trips[loop]
        return times


def start_dump() -> str:
    """Makes libtpu write its schedules, and returns the folder. Call before libtpu is loaded.

    The folder goes when the process ends.
    """
    folder = leftovers.folder("llo-")
    # Of some seventy stages only the last: writing all takes longer than compiling.
    stages = "--xla_jf_dump_llo_pass_label_regex=final_bundles|final_hlo"
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true {stages}"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
    return folder


def clear(folder: str) -> None:
    """Forgets earlier dumps."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)


def read(folder: str, kernel: str) -> list[Schedule]:
    """Schedules of the kernels whose `pallas_call` name begins with `kernel`, in order of name.

    Raises:
      FileNotFoundError: libtpu wrote none.
    """
    pattern = re.compile(rf"\d+-({re.escape(kernel)}[^-]*)-\d+-{re.escape(_USAGE)}$")
    found = {}
    for path in glob.glob(os.path.join(glob.escape(folder), f"*{_USAGE}")):
        if match := pattern.search(os.path.basename(path)):
            found[match.group(1)] = path
    if not found:
        raise FileNotFoundError(f"no schedule of a kernel {kernel!r} in {folder}.")
    return [_parse(name, found[name]) for name in sorted(found)]


def read_all(folder: str) -> dict[str, Schedule]:
    """Schedules of all that has been compiled, kernels and what XLA made: by the instruction's name.

    Of instructions that do the same, the compiler writes one.
    """
    found = {}
    for path in glob.glob(os.path.join(glob.escape(folder), f"*{_USAGE}")):
        if match := _ANY.search(os.path.basename(path)):
            found[match[1]] = _parse(match[1], path)
    return found


def _parse(name: str, usage_path: str) -> Schedule:
    stem = usage_path.rsplit(f"-{name}-", 1)[0]
    (bundle_path,) = [
        p
        for p in glob.glob(f"{glob.escape(stem)}-{glob.escape(name)}-*-final_bundles.txt")
        if "schedule-analysis" not in p
    ]
    units, capacity, rows = _read_usage(usage_path)
    loops, trips = _read_loops(bundle_path)
    if len(rows) != len(loops):
        raise ValueError(f"{usage_path} has {len(rows)} bundles, {bundle_path} {len(loops)}.")
    regions: dict[tuple[int, ...], list] = {}
    for row, where in zip(rows, loops):
        regions.setdefault(where, []).append(row)
    return Schedule(
        kernel=name,
        regions=tuple(
            Region(where, len(group), {u: sum(c) for u, c in zip(units, zip(*group))})
            for where, group in regions.items()
        ),
        num_loops=len(trips),
        capacity=capacity,
        fixed_trips=trips,
    )


def _read_usage(path: str):
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()
    units = lines[1].replace(" ", "").split(",")
    capacity = dict(zip(units, map(int, lines[2].split())))
    return (
        units,
        capacity,
        [[int(v) for v in line.split()] for line in lines[4:] if line[:1].isdigit()],
    )


def _read_loops(path: str) -> tuple[list[tuple[int, ...]], tuple[int | None, ...]]:
    """For each bundle, the loops it lies in, and the trips of each loop.

    A loop begins at an LB mark; `>` counts its depth. Its exit test compares the counter, which goes
    from 0 in steps of 1, with a number where that is known.
    """
    stack: list[int] = []
    trips: list[int | None] = []
    result = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if not (match := _BUNDLE.match(line)):
                continue
            depth = len(match.group(3))
            if match.group(2) == "LB":
                stack = [*stack[: depth - 1], len(trips)]
                trips.append(None)
            result.append(tuple(stack[:depth]))
            if result[-1] and (exit_test := _EXIT.search(line)):
                trips[result[-1][-1]] = int(exit_test[1])
    return result, tuple(trips)
