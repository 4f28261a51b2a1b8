"""Draws what `benchmarks.long_context` measured.

python -m scripts.plot_long_context figures.json docs/long_context.svg
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot


def main() -> None:
    """Two panels: CPU seconds of the prompt, and of a decoded token, against tokens."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "figures", type=pathlib.Path, help="[tokens, CPU seconds, CPU seconds a token] rows"
    )
    parser.add_argument("output", help="SVG")
    args = parser.parse_args()

    lengths, prompts, tokens = zip(*json.loads(args.figures.read_text()))
    _, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.loglog(lengths, prompts, "o-")
    left.set(xlabel="tokens of the prompt", ylabel="CPU seconds until they are fed")
    right.semilogx(lengths, [1e3 * seconds for seconds in tokens], "o-")
    right.set(xlabel="tokens of context", ylabel="CPU ms a decoded token", ylim=(0, None))
    pyplot.savefig(args.output)


if __name__ == "__main__":
    main()
