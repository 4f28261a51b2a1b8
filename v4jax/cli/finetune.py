"""Trains a model on conversations, texts or tokens: from scratch, or from a checkpoint.

    v4jax finetune --checkpoint DIR --data chat.jsonl --output runs/a --trainable lora --dtype bfloat16
    v4jax finetune --model nano --tokens runs/nano/data/tokens.npy --output runs/nano

`--data` has an example a line, which the released prompt format renders; loss is on what the assistant writes
(docs/training.md; `v4jax data check FILE` shows it). `--tokens` is one array of ids, cut into windows.

AdamW over the next token, the token after it (MTP), the indexer's loss and router balance. What trains
is float32; with `--trainable no-experts` or `lora` the other weights stay packed as they are stored.
With `--qat` every step computes with weights and activations rounded as the released format and code
round them (docs/low_precision.md). Run the same command again to go on after an interruption: a step's
batch depends on the seed and the step only. `--output` gets state/ (Orbax), metrics.jsonl, and at the
end model/ in the released layout, FP4 experts and FP8 linears included (or float32 with `--save float`),
or adapter/ in PEFT's files.

Over several devices with `--mesh fsdp=4,expert=2`, over several hosts as v4jax/cli/pod.py shows. A model
that is spread over several hosts stays in state/: run the same command once more on one host, with
any mesh, to write model/.
"""

import argparse
import json
import math
import pathlib
import shutil
import sys

import jax
from flax import nnx

from v4jax import checkpoint, stores
from v4jax.checkpoint.folders import weight_files
from v4jax.checkpoint.hf_config import from_hf
from v4jax.checkpoint.saving import write_text
from v4jax.cli.errors import one_message
from v4jax.cli.options import DTYPES, checkpoint_folder, command_parser, local_folder
from v4jax.cli.pod import add_pod_arguments, on_mesh, parse_pod_args, start_processes
from v4jax.config import VARIANTS, V4Config
from v4jax.inference.batch.files import fingerprint
from v4jax.nn.documents import alignment
from v4jax.nn.lora import ATTENTION, LoRA
from v4jax.nn.model import Transformer
from v4jax.nn.numerics import plain, released
from v4jax.planning.devices import require_room_to_train, training_mesh
from v4jax.text.tokenizer import Tokenizer
from v4jax.train.data import Data, Examples, TokenStream
from v4jax.train.data.examples import TOO_LONG
from v4jax.train.losses import LossWeights
from v4jax.train.optimizers import adamw
from v4jax.train.schedules import schedule
from v4jax.train.trainer import FORMATS, TRAINABLE, Trainer


def natural(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 on.")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if natural(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected at least 1.")
    return int(text)


def rate(text: str) -> float:
    """A number from 0 on."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 on.")
    return value


# What does not decide the numbers of a run. A state is not continued with other values of the rest.
_FREE = (
    "output",
    "eval_tokens",
    "eval_data",
    "save_every",
    "eval_every",
    "log_every",
    "tokenizer",
    "save",
    "mesh",
    *("distributed", "coordinator", "num_processes", "process_id"),
)
# Of `--data` alone: they are no settings of a run over tokens.
_OF_DATA = ("data", "mode", "no_packing", "too_long")
# Left out, it depends on where training starts: pre-training's values, or what fine-tuning takes.
_BY_START = {"bias_speed": (1e-3, 0.0), "mtp_weight": (0.3, 0.1)}


def identity_of(args: argparse.Namespace) -> dict[str, object]:
    """Settings and files that a run's numbers depend on."""
    found = {name: value for name, value in vars(args).items() if name not in _FREE}
    if args.data:
        found["data"] = fingerprint([args.data, tokenizer_file(args)])
        found["release"] = Tokenizer(tokenizer_file(args)).release
    else:
        found = {name: value for name, value in found.items() if name not in _OF_DATA}
        found["tokens"] = fingerprint([args.tokens])
    if args.checkpoint:
        files = [stores.join(args.checkpoint, "config.json"), *weight_files(args.checkpoint)]
        found["checkpoint"] = fingerprint(files)
    return found


def tokenizer_file(args: argparse.Namespace) -> str:
    """The `tokenizer.json` that data is encoded with."""
    return stores.in_folder(args.tokenizer or args.checkpoint, "tokenizer.json")


