"""What merging an adapter into a checkpoint's formats costs: a LoRA of nano, apart and merged.

    python -m benchmarks.adapter_merging runs/merging

Trains an adapter, unless the folder has one, on one half of the held-out text that nano has not seen, and
compares what the merged checkpoints predict for the other half with what the adapter beside the released
weights does.
"""

import argparse
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

import v4jax
from v4jax.checkpoint import load_adapter
from v4jax.checkpoint.convert import Conversion
from v4jax.train import TokenStream

TEXT = pathlib.Path(__file__).parent.parent / "scripts" / "data" / "austen" / "heldout.txt"
FORMATS = ("released", "fp8", "fp4-bf16", "bf16")
LENGTH, ROWS = 256, 8


def main() -> None:
    """Prints one line a format."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="a new folder for what is written")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--targets", default="all-linear")
    args = parser.parse_args()
    base, adapter = v4jax.nano_path(), args.folder / "adapter"
    tokens = np.array(v4jax.Tokenizer(base).encode(TEXT.read_text(encoding="utf-8")), np.int32)
    half = len(tokens) // 2
    lora = v4jax.LoRA(rank=8, targets=args.targets)
    if not adapter.exists():
        model = v4jax.load(base, use="train")
        trainer = v4jax.Trainer(model, v4jax.train.adamw(args.rate), trainable=lora)
        trainer.fit(TokenStream(tokens[:half], LENGTH), args.steps, batch_size=4)
        trainer.save(adapter)
    rows = jnp.asarray(tokens[half : half + ROWS * LENGTH].reshape(ROWS, LENGTH))

    @jax.jit
    def log_probabilities(model, rows):
        return jax.nn.log_softmax(model(rows), axis=-1)

    def predicted(model):
        return np.asarray(log_probabilities(model, rows), np.float64)

    before = predicted(v4jax.load(base))
    apart = predicted(load_adapter(v4jax.load(base), adapter))
    report("without the adapter", before, apart, rows)
    report("apart", apart, apart, rows)
    for to in FORMATS:
        target = args.folder / to
        shutil.rmtree(target, ignore_errors=True)
        Conversion(base, target, to=to, adapter=adapter).run()
        report(f"merged, {to}", predicted(v4jax.load(target)), apart, rows)


def report(name: str, found, apart, rows) -> None:
    """Divergence from the adapter apart, and the perplexity."""
    divergence = (np.exp(apart) * (apart - found)).sum(-1).mean()
    chosen = np.take_along_axis(found[:, :-1], np.asarray(rows)[:, 1:, None], axis=-1)
    print(f"{name:22} KL {divergence:.2e}  perplexity {np.exp(-chosen.mean()):.3f}", flush=True)


if __name__ == "__main__":
    main()
