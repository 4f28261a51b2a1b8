"""This project: python ours.py FOLDER, tasks on stdin (benchmarks/compare_transformers.py)."""

import functools
import sys

import jax
import numpy as np

import v4jax
from benchmarks.against_transformers.worker import DECODED, prompt, serve
from v4jax import Engine, Sampling, Trainer
from v4jax.train.losses import LossWeights, shifted

folder = sys.argv[1]


@functools.cache
def engine(slots: int, tokens: int) -> Engine:
    engine.cache_clear()  # one at a time
    model = v4jax.load(folder, v4jax.plain())
    return Engine(model, slots=slots, prefixes=0, cache_tokens=slots * (tokens + 2 * DECODED))


@functools.cache
def trainer() -> Trainer:
    model = v4jax.load(folder, v4jax.plain(), use="train")
    alone = LossWeights(mtp=0.0, balance=0.0, indexer=0.0)
    return Trainer(model, v4jax.train.adamw(1e-6), weights=alone, remat=False)


def submit(of: Engine, tokens: int, batch: int, new_tokens: int):
    """Requests that are decoded greedily, and never stop by themselves."""
    sampling = Sampling(temperature=0.0, max_new_tokens=new_tokens)
    vocab = of.cfg.vocab_size
    return [of.submit(prompt(tokens, vocab, seed), sampling, stop_ids=[]) for seed in range(batch)]


def prefill(clock, tokens: int) -> list[int]:
    of = engine(1, tokens)
    with clock.counting():
        (request,) = submit(of, tokens, 1, 1)
        of.run_until_idle()
    return request.tokens


def decode(clock, tokens: int, batch: int) -> list[int]:
    of = engine(batch, tokens)
    requests = submit(of, tokens, batch, DECODED + 1)
    while any(slot is None or slot.state != "decode" for slot in of.slots):
        of.step()
    jax.block_until_ready(of._holdings.slots.logits)
    with clock.counting():
        of.run_until_idle()
    return [request.tokens[-1] for request in requests]


def train(clock, tokens: int) -> float:
    of = trainer()
    ids = np.array([prompt(tokens + 1, of.model.cfg.vocab_size)], np.int32)
    batch = shifted(np.concatenate([ids, ids[:, :1]], axis=1))
    with clock.counting():
        return float(of.step(batch).ce)


serve({"prefill": prefill, "first": prefill, "decode": decode, "train": train})
