"""Looks at a data file before a run does: lengths, what has loss, and lines that are no examples.

    v4jax data check chat.jsonl --checkpoint DIR
    v4jax data check chat.jsonl --tokenizer DIR/tokenizer.json --seq-len 4096
    v4jax data check tokens.npy --checkpoint nano

Every line is read, rendered by the released prompt format and encoded, as `v4jax finetune --data` does it.
A sample shows what has loss between ⟦ and ⟧. Forms of a line are in docs/training.md. The exit status is 1
if a line is no example, or preference pairs are among other examples.
"""

import argparse
import collections

import numpy as np

from v4jax.cli.errors import one_message
from v4jax.cli.options import checkpoint_folder, command_parser, local_folder
from v4jax.text.tokenizer import Tokenizer
from v4jax.train.data.examples import Reader, has_loss
from v4jax.train.data.formats import Example, Pair, marked
from v4jax.train.data.packing import pack
from v4jax.train.data.tokens import TokenStream

ALIGN = 128  # of the released models: documents of a row begin at its multiples
_SHOWN = 6000  # characters of a sample


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = command_parser("data", __doc__)
    parser.add_argument("action", choices=("check",), help="what to do with the file")
    parser.add_argument("file", type=local_folder, metavar="FILE", help=".jsonl, .txt or .npy")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint", type=checkpoint_folder, metavar="DIR", help="whose tokenizer to take"
    )
    source.add_argument("--tokenizer", type=local_folder, metavar="FILE", help="tokenizer.json")
    parser.add_argument("--mode", help="of conversations that name none, as think-high")
    parser.add_argument(
        "--seq-len", type=int, metavar="N", help="say how examples fill rows of so many tokens"
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=1,
        metavar="LINE",
        help="the first example from here on is shown",
    )
    args = parser.parse_args()
    if args.seq_len is not None and args.seq_len < 1:
        parser.error(f"--seq-len {args.seq_len}: expected at least 1.")
    return args


def main() -> None:
    """Checks."""
    args = parse_args()
    tokenizer = Tokenizer(args.tokenizer or args.checkpoint)
    if args.file.suffix == ".npy":
        stream = TokenStream(args.file, 0)
        stream.require_ids(tokenizer.vocab_size)
        print(f"{args.file}: {len(stream.tokens)} tokens, all of them of the vocabulary")
        return
    if not check(args, tokenizer):
        raise SystemExit(1)


def check(args: argparse.Namespace, tokenizer: Tokenizer) -> bool:
    """Prints what the file has; whether all lines are examples."""
    lengths, learned, is_text, lost = [], [], [], 0
    kinds: collections.Counter[str] = collections.Counter()
    first: dict[str, int] = {}  # line of each kind
    bad, sample, num_lines = [], None, 0
    for found in Reader(args.file, tokenizer, mode=args.mode).all():
        num_lines += 1
        if found.error is not None:
            bad.append((found.line, found.error))
        for example in found.examples:
            if sample is None and found.line >= args.sample:
                sample = (found.line, example)
            kind = "pairs" if isinstance(example, Pair) else _kind(example)
            kinds[kind] += 1
            first.setdefault(kind, found.line)
            if args.seq_len is not None:
                lost += not all(has_loss(one, args.seq_len) for one in _sides(example))
            for one in _sides(example):
                lengths.append(len(one.ids))
                learned.append(int((one.weights > 0).sum()))
                is_text.append(one.is_text)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"
    print(f"{args.file}: {num_lines} lines, examples: {counts}")
    if lengths:
        sizes = np.array(lengths)
        low, median, p95, high = np.percentile(sizes, (0, 50, 95, 100)).round().astype(int)
        print(f"tokens of an example: min {low}, median {median}, p95 {p95}, max {high}")
        print(
            f"tokens with loss: {sum(learned)} of {sizes.sum()}, {sum(learned) / sizes.sum():.1%}"
        )
        if args.seq_len is not None:
            rows = _cut if kinds["pairs"] else _filled
            left = f", {lost} examples without loss left out" if lost else ""
            print(rows(sizes, np.array(is_text), args.seq_len) + left)
    if sample is not None:
        line, example = sample
        print(f"\nline {line}, with loss on what is between ⟦ and ⟧:")
        names = ("chosen: ", "rejected: ") if isinstance(example, Pair) else ("",)
        for name, one in zip(names, _sides(example)):
            text = marked(one, tokenizer)
            rest = f" ... and {len(text) - _SHOWN} characters more" if len(text) > _SHOWN else ""
            print(name + text[:_SHOWN] + rest)
    if bad:
        print(f"\n{len(bad)} of {num_lines} lines are no examples:")
        for line, reason in bad:
            print(f"  line {line}: {reason}")
    elif not lengths:
        print("the file has no examples")
    is_mixed = "pairs" in kinds and len(kinds) > 1
    if is_mixed:
        places = ", ".join(f"{kind} from line {line} on" for kind, line in first.items())
        print(f"\nno run takes preference pairs among other examples: {places}")
    return not bad and bool(lengths) and not is_mixed


def _kind(example: Example) -> str:
    return "texts" if example.is_text else "conversations"


def _sides(example: Example | Pair) -> tuple[Example, ...]:
    return (example.chosen, example.rejected) if isinstance(example, Pair) else (example,)


def _cut(sizes: np.ndarray, is_text: np.ndarray, seq_len: int) -> str:
    del is_text  # a side of a pair is a row
    return f"rows of {seq_len}: {len(sizes)}, one a side; {int((sizes - 1 > seq_len).sum())} cut"


def _filled(sizes: np.ndarray, is_text: np.ndarray, seq_len: int) -> str:
    inputs = sizes - 1
    held = np.where(is_text, inputs, np.minimum(inputs, seq_len))
    rows = pack(held, np.flatnonzero(held), seq_len, ALIGN, is_cut=is_text)
    cut = int((inputs > seq_len).sum())
    share = held.sum() / (max(len(rows), 1) * seq_len)
    return f"rows of {seq_len}: {len(rows)} in the order of the file, {share:.1%} filled; {cut} cut"


if __name__ == "__main__":
    with one_message():
        main()
