"""This project: python ours.py FOLDER, tasks on stdin (benchmarks/compare_transformers.py)."""

import functools
import pathlib
import sys

import jax
import numpy as np
from flax import nnx

import v4jax
from benchmarks.against_transformers.worker import DECODED, prompt, serve
from sharding import TRAIN
from v4jax import Engine, Sampling, Trainer
from v4jax.nn.choices import Choices
from v4jax.nn.quantization import to_float
from v4jax.train.losses import Batch, LossWeights, shifted
from v4jax.train.step import loss_and_gradients

folder = sys.argv[1]
ALONE = LossWeights(mtp=0.0, balance=0.0, indexer=0.0)  # the next token's loss


@functools.cache
def engine(slots: int, tokens: int) -> Engine:
    engine.cache_clear()  # one at a time
    model = v4jax.load(folder, v4jax.plain())
    return Engine(model, slots=slots, prefixes=0, cache_tokens=slots * (tokens + 2 * DECODED))


@functools.cache
def trainer() -> Trainer:
    model = v4jax.load(folder, v4jax.plain(), use="train")
    return Trainer(model, v4jax.train.adamw(1e-6), weights=ALONE, remat="none")


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


def training_batch(tokens: int, vocab: int):
    ids = np.array([prompt(tokens + 1, vocab)], np.int32)
    return shifted(np.concatenate([ids, ids[:, :1]], axis=1))


def train(clock, tokens: int) -> float:
    of = trainer()
    batch = training_batch(tokens, of.model.cfg.vocab_size)
    with clock.counting():
        return float(of.step(batch).ce)


def gradients(clock, tokens: int, output: str, choices: str | None) -> float:
    """The loss, with the experts and entries of a file [1, T, ...] or with its own.

    Writes weights and gradients to output/weights and output/gradients, and its own choices to choices.npz.
    """
    model = to_float(v4jax.load(folder, v4jax.plain(), use="train"))
    batch = training_batch(tokens, model.cfg.vocab_size)
    views = model.inspect(batch[0])
    own = {
        "experts": np.stack([view.experts for view in views], axis=2),
        "selections": np.stack([view.picks for view in views if view.picks is not None], axis=2),
    }
    pathlib.Path(output).mkdir(parents=True)
    np.savez(pathlib.Path(output) / "choices.npz", **own)
    given = Choices()
    if choices is not None:
        given = Choices(**{name: x.astype(np.int32) for name, x in np.load(choices).items()})
    graphdef, params, fixed = nnx.split(model, nnx.Param, ...)
    with clock.counting():
        of = jax.jit(loss_and_gradients(graphdef, ALONE, TRAIN))
        found, metrics = of(params, fixed, *Batch(*batch, choices=given))
        loss = float(metrics.ce)
    for name, values in (("weights", params), ("gradients", found)):
        v4jax.checkpoint.save(nnx.merge(graphdef, values, fixed), pathlib.Path(output) / name)
    return loss


serve(prefill, decode, train, gradients)
