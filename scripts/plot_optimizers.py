"""Trains a small byte model by AdamW and by Muon, and draws held-out loss over steps.

    python -m scripts.plot_optimizers docs/optimizers.svg

Two layers of `tiny()` (a sliding window; CSA with its indexer) read the bytes of novels. Both optimizers
start from the same weights and see the same batches; the rate warms up and falls by a cosine.
"""

import argparse
import dataclasses
import itertools
import pathlib
import time

import jax
import matplotlib
import numpy as np
from flax import nnx

import v4jax
from v4jax.config import V4Config, window_layer
from v4jax.train import TokenStream, adamw, muon, schedule
from v4jax.train.optimizers import STATE_DTYPES

matplotlib.use("agg")
import matplotlib.pyplot as plt

TEXTS = pathlib.Path(__file__).parent / "data" / "austen"
OPTIMIZERS = {"AdamW": adamw, "Muon": muon}
LENGTH, BATCH, EVERY = 128, 8, 25


def main() -> None:
    """Trains, prints a table and writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("figure", type=pathlib.Path, help=".svg, .png or .pdf")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=1, help="of weights and batches")
    parser.add_argument(
        "--state-dtypes", choices=STATE_DTYPES, nargs="+", default=["float32"], help="of the state"
    )
    args = parser.parse_args()
    texts = [(TEXTS / f"{name}.txt").read_bytes() for name in ("train", "heldout")]
    texts = [np.frombuffer(text, np.uint8).astype(np.int32) for text in texts]
    figure, axis = plt.subplots(figsize=(7, 4))
    print("| optimizer | rate | state | seed | held-out nats a byte | CPU s a step |")
    print("|---|---|---|---|---|---|")
    runs = itertools.product(("AdamW", "Muon"), args.rates, args.state_dtypes, range(args.seeds))
    colors = list(itertools.product(args.rates, args.state_dtypes))
    for name, rate, dtype, seed in runs:
        curve, seconds = train(name, rate, dtype, seed, args.steps, *texts)
        loss = curve[-1][1]
        print(f"| {name} | {rate:g} | {dtype} | {seed} | {loss:.3f} | {seconds:.2f} |", flush=True)
        state = "" if dtype == "float32" else f", state {dtype}"
        label = f"{name}, rate {rate:g}{state}" if seed == 0 else None
        color = f"C{colors.index((rate, dtype))}"
        axis.plot(*zip(*curve), {"AdamW": "--", "Muon": "-"}[name], color=color, label=label)
    axis.set_xlabel("step")
    axis.set_ylabel("held-out cross-entropy, nats per byte")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure)
    print(f"wrote {args.figure}")


def small() -> V4Config:
    """One layer with a window alone, and one of CSA."""
    tiny = v4jax.tiny()
    return dataclasses.replace(tiny, layers=(window_layer(), tiny.layers[3]), mtp_layers=())


def train(name: str, rate: float, state_dtype: str, seed: int, steps: int, data, heldout):
    """(step, held-out loss) every `EVERY` steps, and CPU seconds a step."""
    model = jax.jit(lambda key: v4jax.Transformer(small(), rngs=nnx.Rngs(key)))(
        jax.random.key(seed)
    )
    rates = schedule("cosine", rate, steps, warmup_steps=steps // 10)
    optimizer = OPTIMIZERS[name](rates, state_dtype=state_dtype)
    trainer = v4jax.Trainer(model, optimizer, bias_speed=1e-3)
    train_data = TokenStream(data, LENGTH, seed=seed)
    curve, seconds = [], []
    for number in range(steps):
        batch, started = trainer.batch(train_data, number, BATCH), time.process_time()
        jax.block_until_ready(trainer.step(batch).loss)
        seconds.append(time.process_time() - started)
        if (number + 1) % EVERY == 0:
            curve.append((number + 1, trainer.evaluate(TokenStream(heldout, LENGTH), BATCH, 4)))
    return curve, float(np.median(seconds))


if __name__ == "__main__":
    main()
