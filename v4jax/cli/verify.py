"""Checks that this installation computes the right thing with given weights.

    v4jax verify --checkpoint DIR
    v4jax verify --checkpoint nano --quick --json verify.json
    v4jax verify --checkpoint DIR --vectors vectors.jsonl --dtype float32 --numerics plain

The tokenizer and the prompt format; prefill in chunks and decoding against whole sequences; requests alone
and in a batch; perplexity of a text that comes with the package, with more and more context; and greedy
completions of a file, if one is given. Prints a line for each check. The status is 0 if none failed, else
1. docs/inference.md explains the figures.

A line of --vectors is {"prompt": TEXT, "tokens": [IDS]}, or has messages in place of the prompt, and with
them mode and tools.
"""

import argparse
import json
import math
import sys

import jax

from v4jax import __version__, checkpoint
from v4jax.checkpoint.saving import write_text
from v4jax.cli.errors import one_message
from v4jax.cli.options import (
    add_adapter_option,
    add_checkpoint_option,
    add_mesh_option,
    add_numerics_options,
    command_parser,
    local_folder,
    numerics_of,
)
from v4jax.cli.serving import load_for_serving
from v4jax.inference.findings import FAIL, PASS, SKIPPED, Row
from v4jax.inference.verify import LENGTHS, MAX_PROMPT, Options, needed_room, verify
from v4jax.inference.verify_text import read_vectors
from v4jax.text.tokenizer import Tokenizer


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(length) for length in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected numbers of tokens with commas between them, such as 2048,8192."
        ) from None


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = command_parser("verify", __doc__)
    add_checkpoint_option(parser)
    add_adapter_option(parser)
    parser.add_argument("--json", type=local_folder, metavar="FILE", help="write the results there")
    parser.add_argument(
        "--vectors", type=local_folder, metavar="FILE", help="JSON lines: prompts and greedy tokens"
    )
    parser.add_argument(
        "--lengths",
        type=_lengths,
        metavar="N,...",
        default=",".join(map(str, LENGTHS)),
        help="tokens of context for perplexity",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="of --lengths only the shortest: the others take longest",
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        default=MAX_PROMPT,
        help="the prompt of prefill and decode has at most this many tokens",
    )
    add_mesh_option(parser)
    add_numerics_options(parser)
    args = parser.parse_args()
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.absolute().parent}.")
    return args


def main() -> None:
    """Verifies."""
    args = parse_args()
    numerics = numerics_of(args)
    opened, tokenizer = checkpoint.Checkpoint(args.checkpoint), Tokenizer(args.checkpoint)
    vectors = read_vectors(args.vectors, tokenizer, opened.config) if args.vectors else ()
    lengths = args.lengths[:1] if args.quick else args.lengths
    options = Options(lengths, args.length, vectors)
    context, batch = needed_room(opened.config, options)
    model = load_for_serving(args, numerics, context=context, batch=batch, adapter=args.adapter)
    print(f"\n{'check':17} {'result':8} {'seconds':>7}  figure", flush=True)
    rows = []
    for row in verify(model, tokenizer, options, cache=args.cache):
        print(line_of(row), flush=True)
        rows.append(row)
    results = [row.finding.result for row in rows]
    counts = ", ".join(f"{results.count(r)} {w}" for r, w in _WORDS.items() if r in results)
    print(f"\n{counts}")
    if args.json:
        write_text(str(args.json), json.dumps(report(args, model, rows), indent=2))
    if FAIL in results:
        sys.stdout.flush()
        raise SystemExit(1)


_WORDS = {PASS: "passed", FAIL: "failed", SKIPPED: "skipped"}


def line_of(row: Row) -> str:
    """A row of the table."""
    finding = row.finding
    if finding.result == PASS:
        shown = f"{finding.figure} ({finding.reason})" if finding.reason else finding.figure
    else:
        shown = ": ".join(text for text in (finding.figure, finding.reason) if text)
    return f"{row.check:17} {finding.result:8} {row.seconds:7.1f}  {shown}"


def report(args: argparse.Namespace, model, rows: list[Row]) -> dict[str, object]:
    """What the JSON file holds: what ran where, and a record for each row."""
    numerics, devices = model.numerics, jax.devices()
    return {
        "v4jax": __version__,
        "checkpoint": str(args.checkpoint),
        "model": model.cfg.name,
        "adapter": None if args.adapter is None else str(args.adapter),
        "numerics": numerics.name,
        "dtype": str(numerics.dtype),
        "recipe": numerics.recipe,
        "cache": args.cache,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "passed": all(row.finding.result != FAIL for row in rows),
        "checks": [
            {
                "check": row.check,
                "result": row.finding.result,
                "figure": row.finding.figure,
                "reason": row.finding.reason,
                "seconds": round(row.seconds, 3),
                **{name: _as_json(value) for name, value in row.finding.values.items()},
            }
            for row in rows
        ],
    }


def _as_json(value: object) -> object:
    """JSON has no name for what is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    with one_message():
        main()
