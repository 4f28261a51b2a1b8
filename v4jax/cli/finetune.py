"""Trains a model on a stream of tokens: from scratch, or from a checkpoint.

    v4jax finetune --model nano --tokens runs/nano/data/tokens.npy --output runs/nano

AdamW over the next token, the token after it (MTP), the indexer's loss and router balance; float32
throughout. With `--qat` every step computes with weights and activations rounded as the released
format and code round them (docs/low_precision.md). Run the same command again to go on after an
interruption: a step's batch depends on the seed and the step only. `--output` gets state/ (Orbax),
metrics.jsonl, and at the end model/ in the released layout, FP4 experts and FP8 linears included (or
float32 with `--save float`).

Over several devices with `--mesh fsdp=4,expert=2`, over several hosts as v4jax/cli/pod.py shows. A model
that is spread over several hosts stays in state/: run the same command once more on one host, with
any mesh, to write model/.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import sys
import time

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from v4jax import checkpoint, stores
from v4jax.checkpoint.folders import weight_files
from v4jax.checkpoint.hf_config import from_hf
from v4jax.checkpoint.saving import write_text
from v4jax.cli.errors import one_message
from v4jax.cli.options import DTYPES, checkpoint_folder, command_parser, local_folder
from v4jax.cli.pod import add_pod_arguments, on_mesh, parse_pod_args, start_processes
from v4jax.config import VARIANTS, V4Config
from v4jax.inference.batch.files import fingerprint
from v4jax.nn.model import Transformer
from v4jax.nn.numerics import plain, released
from v4jax.nn.quantization import to_float, to_released
from v4jax.planning.devices import training_mesh
from v4jax.text.tokenizer import Tokenizer
from v4jax.train.data import TokenStream
from v4jax.train.losses import LossWeights, Metrics
from v4jax.train.optimizers import OptimizerConfig
from v4jax.train.trainer import Saver, Trainer, TrainState


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


# What decides the numbers of a run: a state is not continued with another of these.
IDENTITY = ("model", "steps", "batch_size", "seq_len", "lr", "warmup", "seed", "qat", "dtype")


def identity_of(args: argparse.Namespace) -> dict[str, object]:
    """Settings and files that a run's numbers depend on."""
    found = {name: getattr(args, name) for name in IDENTITY}
    found["tokens"] = fingerprint([args.tokens])
    if args.checkpoint:
        files = [stores.join(args.checkpoint, "config.json"), *weight_files(args.checkpoint)]
        found["checkpoint"] = fingerprint(files)
    return found


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
    if (args.output / "model").exists():
        raise ValueError(
            f"{args.output / 'model'} exists, and this run did not write it: give another --output. "
            "Nothing was changed."
        )
    write_text(str(path), json.dumps(own, indent=2))


