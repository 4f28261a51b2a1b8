"""Draws the training curve of a run.

python -m scripts.plot_metrics runs/nano/metrics.jsonl docs/nano.svg
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

_SMOOTH = 5  # lines of the log that one point of a curve averages, if there are as many


def main() -> None:
    """Reads metrics.jsonl and writes a figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("metrics", type=pathlib.Path)
    parser.add_argument("figure", type=pathlib.Path, help=".svg, .png or .pdf")
    args = parser.parse_args()
    lines = [json.loads(x) for x in args.metrics.read_text(encoding="utf-8").splitlines()]
    figure, axis = plt.subplots(figsize=(7, 4))
    steps = np.array([x["step"] for x in lines])
    smooth = min(_SMOOTH, len(steps))
    kernel = np.ones(smooth) / smooth
    for key, label in (("ce", "next token"), ("mtp_ce", "token after next (MTP)")):
        values = np.array([x[key] for x in lines])
        axis.plot(steps[smooth - 1 :], np.convolve(values, kernel, mode="valid"), label=label)
    held_out = [(x["step"], x["heldout_ce"]) for x in lines if "heldout_ce" in x]
    if held_out:
        axis.plot(*zip(*held_out), "k.--", label="next token, held-out text")
    axis.set_xlabel("step")
    axis.set_ylabel("cross-entropy, nats per token")
    axis.set_ylim(top=min(7.0, axis.get_ylim()[1]))
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure)
    print(f"wrote {args.figure}")


if __name__ == "__main__":
    main()
