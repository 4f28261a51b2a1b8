"""A trace of some steps of an engine, as `jax.profiler` writes it."""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterator

import jax

from v4jax.cli.options import local_folder
from v4jax.inference.engine import Engine

STEPS = 8  # of the engine, in a trace


def add_profile_option(parser: argparse.ArgumentParser) -> None:
    """--profile."""
    parser.add_argument(
        "--profile",
        type=local_folder,
        metavar="DIR",
        help=f"write a trace of {STEPS} steps after the first tokens to this folder",
    )


@contextlib.contextmanager
def profiled(engine: Engine, folder: pathlib.Path | None) -> Iterator[None]:
    """Traces the first `STEPS` steps of the engine that come after it has given tokens.

    The programs are compiled by then. Says on stderr where the trace is.

    Args:
      folder: is made if it is not there. None: nothing is traced.

    Raises:
      OSError: the folder cannot be made.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    tracer = _Tracer(engine, folder)
    engine.before_step = tracer.step
    try:
        yield
    finally:
        engine.before_step = None
        tracer.close()
        what = (
            f"{tracer.steps} steps, in {folder}" if tracer.steps else "no step came after the first"
        )
        print(f"{'profile':9} {what}", file=sys.stderr)


class _Tracer:
    def __init__(self, engine: Engine, folder: pathlib.Path):
        self._engine, self._folder, self._is_on = engine, folder, False
        self.steps = 0  # that are in the trace

    def step(self) -> None:
        """Before a step: begins the trace, or ends it, or neither."""
        if self._is_on and self.steps == STEPS:
            self.close()
        elif not self._is_on and not self.steps and self._engine.stats().generated_tokens:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of Python would slow down what is measured
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._is_on = True
        self.steps += self._is_on

    def close(self) -> None:
        """Writes the trace, if it has begun and not ended."""
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
