"""Plots FLOP and cache of a token against the length of the context, beside DeepSeek-V3.2.

python -m scripts.plot_costs --output docs/costs.svg
"""

import argparse
import pathlib

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np

from v4jax import flash, pro
from v4jax.planning import costs

GiB, TFLOP = 2**30, 1e12
CONTEXTS = np.unique(np.geomspace(1024, 2**20, 81).astype(int))
COLORS = {"V3.2": "#888888", "V4-Pro": "#1f77b4", "V4-Flash": "#d62728"}


def curves() -> dict[str, tuple[list[float], list[float]]]:
    """Model -> TFLOP of one token (in FP8 FLOP, `costs`), and GiB of a sequence's cache."""
    models = {"V4-Pro": pro(), "V4-Flash": flash()}
    found = {
        name: (
            [costs.decode_flops(cfg, n).fp8_equivalent / TFLOP for n in CONTEXTS],
            [costs.cache_bytes(cfg, n) / GiB for n in CONTEXTS],
        )
        for name, cfg in models.items()
    }
    theirs = (
        [costs.v32_decode_flops(n).fp8_equivalent / TFLOP for n in CONTEXTS],
        [costs.v32_cache_bytes(n) / GiB for n in CONTEXTS],
    )
    return {"V3.2": theirs, **found}


def main() -> None:
    """Writes the plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/costs.svg"))
    args = parser.parse_args()
    plt.rcParams.update({"svg.hashsalt": "v4jax", "font.size": 9, "svg.fonttype": "none"})
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    titles = ("TFLOP for one token (FP8 equivalent)", "GiB of cache for one sequence")
    for axis, title, which in zip(axes, titles, range(2)):
        for name, both in curves().items():
            axis.plot(CONTEXTS, both[which], color=COLORS[name], label=name)
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        axis.set_xticks([2**n for n in range(10, 21, 2)], ["1K", "4K", "16K", "64K", "256K", "1M"])
        axis.set_xlabel("tokens of context")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(args.output, metadata={"Date": None})
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
