"""How fast a checkpoint loads, beside reading its files.

python -m benchmarks.load runs/wide
"""

import argparse
import pathlib
import resource
import time

import jax
from flax import nnx

import v4jax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=pathlib.Path)
    args = parser.parse_args()
    files = sorted(args.checkpoint.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    v4jax.load("nano")  # starts jax
    for name in ("read", "load", "read", "load"):
        started, used = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
        if name == "read":
            for file in files:
                with open(file, "rb") as opened:
                    while opened.read(1 << 24):
                        pass
        else:
            jax.block_until_ready(nnx.state(v4jax.load(args.checkpoint)))
        seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
        print(f"{name}: {seconds:5.1f} s, {size / seconds / 1e9:5.2f} GB/s, {cpu:5.1f} s of CPU")


if __name__ == "__main__":
    main()
