"""Options of `v4jax finetune`."""

import argparse
import math
import sys

from v4jax.cli.options import DTYPES, checkpoint_folder, command_parser, local_folder
from v4jax.cli.pod import add_pod_arguments, parse_pod_args
from v4jax.cli.settings import add_config_option, words_with_config
from v4jax.config import VARIANTS
from v4jax.nn.lora import PRESETS
from v4jax.nn.remat import POLICIES
from v4jax.train.anticipation import WHEN
from v4jax.train.data.examples import TOO_LONG
from v4jax.train.export import FORMATS
from v4jax.train.optimizers import STATE_DTYPES, adamw, muon
from v4jax.train.schedules import SHAPES
from v4jax.train.trainer import TRAINABLE

OPTIMIZERS = {"adamw": adamw, "muon": muon}
# Left out, it depends on where training starts: pre-training's values, or what fine-tuning takes.
_BY_START = {"bias_speed": (1e-3, 0.0), "mtp_weight": (0.3, 0.1)}


def natural(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 on.")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 on.")
    return int(text)


def several(text: str) -> int:
    """A whole number from 2 on."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 2 on.")
    return int(text)


def _number(text: str) -> float:
    """NaN, which lies in no range, for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def rate(text: str) -> float:
    """A number from 0 on."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 on.")
    return value


def share(text: str) -> float:
    """A number from 0 to below 1."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share from 0 to below 1.")
    return value


