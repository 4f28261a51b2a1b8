"""The output folder of a training run: whose it is, and that one process at a time works in it."""

import argparse
import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator

from v4jax.checkpoint.saving import write_text

SETTINGS, LOCK = "run.json", "run.lock"


@contextlib.contextmanager
def locked(output: pathlib.Path) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it until the end. A process that dies leaves no lock.

    Raises:
      ValueError: it cannot be made or written to, or another process trains in it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / LOCK).touch()
    except OSError as error:
        raise ValueError(
            f"--output {output}: {error.strerror}: expected a folder that can be made and written to."
        ) from None
    with open(output / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"--output {output}: another process trains in this folder. Wait for its end, or give another "
                "--output."
            ) from None
        yield


def claim(
    output: pathlib.Path, own: dict[str, object], parser: argparse.ArgumentParser, steps: str
) -> None:
    """Makes a folder the own of a run with these settings.

    Settings hold once something was saved: those of a command that failed before make room. A run that
    began before an option existed has that option's default.

    Args:
      own: settings and files that the run's numbers depend on.
      steps: why a run cannot have more steps than before; "" if it can.

    Raises:
      ValueError: it has another run's state, or a model that no run wrote.
    """
    path = output / SETTINGS
    written = [name for name in ("model", "adapter") if (output / name).exists()]
    if path.exists() and (written or _has_state(output)):
        _require_same(output, json.loads(path.read_text(encoding="utf-8")), own, parser, steps)
    elif written:
        raise ValueError(
            f"{output / written[0]} exists, and this run did not write it: give another --output. "
            "Nothing was changed."
        )
    elif path.exists():
        (output / "metrics.jsonl").unlink(missing_ok=True)  # of a run that saved nothing
    write_text(str(path), json.dumps(own, indent=2))


def _has_state(output: pathlib.Path) -> bool:
    """Whether a step was saved; its folder is named by its number, a damaged one's begins with it."""
    names = [path.name for path in (output / "state").glob("*")]
    return any(name.isdecimal() or name.endswith(".damaged") for name in names)


def _require_same(
    output: pathlib.Path,
    found: dict[str, object],
    own: dict[str, object],
    parser: argparse.ArgumentParser,
    steps: str,
) -> None:
    found = {name: parser.get_default(name) for name in own} | found
    other = [name for name in sorted({*found, *own}) if found.get(name) != own.get(name)]
    if other == ["steps"]:
        before, now = found["steps"], own["steps"]
        assert isinstance(before, int) and isinstance(now, int)
        if now > before and not steps:
            return
        reason = steps or "a run can be made longer, not shorter"
        raise ValueError(
            f"{output} has a run of {before} steps, and --steps is {now}: {reason}. Give --steps {before} to go "
            "on with it, or another --output."
        )
    if other:
        raise ValueError(
            f"{output} has a run with other settings: {', '.join(other)}. Give the same "
            "ones to go on with it, or another --output."
        )
