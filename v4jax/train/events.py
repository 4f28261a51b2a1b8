"""What happens in a run, as `Trainer.events` tells it. One dataclass a kind; all have the step."""

import dataclasses
import pathlib

import jax
import numpy as np

from v4jax.train.losses import Metrics

_DIGITS = 5  # of numbers in metrics.jsonl


# A line of metrics.jsonl, and what `Trainer.run` yields: the step, the metrics that are `logged` (loss, ce ...),
# grad_norm, expert_load, with `anticipate` whether the step was anticipated (1 or 0), and heldout_ce where it was
# measured. `run` adds what depends on the machine:
# tokens_per_second, flop_utilisation, memory.
Record = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened.

    Attributes:
      step: steps done when it did.
    """

    step: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """The run goes on from a saved state.

    Attributes:
      folder: of the states.
      damaged: step -> what is wrong, of newer states that could not be read.
    """

    folder: pathlib.Path
    damaged: dict[int, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """A step whose numbers are told: every `log_every`, where held-out loss is measured, and the last.

    Attributes:
      metrics: terms of the loss, in nats; norm of the gradient before clipping; tokens of each expert;
        whether these were chosen ahead.
      tokens_per_second: padding included, since the last such event, without evaluations and saves.
      flop_utilisation: share of the devices' bfloat16 peak; None where that is not known.
      memory: bytes, the most that a device had in use so far (on a CPU, the process).
      heldout_ce: in nats, where it was measured.
    """

    metrics: Metrics
    tokens_per_second: float
    flop_utilisation: float | None
    memory: float | None
    heldout_ce: float | None

    @property
    def expert_load(self) -> float | None:
        """Tokens of the fullest expert beside the mean, in the layer where that is worst; 1 is even."""
        counts = [np.asarray(count) for stage in self.metrics.expert_counts for count in stage]
        loads = [float((c.max(-1) / np.maximum(c.mean(-1), 1e-9)).max()) for c in counts]
        return max(loads, default=None)

    @property
    def line(self) -> Record:
        """Of metrics.jsonl: the same on every machine."""

        def rounded(number: jax.Array | float) -> float:
            return round(float(number), _DIGITS)

        names = (*self.metrics.logged, "grad_norm")
        terms = {name: rounded(getattr(self.metrics, name)) for name in names}
        line: Record = {"step": self.step, **terms}
        if self.expert_load is not None:
            line["expert_load"] = rounded(self.expert_load)
        if self.metrics.anticipated is not None:
            line["anticipated"] = int(self.metrics.anticipated)
        if self.heldout_ce is not None:
            line["heldout_ce"] = rounded(self.heldout_ce)
        return line

    @property
    def record(self) -> Record:
        """`line`, with how fast it went."""
        record = self.line
        record["tokens_per_second"] = self.tokens_per_second
        if self.flop_utilisation is not None:
            record["flop_utilisation"] = self.flop_utilisation
        if self.memory is not None:
            record["memory"] = self.memory
        return record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """Held-out loss was measured.

    Attributes:
      heldout_ce: nats a token.
      is_best: lower than all before, those of the run's earlier processes too.
    """

    heldout_ce: float
    is_best: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled(Event):
    """Prompts and how the model goes on with them.

    Attributes:
      texts: pairs of a prompt and its continuation.
    """

    texts: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped(Event):
    """A step that changed nothing, since its loss or gradient was not finite or above `skip_above`.

    Attributes:
      loss, grad_norm: of that step.
      grad_limit: the largest norm that it would have been taken by.
      in_a_row: skipped steps up to this one, without one between that was taken.
      anticipated: as in `Metrics`.
    """

    loss: float
    grad_norm: float
    grad_limit: float
    in_a_row: int
    anticipated: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anticipating(Event):
    """This step is the first whose experts earlier parameters chose, or the first of which they are its own.

    Attributes:
      is_on: whether they were chosen ahead.
    """

    is_on: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved(Event):
    """A state is on disk: `step` is its step, and some may have been done since.

    Attributes:
      folder: of the state.
      is_best: its held-out loss is the lowest so far.
    """

    folder: pathlib.Path
    is_best: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The run ends before its last step, since it was asked to. A state of this step is saved.

    Attributes:
      folder: of the states; None without an `output`.
    """

    folder: pathlib.Path | None
