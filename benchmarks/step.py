"""Whole steps of a full-size model, layer by layer, as the TPU compiler made them; no TPU is needed.

    python -m benchmarks.step                                        Flash: three jobs, four chips
    python -m benchmarks.step --chip v6e --job decode --json step.json
    python -m benchmarks.step --model pro --chip v7x --job decode

Decoding and prefill (a chunk of 4,096 tokens) are at a context of 128k with a sequence a device, training
is at 4k with experts frozen, each on the smallest slice that holds the job and under the mesh that
`v4jax plan` chooses. `v4jax plan --step` does one of them, for any slice, mesh and context.
"""

import argparse
import json
import pathlib
import sys

from pallas_kernels.chips import CHIPS
from v4jax.cli import step_table
from v4jax.cli.plan import plan_step
from v4jax.config import VARIANTS
from v4jax.planning.plan import Job
from v4jax.planning.topologies import Slice

SLICES = {  # those of docs/measurements/plans.md; training with frozen experts on v6e takes 16 chips
    "flash": {"v5e": "v5e:4x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4", "v7x": "tpu7x:2x2x1"},
    "pro": {"v5e": "v5e:8x16", "v5p": "v5p:2x2x4", "v6e": "v6e:8x8", "v7x": "tpu7x:2x2x2"},
}
SEQUENCES = {
    ("pro", "v6e"): 16,
    ("pro", "v5e"): 16,
}  # fewer than devices: experts go over 16 of them
JOBS = ("decode", "prefill", "train")


def job_of(kind: str, batch: int) -> Job:
    """One of `JOBS`."""
    if kind == "train":
        return Job(kind="train", context=4096, batch=batch, trainable="no-experts")
    return Job(kind=kind, context=131_072, batch=batch)


def main() -> None:
    """Prints tables; exits with 1 if a step did not compile."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(SLICES), default="flash")
    parser.add_argument("--chip", action="append", choices=list(CHIPS), help="default: all")
    parser.add_argument("--job", action="append", choices=JOBS, help="default: all")
    parser.add_argument(
        "--schedule", action="store_true", help="make no code: kernels take their floors"
    )
    parser.add_argument("--json", type=pathlib.Path, help="also write the reports here")
    args = parser.parse_args()
    cfg, reports, failed = VARIANTS[args.model](), [], []
    for chip in args.chip or CHIPS:
        for kind in args.job or JOBS:
            topology = SLICES[args.model][chip]
            if (chip, kind, args.model) == ("v6e", "train", "flash"):
                topology = "v6e:4x4"
            batch = SEQUENCES.get((args.model, chip), Slice.of(topology).devices)
            batch = 8 if topology == "v6e:4x4" else batch
            try:
                report = plan_step(
                    *(cfg, topology, job_of(kind, batch), ""), has_code=not args.schedule, say=_say
                )
            except ValueError as error:
                failed.append(f"{chip} {kind}: {error}")
                continue
            print(step_table.describe(report), end="\n\n", flush=True)
            reports.append(json.loads(step_table.as_json(report)))
    if args.json:
        args.json.write_text(json.dumps(reports, indent=1), encoding="utf-8")
    if failed:
        sys.exit("\n".join(failed))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
