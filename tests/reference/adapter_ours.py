"""A LoRA trained here on the golden model of transformers, for PEFT to read: see adapter_peft.py.

python -m tests.reference.adapter_ours runs/adapter runs/adapter.npz
"""

import argparse

import numpy as np

import v4jax
from tests.conftest import GOLDEN
from v4jax.checkpoint import load_adapter, save_adapter
from v4jax.train.losses import shifted

BASE = GOLDEN / "hf_small"
POSITIONS = np.r_[0:8, 124:132, 292:300]


def main() -> None:
    """Ten steps; then the adapter of the trained model, and logits of the one that reads its files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="the adapter goes there")
    parser.add_argument("logits", help=".npz")
    args = parser.parse_args()
    tokens = np.load(BASE / "reference.npz")["tokens"]
    lora = v4jax.LoRA(rank=8, targets="attention+shared")
    trainer = v4jax.Trainer(v4jax.load(BASE, use="train"), v4jax.train.adamw(1e-2), trainable=lora)
    losses = [float(trainer.step(shifted(tokens)).ce) for _ in range(10)]
    print(f"cross-entropy {losses[0]:.3f} to {losses[-1]:.3f}")
    save_adapter(trainer.model, args.folder, names="transformers")
    model = load_adapter(v4jax.load(BASE, v4jax.plain()), args.folder)
    np.savez(args.logits, tokens=tokens, logits=np.asarray(model(tokens))[:, POSITIONS])


if __name__ == "__main__":
    main()
