"""transformers on torch: python theirs.py FOLDER, tasks on stdin (benchmarks/compare_transformers.py)."""

import functools
import sys

import torch
from transformers import AutoModelForCausalLM

from benchmarks.against_transformers.worker import DECODED, prompt, serve

CHUNK = 1024  # of prompts: in one piece, 4,096 tokens take three times as long

model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, attn_implementation="eager"
)
vocab = model.config.vocab_size


def fed(tokens: torch.Tensor):
    """The logits behind a prompt [B, T], and the cache."""
    cache, logits = None, None
    for start in range(0, tokens.shape[1], CHUNK):
        out = model(
            tokens[:, start : start + CHUNK],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, logits = out.past_key_values, out.logits
    return logits[:, -1], cache


def batch_of(tokens: int, batch: int) -> torch.Tensor:
    return torch.tensor([prompt(tokens, vocab, seed) for seed in range(batch)])


@torch.no_grad()
def prefill(clock, tokens: int) -> list[int]:
    model.eval()
    ids = batch_of(tokens, 1)
    with clock.counting():
        logits, _ = fed(ids)
        return logits.argmax(-1).tolist()


@torch.no_grad()
def decode(clock, tokens: int, batch: int) -> list[int]:
    model.eval()
    logits, cache = fed(batch_of(tokens, batch))
    with clock.counting():
        for _ in range(DECODED):
            token = logits.argmax(-1)
            out = model(token[:, None], past_key_values=cache, use_cache=True)
            logits, cache = out.logits[:, -1], out.past_key_values
    return logits.argmax(-1).tolist()


@functools.cache
def adamw() -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95))


def train(clock, tokens: int) -> float:
    model.train()
    optimizer = adamw()
    ids = batch_of(tokens + 1, 1)
    with clock.counting():
        optimizer.zero_grad()
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])
        loss.backward()
        optimizer.step()
        return loss.item()


serve({"prefill": prefill, "first": prefill, "decode": decode, "train": train})