def norm(text: str) -> float:
    """A number above 0, which may be inf."""
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0.")
    return value


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """The options, with the module's docstring as help."""
    parser = command_parser("finetune", doc)
    add_config_option(parser)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", choices=sorted(VARIANTS), help="train this variant from scratch")
    start.add_argument(
        "--checkpoint",
        type=checkpoint_folder,
        metavar="DIR",
        help="start from this folder, or from its URL (gs://, s3://)",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=local_folder, metavar="FILE", help=".jsonl or .txt")
    what.add_argument("--tokens", type=local_folder, help=".npy, integers [N]")
    parser.add_argument("--eval-data", type=local_folder, metavar="FILE", help="held-out data")
    parser.add_argument("--eval-tokens", type=local_folder, help="held-out tokens, .npy")
    parser.add_argument(
        "--output", type=local_folder, metavar="DIR", required=True, help="folder of the run"
    )
    parser.add_argument(
        "--steps", type=positive, default=1000, help="in all, those before an interruption too"
    )
    parser.add_argument("--batch-size", type=positive, default=8, help="sequences a step")
    parser.add_argument("--seq-len", type=positive, default=512, help="tokens of a sequence")
    parser.add_argument("--lr", type=rate, default=2e-4, help="peak learning rate")
    parser.add_argument("--warmup", type=natural, default=100, help="steps until --lr is reached")
    parser.add_argument(
        "--seed", type=natural, default=0, help="of the weights and the order of the data"
    )
    seen = parser.add_argument_group("what is seen of the run")
    seen.add_argument(
        "--sample",
        action="append",
        metavar="TEXT",
        help="gone on with greedily where held-out loss is measured; can be given again. A user's message "
        "beside conversations (--data .jsonl), else a text's beginning",
    )
    seen.add_argument(
        "--sample-tokens", type=positive, default=48, help="of what goes on behind a --sample"
    )
    seen.add_argument(
        "--tensorboard", action="store_true", help="write --output/tensorboard (v4jax[tensorboard])"
    )
    parser.add_argument("--save-every", type=positive, default=250, help="steps")
    parser.add_argument("--eval-every", type=positive, default=250, help="steps")
    parser.add_argument("--log-every", type=positive, default=10, help="steps")
    parser.add_argument(
        "--tokenizer",
        type=local_folder,
        help="tokenizer.json for --data, and to put into model/; default: that of --checkpoint",
    )
    rows = parser.add_argument_group("rows of --data")
    rows.add_argument("--mode", help="of conversations that name none, as think-high")
    rows.add_argument(
        "--no-packing", action="store_true", help="one example a row, and padding behind it"
    )
    rows.add_argument(
        "--too-long",
        choices=TOO_LONG,
        default="cut",
        help="an example longer than --seq-len: the rest of a text goes into further rows and that of a "
        "conversation is left out, or the run is refused",
    )
    trained = parser.add_argument_group("what trains")
    trained.add_argument(
        "--trainable",
        choices=[*TRAINABLE, "lora"],
        help="no-experts: the routed experts stay packed; indexer: those of CSA layers alone train; lora: "
        "everything stays packed, beside adapters. Default all, and indexer with --loss indexer",
    )
    trained.add_argument(
        "--train",
        nargs="+",
        metavar="NAME",
        help="what trains by name, in place of --trainable, as layers.20-42 or '*.attention'",
    )
    trained.add_argument(
        "--freeze", nargs="+", metavar="NAME", help="what stays, of all or of --train, as embed"
    )
    trained.add_argument("--lora-rank", type=positive, default=16, help="columns of an adapter")
    trained.add_argument(
        "--lora-alpha", type=rate, help="its scale is alpha / rank; default 2 * rank"
    )
    trained.add_argument(
        "--lora-targets",
        nargs="+",
        metavar="NAME",
        default=["attention"],
        help=f"of {', '.join(PRESETS)}, and ends of the paths of matrices, as attention.wq_a, shared.w1 or moe.w1",
    )
    trained.add_argument(
        "--lora-rslora", action="store_true", help="its scale is alpha / sqrt(rank)"
    )
    trained.add_argument(
        "--lora-dropout",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="of an adapter's inputs, left out in a step",
    )
    trained.add_argument(
        "--init-adapter",
        type=checkpoint_folder,
        metavar="FOLDER",
        help="of --trainable lora: go on from this adapter in PEFT's files, whose rank, alpha and targets hold",
    )
    rule = parser.add_argument_group("optimizer and loss")
    rule.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help="muon: of the model's matrices, and adamw for the rest",
    )
    rule.add_argument(
        "--optimizer-dtype",
        choices=STATE_DTYPES,
        default="float32",
        help="of its moments, between steps",
    )
    rule.add_argument(
        "--schedule", choices=SHAPES, default="cosine", help="of the rate, after its warm-up"
    )
    rule.add_argument(
        "--loss",
        choices=("next-token", "dpo", "indexer"),
        default="next-token",
        help="dpo: --data has preference pairs, and --batch-size counts them; indexer: warm indexers up, "
        "with attention to all compressed entries",
    )
    rule.add_argument(
        "--dpo-beta", type=rate, default=0.1, help="how close to the checkpoint dpo stays"
    )
    rule.add_argument("--weight-decay", type=rate, default=0.1, help="of matrices")
    rule.add_argument("--b1", type=share, default=0.9, help="Adam's first decay")
    rule.add_argument("--b2", type=share, default=0.95, help="Adam's second decay")
    rule.add_argument("--clip-norm", type=rate, default=1.0, help="of the whole gradient")
    rule.add_argument(
        "--bias-speed", type=rate, help="of the routing bias; default 0.001 from scratch, else 0"
    )
    rule.add_argument(
        "--mtp-weight", type=rate, help="of the MTP loss; default 0.3 from scratch, else 0.1"
    )
    rule.add_argument(
        "--balance-weight", type=rate, default=1e-4, help="of the router's balance loss"
    )
    rule.add_argument("--indexer-weight", type=rate, default=1.0, help="of the indexer's loss")
    rule.add_argument(
        "--z-weight", type=rate, default=0.0, help="of the square of the softmax's log normaliser"
    )
    rule.add_argument(
        "--micro-batches",
        type=positive,
        default=1,
        help="parts of a batch, whose gradients are taken one after the other and added up",
    )
    rule.add_argument(
        "--remat",
        choices=list(POLICIES),
        default="layers",
        help="what layers keep for the backward pass, from most memory to least; the rest is computed again",
    )
    rule.add_argument(
        "--skip-above",
        type=norm,
        default=math.inf,
        help="skip a step whose gradient has a larger norm; one that is not finite always is",
    )
    rule.add_argument(
        "--skip-spikes",
        type=norm,
        metavar="DEVIATIONS",
        help="skip a step whose gradient's norm is so many standard deviations above the mean of the last "
        "--spike-steps steps that were taken, as 6",
    )
    rule.add_argument(
        "--spike-steps", type=several, default=128, help="of --skip-spikes; none is skipped before"
    )
    rule.add_argument(
        "--anticipate-routing",
        choices=("off", *WHEN),
        default="off",
        help="choose experts by the parameters of some steps before: after a step that --skip-spikes or "
        "--skip-above skips, for a while (auto), or always",
    )
    rule.add_argument(
        "--routing-delay", type=natural, default=4, help="steps before, of --anticipate-routing"
    )
    rule.add_argument(
        "--routing-steps",
        type=positive,
        default=128,
        help="that --anticipate-routing auto goes on for",
    )
    rule.add_argument(
        "--max-skipped", type=positive, default=10, help="end after so many skipped steps in a row"
    )
    parser.add_argument("--qat", action="store_true", help="train with the rounding in the loop")
    parser.add_argument(
        "--export",
        choices=("last", "best"),
        default="last",
        help="what is written at the end: the last state, or that of the lowest held-out loss",
    )
    parser.add_argument(
        "--save", choices=FORMATS, help="at the end; default released, and adapter with lora"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of activations; parameters stay float32",
    )
    add_pod_arguments(parser, auto=True)
    return parser


