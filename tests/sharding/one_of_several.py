"""One process of a training and generating job over four devices; test_processes.py starts them.

python -m tests.sharding.one_of_several PORT COUNT NUMBER CHECKPOINT FOLDER
"""

import dataclasses
import json
import pathlib
import sys

PORT, COUNT, NUMBER = (int(x) for x in sys.argv[1:4])
CHECKPOINT, FOLDER = (pathlib.Path(x) for x in sys.argv[4:6])

import jax
import jax.numpy as jnp
import numpy as np

from sharding import make_mesh
from v4jax import LoRA, Trainer, checkpoint
from v4jax.inference.engine import Engine
from v4jax.inference.sampling import Sampling
from v4jax.train.data import TokenStream
from v4jax.train.optimizers import adamw
from v4jax.train.schedules import schedule
from v4jax.train.state import Saver
from v4jax.train.step import TrainStep

STEPS, BATCH, LENGTH = 2, 4, 136


def _loss(trainer: TrainStep, state, stream: TokenStream) -> float:
    return float(trainer.loss(state, trainer.batch(stream, STEPS, BATCH)))


def _led(engine: Engine) -> list:
    """Requests that come while others run, one of which is cancelled: tokens and ends."""
    if COUNT > 1:
        engine.lead()
    drawn = Sampling(max_new_tokens=7, seed=3, logit_bias={9: 2.0})
    requests = [engine.submit([5, 6, 7] * 9, drawn, stop_ids=(0,))]
    for _ in range(3):
        engine.step()
    requests += [engine.submit([8] * n, drawn, stop_ids=(0,), priority=n) for n in (12, 140)]
    endless = engine.submit([4], Sampling(max_new_tokens=500), stop_ids=())
    while len(endless.tokens) < 2:
        engine.step()
    endless.cancel()
    engine.run_until_idle()
    requests += _leaving(engine, drawn)
    requests += _from_file(engine, drawn)
    engine.end()
    found = [[r.tokens, r.finish_reason, r.cached_tokens] for r in requests]
    return [*found, endless.finish_reason, engine.stats().preemptions]


def _leaving(engine: Engine, drawn: Sampling) -> list:
    """Requests that leave their slots for others, and a prefix that left for host memory."""
    low = [engine.submit([9] * n, drawn, stop_ids=(0,)) for n in (3, 140, 5, 7)]  # all slots
    while not all(request.tokens for request in low):
        engine.step()
    high = [engine.submit([8] * n, drawn, stop_ids=(0,), priority=1) for n in (140, 4)]
    engine.run_until_idle()
    return low + high


def _from_file(engine: Engine, drawn: Sampling) -> list:
    """A request behind a prefix in a file: this job's own, then that of the job of one process."""
    saved = FOLDER / "prefix.npz"
    assert engine.save_prefix([8] * 140, saved) == 128
    requests = []
    for path in (saved, FOLDER.parent / "1" / "prefix.npz"):
        engine.forget_prefixes()
        assert engine.load_prefix(path) == 128
        requests.append(engine.submit([8] * 140, drawn, stop_ids=(0,)))
        engine.run_until_idle()
    return requests


def main() -> None:
    if COUNT > 1:
        jax.distributed.initialize(f"127.0.0.1:{PORT}", COUNT, NUMBER)
    assert len(jax.devices()) == 4
    result = {}
    with jax.set_mesh(make_mesh(fsdp=2, expert=2)):
        model = checkpoint.load(CHECKPOINT, use="train")
        weight = model.stages[0].blocks[0].moe.w1.kernel[...]
        held = sum(shard.data.nbytes for shard in weight.addressable_shards)
        result["share held"] = held / weight.nbytes
        checkpoint.save(model, FOLDER / "model", single_file_limit=0)
        lora = LoRA(rank=2, targets=("attention.wq_b", "moe.w2"))
        adapted = Trainer(jax.tree.map(jnp.copy, model), adamw(1e-3), trainable=lora)
        adapted.save(FOLDER / "adapter")
        adapted.save(FOLDER / "merged", "released")
        stream = TokenStream(np.random.default_rng(0).integers(2, 256, 5000), LENGTH)
        trainer = TrainStep(model, adamw(schedule("cosine", 1e-3, STEPS, warmup_steps=1)))
        state = trainer.init()
        for step in range(STEPS):
            state, metrics = trainer.step(state, trainer.batch(stream, step, BATCH))
        result["trained"] = float(metrics.loss)
        result["after"] = _loss(trainer, state, stream)
        saver = Saver(FOLDER / "state")
        saver.save(STEPS, state)
        saver.wait()
        zeros = jax.tree.map(lambda x: x * 0, (state.params, state.opt_state))
        blank = dataclasses.replace(state, params=zeros[0], opt_state=zeros[1])
        restored, step = saver.restore(blank)
        saver.close()
        result["restored"], result["step"] = _loss(trainer, restored, stream), step

        engine_model = checkpoint.load(CHECKPOINT)
        engine = Engine(engine_model, chunks=(128,), slots=4)
        greedy = Sampling(temperature=0, max_new_tokens=5)
        completions = engine.generate([[5, 6, 7] * 9, [8] * 12], greedy, stop_ids=(0,))
        result["tokens"] = [list(c.tokens) for c in completions]
        # A second prefix puts the first into host memory.
        engine = Engine(engine_model, chunks=(128,), slots=4, prefixes=1, host_bytes=2**30)
        if NUMBER:
            engine.follow()
        else:
            result["led"] = _led(engine)
    (FOLDER / f"{NUMBER}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
