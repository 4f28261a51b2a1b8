"""The loop of a run: steps, records, evaluations, saves and skips, as events one after the other."""

import contextlib
import dataclasses
import math
import numbers
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import jax

from v4jax.train.data import Data
from v4jax.train.events import (
    Anticipating,
    Evaluated,
    Event,
    Resumed,
    Sampled,
    Saved,
    Skipped,
    StepDone,
    Stopped,
)
from v4jax.train.log import Log
from v4jax.train.losses import Metrics
from v4jax.train.samples import Prompts
from v4jax.train.speed import Speed, peak_memory
from v4jax.train.state import Saver
from v4jax.train.step import TrainState
from v4jax.train.stopping import agreed


class Training(Protocol):
    """What the loop asks of a `Trainer`, which documents it."""

    steps: int

    @property
    def state(self) -> TrainState:
        """Of now."""

    @property
    def num_devices(self) -> int:
        """That compute a step."""

    def next_batch(self, data: Data, batch_size: int) -> Sequence:
        """Of the next step."""

    def step(self, tokens: Sequence) -> Metrics:
        """Takes it."""

    def evaluate(self, data: Data, batch_size: int) -> float:
        """Held-out loss."""

    def continued(self, prompts: Prompts) -> tuple[tuple[str, str], ...]:
        """Prompts, and how they go on."""

    def require_finite(self, metrics: Metrics, folder: str | os.PathLike) -> None:
        """Refuses a state that is not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Of a run; `Trainer.events` has what they mean."""

    batch_size: int
    output: pathlib.Path | None
    evaluation: Data | None
    eval_every: int
    save_every: int
    log_every: int
    prompts: Prompts | None
    tensorboard: bool
    step_flops: float | None
    max_skipped: int
    stop: Callable[[], bool]

    def __post_init__(self):
        for name in ("batch_size", "eval_every", "save_every", "log_every", "max_skipped"):
            require_count(name, getattr(self, name))


