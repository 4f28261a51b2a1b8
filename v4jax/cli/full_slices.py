"""Tables of `v4jax plan --job serve`: what slices do when they are full, by arithmetic."""

import dataclasses
import json
from collections.abc import Sequence

from v4jax.config import V4Config
from v4jax.planning.capacity import Choice, Workload, fullest
from v4jax.planning.published import FIGURES, Comparison, compare
from v4jax.planning.topologies import Slice

GiB = 2**30
CONTEXTS = (8192, 32_768, 131_072, 1_048_576)
ANSWER = 1024  # tokens, behind a prompt of the first context


def choices(
    cfg: V4Config, places: Sequence[Slice], workloads: Sequence[Workload], **options
) -> tuple[list[Choice], list[str]]:
    """The fastest mesh of each workload on each slice, and what does not fit.

    Args:
      options: of `fullest`.

    Raises:
      ValueError: nothing fits.
    """
    found, refused = [], []
    for place in places:
        for workload in workloads:
            try:
                found.append(fullest(cfg, place, workload, **options))
            except ValueError as error:
                refused.append(str(error))
    if not found:
        raise ValueError("\n".join(refused))
    return found, refused


def comparisons(cfg: V4Config, places: Sequence[Slice]) -> list[Comparison]:
    """Figures that others published of this model on these slices."""
    names = {place.topology for place in places}
    return [
        compare(cfg, figure)
        for figure in FIGURES
        if figure.model == cfg.name and figure.topology in names
    ]


def describe(
    cfg: V4Config, found: Sequence[Choice], refused: Sequence[str], others: Sequence[Comparison]
) -> str:
    """Markdown: what each slice does, then mesh by mesh, commands, and published figures."""
    parts = [_overview(found), _details(found), _commands(cfg, found)]
    parts += [_published(others)] if others else []
    parts += ["\n".join(refused)] if refused else []
    return "\n\n".join(parts)


def as_json(cfg: V4Config, found: Sequence[Choice], others: Sequence[Comparison]) -> str:
    """The same, all figures."""

    def one(choice: Choice) -> dict:
        full = choice.full
        return {
            **dataclasses.asdict(full),
            "topology": full.place.topology,
            "seconds": full.seconds,
            "tokens_per_second": full.tokens_per_second,
            "generated_per_second": full.generated_per_second,
            "bound": full.bound,
            "reason": choice.reason,
            "command": full.command(cfg),
        }

    shares = [{**dataclasses.asdict(other), "share": other.share} for other in others]
    return json.dumps({"full": [one(c) for c in found], "published": shares}, indent=1)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _overview(found: Sequence[Choice]) -> str:
    """A row for each workload, a column for each slice."""
    places = list(dict.fromkeys(choice.full.place.topology for choice in found))
    by_work: dict[str, dict[str, str]] = {}
    for choice in found:
        full = choice.full
        rate = f"{_two_digits(full.tokens_per_second)} tokens/s"
        if full.prompt is not None:
            rate += f", {_two_digits(full.generated_per_second)} of them generated"
        cell = f"{full.batch:,} at once, {_two_digits(full.step.seconds * 1e3)} ms a step, {rate}"
        by_work.setdefault(full.workload.name, {})[full.place.topology] = cell
    model = found[0].full.model.capitalize()
    rows = [
        [f"{model}, {work}", *(cells.get(place, "does not fit") for place in places)]
        for work, cells in by_work.items()
    ]
    return _table(["work", *places], rows)


def _details(found: Sequence[Choice]) -> str:
    header = "work, slice, at once, mesh, weights, slots and pages, prefixes, temporary, sum, of, "
    header += "step, prompts, tokens/s at most, bound by, why this mesh"
    rows = []
    for choice in found:
        full, held = choice.full, choice.full.held
        sizes = held.weights, held.state, held.prefixes, held.temporary, held.total
        prompt = f"{full.prompt.seconds * 1e3:,.0f} ms" if full.prompt else ""
        rows.append(
            [
                full.workload.name,
                full.place.topology,
                f"{full.batch:,}",
                full.mesh.replace(",", ", ").replace("=", " ") or "one device",
                *(f"{size / GiB:.1f}" for size in (*sizes, full.limit)),
                f"{full.step.seconds * 1e3:.1f} ms",
                prompt,
                f"{full.tokens_per_second:,.0f}",
                full.bound,
                choice.reason,
            ]
        )
    return _table(header.split(", "), rows)


def _commands(cfg: V4Config, found: Sequence[Choice]) -> str:
    return "\n".join(f"    {choice.full.command(cfg)}" for choice in found)


def _published(others: Sequence[Comparison]) -> str:
    rows = [
        [
            other.figure.name,
            other.figure.topology,
            f"{other.figure.value:,g} {other.figure.unit}",
            f"{other.bound:,.{2 if other.bound < 100 else 0}f}",
            other.mesh.replace(",", ", ").replace("=", " "),
            f"{other.share:.0%}",
            other.figure.source,
        ]
        for other in others
    ]
    header = ["published", "slice", "measured by others", "bound here", "its mesh"]
    return _table([*header, "share of the bound's speed", "source"], rows)


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.{1 if value < 9.95 else 0}f}"
