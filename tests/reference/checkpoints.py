"""Checkpoints written by hand, what the released ones hold, and the parameters of a model."""

import functools
import json
import pathlib
import re
import struct

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from pallas_kernels.formats.quantize import QuantizedArray
from tests.reference.fp4 import two_codes, two_codes_joined
from tests.reference.official import read_tensors
from v4jax.nn.model import Transformer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
OFFICIAL, HF = GOLDEN / "official_small", GOLDEN / "hf_small"

Tensors = dict[str, np.ndarray]  # by name; packed FP4 (tag I8) as uint8

# Checkpoints by hand ------------------------------------------------------------------------------

TAGS = {
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
    np.dtype(np.uint8): "I8",
}


@functools.cache
def official_tensors() -> Tensors:
    return read_tensors(OFFICIAL / "model.safetensors")


@functools.cache
def hf_tensors() -> Tensors:
    """Under released names; what transformers writes differs in these four."""
    renamed = {"embed_tokens.weight": "embed.weight", "hc_head.hc_fn": "hc_head_fn"}
    renamed |= {"hc_head.hc_base": "hc_head_base", "hc_head.hc_scale": "hc_head_scale"}
    tensors = {}
    for name, data in read_tensors(HF / "model.safetensors").items():
        name = name.removeprefix("model.")
        tensors[renamed.get(name, name.replace(".attn.norm.", ".attn.kv_norm."))] = data
    return tensors


