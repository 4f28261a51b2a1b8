"""What an engine does with 200 requests of mixed lengths: tokens/s, and the share of useful rows.

    python -m benchmarks.serving                       nano, 8 slots, `released` bfloat16
    python -m benchmarks.serving --slots 32 --requests 400

The same requests twice in one process, programs compiled before: as they come into slots that become
free, and in static batches, each of which runs until its longest request has ended.
"""

import argparse
import time

import numpy as np

import v4jax
from v4jax import Engine, Sampling


def requests(count: int, vocab: int) -> list[tuple[list[int], Sampling]]:
    """Prompts of 1 to 600 tokens, answers of 4 to 256, most of them short; samplers of many kinds."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        prompt = rng.integers(3, vocab, int(rng.integers(1, 600))).tolist()
        length = int(np.clip(rng.lognormal(4.0, 0.9), 4, 256))
        options = [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 40, "min_p": 0.02}]
        sampling = Sampling(seed=number, max_new_tokens=length, **options[number % 4])
        found.append((prompt, sampling))
    return found


def run(engine: Engine, batches) -> tuple[float, float, int]:
    """Seconds, useful share of decoded rows, and tokens, every batch being served to its end."""
    before = engine.stats()
    started = time.monotonic()
    for batch in batches:
        for prompt, sampling in batch:
            engine.submit(prompt, sampling, stop_ids=[])
        engine.run_until_idle()
        engine.forget_prefixes()
    seconds = time.monotonic() - started
    stats = engine.stats()
    tokens = stats.generated_tokens - before.generated_tokens
    return seconds, tokens / (stats.row_steps - before.row_steps), tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200)
    args = parser.parse_args()

    model = v4jax.load("nano", v4jax.released())
    engine = Engine(model, slots=args.slots)
    asked = requests(args.requests, model.cfg.vocab_size)
    run(engine, [asked[: 2 * args.slots]])  # compiles
    longest_first = sorted(asked, key=lambda r: -r[1].max_new_tokens)
    static = [longest_first[n : n + args.slots] for n in range(0, len(asked), args.slots)]
    print(
        f"{args.requests} requests, {args.slots} slots, {sum(len(p) for p, _ in asked)} prompt tokens"
    )
    print("| how | s | tokens/s | useful rows |\n|---|---|---|---|")
    for name, batches in (
        ("static batches of similar length", static),
        (
            "static batches as they come",
            [asked[n : n + args.slots] for n in range(0, len(asked), args.slots)],
        ),
        ("continuous, as they come", [asked]),
        ("continuous, longest first", [longest_first]),
    ):
        seconds, share, tokens = run(engine, batches)
        print(f"| {name} | {seconds:.1f} | {tokens / seconds:.0f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
