"""A long document through a model by chunks, and decoding behind it: time and memory against context.

    python -m benchmarks.long_context --lengths 1024 65536 262144 1048576 --json figures.json
    python -m scripts.plot_long_context figures.json docs/long_context.svg
    python -m benchmarks.long_context --lengths 100 --room 1048576

One engine of one slot with room for the longest. The document grows: a length goes on from the kept
prefix of the one before, and its time is the sum of what both took. Of each length: CPU seconds and
seconds until it is fed, the same of a decoded token behind it, and the process's peak memory so far.
CPU seconds are of all threads; they change little on a machine that does other work too.

nano was trained for 131,072 tokens: beyond, time and memory are those of a model for longer ones.
"""

import argparse
import dataclasses
import json
import pathlib
import resource
import time

import jax
import numpy as np

import v4jax
from v4jax import Engine, Sampling

DECODED = 64


def seconds() -> np.ndarray:
    """CPU seconds of the process, and those of the clock."""
    return np.array([time.process_time(), time.monotonic()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 65_536, 262_144])
    parser.add_argument("--room", type=int, help="tokens of the cache (default: what they need)")
    parser.add_argument("--json", type=pathlib.Path, help="for scripts.plot_long_context")
    args = parser.parse_args()

    lengths = sorted(args.lengths)
    most = (args.room or lengths[-1]) + DECODED + 1
    model = v4jax.load("nano", v4jax.released())
    longest = max(model.cfg.max_length, most)
    model = model.variant(dataclasses.replace(model.cfg, max_length=longest))
    engine = Engine(model, slots=1, cache_tokens=most + 1024, chunks=(1024,))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._holdings.slots.cache.pools))
    print(f"{model.cfg.name}, room for {most} tokens: {held / 2**20:.0f} MiB of pages")
    print("| tokens | prompt CPU s | s | CPU ms a decoded token | ms | peak memory GiB |")
    print("|---|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    document, other = rng.integers(3, model.cfg.vocab_size, (2, lengths[-1])).tolist()
    sampling = Sampling(max_new_tokens=DECODED)
    fed, figures = np.zeros(2), []
    for length in lengths:
        first = engine.submit(other[:length], sampling, stop_ids=[])
        for _ in range(2):  # compiles prefill for tables of this width
            engine.step()
        first.cancel()
        engine.run_until_idle()
        engine.submit(document[:length], sampling, stop_ids=[])
        started = seconds()
        while engine.slots[0].state != "decode":
            engine.step()
        jax.block_until_ready(engine._holdings.slots.logits)
        fed += seconds() - started
        engine.step()  # compiles decode
        jax.block_until_ready(engine._holdings.slots.logits)
        before, started = engine.stats().generated_tokens, seconds()
        engine.run_until_idle()
        token = (seconds() - started) / (engine.stats().generated_tokens - before)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        figures.append((length, fed[0], token[0]))
        print(
            f"| {length:,} | {fed[0]:.1f} | {fed[1]:.1f} | {token[0] * 1e3:.2f} | {token[1] * 1e3:.2f} "
            f"| {peak:.2f} |",
            flush=True,
        )
        if args.json:
            args.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
