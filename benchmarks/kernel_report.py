"""What the compiler made of a kernel's case, as a line of a table."""

import dataclasses

from pallas_kernels.chips import CHIPS
from v4jax.planning import launches
from v4jax.planning.hlo import loops_on_data


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
    xla_us: float | None = None  # the compiler's estimate of the XLA form; None: not asked for
    xla_is_more: bool = False  # some of its launches have no estimate, or the data end a loop of it

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


HEADER = (
    f"{'case':46} {'chip':4} {'compile s':>9} {'VMEM':>6} {'HBM':>8} {'temp':>7} "
    f"{'around':>7} {'least us':>10} {'by':>2} {'schedule':>10} {'MXU':>9} {'HBM':>9} {'VALU':>9} "
    f"{'ratio':>6} {'spills':>12} {'XLA form':>9}   (MB, us)"
)


def line(r: Report) -> str:
    """A row of the table."""
    return (
        f"{r.case:46} {r.chip:4} {r.compile_seconds:9.1f} {r.vmem_bytes / 1e6:6.1f} "
        f"{r.hbm_bytes / 1e6:8.1f} {r.temp_bytes / 1e6:7.1f} "
        f"{r.xla_bytes / 1e6:7.1f} {r.least_us:10.1f} {r.bound[0]:>2} "
        f"{r.schedule_us:10.1f} {r.mxu_floor_us:9.1f} "
        f"{r.hbm_floor_us:9.1f} {r.vector_us:9.1f} "
        f"{r.ratio:6.2f} {r.spills:6} {100 * r.spills_per_cycle:5.1f} {_xla(r):>9}"
    )


def _xla(r: Report) -> str:
    return "" if r.xla_us is None else f"{'>' if r.xla_is_more else ''}{_us(r.xla_us)}"


def _us(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def xla_estimate(text: str, clock: float) -> tuple[float, bool]:
    """Of a compiled program without kernels: microseconds by the compiler, and whether it takes more."""
    found = [op for op in launches.operations(text) if not op.in_branch]
    cycles = sum((op.cycles or 0) * op.times for op in found)
    unknown = any(op.kind == launches.XLA and op.cycles is None for op in found)
    return cycles / clock * 1e6, unknown or loops_on_data(text) > 0


def markdown(reports: list[Report]) -> list[str]:
    """A line a case, a column a chip: least us and what binds · ratio · fills and spills in 100 cycles.

    And the XLA form's us, where it was asked for.
    """
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
    figures = [
        f"{_us(r.least_us)} {r.bound[0]}",
        f"{r.ratio:.2f}",
        f"{100 * r.spills_per_cycle:.0f}",
    ]
    return " · ".join(figures + ([_xla(r)] if r.xla_us is not None else []))
