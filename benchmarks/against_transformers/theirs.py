"""transformers on torch: python theirs.py FOLDER, tasks on stdin (benchmarks/compare_transformers.py)."""

import functools
import pathlib
import sys

import numpy as np
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


def recording(found: dict[str, list[np.ndarray]]) -> list:
    """Hooks that append what layers choose, in their order; with `remove` they go."""

    def experts(module, given, out):
        found["experts"].append(out[2].numpy())  # of logits, weights and indices [T, K]

    def entries(module, given, out):
        found["selections"].append(out.numpy())  # [1, T, S], -1 for none

    kinds = {".mlp.gate": experts, ".indexer": entries}
    return [
        module.register_forward_hook(hook)
        for name, module in model.named_modules()
        for end, hook in kinds.items()
        if name.endswith(end)
    ]


def gradients(clock, tokens: int, output: str) -> float:
    """The loss. Writes weights and gradients to output/weights and output/gradients, and choices.npz."""
    model.train()
    model.zero_grad()
    ids = batch_of(tokens + 1, 1)
    chosen: dict[str, list[np.ndarray]] = {"experts": [], "selections": []}
    hooks = recording(chosen)
    with clock.counting():
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])
        loss.backward()
    for hook in hooks:
        hook.remove()
    pathlib.Path(output).mkdir(parents=True)
    np.savez(
        pathlib.Path(output) / "choices.npz",
        experts=np.stack(chosen["experts"], axis=1)[None],  # [1, T, layers, K]
        selections=np.stack(chosen["selections"], axis=2),  # [1, T, layers with an indexer, S]
    )
    weights = dict(model.named_parameters())
    found = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in weights.items()
    }
    for name, values in (("weights", weights), ("gradients", found)):
        model.save_pretrained(pathlib.Path(output) / name, state_dict=values)
    return loss.item()


serve(prefill, decode, train, gradients)