def _is_given(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> bool:
    """Whether an option has another value than its default."""
    return getattr(args, name) != parser.get_default(name)


def _check_init_adapter(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.trainable != "lora":
        parser.error("--init-adapter: expected --trainable lora beside it.")
    names = ("lora_rank", "lora_alpha", "lora_targets", "lora_rslora", "lora_dropout")
    for name in names:
        if _is_given(parser, args, name):
            option = name.replace("_", "-")
            parser.error(f"--{option}: expected none beside --init-adapter, whose own holds.")


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, and the file that --config names."""
    args = parse_pod_args(parser, words_with_config(parser, sys.argv[1:]))
    if args.data and not (args.tokenizer or args.checkpoint):
        parser.error("--data: expected --tokenizer FILE beside --model, to encode it with.")
    if args.eval_data and not (args.tokenizer or args.checkpoint):
        parser.error("--eval-data: expected --tokenizer FILE beside --model, to encode it with.")
    if args.eval_data and args.eval_tokens:
        parser.error("--eval-data and --eval-tokens: expected one of them.")
    is_measured = args.eval_data or args.eval_tokens
    if args.sample and not (is_measured and (args.tokenizer or args.checkpoint)):
        parser.error("--sample: expected --eval-data or --eval-tokens beside it, and a tokenizer.")
    if args.export == "best" and not is_measured:
        parser.error("--export best: expected --eval-data or --eval-tokens beside it.")
    if args.loss == "dpo" and not (args.data and args.checkpoint):
        parser.error(
            "--loss dpo: expected --data of pairs, and --checkpoint, which is the reference."
        )
    if args.loss == "dpo" and args.eval_tokens:
        parser.error("--loss dpo: expected --eval-data of pairs in place of --eval-tokens.")
    names = [f"--{name}" for name in ("train", "freeze") if getattr(args, name)]
    if names and args.trainable:
        parser.error(f"{' and '.join(names)}: expected no --trainable beside names.")
    if not names:
        args.trainable = args.trainable or ("indexer" if args.loss == "indexer" else "all")
    if args.loss == "indexer" and args.trainable != "indexer":
        parser.error("--loss indexer: expected --trainable indexer, or nothing in its place.")
    if args.anticipate_routing != "off" and args.loss == "indexer":
        parser.error(
            "--anticipate-routing: expected another --loss than indexer, in which no router changes."
        )
    is_skipping = args.skip_spikes is not None or args.skip_above < math.inf
    if args.anticipate_routing == "auto" and not is_skipping:
        parser.error(
            "--anticipate-routing auto: expected --skip-spikes or --skip-above beside it, which say what "
            "a spike is."
        )
    if not (args.data or args.eval_data):
        given = [n for n in ("mode", "no_packing", "too_long") if _is_given(parser, args, n)]
        if given:
            parser.error(f"--{given[0].replace('_', '-')}: expected --data beside it.")
    if args.init_adapter:
        _check_init_adapter(parser, args)
    if args.save == "adapter" and args.trainable != "lora":
        parser.error("--save adapter: expected --trainable lora beside it.")
    for name, (pre_training, fine_tuning) in _BY_START.items():
        if getattr(args, name) is None:
            setattr(args, name, pre_training if args.model else fine_tuning)
    args.save = args.save or ("adapter" if args.trainable == "lora" else "released")
    return args
