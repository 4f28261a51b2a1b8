"""Generates for a file of requests; killed and started again, it goes on.

    v4jax batch --checkpoint nano --input requests.jsonl --output results.jsonl

A request is a JSON object with `messages` or `prompt`; docs/batch.md lists its keys. With
--adapter NAME=FOLDER its key `model` may name that adapter. Lines that are
no requests are reported in results.jsonl.errors, by number. On several hosts that see one file
system every process takes a share: give --coordinator, --num-processes and --process-id, or
--distributed where jax finds these out by itself (TPU pods, Slurm). With a --mesh of all their devices
they hold one model together.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from tqdm import tqdm

from v4jax import checkpoint, from_hf, stores
from v4jax.checkpoint.folders import weight_files
from v4jax.cli.options import (
    add_checkpoint_option,
    add_named_adapters_option,
    add_numerics_options,
    add_sampling_options,
    command_parser,
    local_folder,
    numerics_of,
)
from v4jax.cli.pod import (
    add_pod_arguments,
    from_first,
    parse_pod_args,
    spans_processes,
    start_processes,
)
from v4jax.cli.profiling import add_profile_option, profiled
from v4jax.cli.serving import load_for_serving, named_adapters
from v4jax.inference.batch import Job, JobError, Settings, merge_files
from v4jax.inference.batch.files import errors_path, fingerprint
from v4jax.inference.engine import Engine
from v4jax.text.format import MODES
from v4jax.text.release import release_of
from v4jax.text.tokenizer import Tokenizer

CONTEXT = 8192  # tokens of a sequence that a mesh is chosen for


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = command_parser("batch", __doc__)
    add_checkpoint_option(parser, required=False)
    add_named_adapters_option(parser, may_be_alone=True)
    parser.add_argument("--input", type=local_folder, metavar="FILE", help="requests, JSON lines")
    parser.add_argument(
        "--output", type=local_folder, metavar="FILE", required=True, help="results, JSON lines"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="requests that run together")
    parser.add_argument(
        "--mode", choices=list(MODES), default="non-think", help="of requests that name none"
    )
    add_sampling_options(parser)
    add_numerics_options(parser)
    add_profile_option(parser)
    hosts = add_pod_arguments(parser, auto=True)
    hosts.add_argument("--merge", action="store_true", help="only join what they have written")
    args = parse_pod_args(parser)
    if not args.merge and not (args.checkpoint and args.input):
        parser.error("--checkpoint and --input are required, except with --merge.")
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: expected at least 1.")
    names = ("mode", "temperature", "top_k", "top_p", "min_p", "max_new_tokens", "seed")
    try:
        args.settings = Settings(**{name: getattr(args, name) for name in names})
        args.rounding = numerics_of(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _adapters(
    given: Sequence[tuple[str | None, pathlib.Path | str]], model: str
) -> tuple[pathlib.Path | str | None, dict[str, checkpoint.Adapter]]:
    """The folder of all requests' adapter, or adapters by the names that lines choose them by."""
    named = [(name, folder) for name, folder in given if name is not None]
    alone = [folder for name, folder in given if name is None]
    if len(alone) > 1 or (alone and named):
        raise ValueError(
            f"--adapter {alone[0]} without a name beside another one: expected one FOLDER for all "
            "requests, or NAME=FOLDER each for lines to choose from."
        )
    return alone[0] if alone else None, named_adapters(named, model)


def run(args: argparse.Namespace, process: int, count: int) -> int:
    """Does this process's share and returns the number of requests that are still to do."""
    files = [stores.join(args.checkpoint, name) for name in ("config.json", "tokenizer.json")]
    files += weight_files(args.checkpoint)
    identity = {
        "checkpoint": fingerprint(files),
        "dtype": args.dtype,
        "numerics": args.numerics,
        "recipe": args.rounding.recipe,
        "cache": args.cache,
        "mesh": args.mesh,
    }
    model_name = from_hf(args.checkpoint).name
    alone, adapters = _adapters(args.adapter, model_name)
    if alone is not None:
        identity["adapter"] = checkpoint.Adapter(alone).digest.hex()
    if adapters:  # their order too: it decides how the factors lie
        identity["adapters"] = [[name, one.digest.hex()] for name, one in adapters.items()]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    together: dict[str, Any] = {}
    leads, devices = True, jax.local_devices()
    if spans_processes(args.mesh):
        leads, devices = process == 0, jax.devices()
        together = dict(leads=leads, agree=from_first)
        process, count = 0, 1  # one share for all of them
    job = Job(
        *(args.input, args.output, args.settings),
        batch_size=args.batch_size,
        identity=identity,
        release=release_of(args.checkpoint),
        models=(model_name, *adapters),
        process=process,
        count=count,
        **together,
    )

    def say(text: str) -> None:
        if leads:
            print(text, file=sys.stderr)

    with job:
        plan, done, tokens = job.plan, job.total - job.remaining, 0
        name = f"process {process} of {count}: " if count > 1 else ""
        say(f"{name}{job.total} requests, {done} of them done")
        if plan.malformed:
            lines = ", ".join(str(record["line"]) for record in plan.malformed[:10])
            more = ", ..." if len(plan.malformed) > 10 else ""
            say(f"{len(plan.malformed)} malformed lines: {lines}{more}")
        if job.remaining:
            tokenizer = Tokenizer(args.checkpoint)
            # Kernels can run: a program is of one device or of a whole mesh.
            numerics = args.rounding.with_names("tpu", "xla")
            bar = tqdm(
                initial=done, total=job.total, unit="request", desc=name[:-2], disable=not leads
            )
            with bar:
                model = load_for_serving(
                    args,
                    numerics,
                    context=CONTEXT,
                    batch=args.batch_size,
                    devices=devices,
                    adapter=alone,
                )
                engine = Engine(
                    model,
                    tokenizer,
                    slots=args.batch_size,
                    cache=args.cache,
                    adapters={name: one.path for name, one in adapters.items()},
                )
                started = time.monotonic()
                with profiled(engine, args.profile):
                    for progress in job.run(engine, tokenizer):
                        tokens += progress.tokens
                        rate = tokens / (time.monotonic() - started)
                        bar.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
                        bar.update(progress.requests)
            seconds = time.monotonic() - started
            say(
                f"{name}{tokens} tokens in {seconds:.1f} s, compilation included: "
                f"{tokens / seconds:.1f} tokens/s; {engine.stats().useful_row_steps:.0%} of the decoded "
                "rows gave a token"
            )
        return job.finish()


def main() -> None:
    """Runs a share of the job, or merges."""
    args = parse_args()
    try:
        if args.merge:
            results, errors, left = merge_files(args.output)
            print(f"{results} results in {args.output}, {errors} errors", file=sys.stderr)
        else:
            left = run(args, *start_processes(args))
    except (JobError, checkpoint.CheckpointError, OSError, ValueError) as error:
        raise SystemExit(f"batch: {error}") from error
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    if left:
        raise SystemExit(
            f"batch: {left} requests are still to do: their process has ended or was not started. "
            "Run the same command again."
        )
    if (path := errors_path(args.output)).exists():
        print(f"errors are in {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
