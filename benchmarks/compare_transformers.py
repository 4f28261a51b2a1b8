"""The same weights, tokens and tasks here and in transformers on torch, alternated in one run.

    python -m venv ../torch && ../torch/bin/pip install -r benchmarks/against_transformers/requirements.txt
    python -m benchmarks.compare_transformers --python ../torch/bin/python
    python -m benchmarks.compare_transformers --python ../torch/bin/python --tasks prefill-1024 start

Both compute in float32 (`plain` numerics here). Figures are CPU seconds of the whole process, user and
system, and seconds of the clock, the least of the repeats after one run that is not counted; ratios say
how many times less this project takes. Threads of torch spin while they wait: run it on a machine that
does nothing else. Each side keeps one process for inference and one for training; cold starts are
processes of their own.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from v4jax import nano_path
from v4jax.checkpoint.convert import Conversion

FOLDER = pathlib.Path(__file__).parent / "against_transformers"
ROOT = FOLDER.parent.parent

# Name of a task -> what both sides run, and its numbers.
INFERENCE = {
    "prefill-1024": ("prefill", dict(tokens=1024)),
    "prefill-4096": ("prefill", dict(tokens=4096)),
    "prefill-16384": ("prefill", dict(tokens=16_384)),
    "decode-128": ("decode", dict(tokens=128, batch=1)),
    "decode-128-x8": ("decode", dict(tokens=128, batch=8)),
    "decode-4096": ("decode", dict(tokens=4096, batch=1)),
    "decode-4096-x8": ("decode", dict(tokens=4096, batch=8)),
    "decode-16384": ("decode", dict(tokens=16_384, batch=1)),
    "decode-16384-x8": ("decode", dict(tokens=16_384, batch=8)),
}
TRAINING = {
    "train-1024": ("train", dict(tokens=1024)),
    "train-4096": ("train", dict(tokens=4096)),
}
START = "start"
TASKS = (*INFERENCE, *TRAINING, START)


class Side:
    """A process of one implementation that does tasks one by one."""

    def __init__(self, command: Sequence[str], threads: int, **settings: str):
        limits = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **limits, **settings},
        )

    def ask(self, action: str, numbers: dict) -> dict:
        """Does a task: `cpu` and `wall` seconds of what counts, and `result`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([action, numbers]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{self._process.args} ended at {action} {numbers}; see its messages above."
            )
        return json.loads(line)

    def end(self) -> dict:
        """Ends the process: its CPU and wall seconds and the peak of its memory in GiB."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = status
        return {
            "cpu": usage.ru_utime + usage.ru_stime,
            "wall": time.monotonic() - self._started,
            "peak": usage.ru_maxrss / 2**20,
        }


def alternated(sides: Sequence[Side], action: str, numbers: dict, repeats: int) -> list[dict]:
    """The run of least CPU time of each side, after a run of both that is not counted."""
    runs = [[side.ask(action, numbers) for side in sides] for _ in range(repeats + 1)][1:]
    mine, other = (run["result"] for run in runs[0])
    if not same(mine, other):
        print(f"{action} {numbers}: the results differ, {mine} and {other}", file=sys.stderr)
    return [min(of_side, key=lambda run: run["cpu"]) for of_side in zip(*runs)]


def same(mine, other) -> bool:
    """Token ids that are equal, or losses that are nearly so."""
    return abs(mine - other) < 1e-3 if isinstance(mine, float) else mine == other


def row(name: str, ours: dict, theirs: dict) -> str:
    """A line of the table."""
    times = " | ".join(f"{side['cpu']:.3g} | {side['wall']:.3g}" for side in (ours, theirs))
    ratios = " | ".join(f"{theirs[of] / ours[of]:.2f}" for of in ("cpu", "wall"))
    return f"| {name} | {times} | {ratios} |"


def commands(
    python: str, checkpoint: pathlib.Path, converted: pathlib.Path
) -> tuple[list[str], list[str]]:
    """What starts this project's side and that of `python`, for which the weights are converted."""
    Conversion(checkpoint, converted, to="bf16", naming="transformers").run()
    ours = [sys.executable, str(FOLDER / "ours.py"), str(checkpoint)]
    return ours, [python, str(FOLDER / "theirs.py"), str(converted)]


def main() -> None:
    """Prints the tables, and writes the figures to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", required=True, help="that has torch and transformers")
    parser.add_argument("--checkpoint", type=pathlib.Path, default=nano_path())
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of torch (default: all)"
    )
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        converted = pathlib.Path(folder) / "transformers"
        ours, torch = commands(args.python, args.checkpoint, converted)

        def start(**settings: str) -> list[Side]:
            return [Side(command, args.threads, **settings) for command in (ours, torch)]

        print("| task | CPU s | s | transformers: CPU s | s | ratio of CPU s | of s |")
        print("|---|---|---|---|---|---|---|")
        peaks = {}
        for group, tasks in (("inference", INFERENCE), ("training", TRAINING)):
            chosen = [name for name in tasks if name in args.tasks]
            if not chosen:
                continue
            sides = start()
            for name in chosen:
                print(row(name, *alternated(sides, *tasks[name], args.repeats)), flush=True)
            peaks[group] = [side.end()["peak"] for side in sides]
        if START in args.tasks:
            kept = {"V4JAX_CACHE": str(pathlib.Path(folder) / "programs")}
            for name in ("first token, nothing compiled before", "first token, programs kept"):
                ended = []
                for command in (ours, torch):  # one after the other
                    side = Side(command, args.threads, **kept)
                    side.ask("prefill", dict(tokens=128))
                    ended.append(side.end())
                print(row(name, *ended), flush=True)
        for group, (mine, torch_peak) in peaks.items():
            print(f"peak memory, {group}: {mine:.2f} GiB, transformers {torch_peak:.2f} GiB")


if __name__ == "__main__":
    main()
