"""A long document through a model by chunks, then decoding: time and memory against context.

    python -m benchmarks.long_context --lengths 1024 65536 262144 1048576 --json figures.json
    python -m scripts.plot_long_context figures.json docs/long_context.svg
    python -m benchmarks.long_context --lengths 100 --room 1048576

One engine of one slot with room for the longest. Of each length: seconds and tokens/s of its prompt, the
time of a decoded token behind it (after the first), bytes of the pools, and the process's peak memory so far. Prompts share
no prefix. The first prompt compiles; `--lengths` should be increasing.
"""

import argparse
import json
import pathlib
import resource
import time

import jax
import numpy as np

import v4jax
from v4jax import Engine, Sampling

DECODED = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 65_536, 262_144])
    parser.add_argument("--room", type=int, help="tokens of the cache (default: what they need)")
    parser.add_argument("--json", type=pathlib.Path, help="for scripts.plot_long_context")
    args = parser.parse_args()

    model = v4jax.load("nano", v4jax.released())
    most = args.room or max(args.lengths) + DECODED + 1
    engine = Engine(model, slots=1, cache_tokens=most + 1024, prefixes=0)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._holdings.slots.cache.pools))
    print(f"{model.cfg.name}, room for {most} tokens: {held / 2**20:.0f} MiB of pages")
    print("| tokens | prompt s | tokens/s | ms a decoded token | peak memory GiB |")
    print("|---|---|---|---|---|")
    figures = []
    for length in args.lengths:
        rng = np.random.default_rng(length)
        tokens = rng.integers(3, model.cfg.vocab_size, length).tolist()
        first = engine.submit(tokens, Sampling(max_new_tokens=DECODED), stop_ids=[])
        for _ in range(2):  # compiles prefill for tables of this width
            engine.step()
        first.cancel()
        engine.run_until_idle()
        request = engine.submit(tokens, Sampling(max_new_tokens=DECODED), stop_ids=[])
        started = time.monotonic()
        while engine.slots[0].state != "decode":
            engine.step()
        jax.block_until_ready(engine._holdings.slots.logits)
        prompt = time.monotonic() - started
        engine.run_until_idle()
        token = (request.finished_at - request.first_token_at) / (len(request.tokens) - 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        figures.append((length, prompt, token))
        print(
            f"| {length:,} | {prompt:.1f} | {length / prompt:.0f} | {token * 1e3:.2f} | {peak:.2f} |",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
