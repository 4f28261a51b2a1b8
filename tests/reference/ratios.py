"""The golden model of transformers with other compression ratios: 8 in CSA layers, 64 in HCA layers.

    python -m tests.reference.ratios runs/ratios
    python tests/reference/ratios_transformers.py runs/ratios tests/golden/hf_ratios.npz

The first makes the folder; the second runs transformers on it, in an environment of its own.
"""

import json
import pathlib
import sys

import numpy as np

from tests.reference.checkpoints import HF, read_config, write_file
from tests.reference.official import read_tensors

RATES = {"compressed_sparse_attention": 8, "heavily_compressed_attention": 64}


def make_folder(path: pathlib.Path) -> None:
    """`hf_small` whose position biases have as many rows as the new ratios, drawn from a seed."""
    ratios, rng = {4: 8, 128: 64}, np.random.default_rng(0)
    tensors = dict(sorted(read_tensors(HF / "model.safetensors").items()))
    for name, data in tensors.items():
        if name.endswith(".ape"):
            shape = (ratios[len(data)], data.shape[1])
            tensors[name] = rng.normal(size=shape).astype(np.float32)
    path.mkdir(parents=True, exist_ok=True)
    write_file(path / "model.safetensors", tensors, {"format": "pt"})
    config = read_config(HF) | {"compress_rates": RATES}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")


if __name__ == "__main__":
    make_folder(pathlib.Path(sys.argv[1]))
