"""Logits of a wide checkpoint in plain float32, for comparison with other implementations.

    python -m benchmarks.wide runs/wide runs/wide.npz

`scripts/make_wide_checkpoint.py` makes the folder. The prompt is longer than 4 x 512 tokens, so that
the indexer has to choose; logits of a few positions are kept, with the tokens.
"""

import argparse
import pathlib
import resource
import time

import jax
import numpy as np
from flax import nnx

import v4jax

LENGTH = 2203
POSITIONS = (0, 127, 128, 129, 2047, 2048, 2100, 2150, LENGTH - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path, help=".npz")
    args = parser.parse_args()
    started = time.monotonic()
    model = v4jax.load(args.checkpoint, v4jax.plain())
    graphdef, params = nnx.split(model)
    jax.block_until_ready(params)
    print(f"loaded in {time.monotonic() - started:.1f} s")
    tokens = np.random.default_rng(1).integers(0, model.cfg.vocab_size, (1, LENGTH))

    @jax.jit
    def some_logits(params, tokens):
        model = nnx.merge(graphdef, params)
        hidden = model.hidden(model.trunk(tokens)[0])
        return model.logits(hidden[:, np.array(POSITIONS)])

    started = time.monotonic()
    logits = np.asarray(some_logits(params, tokens.astype(np.int32)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{LENGTH} tokens in {time.monotonic() - started:.1f} s, peak memory {peak:.1f} GiB")
    np.savez(args.output, tokens=tokens, positions=POSITIONS, logits=logits)


if __name__ == "__main__":
    main()
