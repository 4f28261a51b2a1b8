"""The same logits by transformers on torch, in an environment of its own (docs/measurements/wide.md).

python benchmarks/wide_transformers.py runs/wide-hf runs/wide.npz
"""

import sys
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main(folder: str, ours: str) -> None:
    saved = np.load(ours)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    started = time.monotonic()
    with torch.no_grad():
        logits = model(
            torch.tensor(saved["tokens"]).long(),
            use_cache=False,
            logits_to_keep=torch.tensor(saved["positions"]),
        ).logits.numpy()
    difference = np.abs(logits - saved["logits"])
    same = (logits.argmax(-1) == saved["logits"].argmax(-1)).all()
    print(
        f"{time.monotonic() - started:.0f} s; largest difference {difference.max():.2g}, standard "
        f"deviation {saved['logits'].std():.2g}, argmax equal everywhere: {same}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
