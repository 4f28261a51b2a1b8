"""Time and peak memory of a long prompt through a model.

    python -m benchmarks.prefill --length 131072

Each length wants a process of its own, since peak memory is the process's.
"""

import argparse
import pathlib
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

import v4jax
from v4jax import Numerics, checkpoint
from v4jax.inference.feeding import Feeder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=pathlib.Path, default=v4jax.nano_path())
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--numerics", choices=["plain", "released"], default="released")
    args = parser.parse_args()

    model = checkpoint.load(args.checkpoint, Numerics(args.numerics, jnp.dtype(args.dtype)))
    feeder = Feeder(model)
    tokens = np.random.default_rng(0).integers(3, model.cfg.vocab_size, args.length).tolist()
    seconds = []
    for _ in range(2):  # the first run compiles
        cache = feeder.init_cache(1, args.length)
        start = time.monotonic()
        cache, logits = feeder.feed([tokens], cache)
        jax.block_until_ready(logits)
        seconds.append(time.monotonic() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{model.cfg.name}, {args.length} tokens, {args.numerics} {args.dtype}: "
        f"{seconds[1]:.1f} s ({args.length / seconds[1]:.0f} tokens/s), compilation "
        f"{seconds[0] - seconds[1]:.1f} s, cache {cache.nbytes / 2**20:.1f} MiB, peak memory "
        f"{peak:.2f} GiB"
    )


if __name__ == "__main__":
    main()
