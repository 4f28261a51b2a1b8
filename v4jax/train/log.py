"""What a run leaves to read: metrics.jsonl, and files for TensorBoard. Of the first process alone."""

import json
import os
import pathlib
from typing import IO, Any

import jax

from v4jax.train.events import Evaluated, Event, Sampled, Skipped, StepDone

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
# Groups of TensorBoard's tags; terms of a loss are in "loss".
_GROUPS = {
    "step": ("grad_norm", "expert_load", "anticipated"),
    "speed": ("tokens_per_second", "flop_utilisation", "memory"),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}


class Log:
    """Writes the events of a run that goes on after a step; lines of later steps are left out first.

    Args:
      folder: of the run; None writes nothing.
      step: that the run goes on after.
      tensorboard: also write `folder/tensorboard`.

    Raises:
      ValueError: `tensorboard` without the package that writes it, or without a folder.
    """

    def __init__(self, folder: pathlib.Path | None, step: int, *, tensorboard: bool = False):
        self._file: IO[str] | None = None
        self._board: Any = None
        if tensorboard and folder is None:
            raise ValueError("tensorboard=True: expected output= beside it, for the files.")
        if folder is None or jax.process_index() != 0:
            return
        if tensorboard:
            self._board = _board(folder / TENSORBOARD, step)
        self._path = folder / METRICS
        if self._path.exists():
            _drop_lines_after(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, event: Event) -> None:
        """Adds what an event says.

        Raises:
          OSError: it cannot be written; names the file.
        """
        if self._file is not None and isinstance(event, StepDone):
            try:
                self._file.write(json.dumps(event.line) + "\n")
                self._file.flush()
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from error
        if self._board is not None:
            _add(self._board, event)

    def close(self) -> None:
        """Lets go of the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _board(folder: pathlib.Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError(
            "files for TensorBoard need a package that is not installed: pip install "
            "'v4jax[tensorboard]'"
        ) from None
    # What a killed process wrote of later steps is not shown.
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _add(board: Any, event: Event) -> None:
    match event:
        case StepDone():
            for name, value in event.record.items():
                if name != "step":
                    group = _GROUP_OF.get(name, "loss")
                    board.add_scalar(f"{group}/{name}", value, event.step)
        case Skipped():
            board.add_scalar("step/skipped_in_a_row", event.in_a_row, event.step)
        case Sampled():
            for number, (prompt, text) in enumerate(event.texts):
                board.add_text(f"sample/{number}", f"**{prompt}** {text}", event.step)
    if isinstance(event, StepDone | Evaluated | Sampled):
        board.flush()


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
    """Leaves out the steps behind the state that a run goes on from."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):  # half a line: the run was killed while it wrote
            continue
    path.with_suffix(".new").write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(path.with_suffix(".new"), path)