def read_config(folder: pathlib.Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def cut_tensors() -> Tensors:
    """Layers 0, 2 and 3 of the official checkpoint and its MTP block, with two experts."""
    layers = {"layers.0.": "layers.0.", "layers.2.": "layers.1.", "layers.3.": "layers.2."}
    tensors = {}
    for name, data in official_tensors().items():
        match = re.match(r"layers\.\d+\.", name)
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if (match and match[0] not in layers) or (expert and int(expert[1]) > 1):
            continue
        name = layers[match[0]] + name.removeprefix(match[0]) if match else name
        if name.endswith((".gate.weight", ".gate.bias")):
            data = data[:2]
        if name.endswith(".tid2eid"):
            data = np.tile(np.array([0, 1], data.dtype), (len(data), 1))
        tensors[name] = data
    return tensors


def cut_config() -> dict:
    return read_config(OFFICIAL) | {
        "num_hidden_layers": 3,
        "num_hash_layers": 1,
        "compress_ratios": [0, 4, 128, 0],
        "n_routed_experts": 2,
    }


def write_file(path: pathlib.Path, tensors: Tensors, metadata: dict | None = None) -> None:
    header, offset = {"__metadata__": metadata} if metadata else {}, 0
    for name, data in tensors.items():
        header[name] = {
            "dtype": TAGS[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [offset, offset + data.nbytes],
        }
        offset += data.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = b"".join(np.ascontiguousarray(data).tobytes() for data in tensors.values())
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def write_folder(path: pathlib.Path, tensors: Tensors, config: dict) -> pathlib.Path:
    path.mkdir(exist_ok=True)
    write_file(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def write_index(path: pathlib.Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def assert_same_tensors(actual: Tensors, expected: Tensors) -> None:
    assert list(actual) == list(expected)
    for name, data in expected.items():
        assert actual[name].dtype == data.dtype, name
        assert actual[name].shape == data.shape, name
        assert actual[name].tobytes() == data.tobytes(), name


# The parameters that a checkpoint must become -----------------------------------------------------

# Parameter of a block -> tensor of the released layout.
HYPER = ("fn", "base", "scale")
COMPRESSOR = {"ape": "ape", "wkv.kernel": "wkv.weight", "wgate.kernel": "wgate.weight"}
COMPRESSOR |= {"norm.weight": "norm.weight"}
BLOCK = {
    **{f"attn_hc.{part}": f"hc_attn_{part}" for part in HYPER},
    **{f"ffn_hc.{part}": f"hc_ffn_{part}" for part in HYPER},
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "attention.sink": "attn.attn_sink",
    "attention.wq_a.kernel": "attn.wq_a.weight",
    "attention.q_norm.weight": "attn.q_norm.weight",
    "attention.wq_b.kernel": "attn.wq_b.weight",
    "attention.wkv.kernel": "attn.wkv.weight",
    "attention.kv_norm.weight": "attn.kv_norm.weight",
    "attention.wo_a.kernel": "attn.wo_a.weight",
    "attention.wo_b.kernel": "attn.wo_b.weight",
    **{f"attention.compressor.{k}": f"attn.compressor.{v}" for k, v in COMPRESSOR.items()},
    "attention.indexer.wq_b.kernel": "attn.indexer.wq_b.weight",
    "attention.indexer.weights_proj.kernel": "attn.indexer.weights_proj.weight",
    **{
        f"attention.indexer.compressor.{k}": f"attn.indexer.compressor.{v}"
        for k, v in COMPRESSOR.items()
    },
    "moe.router.gate.kernel": "ffn.gate.weight",
    "moe.router.bias": "ffn.gate.bias",
    "moe.router.table": "ffn.gate.tid2eid",
    **{f"moe.{w}.kernel": f"ffn.experts.{{e}}.{w}.weight" for w in ("w1", "w2", "w3")},
    **{f"moe.shared.{w}.kernel": f"ffn.shared_experts.{w}.weight" for w in ("w1", "w2", "w3")},
}
MTP = {
    "e_proj.kernel": "e_proj.weight",
    "h_proj.kernel": "h_proj.weight",
    **{f"{norm}.weight": f"{norm}.weight" for norm in ("enorm", "hnorm", "norm")},
    **{f"hc_head.{part}": f"hc_head_{part}" for part in HYPER},
}
TOP = {
    "embed.table": "embed.weight",
    "head.table": "head.weight",
    "norm.weight": "norm.weight",
    **{f"hc_head.{part}": f"hc_head_{part}" for part in HYPER},
}
# Blocks of the golden models when scanned -> the layers stacked in them.
SCANNED = {"stages.0.blocks.0": [0, 1], "stages.1.blocks.0": [2, 4], "stages.1.blocks.1": [3, 5]}

Parameters = dict[str, tuple[np.ndarray, ...]]  # by path; (values, scale) if quantised


def fp4_codes(values: np.ndarray) -> np.ndarray:
    """Codes [..., in, out] of packed FP4 as it lies in memory: blocks of 256 inputs, in halves."""
    half = min(values.shape[-2], 128)
    blocks = np.split(values, values.shape[-2] // half, axis=-2)
    return np.concatenate([b for v in blocks for b in two_codes(v)], axis=-2)


def fp4_in_memory(stored: np.ndarray) -> np.ndarray:
    """Bytes [in / 2, out] as they lie in memory, of bytes [out, in / 2] of a file."""
    codes = np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(stored), -1).T
    half = min(len(codes) // 2, 128)
    halves = np.split(codes, len(codes) // half)
    return np.concatenate([two_codes_joined(*pair) for pair in zip(halves[0::2], halves[1::2])])


def expected_parameters(tensors: Tensors, blocks: dict[str, list[int]] | None = None) -> Parameters:
    """Every parameter as it must be loaded: kernels [in, out], layers and experts stacked."""

    def one(name: str) -> tuple[np.ndarray, ...]:
        data = tensors[name]
        if data.dtype.kind == "i":
            return (data.astype(np.int32),)
        is_matrix = name.endswith(".weight") and data.ndim == 2
        if name.endswith("_fn") or (is_matrix and name not in ("embed.weight", "head.weight")):
            data = fp4_in_memory(data) if data.dtype == np.uint8 else data.T
        scale = tensors.get(name.removesuffix(".weight") + ".scale")
        return (data,) if scale is None else (data, scale.T)

    def stacked(values: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        return tuple(np.stack(parts) for parts in zip(*values, strict=True))

    def of_block(prefix: str) -> Parameters:
        found = {}
        for path, name in BLOCK.items():
            names = [prefix + name.format(e=e) for e in range(8 if "{e}" in name else 1)]
            values = [one(name) for name in names if name in tensors]
            if values:
                found[path] = stacked(values) if "{e}" in name else values[0]
        return found

    expected = {path: one(name) for path, name in TOP.items()}
    if blocks is None:
        blocks = {
            f"stages.{i}.blocks.0": [i] for i in range(6) if f"layers.{i}.hc_attn_fn" in tensors
        }
    for block, layers in blocks.items():
        found = [of_block(f"layers.{layer}.") for layer in layers]
        for path in found[0]:
            values = [one_layer[path] for one_layer in found]
            expected[f"{block}.{path}"] = stacked(values) if len(layers) > 1 else values[0]
    if "mtp.0.norm.weight" in tensors:
        expected |= {f"mtp.0.{path}": one(f"mtp.0.{name}") for path, name in MTP.items()}
        expected |= {f"mtp.0.block.{path}": value for path, value in of_block("mtp.0.").items()}
    return expected


def values_of(model: Transformer) -> dict[str, jax.Array | QuantizedArray]:
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def parameters(model: Transformer) -> Parameters:
    return {
        path: tuple(map(np.asarray, jax.tree.leaves(v))) for path, v in values_of(model).items()
    }


def assert_same_parameters(actual: Parameters, expected: Parameters) -> None:
    assert sorted(actual) == sorted(expected)
    for path, parts in expected.items():
        assert len(actual[path]) == len(parts), path
        for a, e in zip(actual[path], parts, strict=True):
            assert (a.dtype, a.shape) == (e.dtype, e.shape), path
            assert a.tobytes() == np.ascontiguousarray(e).tobytes(), path


# The tensors of the released models -------------------------------------------------------------

Table = dict[str, tuple[str, tuple[int, ...]]]  # name -> tag and shape


def fp8(name: str, rows: int, cols: int) -> Table:
    blocks = (-(-rows // 128), -(-cols // 128))
    return {f"{name}.weight": ("F8_E4M3", (rows, cols)), f"{name}.scale": ("F8_E8M0", blocks)}


def fp4(name: str, rows: int, cols: int) -> Table:
    packed, groups = (rows, cols // 2), (rows, cols // 32)
    return {f"{name}.weight": ("I8", packed), f"{name}.scale": ("F8_E8M0", groups)}


def bf16(name: str, *shape: int) -> Table:
    return {f"{name}.weight": ("BF16", shape)}


def hyper(name: str, dim: int, rows: int, scales: int) -> Table:
    shapes = {"fn": (rows, 4 * dim), "base": (rows,), "scale": (scales,)}
    return {f"{name}_{part}": ("F32", shape) for part, shape in shapes.items()}


def compressor(name: str, dim: int, ratio: int, width: int) -> Table:
    channels = 2 * width if ratio == 4 else width
    table = bf16(f"{name}.wkv", channels, dim) | bf16(f"{name}.wgate", channels, dim)
    return table | bf16(f"{name}.norm", width) | {f"{name}.ape": ("F32", (ratio, channels))}


def block_table(c: dict, prefix: str, ratio: int, is_hashed: bool) -> Table:
    """Sections 1.2 to 1.4 of the released layout for a config.json."""
    dim, hidden, rank = c["hidden_size"], c["moe_intermediate_size"], c["q_lora_rank"]
    heads, head_dim, groups = c["num_attention_heads"], c["head_dim"], c["o_groups"]
    heads_dim, latent, experts = heads * head_dim, groups * c["o_lora_rank"], c["n_routed_experts"]
    table = {
        "attn.attn_sink": ("F32", (heads,)),
        **fp8("attn.wq_a", rank, dim),
        **bf16("attn.q_norm", rank),
        **fp8("attn.wq_b", heads_dim, rank),
        **fp8("attn.wkv", head_dim, dim),
        **bf16("attn.kv_norm", head_dim),
        **fp8("attn.wo_a", latent, heads_dim // groups),
        **fp8("attn.wo_b", dim, latent),
        **bf16("attn_norm", dim),
        **bf16("ffn_norm", dim),
        **bf16("ffn.gate", experts, dim),
        **fp8("ffn.shared_experts.w1", hidden, dim),
        **fp8("ffn.shared_experts.w2", dim, hidden),
        **fp8("ffn.shared_experts.w3", hidden, dim),
        **hyper("hc_attn", dim, 24, 3),
        **hyper("hc_ffn", dim, 24, 3),
    }
    for e in range(experts):
        table |= fp4(f"ffn.experts.{e}.w1", hidden, dim)
        table |= fp4(f"ffn.experts.{e}.w2", dim, hidden)
        table |= fp4(f"ffn.experts.{e}.w3", hidden, dim)
    if is_hashed:
        table["ffn.gate.tid2eid"] = ("I64", (c["vocab_size"], c["num_experts_per_tok"]))
    else:
        table["ffn.gate.bias"] = ("F32", (experts,))
    if ratio:
        table |= compressor("attn.compressor", dim, ratio, head_dim)
    if ratio == 4:
        heads, width = c["index_n_heads"], c["index_head_dim"]
        table |= fp8("attn.indexer.wq_b", heads * width, rank)
        table |= bf16("attn.indexer.weights_proj", heads, dim)
        table |= compressor("attn.indexer.compressor", dim, ratio, width)
    return {prefix + name: value for name, value in table.items()}


def released_table(c: dict) -> Table:
    """Every tensor of a preview release with that config.json."""
    vocab, dim = c["vocab_size"], c["hidden_size"]
    table = bf16("embed", vocab, dim) | bf16("head", vocab, dim) | bf16("norm", dim)
    table |= hyper("hc_head", dim, 4, 1)
    for i in range(c["num_hidden_layers"]):
        ratio, is_hashed = c["compress_ratios"][i], i < c["num_hash_layers"]
        table |= block_table(c, f"layers.{i}.", ratio, is_hashed)
    table |= block_table(c, "mtp.0.", 0, False) | hyper("mtp.0.hc_head", dim, 4, 1)
    table |= fp8("mtp.0.e_proj", dim, dim) | fp8("mtp.0.h_proj", dim, dim)
    for norm in ("enorm", "hnorm", "norm"):
        table |= bf16(f"mtp.0.{norm}", dim)
    return table
