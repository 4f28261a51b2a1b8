"""Finds sizes of kernels on the TPU that is there, and writes them to a file.

    python -m benchmarks.autotune --out sizes.json
    python -m benchmarks.autotune --out sizes.json --chip v6e --only decode_attention

A size is tried on a few cases at a time; the one with the least mean ratio to the chip's own is kept if it saves
2 % at least. `--kernel-sizes sizes.json` of the commands, or `pallas_kernels.tuning.load`, takes the file. With
`--chip`, of a machine without that TPU, times are what the compiler's schedule and the rates of the chip say.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

LEAST_GAIN = 0.98


@dataclasses.dataclass(frozen=True)
class Search:
    """A size of some operations, values to try, and the cases that they are tried on."""

    operations: tuple[str, ...]
    size: str
    values: tuple[Any, ...]
    cases: tuple[str, ...]


def _rows(*counts: int, op: str) -> tuple[str, ...]:
    return tuple(f"{op}: Flash FP4, {count} rows" for count in counts)


_WEIGHTS = tuple(1 << n for n in range(19, 24))
SEARCHES = (
    Search(
        ("window_attention", "selected_attention"),
        "attention_blocks",
        (
            (1024, 512, 512),
            (2048, 512, 512),
            (2048, 1024, 1024),
            (4096, 512, 512),
            (4096, 1024, 512),
        ),
        (
            "attention: Flash HCA 8k",
            "attention: Flash CSA 8k",
            "attention: Flash CSA 2k after 128k",
        ),
    ),
    Search(
        ("decode_attention",),
        "decode_entries",
        (1024, 2048, 4096),
        tuple(f"decode_attention: Flash HCA {n} packed" for n in ("128k x8", "1M x8", "1M x64")),
    ),
    *(
        Search((op,), "grouped_step_weights", _WEIGHTS, _rows(16, 256, 4096, op=op))
        for op in ("grouped_swiglu", "grouped_matmul")
    ),
    Search(
        ("linear", "linear_swiglu"),
        "grouped_step_weights",
        _WEIGHTS,
        tuple(f"linear: Flash {n} rows" for n in ("query, 8", "output, 8", "query, 4096")),
    ),
    Search(
        ("hc_pre", "hc_post", "hc_post_pre", "hc_head"),
        "hyper_connections_tokens",
        (128, 256, 512),
        tuple(f"{op}: Flash prefill 8k" for op in ("hc_pre", "hc_post", "hc_post_pre")),
    ),
)

# (name of a case, sizes of operations) -> seconds
Timer = Callable[[str, dict[str, dict]], float]


def best(search: Search, default: Any, seconds: Timer) -> tuple[Any, float]:
    """The value with the least mean ratio to the default, and that ratio; 1 where no other is better."""
    import jax

    own = [seconds(case, {}) for case in search.cases]
    found = default, 1.0
    for value in search.values:
        if value == default:
            continue
        try:
            sizes = {op: {search.size: value} for op in search.operations}
            taken = [seconds(case, sizes) for case in search.cases]
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            print(f"  {value}: does not compile ({str(error).splitlines()[0][:80]})", flush=True)
            continue
        ratio = math.exp(sum(math.log(a / b) for a, b in zip(taken, own)) / len(own))
        print(f"  {value}: {ratio:.3f}", flush=True)
        if ratio < min(found[1], LEAST_GAIN):
            found = value, ratio
    return found


def tune(
    chip: str, searches: Sequence[Search], seconds: Timer, kept: Callable[[dict[str, dict]], None]
) -> dict[str, dict]:
    """Operation -> sizes that are better than the chip's own. `kept` is told after each search."""
    from pallas_kernels.chips import CHIPS

    operations: dict[str, dict] = {}
    for search in searches:
        default = getattr(CHIPS[chip].sizes, search.size)
        print(f"{', '.join(search.operations)}: {search.size}, {default} now", flush=True)
        value, ratio = best(search, default, seconds)
        if ratio < 1:
            for op in search.operations:
                operations.setdefault(op, {})[search.size] = value
        kept(operations)
    return operations


def _by_schedule(chip: str) -> Timer:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from benchmarks import compile_kernels
    from pallas_kernels import chips, tuning

    def seconds(name: str, sizes: dict[str, dict]) -> float:
        (case,) = compile_kernels.choose([name])
        (own,) = {tuple(given.items()) for given in sizes.values()} or {()}
        with chips.using(tuning.with_sizes(chip, dict(own))):
            return compile_kernels.report(case, chip).least_us / 1e6

    return seconds


def _on_device(chip: str) -> Timer:
    from benchmarks import case as cases
    from benchmarks import kernel_cases
    from pallas_kernels import dispatch, tuning

    by_name = {case.name: case for case in kernel_cases.all_cases()}

    def seconds(name: str, sizes: dict[str, dict]) -> float:
        pairs = tuple((op, tuning.with_sizes(chip, given)) for op, given in sizes.items())
        return cases.measure(by_name[name], dispatch.Tuned(chip, pairs, "tpu"), 5)[0]

    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the file to write")
    parser.add_argument(
        "--chip", help="by the compiler's schedules for this chip (default: time here)"
    )
    parser.add_argument("--only", default="", help="operations whose name contains this")
    args = parser.parse_args()
    searches = [s for s in SEARCHES if any(args.only in op for op in s.operations)]
    if not searches:
        names = ", ".join(op for s in SEARCHES for op in s.operations)
        sys.exit(f"--only {args.only}: expected a part of one of {names}.")
    if args.chip:
        timer, name, how = _by_schedule(args.chip), args.chip, "schedules of the compiler"
    else:
        from pallas_kernels import dispatch

        if dispatch.target_platform() != "tpu":
            sys.exit("there is no TPU here: --chip NAME takes the compiler's schedules for one.")
        name, how = dispatch.target_chip(), "measured"
        timer = _on_device(name)
    import jax

    from pallas_kernels import tuning

    found = tune(
        name,
        searches,
        timer,
        lambda operations: tuning.save(args.out, name, operations, found=how, jax=jax.__version__),
    )
    print(f"{args.out}: other sizes for {', '.join(found) or 'no operation'}")


if __name__ == "__main__":
    main()
