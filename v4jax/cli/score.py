"""Writes the logits of given tokens, or prints the perplexity of a text.

    v4jax score --checkpoint DIR --tokens tokens.npy --out logits.npz \\
        --dtype float32 --numerics plain
    v4jax score --checkpoint nano --text scripts/data/austen/heldout.txt

`--tokens` holds int32 [B, T]; `logits` in the output is float32 [B, T, V]. With `--decode-from N`
the first N tokens are fed at once and the others one at a time through the cache.
"""

import argparse
import math
import pathlib
import sys

import numpy as np

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
from v4jax.inference.score import Scorer
from v4jax.text.prompt import with_bos


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = command_parser("score", __doc__)
    add_checkpoint_option(parser)
    add_adapter_option(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--tokens", type=local_folder, help=".npy, integers [B, T], or [T] of one sequence"
    )
    what.add_argument("--text", type=local_folder, help="print the perplexity of this file")
    parser.add_argument("--out", type=local_folder, help=".npz to write (with --tokens)")
    parser.add_argument(
        "--decode-from", type=int, metavar="N", help="feed tokens from here on one at a time"
    )
    parser.add_argument(
        "--context", type=int, default=512, help="tokens that a token of --text can look back at"
    )
    add_mesh_option(parser)
    add_numerics_options(parser, dtype="float32")
    args = parser.parse_args()
    if args.tokens and not args.out:
        parser.error("--tokens needs --out FILE.npz")
    if args.text and (args.out or args.decode_from is not None):
        parser.error("--out and --decode-from go with --tokens; --text prints a perplexity.")
    if args.out and not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.absolute().parent}.")
    return args


def read_tokens(path: pathlib.Path) -> np.ndarray:
    """The sequences [B, T] of a `.npy` file; [T] is one.

    Raises:
      ValueError: it is another kind of file.
    """
    try:
        tokens = np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a .npy file of integers [B, T].") from error
    if not hasattr(tokens, "ndim"):  # an .npz file
        raise ValueError(f"{path} holds several arrays: expected a .npy file of integers [B, T].")
    return tokens[None] if tokens.ndim == 1 else tokens


def main() -> None:
    """Scores."""
    args = parse_args()
    numerics = numerics_of(args)
    tokens = read_tokens(args.tokens) if args.tokens else None
    context = args.context if tokens is None or tokens.ndim != 2 else max(1, tokens.shape[1])
    model = load_for_serving(args, numerics, context=context, adapter=args.adapter)
    scorer = Scorer(model, cache=args.cache)
    if args.tokens:
        logits = scorer.logits(tokens, decode_from=args.decode_from)
        np.savez(args.out, logits=logits)
        print(f"wrote logits {logits.shape} to {args.out}", file=sys.stderr)
        return
    from v4jax.text.tokenizer import Tokenizer

    text = args.text.read_text(encoding="utf-8-sig")  # without a byte-order mark
    ids = Tokenizer(args.checkpoint).encode(with_bos(text))
    perplexity, count = scorer.perplexity(ids, context=args.context)
    bits = math.log2(perplexity) * count / len(text.encode())
    print(f"perplexity {perplexity:.4f} per token over {count} tokens, {bits:.4f} bits per byte")


if __name__ == "__main__":
    with one_message():
        main()
