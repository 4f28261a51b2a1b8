"""One operation at one shape: what is timed on a device, and compiled for those that are not here.

    python -m benchmarks.attention --list
    python -m benchmarks.attention --only "Flash prefill 8k" --implementation xla

`benchmarks/compile_kernels.py` compiles the same cases for TPUs.
"""

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.chips import CHIPS, Chip

Trips = dict[str, tuple[int, ...]]  # name of a Pallas kernel -> trips of its loops


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation at a shape."""

    op: str
    shape: str  # "Flash prefill 8k"
    run: Callable  # (*arguments, implementation=...) -> arrays
    make: Callable[[], tuple]  # arguments, traceable
    flops: float  # multiply-adds the algorithm cannot avoid, as FLOP
    bytes: float  # HBM bytes it cannot avoid
    trips: Callable[[str], Trips]  # chip -> loops of the kernels this case runs there
    fp8: bool = False  # both factors of the products are FP8
    make_off_tpu: Callable[[], tuple] | None = None  # arguments, where the XLA form takes others

    @property
    def name(self) -> str:
        """ "attention: Flash prefill 8k"."""
        return f"{self.op}: {self.shape}"

    def maker(self, platform: str) -> Callable[[], tuple]:
        """What makes the arguments on a platform: "tpu", "gpu" or "cpu"."""
        return self.make if platform == "tpu" else self.make_off_tpu or self.make

    def arguments(self, platform: str = "tpu") -> tuple:
        """Shapes and dtypes of the arguments."""
        return jax.eval_shape(self.maker(platform))

    def floors(self, chip: Chip) -> tuple[float, float]:
        """Seconds the matrix units and the memory of a chip need at least."""
        peak = chip.fp8_flops if self.fp8 else chip.flops
        return self.flops / peak, self.bytes / chip.bandwidth


LEAST_SECONDS = 0.02  # of a call that is timed: starting a program takes up to a millisecond


def measure(case: Case, implementation: str | None, repeats: int) -> tuple[float, float]:
    """Median seconds of a run on the default device, and of compiling.

    What takes less than `LEAST_SECONDS` runs many times in a loop inside one program.
    """
    arguments = jax.jit(case.maker(jax.default_backend()))()
    run = functools.partial(case.run, implementation=implementation)
    started = time.perf_counter()
    compiled = jax.jit(run).lower(*arguments).compile()
    seconds_to_compile = time.perf_counter() - started
    _seconds(compiled, *arguments)
    if _seconds(compiled, *arguments) > LEAST_SECONDS:
        times = [_seconds(compiled, *arguments) for _ in range(repeats)]
        return statistics.median(times), seconds_to_compile
    loop = jax.jit(functools.partial(in_a_loop, run)).lower(1, *arguments).compile()
    _seconds(loop, 1, *arguments)
    turns = 1
    while (taken := _seconds(loop, turns, *arguments)) < LEAST_SECONDS:
        turns = math.ceil(turns * max(2.0, 1.2 * LEAST_SECONDS / taken))
    times = [_seconds(loop, turns, *arguments) / turns for _ in range(repeats)]
    return statistics.median(times), seconds_to_compile


def _seconds(program: Callable, *arguments) -> float:
    started = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - started


def in_a_loop(run: Callable, turns: jax.Array | int, *arguments):
    """What `run(*arguments)` gives, computed anew in each of so many turns.

    Each turn's arguments have an element that depends on the result before, or XLA would compute what
    does not change once.
    """

    def turn(_, state):
        given, result = state
        first = jax.tree.leaves(result)[0].ravel()[0].astype(jnp.float32)
        given = jax.tree.map(functools.partial(_unless, jnp.isnan(first)), given)
        return given, run(*given)

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, *arguments))
    return jax.lax.fori_loop(0, turns, turn, (arguments, nothing))[1]


def _unless(is_nan: jax.Array, x: jax.Array) -> jax.Array:
    """x; another x if the number is none."""
    begin = (0,) * x.ndim
    one = jax.lax.slice(x, begin, (1,) * x.ndim)
    end = jax.lax.slice(x, tuple(n - 1 for n in x.shape), x.shape)
    return jax.lax.dynamic_update_slice(x, jnp.where(is_nan, end, one), begin)


def main(cases: list[Case], doc: str) -> None:
    """Times the cases on the default device and prints a table."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--implementation", help='"tpu", "xla", "reference" (default: the best)')
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    chosen = [case for case in cases if args.only in case.name]
    if args.list or not chosen:
        print("\n".join(case.name for case in cases))
        return
    device = jax.devices()[0]
    chip = next((c for c in CHIPS.values() if c.name in device.device_kind), None)
    print(f"{device.device_kind}, jax {jax.__version__}")
    print(f"{'case':48} {'ms':>10} {'TFLOP/s':>9} {'GB/s':>9} {'roofline':>9} {'compile s':>10}")
    for case in chosen:
        seconds, compiling = measure(case, args.implementation, args.repeats)
        share = f"{max(case.floors(chip)) / seconds:9.0%}" if chip else f"{'-':>9}"
        print(
            f"{case.name:48} {seconds * 1e3:10.3f} {case.flops / seconds / 1e12:9.3f} "
            f"{case.bytes / seconds / 1e9:9.2f} {share} {compiling:10.1f}"
        )
