"""Logits by transformers on torch, in an environment of its own: see ratios.py."""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

LENGTH, EVERY = 300, 13


def main(folder: str, output: str) -> None:
    """Writes `tokens` [2, T], `positions` [P] and `logits` [2, P, V]."""
    tokens = np.random.default_rng(0).integers(2, 256, (2, LENGTH))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    positions = np.arange(LENGTH)[::-EVERY][::-1].copy()
    with torch.no_grad():
        logits = model(torch.tensor(tokens), use_cache=False).logits.numpy()[:, positions]
    np.savez(output, tokens=tokens.astype(np.int32), positions=positions, logits=logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