def claim(args: argparse.Namespace) -> None:
    """Makes `--output` this run's own.

    Raises:
      ValueError: it has another run's state, or a model that no run wrote.
    """
    path, own = args.output / "run.json", identity_of(args)
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in sorted({*found, *own}) if found.get(name) != own.get(name)]
        if other:
            raise ValueError(
                f"{args.output} has a run with other settings: {', '.join(other)}. Give the same "
                "ones to go on with it, or another --output."
            )
        return
    for written in (args.output / "model", args.output / "adapter"):
        if not written.exists():
            continue
        raise ValueError(
            f"{written} exists, and this run did not write it: give another --output. "
            "Nothing was changed."
        )
    write_text(str(path), json.dumps(own, indent=2))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = command_parser("finetune", __doc__)
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
        default="all",
        help="no-experts: the routed experts stay packed; lora: everything does, beside adapters",
    )
    trained.add_argument("--lora-rank", type=positive, default=16, help="columns of an adapter")
    trained.add_argument(
        "--lora-alpha", type=rate, help="its scale is alpha / rank; default 2 * rank"
    )
    trained.add_argument(
        "--lora-targets",
        nargs="+",
        metavar="NAME",
        default=list(ATTENTION),
        help="ends of the paths of matrices, as attention.wq_a, shared.w1 or moe.w1",
    )
    rule = parser.add_argument_group("optimizer and loss")
    rule.add_argument("--weight-decay", type=rate, default=0.1, help="of matrices")
    rule.add_argument("--b1", type=rate, default=0.9, help="Adam's first decay")
    rule.add_argument("--b2", type=rate, default=0.95, help="Adam's second decay")
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
    parser.add_argument("--qat", action="store_true", help="train with the rounding in the loop")
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
    args = parse_pod_args(parser)
    if args.data and not (args.tokenizer or args.checkpoint):
        parser.error("--data: expected --tokenizer FILE beside --model, to encode it with.")
    if args.eval_data and not (args.tokenizer or args.checkpoint):
        parser.error("--eval-data: expected --tokenizer FILE beside --model, to encode it with.")
    if args.eval_data and args.eval_tokens:
        parser.error("--eval-data and --eval-tokens: expected one of them.")
    if args.save == "adapter" and args.trainable != "lora":
        parser.error("--save adapter: expected --trainable lora beside it.")
    for name, (pre_training, fine_tuning) in _BY_START.items():
        if getattr(args, name) is None:
            setattr(args, name, pre_training if args.model else fine_tuning)
    args.save = args.save or ("adapter" if args.trainable == "lora" else "released")
    return args


def config_of(args: argparse.Namespace) -> V4Config:
    """The architecture that is trained."""
    return VARIANTS[args.model]() if args.model else from_hf(args.checkpoint)


def start_model(args: argparse.Namespace) -> Transformer:
    """The model to start from, its weights in the formats that they are stored in."""
    numerics = released(args.dtype) if args.qat else plain(args.dtype)
    if args.checkpoint:
        return checkpoint.load(args.checkpoint, numerics, use="train", progress=True)
    cfg = config_of(args)
    return jax.jit(lambda: Transformer(cfg, numerics, rngs=nnx.Rngs(args.seed)))()


def make_trainer(args: argparse.Namespace) -> Trainer:
    """What the options describe."""
    trainable = args.trainable
    if trainable == "lora":
        trainable = LoRA(
            rank=args.lora_rank, alpha=args.lora_alpha, targets=tuple(args.lora_targets)
        )
    optimizer = adamw(
        schedule("cosine", args.lr, args.steps, warmup_steps=args.warmup),
        b1=args.b1,
        b2=args.b2,
        weight_decay=args.weight_decay,
        clip_norm=args.clip_norm,
    )
    weights = LossWeights(
        mtp=args.mtp_weight, balance=args.balance_weight, indexer=args.indexer_weight
    )
    return Trainer(
        start_model(args),
        optimizer,
        trainable=trainable,
        weights=weights,
        qat=args.qat,
        bias_speed=args.bias_speed,
        seed=args.seed,
    )


def read_data(
    args: argparse.Namespace, file: pathlib.Path | None, tokens: pathlib.Path | None
) -> Data:
    """A file of examples, or else an array of tokens."""
    if file is None:
        assert tokens is not None  # one of them is required
        return TokenStream(tokens, args.seq_len, seed=args.seed)
    return Examples(
        file,
        Tokenizer(tokenizer_file(args)),
        args.seq_len,
        seed=args.seed,
        packing=not args.no_packing,
        too_long=args.too_long,
        mode=args.mode,
        align=alignment(config_of(args)),
    )


def _nothing(path: str, variable: nnx.Variable) -> bool:
    """Of the model's own parameters a LoRA trains none."""
    del path, variable
    return False


def main() -> None:
    """Trains, saves and exports."""
    args = parse_args()
    process, count = start_processes(args)
    if args.mesh == "auto":
        args.mesh, why = training_mesh(config_of(args), jax.devices())
        if process == 0:
            print(f"mesh: {why}", file=sys.stderr)
    with on_mesh(args.mesh):
        train(args, is_first=process == 0, is_alone=count == 1)


def train(args: argparse.Namespace, *, is_first: bool, is_alone: bool) -> None:
    """The run; the first process prints and logs."""
    data = read_data(args, args.data, args.tokens)
    data.require_ids(config_of(args).vocab_size)
    if is_first and args.data:
        print(data, file=sys.stderr)
    chosen = TRAINABLE.get(args.trainable, _nothing)
    require_room_to_train(config_of(args), chosen, args.mesh or {}, jax.devices()[0])
    args.output.mkdir(parents=True, exist_ok=True)
    if is_first:
        claim(args)
    trainer = make_trainer(args)
    evaluation = None
    if args.eval_data or args.eval_tokens:
        evaluation = read_data(args, args.eval_data, args.eval_tokens)
    trainer.fit(
        data,
        args.steps,
        batch_size=args.batch_size,
        output=args.output,
        evaluation=evaluation,
        eval_every=args.eval_every,
        save_every=args.save_every,
        log_every=args.log_every,
    )
    if not is_alone:
        print(f"{args.output / 'state'} has the model: run this on one host to write model/")
        return
    written = args.output / ("adapter" if args.save == "adapter" else "model")
    shutil.rmtree(written, ignore_errors=True)  # `claim` made sure that it is ours
    trainer.save(written, args.save)
    source = args.tokenizer or args.checkpoint
    if source and stores.is_file(stores.in_folder(source, "tokenizer.json")):
        Tokenizer(source).save(written)
    print(f"wrote {written}")


if __name__ == "__main__":
    with one_message():
        main()
