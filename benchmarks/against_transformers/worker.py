"""What both sides have in common: tasks come as lines, figures go back as lines. Imports neither side."""

import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator

DECODED = 32  # tokens of a decoding task


class Clock:
    """CPU and wall seconds of what runs inside `counting`."""

    def __init__(self):
        self.cpu = self.wall = 0.0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        cpu, wall = time.process_time(), time.monotonic()
        yield
        self.cpu += time.process_time() - cpu
        self.wall += time.monotonic() - wall


def prompt(length: int, vocab: int, seed: int = 0) -> list[int]:
    """Random token ids, the same for both sides."""
    draw = random.Random(f"{seed} {length}")
    return [draw.randrange(3, vocab) for _ in range(length)]


def serve(*tasks: Callable[..., object]) -> None:
    """Does the tasks that the lines of stdin name. They take a `Clock` and numbers."""
    actions = {task.__name__: task for task in tasks}
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # whatever libraries print
    for line in sys.stdin:
        name, numbers = json.loads(line)
        clock = Clock()
        result = actions[name](clock, **numbers)
        out.write(json.dumps({"cpu": clock.cpu, "wall": clock.wall, "result": result}) + "\n")
        out.flush()
