"""What `test_run.py` runs in processes that it kills: steps of a small model, with the bits of their losses.

python -m tests.v4jax.killed_run FOLDER STEPS
"""

import dataclasses
import hashlib
import pathlib
import sys

import jax
import numpy as np

from tests.models import random_model
from tests.v4jax.test_trainer import DATA, SMALL
from v4jax.config import window_layer
from v4jax.train import Anticipation, Spikes, Trainer, adamw
from v4jax.train.events import StepDone

CFG = dataclasses.replace(SMALL, layers=(window_layer(),))  # its router learns


def main() -> None:
    folder, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    rule = Anticipation(delay=2, steps=4)
    skip = Spikes(2.0, steps=8)
    trainer = Trainer(random_model(CFG), adamw(1e-3), skip_above=skip, anticipate=rule)
    events = trainer.events(DATA, steps, batch_size=1, output=folder, save_every=4, log_every=1)
    with (folder / "bits").open("a") as file:
        for event in events:
            if isinstance(event, StepDone):
                print(event.step, float(event.metrics.loss).hex(), file=file, flush=True)
    arrays = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(trainer.state))
    (folder / "digest").write_text(hashlib.sha256(arrays).hexdigest())


if __name__ == "__main__":
    main()