def require_count(name: str, value: int) -> None:
    """Raises a ValueError for what is not 1, 2, ..."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number from 1 on.")


class _Skips:
    """Says which steps were skipped, and ends a run of too many in a row.

    A step is looked at when the next one is on its way, so that devices do not wait for it.
    """

    def __init__(self, most: int):
        self._most, self._in_a_row = most, 0
        self._last: tuple[int, Metrics] | None = None

    def add(self, step: int, metrics: Metrics) -> Iterator[Skipped]:
        """A step that has begun."""
        yield from self.rest()
        self._last = (step, metrics)

    def rest(self) -> Iterator[Skipped]:
        """What was not looked at yet."""
        if self._last is None:
            return
        (step, metrics), self._last = self._last, None
        if not bool(metrics.skipped):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        loss, norm = float(metrics.loss), float(metrics.grad_norm)
        yield Skipped(
            step=step,
            loss=loss,
            grad_norm=norm,
            grad_limit=float(metrics.grad_limit),
            in_a_row=self._in_a_row,
            anticipated=metrics.anticipated,
        )
        if self._in_a_row == self._most:
            raise ValueError(
                f"steps {step - self._most + 1} to {step} were all skipped: the last one's loss is {loss} "
                f"and the norm of its gradient {norm}. The model is as it was before them. A lower "
                "learning rate or a longer warm-up, in another output folder, is what mostly helps; "
                "if the norm is finite, a larger skip_above or more deviations of Spikes; or look at the "
                "data of these steps (`v4jax data check`)."
            )


class _Saves:
    """Saves beside training, and what is to be said when one is on disk."""

    def __init__(self, saver: Saver):
        self._saver = saver
        self._pending: Saved | None = None

    def begin(
        self, trainer: Training, metrics: Metrics, heldout_ce: float | None, is_best: bool
    ) -> Iterator[Saved]:
        """Starts to save the state as it is, when the save before has ended."""
        yield from self.finished(wait=True)
        trainer.require_finite(metrics, self._saver.folder)
        self._saver.save(trainer.steps, trainer.state, heldout_ce)
        folder = pathlib.Path(self._saver.folder) / str(trainer.steps)
        self._pending = Saved(step=trainer.steps, folder=folder, is_best=is_best)

    def finished(self, *, wait: bool = False) -> Iterator[Saved]:
        """The save that has ended, if one has."""
        if self._pending is None or (self._saver.is_saving and not wait):
            return
        self._saver.wait()  # and says what went wrong
        done, self._pending = self._pending, None
        yield done


def run(
    trainer: Training, data: Data, steps: int, options: Options, saver: Saver | None, resumed: bool
) -> Iterator[Event]:
    """Trains until `steps` are done in all.

    Args:
      saver: closed at the end.
      resumed: the trainer has just taken a state of it.
    """
    with contextlib.ExitStack() as stack:
        if saver is not None:
            stack.callback(saver.close)
        log = stack.enter_context(
            contextlib.closing(Log(options.output, trainer.steps, tensorboard=options.tensorboard))
        )
        if resumed and saver is not None:
            folder = pathlib.Path(saver.folder)
            yield Resumed(step=trainer.steps, folder=folder, damaged=saver.damaged)
        for event in _events(trainer, data, steps, options, saver):
            log.write(event)
            yield event


def _events(
    trainer: Training, data: Data, steps: int, options: Options, saver: Saver | None
) -> Iterator[Event]:
    first, batch_size = trainer.steps, options.batch_size
    skips, saves = _Skips(options.max_skipped), None if saver is None else _Saves(saver)
    speed = Speed(batch_size * data.seq_len, options.step_flops, trainer.num_devices)
    is_ahead = False
    best = math.inf if saver is None or saver.best is None else saver.best[1]
    for number in range(first, steps):
        metrics = trainer.step(trainer.next_batch(data, batch_size))
        done, is_last = number + 1, number + 1 == steps
        speed.step()
        yield from skips.add(done, metrics)
        if bool(metrics.anticipated) != is_ahead:
            is_ahead = bool(metrics.anticipated)
            yield Anticipating(step=done, is_on=is_ahead)
        is_eval = options.evaluation is not None and (done % options.eval_every == 0 or is_last)
        is_due = done % options.log_every == 0 or is_last or is_eval
        is_stopped = options.stop() and not is_last
        if jax.process_count() > 1:  # they have to end after the same step
            is_stopped = is_due and agreed(is_stopped)
        is_saved = done % options.save_every == 0 or is_last or is_stopped
        if is_due or is_saved:
            yield from skips.rest()
        if number == first and not is_due:
            jax.block_until_ready(metrics.loss)
            speed.start()  # without the compilation
        heldout = None
        if is_due:
            jax.block_until_ready(metrics.loss)
            rates = speed.tokens_per_second, speed.flop_utilisation
            if is_eval and options.evaluation is not None:
                heldout = trainer.evaluate(options.evaluation, batch_size)
            yield StepDone(
                step=done,
                metrics=metrics,
                tokens_per_second=rates[0],
                flop_utilisation=rates[1],
                memory=peak_memory(),
                heldout_ce=heldout,
            )
        is_best = heldout is not None and heldout < best
        if heldout is not None:
            best = min(best, heldout)
            yield Evaluated(step=done, heldout_ce=heldout, is_best=is_best)
            if options.prompts is not None:
                yield Sampled(step=done, texts=trainer.continued(options.prompts))
        if saves is not None:
            if is_saved or is_best:
                yield from saves.begin(trainer, metrics, heldout, is_best)
            yield from saves.finished(wait=is_last or is_stopped)
        if is_stopped:
            folder = None if saver is None else pathlib.Path(saver.folder)
            yield Stopped(step=done, folder=folder)
            return
        if is_due or is_saved:
            speed.start()
