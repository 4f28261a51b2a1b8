"""Writes a checkpoint as wide as V4-Flash with few layers, few experts and random weights.

    python scripts/make_wide_checkpoint.py runs/wide

Width 4096, 64 heads of 512, an indexer of 64 x 128 that picks 512, experts of 4096 x 2048 in FP4,
129,280 tokens: the true dimensions, in the released layout, so that what depends on them can be
tried where the model itself does not fit. Layers are a sliding window (hash-routed), CSA and HCA.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import ml_dtypes
import numpy as np

from v4jax.checkpoint import saving
from v4jax.checkpoint.hf_config import to_hf
from v4jax.config import V4Config, csa_layer, flash, hca_layer, window_layer

BIAS = 127  # of E8M0 exponents
STRIP = 1 << 22  # random numbers made at a time


def wide(num_experts: int) -> V4Config:
    """Flash with one layer of each kind."""
    layers = (window_layer(hash_routed=True), csa_layer(), hca_layer())
    moe = dataclasses.replace(flash().moe, num_experts=num_experts)
    return dataclasses.replace(flash(), name="wide", layers=layers, mtp_layers=(), moe=moe)


def normal(rng: np.random.Generator, shape: tuple[int, ...], std: float, dtype) -> np.ndarray:
    """Random normal values; made in strips, so that float32 copies stay small."""
    out = np.empty(int(np.prod(shape)), dtype)
    for start in range(0, out.size, STRIP):
        part = out[start : start + STRIP]
        part[:] = (std * rng.standard_normal(part.size, np.float32)).astype(dtype)
    return out.reshape(shape)


def values(tensor: saving.NewTensor, config: V4Config, rng: np.random.Generator) -> np.ndarray:
    """Random data of one tensor, of the size that keeps activations near 1."""
    name, shape = tensor.name, tensor.shape
    if tensor.tag == "I64":  # experts of each token of a hash-routed layer
        noise = rng.random((shape[0], config.moe.num_experts), np.float32)
        return np.argsort(noise, axis=-1)[:, : shape[1]].astype(np.int64)
    if tensor.tag == "I8":  # FP4: any byte is two codes, of standard deviation 2.9
        return rng.integers(-128, 128, shape, np.int8)
    if tensor.tag == "F8_E4M3":
        return normal(rng, shape, 16.0, ml_dtypes.float8_e4m3fn)
    if tensor.tag == "F8_E8M0":
        return scales(name, shape, rng)
    dtype = np.float32 if tensor.tag == "F32" else ml_dtypes.bfloat16
    if name.endswith("norm.weight") or name == "norm.weight":
        return np.ones(shape, dtype)
    if name.endswith(("hc_attn_scale", "hc_ffn_scale", "hc_head_scale")):
        return np.full(shape, 0.5, dtype)
    std = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
    return normal(rng, shape, std, dtype)


def scales(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Block scales that give a matrix of `fan_in` inputs a standard deviation near fan_in**-0.5."""
    is_fp4 = ".experts." in name
    fan_in, std = shape[1] * (32 if is_fp4 else 128), 2.9 if is_fp4 else 16.0
    exponent = round(np.log2(fan_in**-0.5 / std))
    codes = BIAS + exponent + rng.integers(-1, 2, shape)
    return codes.astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--experts", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.output / "config.json").exists():
        parser.error(f"{args.output} holds a checkpoint: give a new folder.")
    config, rng = wide(args.experts), np.random.default_rng(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    tensors = [
        dataclasses.replace(tensor, read=lambda t=tensor: values(t, config, rng))
        for tensor in saving.announced(config)
    ]
    saving.write_safetensors(args.output / saving.SINGLE_NAME, tensors)
    text = json.dumps(to_hf(dataclasses.replace(config, name="wide")), indent=2)
    saving.write_text(str(args.output / "config.json"), text)
    size = sum(tensor.nbytes for tensor in tensors)
    print(f"wrote {len(tensors)} tensors, {size / 1e9:.2f} GB, to {args.output}")


if __name__ == "__main__":
    main()
