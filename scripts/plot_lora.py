"""Fine-tunes nano on a new text, whole and by LoRA, and draws what is learnt and what is forgotten.

    python -m scripts.plot_lora docs/lora.svg
    python -m scripts.plot_lora mine.svg --text mine.txt --steps 300

nano has read novels. The new text is this project's guides (docs/*.md), or a file; its last tenth is held
out. All runs see the same batches. Left: loss of the held-out part. Right: loss of the novels' held-out
chapters, which nothing here trains on.
"""

import argparse
import dataclasses
import pathlib
import time

import jax
import matplotlib
import numpy as np

import v4jax
from v4jax.train import TokenStream, adamw, schedule

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).parent.parent
LENGTH, BATCH, EVERY, EVALUATED = 256, 4, 20, 6


@dataclasses.dataclass(frozen=True)
class Run:
    """What trains, and how fast."""

    name: str
    trainable: str | v4jax.LoRA
    rate: float


RUNS = (
    Run("all weights", "all", 3e-4),
    Run("all weights", "all", 1e-3),
    Run("LoRA, rank 16", v4jax.LoRA(rank=16), 1e-3),
    Run("LoRA, rank 16", v4jax.LoRA(rank=16), 3e-3),
    Run("LoRA, rank 4", v4jax.LoRA(rank=4), 3e-3),
)


def main() -> None:
    """Trains, prints a table and writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("figure", type=pathlib.Path, help=".svg")
    parser.add_argument("--text", type=pathlib.Path, help="default: the guides")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    tokenizer = v4jax.Tokenizer(v4jax.nano_path())
    paths = [args.text] if args.text else sorted((ROOT / "docs").glob("*.md"))
    new = tokenizer.encode("\n".join(path.read_text(encoding="utf-8") for path in paths))
    novels = ROOT / "scripts" / "data" / "austen" / "heldout.txt"
    old = tokenizer.encode(novels.read_text(encoding="utf-8"))
    cut = len(new) * 9 // 10
    texts = [np.array(part, np.int32) for part in (new[:cut], new[cut:], old)]
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    print(f"{cut:,} tokens of the new text, {len(new) - cut:,} held out; {args.steps} steps")
    print("| what trains | numbers | rate | new text | novels | CPU s a step |")
    print("|---|---|---|---|---|---|")
    for number, run in enumerate(RUNS):
        curves, size, seconds = train(run, args.steps, *texts)
        if not number:
            print(f"| nothing | 0 | | {curves[0][1]:.3f} | {curves[0][2]:.3f} | |")
        steps, *losses = zip(*curves)
        print(
            f"| {run.name} | {size:,} | {run.rate:g} | {losses[0][-1]:.3f} | {losses[1][-1]:.3f} "
            f"| {seconds:.2f} |",
            flush=True,
        )
        for panel, loss in zip(panels, losses):
            style = "--" if run.trainable == "all" else "-"
            panel.plot(steps, loss, style, color=f"C{number}", label=f"{run.name}, {run.rate:g}")
    for panel, title in zip(panels, ("the new text, held out", "novels, held out")):
        panel.set(xlabel="step", ylabel="nats a token", title=title)
        panel.grid(alpha=0.3)
    panels[0].legend()
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure)
    print(f"wrote {args.figure}")


def train(run: Run, steps: int, text, heldout, novels) -> tuple[list[tuple], int, float]:
    """(step, loss of the new text, loss of the novels), how many numbers train, CPU seconds a step."""
    rates = schedule("cosine", run.rate, steps, warmup_steps=steps // 10)
    model = v4jax.load("nano", use="train")
    trainer = v4jax.Trainer(model, adamw(rates), trainable=run.trainable)
    size = sum(leaf.size for leaf in jax.tree.leaves(trainer.state.params))
    data, curve, seconds = TokenStream(text, LENGTH, seed=1), [], []

    def measure(step: int) -> None:
        found = [
            trainer.evaluate(TokenStream(tokens, LENGTH), BATCH, EVALUATED)
            for tokens in (heldout, novels)
        ]
        curve.append((step, *found))

    measure(0)
    for number in range(steps):
        batch, started = trainer.batch(data, number, BATCH), time.process_time()
        jax.block_until_ready(trainer.step(batch).loss)
        seconds.append(time.process_time() - started)
        if (number + 1) % EVERY == 0:
            measure(number + 1)
    return curve, size, float(np.median(seconds))


if __name__ == "__main__":
    main()
