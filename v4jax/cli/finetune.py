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
import os
import pathlib
import shutil
import time

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from v4jax import checkpoint
from v4jax.cli.errors import one_message
from v4jax.cli.options import checkpoint_folder, command_parser
from v4jax.cli.pod import add_pod_arguments, on_mesh, parse_pod_args, start_processes
from v4jax.config import VARIANTS
from v4jax.nn.model import Transformer
from v4jax.nn.numerics import plain, released
from v4jax.nn.quantization import to_float, to_released
from v4jax.train.data import TokenStream
from v4jax.train.losses import LossWeights, Metrics
from v4jax.train.optimizers import OptimizerConfig
from v4jax.train.trainer import Saver, Trainer, TrainState


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = command_parser("finetune", __doc__)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", choices=sorted(VARIANTS), help="train this variant from scratch")
    start.add_argument(
        "--checkpoint", type=checkpoint_folder, metavar="DIR", help="start from this folder"
    )
    parser.add_argument("--tokens", type=pathlib.Path, required=True, help=".npy, integers [N]")
    parser.add_argument("--eval-tokens", type=pathlib.Path, help="held-out tokens, .npy")
    parser.add_argument(
        "--output", type=pathlib.Path, metavar="DIR", required=True, help="folder of the run"
    )
    parser.add_argument(
        "--steps", type=int, default=1000, help="in all, those before an interruption too"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--lr", type=float, default=2e-4, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps until --lr is reached")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights and the order of the data"
    )
    parser.add_argument("--save-every", type=int, default=250, help="steps")
    parser.add_argument("--eval-every", type=int, default=250, help="steps")
    parser.add_argument("--log-every", type=int, default=10, help="steps")
    parser.add_argument("--tokenizer", type=pathlib.Path, help="tokenizer.json to put into model/")
    parser.add_argument("--qat", action="store_true", help="train with the rounding in the loop")
    parser.add_argument(
        "--save", choices=["released", "float"], default="released", help="format of model/"
    )
    add_pod_arguments(parser)
    return parse_pod_args(parser)


def start_model(args: argparse.Namespace) -> Transformer:
    """The float32 model to start from."""
    numerics = released("float32") if args.qat else plain()
    if args.checkpoint:
        return to_float(checkpoint.load(args.checkpoint, numerics, scan_layers=True))
    cfg = VARIANTS[args.model]()
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


def main() -> None:
    """Trains, saves and exports."""
    args = parse_args()
    process, count = start_processes(args)
    with on_mesh(args.mesh):
        train(args, is_first=process == 0, is_alone=count == 1)


def train(args: argparse.Namespace, *, is_first: bool, is_alone: bool) -> None:
    """The run; the first process prints and logs."""
    args.output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        start_model(args),
        OptimizerConfig(peak_lr=args.lr, warmup_steps=args.warmup, total_steps=args.steps),
        LossWeights(),
        qat=args.qat,
    )
    stream = TokenStream(args.tokens, args.seq_len, seed=args.seed)
    state, first = trainer.init(), 0
    saver = Saver(args.output / "state")
    if (found := saver.restore(state)) is not None:
        state, first = found
        print(f"going on from step {first} of {args.output / 'state'}")
    evaluate = None
    if args.eval_tokens:
        held_out = TokenStream(args.eval_tokens, args.seq_len, seed=args.seed)
        evaluate = Evaluator(trainer, held_out, args.batch_size)
    per_step, started = args.batch_size * args.seq_len, time.monotonic()
    with open(args.output / "metrics.jsonl" if is_first else os.devnull, "a") as log:
        steps = range(first, args.steps)
        bar = tqdm(steps, initial=first, total=args.steps, unit="step", disable=not is_first)
        for step in bar:
            state, metrics = trainer.step(state, trainer.batch(stream, step, args.batch_size))
            done = step + 1
            if done % args.log_every == 0 or done == args.steps:
                line = record(done, metrics)
                rate = (done - first) * per_step / (time.monotonic() - started)
                bar.set_postfix(ce=line["ce"], mtp=line["mtp_ce"], tok_s=round(rate))
                if evaluate and (done % args.eval_every == 0 or done == args.steps):
                    line["heldout_ce"] = round(evaluate(state), 5)
                    bar.write(f"step {done}: held-out loss {line['heldout_ce']:.4f}")
                log.write(json.dumps(line) + "\n")
                log.flush()
            if done % args.save_every == 0 or done == args.steps:
                saver.save(done, state)
                saver.wait()
    saver.close()
    if not is_alone:
        print(f"{args.output / 'state'} has the model: run this on one host to write model/")
        return
    model = trainer.model(state)
    shutil.rmtree(args.output / "model", ignore_errors=True)
    checkpoint.save(to_released(model) if args.save == "released" else model, args.output / "model")
    if args.tokenizer:
        shutil.copyfile(args.tokenizer, args.output / "model" / "tokenizer.json")
    print(f"wrote {args.output / 'model'}")


if __name__ == "__main__":
    with one_message():
        main()