def drop_lines_after(path: pathlib.Path, step: int) -> None:
    """Leaves out of metrics.jsonl the steps behind the state that a run goes on from."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):  # half a line: the run was killed while it wrote
            continue
    path.with_suffix(".new").write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(path.with_suffix(".new"), path)


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
    parser.add_argument("--tokens", type=local_folder, required=True, help=".npy, integers [N]")
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
    parser.add_argument("--tokenizer", type=local_folder, help="tokenizer.json to put into model/")
    parser.add_argument("--qat", action="store_true", help="train with the rounding in the loop")
    parser.add_argument(
        "--save", choices=["released", "float"], default="released", help="format of model/"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of activations; parameters stay float32",
    )
    add_pod_arguments(parser, auto=True)
    return parse_pod_args(parser)


def config_of(args: argparse.Namespace) -> V4Config:
    """The architecture that is trained."""
    return VARIANTS[args.model]() if args.model else from_hf(args.checkpoint)


def start_model(args: argparse.Namespace) -> Transformer:
    """The float32 model to start from."""
    numerics = released(args.dtype) if args.qat else plain(args.dtype)
    if args.checkpoint:
        return to_float(checkpoint.load(args.checkpoint, numerics, use="train"))
    cfg = config_of(args)
    return jax.jit(lambda: Transformer(cfg, numerics, rngs=nnx.Rngs(args.seed)))()


class Evaluator:
    """Mean next-token loss over fixed windows of held-out tokens."""

    def __init__(self, trainer: Trainer, stream: TokenStream, batch_size: int, batches: int = 4):
        self.trainer = trainer
        self.windows = [trainer.batch(stream, i, batch_size) for i in range(batches)]

    def __call__(self, state: TrainState) -> float:
        """Nats per token."""
        return float(np.mean([float(self.trainer.loss(state, w)) for w in self.windows]))


def record(step: int, metrics: Metrics) -> dict[str, float]:
    """One line of metrics.jsonl."""
    terms = ("loss", "ce", "mtp_ce", "indexer", "balance")
    return {"step": step, **{name: round(float(getattr(metrics, name)), 5) for name in terms}}


def require_finite(trainer: Trainer, state: TrainState, metrics: Metrics, step: int, output):
    """A state with NaN never takes the place of a good one.

    Raises:
      ValueError: the loss or a parameter is NaN or infinite.
    """
    if math.isfinite(float(metrics.loss)) and trainer.is_finite(state):
        return
    raise ValueError(
        f"step {step}: the loss is {float(metrics.loss)}, or a parameter is not finite. Nothing was "
        f"saved; the last good state, if any, is in {output / 'state'}. Try a lower --lr or a longer "
        "--warmup, in another --output."
    )


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
    stream = TokenStream(args.tokens, args.seq_len, seed=args.seed)
    stream.require_ids(config_of(args).vocab_size)
    args.output.mkdir(parents=True, exist_ok=True)
    if is_first:
        claim(args)
    trainer = Trainer(
        start_model(args),
        OptimizerConfig(peak_lr=args.lr, warmup_steps=args.warmup, total_steps=args.steps),
        LossWeights(),
        qat=args.qat,
    )
    state, first = trainer.init(), 0
    saver = Saver(args.output / "state")
    if (found := saver.restore(state)) is not None:
        state, first = found
        print(f"going on from step {first} of {args.output / 'state'}")
    evaluate = None
    if args.eval_tokens:
        held_out = TokenStream(args.eval_tokens, args.seq_len, seed=args.seed)
        evaluate = Evaluator(trainer, held_out, args.batch_size)
    if is_first:
        drop_lines_after(args.output / "metrics.jsonl", first)
    per_step, started = args.batch_size * args.seq_len, time.monotonic()
    with open(args.output / "metrics.jsonl" if is_first else os.devnull, "a") as log:
        steps = range(first, args.steps)
        bar = tqdm(steps, initial=first, total=args.steps, unit="step", disable=not is_first)
        for step in bar:
            state, metrics = trainer.step(state, trainer.batch(stream, step, args.batch_size))
            done = step + 1
            is_eval = evaluate and (done % args.eval_every == 0 or done == args.steps)
            if done % args.log_every == 0 or done == args.steps or is_eval:
                line = record(done, metrics)
                rate = (done - first) * per_step / (time.monotonic() - started)
                bar.set_postfix(ce=line["ce"], mtp=line["mtp_ce"], tok_s=round(rate))
                if is_eval:
                    line["heldout_ce"] = round(evaluate(state), 5)
                    bar.write(f"step {done}: held-out loss {line['heldout_ce']:.4f}")
                log.write(json.dumps(line) + "\n")
                log.flush()
            if done % args.save_every == 0 or done == args.steps:
                require_finite(trainer, state, metrics, done, args.output)
                saver.save(done, state)
                saver.wait()
    saver.close()
    if not is_alone:
        print(f"{args.output / 'state'} has the model: run this on one host to write model/")
        return
    model = trainer.model(state)
    shutil.rmtree(args.output / "model", ignore_errors=True)  # `claim` made sure that it is ours
    checkpoint.save(to_released(model) if args.save == "released" else model, args.output / "model")
    source = args.tokenizer or args.checkpoint
    if source and stores.is_file(stores.in_folder(source, "tokenizer.json")):
        Tokenizer(source).save(args.output / "model")
    print(f"wrote {args.output / 'model'}")


if __name__ == "__main__":
    with one_message():
        main()
