"""A checkpoint of V4-Flash's true widths on a CPU: logits for other implementations, a LoRA step.

    python -m benchmarks.wide runs/wide --output runs/wide.npz
    python -m benchmarks.wide runs/wide --train 512

`scripts/make_wide_checkpoint.py` makes the folder. The prompt is longer than 4 x 512 tokens, so that
the indexer has to choose; logits of a few positions are kept, with the tokens.
"""

import argparse
import pathlib
import resource
import time

import jax
import numpy as np

import v4jax
from v4jax.nn.lora import ATTENTION, EXPERTS, SHARED_EXPERT
from v4jax.train.losses import shifted

LENGTH = 2203  # tokens
POSITIONS = (0, 127, 128, 129, 2047, 2048, 2100, 2150, LENGTH - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path, help="logits of a prompt go here, .npz")
    parser.add_argument(
        "--train", type=int, metavar="N", help="two steps of a LoRA, experts too, on N tokens"
    )
    args = parser.parse_args()
    started = time.monotonic()
    use = "train" if args.train else "serve"
    model = jax.block_until_ready(v4jax.load(args.checkpoint, v4jax.plain(), use=use))
    print(f"loaded in {time.monotonic() - started:.1f} s, {model}")
    if args.train:
        train(model, args.train)
    if args.output:
        write_logits(model, args.output)


def write_logits(model: v4jax.Transformer, output: pathlib.Path) -> None:
    """Logits of a few positions of a prompt."""
    tokens = np.random.default_rng(1).integers(0, model.cfg.vocab_size, (1, LENGTH))

    @jax.jit
    def some_logits(model, tokens):
        hidden = model.hidden(model.trunk(tokens)[0])
        return model.logits(hidden[:, np.array(POSITIONS)])

    started = time.monotonic()
    logits = np.asarray(some_logits(model, tokens.astype(np.int32)))
    print(f"{LENGTH} tokens in {time.monotonic() - started:.1f} s, peak memory {_peak()} GiB")
    np.savez(output, tokens=tokens, positions=POSITIONS, logits=logits)


def train(model: v4jax.Transformer, length: int) -> None:
    """Two steps on one sequence, with adapters at attention, shared and routed experts."""
    targets = (*ATTENTION, *SHARED_EXPERT, *EXPERTS)
    lora = v4jax.LoRA(rank=8, targets=targets)
    trainer = v4jax.Trainer(model, v4jax.train.adamw(1e-3), trainable=lora)
    size = sum(leaf.size for leaf in jax.tree.leaves(trainer.state.params))
    vocab = model.cfg.vocab_size
    tokens = np.random.default_rng(1).integers(0, vocab, (1, length + 2)).astype(np.int32)
    for number in range(2):
        started = time.monotonic()
        loss = float(trainer.step(shifted(tokens)).ce)
        print(f"step {number}: {time.monotonic() - started:.1f} s, cross-entropy {loss:.4f}")
    print(f"{size:,} numbers train, {length} tokens a step, peak memory {_peak()} GiB")


def _peak() -> str:
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f}"


if __name__ == "__main__":
    main()
