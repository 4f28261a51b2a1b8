"""Trains small models to recall what lies beyond their window, and draws accuracy over steps.

    python -m scripts.plot_recall docs/recall.svg

A row hides pairs of a key and a value among fillers; its last tokens are the keys, each of which has to be
answered by its value. No chain of windows reaches from a key back to its pair, so two layers with windows
alone can only guess. A layer with compressed rows can look there. It reads all of them in the first two
thirds of the steps; then it goes on with the few that its indexer picks, once with the indexer that has
learnt, by its own loss, where attention went, and once with the indexer of the first step and no such loss.
"""

import argparse
import pathlib
from collections.abc import Callable, Iterator

import jax
import matplotlib
import numpy as np
from flax import nnx

import v4jax
from v4jax.config import CSA, IndexerSpec, LayerSpec, MoEConfig, V4Config, csa_layer, window_layer
from v4jax.train import LossWeights, muon, schedule
from v4jax.train.losses import IGNORED
from v4jax.train.step import TrainStep

matplotlib.use("agg")
import matplotlib.pyplot as plt

# Step, share of held-out answers that are right, and cross-entropy of the steps since the last one.
Curve = list[tuple[int, float, float]]

KEYS, VALUES, FILLERS = np.arange(8), np.arange(8, 24), np.arange(24, 32)
LENGTH, PAIRS, WINDOW = 64, 4, 8
HIDDEN = 40  # pairs lie in the first so many tokens
BATCH, HELDOUT, EVERY = 32, 256, 25

ALL, TOP = LENGTH // CSA.ratio, 3  # compressed rows that the indexer picks


def main() -> None:
    """Trains, prints a table and writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("figure", type=pathlib.Path, help=".svg, .png or .pdf")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0, help="of weights and rows")
    args = parser.parse_args()
    figure, axis = plt.subplots(figsize=(7, 4))
    print("| second layer | steps | cross-entropy, nats | right answers |")
    print("|---|---|---|---|")
    for name, curve in curves(args.steps, args.rate, args.seed):
        steps, right, losses = zip(*curve)
        print(f"| {name} | {steps[-1]} | {losses[-1]:.2f} | {right[-1]:.1%} |", flush=True)
        axis.plot(steps, right, label=name)
    axis.axhline(1 / len(VALUES), color="gray", linestyle=":", label="chance")
    axis.set_xlabel("step")
    axis.set_ylabel("answers that are right, of held-out rows")
    axis.set_ylim(0, 1)
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure)
    print(f"wrote {args.figure}")


def curves(steps: int, rate: float, seed: int) -> Iterator[tuple[str, Curve]]:
    """Name and curve of each model, as they are trained."""
    dense, last = 2 * steps // 3, steps - 2 * steps // 3
    rates = schedule("wsd", rate, steps, warmup_steps=steps // 20)
    rates_after = schedule("cosine", rate, last, warmup_steps=steps // 20)

    def new(second: LayerSpec) -> v4jax.Transformer:
        return jax.jit(lambda key: v4jax.Transformer(small(second), rngs=nnx.Rngs(key)))(
            jax.random.key(seed)
        )

    model = new(indexed(ALL))
    start = nnx.state(nnx.clone(_indexer(model), arrays=True))
    model, curve = train(model, rates, 1.0, range(dense), seed)
    yield f"CSA, all {ALL} rows", curve
    sparse = nnx.clone(model.variant(small(indexed(TOP))), arrays=True)  # the other one trains too
    yield f"then top {TOP}", train(sparse, rates_after, 1.0, range(dense, steps), seed)[1]
    untrained = model.variant(small(indexed(TOP)))
    nnx.update(_indexer(untrained), start)
    name = f"then top {TOP}, indexer without its loss"
    yield name, train(untrained, rates_after, 0.0, range(dense, steps), seed)[1]
    yield "window alone", train(new(window_layer()), rates, 0.0, range(steps), seed)[1]


def _indexer(model: v4jax.Transformer) -> nnx.Module:
    return model.stages[1].blocks[0].attention.indexer


def indexed(topk: int) -> LayerSpec:
    """CSA whose indexer picks so many rows."""
    return csa_layer(IndexerSpec(num_heads=4, head_dim=16, topk=topk))


def small(second: LayerSpec) -> V4Config:
    """A layer with a window alone, and a second one."""
    return V4Config(
        name="recall",
        vocab_size=32,
        embed_dim=48,
        num_heads=4,
        head_dim=24,
        rope_head_dim=8,
        q_lora_rank=48,
        o_groups=1,
        o_lora_rank=48,
        window=WINDOW,
        layers=(window_layer(), second),
        moe=MoEConfig(num_experts=1, experts_per_token=1, expert_dim=96, routed_scale=1.0),
        num_streams=2,
        sinkhorn_iters=5,
        max_length=LENGTH,
    )


def rows(seed: int, step: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [count, LENGTH] of a step and what follows each token; `IGNORED` where it is no answer."""
    rng = np.random.default_rng((seed, step))
    tokens = rng.choice(FILLERS, (count, LENGTH))
    following = np.full((count, LENGTH), IGNORED)
    for row, answers in zip(tokens, following):
        keys, values = (rng.choice(of, PAIRS, replace=False) for of in (KEYS, VALUES))
        places = 2 * rng.choice(HIDDEN // 2, PAIRS, replace=False)
        row[places], row[places + 1] = keys, values
        asked = rng.permutation(PAIRS)
        row[-PAIRS:], answers[-PAIRS:] = keys[asked], values[asked]
    return tokens.astype(np.int32), following.astype(np.int32)


def train(
    model: v4jax.Transformer, rate: Callable[[int], float], indexer: float, steps: range, seed: int
) -> tuple[v4jax.Transformer, Curve]:
    """The model after these steps, and its curve. Its arrays are moved.

    Args:
      indexer: weight of the indexer's loss.
      steps: by their numbers, which choose rows.
    """
    trained = TrainStep(model, muon(rate), LossWeights(indexer=indexer), remat="none")
    state, losses, curve = trained.init(), [], []
    inputs, following = rows(seed + 1, 0, HELDOUT)
    for number in steps:
        batch = rows(seed, number + 1, BATCH)
        state, metrics = trained.step(state, (*batch, batch[1]))
        losses.append(metrics.ce)
        if (number + 1) % EVERY == 0:
            right = accuracy(trained.likeliest(state, inputs), following)
            curve.append((number + 1, right, float(np.mean(losses))))
            losses.clear()
    return trained.model(state), curve


def accuracy(found: jax.typing.ArrayLike, following: np.ndarray) -> float:
    """Share of the answers that are found."""
    return float((np.asarray(found) == following)[following != IGNORED].mean())


if __name__ == "__main__":
    main()
