"""A run on the terminal: a bar with its numbers, and a line for what else happens."""

from collections.abc import Iterator

from tqdm import tqdm

from v4jax.train.events import (
    Anticipating,
    Evaluated,
    Event,
    Resumed,
    Sampled,
    Skipped,
    StepDone,
    Stopped,
)
from v4jax.train.stopping import StopOnSignal


def show(events: Iterator[Event], done: int, steps: int, stop: StopOnSignal) -> Iterator[Event]:
    """The same events, each shown as it passes.

    Args:
      done, steps: taken so far, and in all.
      stop: what a run that ends early was asked by.
    """
    with tqdm(total=steps, initial=done, unit="step") as bar:
        for event in events:
            match event:
                case StepDone():
                    bar.n = event.step
                    bar.set_postfix(_numbers(event))
                case _:
                    for line in _lines(event, stop):
                        bar.write(line)
            yield event


def _numbers(event: StepDone) -> dict[str, str]:
    """What the bar has room for."""
    metrics, load = event.metrics, event.expert_load
    found = {
        "loss": f"{float(metrics.loss):.4f}",
        "ce": f"{float(metrics.ce):.4f}",
        "mtp": f"{float(metrics.mtp_ce):.4f}" if float(metrics.mtp_ce) else None,
        "norm": f"{float(metrics.grad_norm):.3g}",
        "ahead": "on" if metrics.anticipated else None,
        "load": None if load is None else f"{load:.2f}",
        "tok/s": f"{event.tokens_per_second:,.0f}",
        "flop": None if event.flop_utilisation is None else f"{event.flop_utilisation:.1%}",
        "mem": None if event.memory is None else f"{event.memory / 2**30:.2f}GiB",
    }
    return {name: text for name, text in found.items() if text is not None}


def _lines(event: Event, stop: StopOnSignal) -> Iterator[str]:
    match event:
        case Resumed():
            for step, why in event.damaged.items():
                yield f"{event.folder / str(step)} is damaged and left aside: {why}"
            yield f"going on from step {event.step} of {event.folder}"
        case Evaluated():
            best = ", the lowest so far" if event.is_best else ""
            yield f"step {event.step}: held-out loss {event.heldout_ce:.4f}{best}"
        case Sampled():
            for prompt, text in event.texts:
                yield f"  {prompt!r} -> {text!r}"
        case Skipped():
            yield (
                f"step {event.step} was skipped, {event.in_a_row} in a row: loss {event.loss:.4g}, "
                f"norm of the gradient {event.grad_norm:.4g}, of at most {event.grad_limit:.4g}"
            )
        case Anticipating():
            whose = "parameters of steps before" if event.is_on else "its own parameters, as before"
            yield f"step {event.step}: experts are chosen by {whose}"
        case Stopped():
            saved = f"its state is in {event.folder}" if event.folder else "nothing was saved"
            yield (
                f"stopped by {stop.name} after step {event.step}: {saved}. Run the same again to go on."
            )
