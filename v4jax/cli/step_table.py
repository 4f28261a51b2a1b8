"""Tables of `v4jax plan --step`: a whole step, what it is made of, and what takes longest."""

import dataclasses
import json

from v4jax.planning.step_report import ONCE, UNKNOWN, Amounts, Costs, StepReport, seconds_of

_COLUMNS = (
    *("layers", "operations", "launches", "of these kernels", "scalar", "copies beside"),
    *("XLA, us", "kernels, us", "collectives, us", "MB sent", "sum, us"),
)


def describe(report: StepReport, most: int = 20) -> str:
    """Markdown. Times in microseconds on one device.

    Args:
      most: rows of the tables of XLA's operations and of kernels.
    """
    mesh = ", ".join(f"{axis} {n}" for axis, n in report.mesh.items() if n > 1) or "one device"
    job = report.job
    title = (
        f"{report.model} {job.kind} on {report.topology} ({mesh}): {job.batch} sequences of "
        f"{job.context:,} tokens" + (f", chunks of {job.chunk:,}" if job.kind == "prefill" else "")
    )
    parts = [title, _overview(report), _beside_the_bound(report)]
    parts += [
        f"The {most} operations of XLA that take longest in the step:\n\n"
        + _longest(report, "xla", ("scope", "operation", "result"), most),
        f"The {most} kernels that take longest in the step:\n\n"
        + _longest(report, "kernels", ("kernel", "scope"), most),
    ]
    if report.total.branches:
        parts.append(
            "In branches that not every step takes, not in the sums "
            f"({seconds_of(report.total.branches) * 1e6:,.0f} us):\n\n"
            + _longest(report, "branches", ("scope", "operation", "result"), 5)
        )
    return "\n\n".join(parts)


def as_json(report: StepReport) -> str:
    """All that is known, times in seconds."""
    found = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    found["job"] = dataclasses.asdict(report.job)
    found["bound"] = {**dataclasses.asdict(report.bound), "seconds": report.bound.seconds}
    found["once"], found["total"] = _costs_as_json(report.once), _costs_as_json(report.total)
    found["kinds"] = {kind: _costs_as_json(layer) for kind, layer in report.kinds.items()}
    found["unknown"] = UNKNOWN
    return json.dumps(found, indent=1)


def _costs_as_json(costs: Costs) -> dict:
    rows = {
        name: [{"part": list(part), **dataclasses.asdict(a)} for part, a in amounts.items()]
        for name, amounts in vars(costs).items()
        if name != "other"
    }
    counts = {part[0]: amount.count for part, amount in costs.other.items()}
    return {"launches": costs.launches, "seconds": costs.seconds, **counts, **rows}


def _overview(report: StepReport) -> str:
    rows: list[tuple[str, int | str, Costs]] = [(ONCE, "", report.once)]
    rows += [
        (f"one {kind} layer", report.layers[kind], layer) for kind, layer in report.kinds.items()
    ]
    rows.append(("the step", sum(report.layers.values()), report.total))
    lines = [_row("", *_COLUMNS), _row(*["---"] * (len(_COLUMNS) + 1))]
    return "\n".join([*lines, *(_row(name, n, *_numbers(costs)) for name, n, costs in rows)])


def _numbers(costs: Costs) -> list[str]:
    kernels = sum(amount.count for amount in costs.kernels.values())
    scalar, copies = costs.count("scalar"), costs.count("copy beside")
    counts = [costs.count("operations"), costs.launches, kernels, scalar, copies]
    times = [seconds_of(part) * 1e6 for part in (costs.xla, costs.kernels, costs.sent)]
    sent = sum(amount.bytes for amount in costs.sent.values()) / 1e6
    return [
        *(f"{n:,.0f}" for n in counts),
        *(f"{us:,.1f}" for us in times),
        *(f"{sent:,.2f}", f"{costs.seconds * 1e6:,.1f}"),
    ]


def _beside_the_bound(report: StepReport) -> str:
    bound, total = report.bound, report.total
    partly = (
        "loops whose trips are not known, which count once"
        if report.has_schedules
        else "no schedule, but floors only"
    )
    unknown = (
        f"{total.count('no time'):,.0f} of XLA's launches have neither an estimate nor a schedule",
        f"{total.count('partly timed'):,.0f} runs of kernels have {partly}",
        *UNKNOWN,
    )
    sums = (
        f"The sum is {total.seconds * 1e3:.1f} ms, {bound.tokens / total.seconds:,.0f} tokens/s; the "
        f"roofline's bound {bound.seconds * 1e3:.2f} ms ({bound.bound}), "
        f"{bound.tokens_per_second:,.0f} tokens/s. Temporary memory of {len(report.kinds)} layers, one "
        f"of each kind: {report.temp / 2**20:,.0f} MiB."
    )
    return "\n".join([sums, "", "Not known:", "", *(f"* {text}." for text in unknown)])


def _longest(report: StepReport, part: str, names: tuple[str, ...], most: int) -> str:
    total: Amounts = getattr(report.total, part)
    columns = ("us in the step", "runs", "us each")
    lines = [_row(*names, *columns), _row(*["---"] * (len(names) + len(columns)))]
    longest = sorted(total.items(), key=lambda item: -item[1].seconds)[:most]
    for key, amount in longest:
        each = amount.seconds / amount.count * 1e6 if amount.count else 0.0
        shown = (text.removeprefix("while/body/") for text in key)
        lines.append(
            _row(*shown, f"{amount.seconds * 1e6:,.1f}", f"{amount.count:,.0f}", f"{each:,.2f}")
        )
    return "\n".join(lines)


def _row(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
