"""Times training steps with and without anticipatory routing, one after the other in turn.

    python -m benchmarks.anticipation --steps 30

`auto` is on watch and off: a step waits for the one before it. `always` chooses experts for one batch a step.
"""

import argparse
import time

import jax
import numpy as np

import v4jax
from v4jax.train import Anticipation, TokenStream, Trainer, adamw


def main() -> None:
    """A line for each: the median of a step, and beside that without."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="nano", help="a folder, or nano")
    parser.add_argument("--steps", type=int, default=30, help="of each")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences a step")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a sequence")
    args = parser.parse_args()

    rules = {"off": None, "auto": Anticipation(), "always": Anticipation(when="always")}
    trainers = {}
    for name, rule in rules.items():
        model = v4jax.load(args.checkpoint, use="train")
        trainers[name] = Trainer(model, adamw(1e-4), skip_above=1e6, anticipate=rule)
        vocab = model.cfg.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab, 100_000)
    data = TokenStream(tokens, args.seq_len)

    taken: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(args.steps + 2):  # two to compile, and to choose for the first steps
        for name, trainer in trainers.items():
            start = time.perf_counter()
            metrics = trainer.step(trainer.next_batch(data, args.batch_size))
            jax.block_until_ready((metrics.loss, trainer.state))
            if number > 1:
                taken[name].append(time.perf_counter() - start)
    print(jax.devices()[0].device_kind, args)
    for name, seconds in taken.items():
        median, plain = np.median(seconds), np.median(taken["off"])
        print(f"{name:7} {median:.3f} s a step, {median / plain:.3f} of a step without")


if __name__ == "__main__":
    main()
