import collections
import dataclasses
import functools
import json
import logging
import pathlib
import re
import struct
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.quantize import QuantizedArray
from sharding import make_mesh
from tests.reference.official import Official, power_of_two_above, read_tensors
from tests.v4jax.test_config import FLASH, PRO
from v4jax.checkpoint import Checkpoint, CheckpointError, load, save, writer
from v4jax.checkpoint.reader import leaves
from v4jax.config import ConfigError, flash, from_hf, pro
from v4jax.model import Transformer
from v4jax.quantization import to_float, to_released

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
COMPRESSOR = {"ape": "ape", "wkv": "wkv.weight", "wgate": "wgate.weight"}
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
    "attention.wo_a": "attn.wo_a.weight",
    "attention.wo_b.kernel": "attn.wo_b.weight",
    **{f"attention.compressor.{k}": f"attn.compressor.{v}" for k, v in COMPRESSOR.items()},
    "attention.indexer.wq_b.kernel": "attn.indexer.wq_b.weight",
    "attention.indexer.weights_proj": "attn.indexer.weights_proj.weight",
    **{
        f"attention.indexer.compressor.{k}": f"attn.indexer.compressor.{v}"
        for k, v in COMPRESSOR.items()
    },
    "moe.router.kernel": "ffn.gate.weight",
    "moe.router.bias": "ffn.gate.bias",
    "moe.router.table": "ffn.gate.tid2eid",
    **{f"moe.{w}": f"ffn.experts.{{e}}.{w}.weight" for w in ("w1", "w2", "w3")},
    **{f"moe.shared.{w}.kernel": f"ffn.shared_experts.{w}.weight" for w in ("w1", "w2", "w3")},
}
MTP = {
    "e_proj.kernel": "e_proj.weight",
    "h_proj.kernel": "h_proj.weight",
    **{f"{norm}.weight": f"{norm}.weight" for norm in ("enorm", "hnorm", "norm")},
    **{f"hc_head.{part}": f"hc_head_{part}" for part in HYPER},
}
TOP = {
    "embed": "embed.weight",
    "head": "head.weight",
    "norm.weight": "norm.weight",
    **{f"hc_head.{part}": f"hc_head_{part}" for part in HYPER},
}
# Blocks of the golden models when scanned -> the layers stacked in them.
SCANNED = {"stages.0.blocks.0": [0, 1], "stages.1.blocks.0": [2, 4], "stages.1.blocks.1": [3, 5]}

Parameters = dict[str, tuple[np.ndarray, ...]]  # by path; (values, scale) if quantised


def expected_parameters(tensors: Tensors, blocks: dict[str, list[int]] | None = None) -> Parameters:
    """Every parameter as it must be loaded: kernels [in, out], layers and experts stacked."""

    def one(name: str) -> tuple[np.ndarray, ...]:
        data = tensors[name]
        if data.dtype.kind == "i":
            return (data.astype(np.int32),)
        is_matrix = name.endswith(".weight") and data.ndim == 2
        if name.endswith("_fn") or (is_matrix and name not in ("embed.weight", "head.weight")):
            data = data.T
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


@pytest.fixture(scope="module")
def official_model() -> Transformer:
    return load(OFFICIAL)


# Inventory of the released models -----------------------------------------------------------------


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


@dataclasses.dataclass(frozen=True)
class Announced:
    """Shape and dtype of an array that does not exist, as the writer asks for them."""

    shape: tuple[int, ...]
    dtype: np.dtype
    is_fully_addressable: bool = True


def inventory(config, *, scan_layers: bool) -> list[writer.NewTensor]:
    """What the writer would write of a model in the released formats; nothing is allocated."""

    def make():
        # One key for everything: counting keys under eval_shape takes minutes for unrolled layers.
        key = jax.random.key(0)
        rngs = nnx.Rngs(0) if scan_layers else types.SimpleNamespace(params=lambda: key)
        return to_released(Transformer(config, scan_layers=scan_layers, rngs=rngs))

    model = jax.tree.map(lambda a: Announced(a.shape, a.dtype), nnx.eval_shape(make))
    return [tensor for leaf in leaves(model) for tensor in writer._tensors(leaf, None)]


FLASH_COUNTS = {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34_167, "I64": 3, "I8": 33_792}
PRO_COUNTS = {"BF16": 619, "F32": 590, "F8_E4M3": 528, "F8_E8M0": 71_952, "I64": 3, "I8": 71_424}


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize(
    "model, config, count, num_bytes, mtp_count, counts",
    [
        (flash(), FLASH, 69_187, 159_609_485_896, 1_575, FLASH_COUNTS),
        (pro(), PRO, 145_116, 864_704_792_696, 2_343, PRO_COUNTS),
    ],
    ids=["flash", "pro"],
)
def test_a_released_model_is_written_as_the_published_tensors(
    model, config, count, num_bytes, mtp_count, counts, scan_layers
):
    tensors = inventory(model, scan_layers=scan_layers)
    assert len(tensors) == count
    assert sum(tensor.nbytes for tensor in tensors) == num_bytes
    assert collections.Counter(tensor.tag for tensor in tensors) == counts
    assert sum(tensor.name.startswith("mtp.0.") for tensor in tensors) == mtp_count
    assert {t.name: (t.tag, t.shape) for t in tensors} == released_table(config)


def test_layers_differ_by_exactly_the_published_names():
    names = collections.defaultdict(set)
    for tensor in inventory(flash(), scan_layers=True):
        if match := re.fullmatch(r"layers\.(\d+)\.(.*)", tensor.name):
            names[int(match[1])].add(match[2])
    compressor = {"ape", "wkv.weight", "wgate.weight", "norm.weight"}
    hca = {f"attn.compressor.{part}" for part in compressor}
    csa = hca | {f"attn.indexer.compressor.{part}" for part in compressor}
    csa |= {f"attn.indexer.{n}" for n in ("wq_b.weight", "wq_b.scale", "weights_proj.weight")}
    hashed, scored = {"ffn.gate.tid2eid"}, {"ffn.gate.bias"}
    common = names[0] & names[3]
    assert names[0] == names[1] == common | hashed
    assert names[2] == common | hashed | csa
    assert all(names[i] == common | scored | hca for i in range(3, 43, 2))
    assert all(names[i] == common | scored | csa for i in range(4, 43, 2))
    assert len(names) == 43


# Loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scan_layers, blocks", [(False, None), (True, SCANNED)], ids=["unrolled", "scanned"]
)
def test_official_weights_load_bit_for_bit(scan_layers, blocks):
    model = load(OFFICIAL, scan_layers=scan_layers)
    assert_same_parameters(parameters(model), expected_parameters(official_tensors(), blocks))


@pytest.mark.parametrize(
    "scan_layers, blocks", [(False, None), (True, SCANNED)], ids=["unrolled", "scanned"]
)
def test_weights_as_transformers_saves_them_load_bit_for_bit(scan_layers, blocks):
    model = load(HF, scan_layers=scan_layers)
    assert_same_parameters(parameters(model), expected_parameters(hf_tensors(), blocks))
    assert model.cfg.mtp_layers == ()
    assert model.cfg.expert_format is None


# Released name of a module or tensor of a layer -> its name in transformers' memory.
IN_TRANSFORMERS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"hc_attn_{part}": f"attn_hc.{part}" for part in HYPER},
    **{f"hc_ffn_{part}": f"ffn_hc.{part}" for part in HYPER},
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_norm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj",
    "attn.kv_norm": "self_attn.kv_norm",
    "attn.wo_a": "self_attn.o_a_proj",
    "attn.wo_b": "self_attn.o_b_proj",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.wkv": "self_attn.compressor.kv_proj",
    "attn.compressor.wgate": "self_attn.compressor.gate_proj",
    "attn.compressor.norm": "self_attn.compressor.kv_norm",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj",
    "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj",
    "attn.indexer.compressor.norm": "self_attn.compressor.indexer.kv_norm",
    "ffn.gate": "mlp.gate",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
}


def in_transformers_memory(tensors: Tensors) -> Tensors:
    """The `state_dict` of transformers, without MTP."""
    renamed = {
        "model.embed_tokens.weight": tensors["embed.weight"],
        "lm_head.weight": tensors["head.weight"],
        "model.norm.weight": tensors["norm.weight"],
        **{f"model.hc_head.hc_{part}": tensors[f"hc_head_{part}"] for part in HYPER},
    }
    experts = collections.defaultdict(dict)
    for name, data in tensors.items():
        match = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
        if not match:
            continue
        prefix, rest = f"model.layers.{match[1]}.", match[2]
        if expert := re.fullmatch(r"ffn\.experts\.(\d+)\.(w\d\.(?:weight|scale))", rest):
            experts[f"{prefix}mlp.experts."][int(expert[1]), expert[2]] = data
            continue
        module, _, kind = rest.rpartition(".")
        if kind in ("weight", "scale"):
            kind = {"weight": "weight", "scale": "weight_scale_inv"}[kind]
            renamed[f"{prefix}{IN_TRANSFORMERS[module]}.{kind}"] = data
        else:
            renamed[prefix + IN_TRANSFORMERS[rest]] = data
    for prefix, parts in experts.items():
        count = 1 + max(expert for expert, _ in parts)
        for kind in {part.removeprefix("w1.") for _, part in parts if part.startswith("w1.")}:
            gate, up, down = (
                np.stack([parts[e, f"{w}.{kind}"] for e in range(count)])
                for w in ("w1", "w3", "w2")
            )
            suffix = "_scale_inv" if kind == "scale" else ""
            renamed[f"{prefix}gate_up_proj{suffix}"] = np.concatenate([gate, up], axis=1)
            renamed[f"{prefix}down_proj{suffix}"] = down
    return renamed


def test_names_of_transformers_in_memory_give_the_same_arrays(tmp_path):
    tensors = in_transformers_memory(hf_tensors())
    assert tensors["model.layers.5.mlp.experts.gate_up_proj"].shape == (8, 128, 128)
    model = load(write_folder(tmp_path / "hf", tensors, read_config(HF)))
    assert_same_parameters(parameters(model), expected_parameters(hf_tensors()))


def test_quantised_weights_under_names_of_transformers_give_the_same_arrays(tmp_path):
    tensors = in_transformers_memory(cut_tensors())
    assert tensors["model.layers.1.mlp.experts.gate_up_proj_scale_inv"].shape == (2, 256, 8)
    assert tensors["model.layers.1.self_attn.q_a_proj.weight_scale_inv"].shape == (1, 2)
    model = load(write_folder(tmp_path / "hf", tensors, cut_config()))
    expected = {name: d for name, d in cut_tensors().items() if not name.startswith("mtp.")}
    assert_same_parameters(parameters(model), expected_parameters(expected))


def test_released_names_with_the_older_scale_suffix_load(tmp_path):
    tensors = {
        re.sub(r"\.scale$", ".weight_scale_inv", name): data for name, data in cut_tensors().items()
    }
    model = load(write_folder(tmp_path / "x", tensors, cut_config()))
    assert_same_parameters(parameters(model), expected_parameters(cut_tensors()))


def test_stacked_experts_whose_rows_do_not_halve_are_refused(tmp_path):
    tensors = in_transformers_memory(cut_tensors())
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors[name] = np.concatenate([tensors[name], tensors[name][:, :1]], axis=1)
    with pytest.raises(CheckpointError, match=r"layers\.1\.(mlp|ffn)\.experts"):
        load(write_folder(tmp_path / "hf", tensors, cut_config()))


@pytest.mark.parametrize(
    "second", ["model.layers.1.attn_norm.weight", "model.layers.1.mlp.experts.down_proj"]
)
def test_a_tensor_under_two_names_is_refused(tmp_path, second):
    tensors = cut_tensors()
    tensors[second] = np.zeros((2, 256, 64), np.uint8)
    with pytest.raises(CheckpointError, match=re.escape(second)):
        load(write_folder(tmp_path / "x", tensors, cut_config()))


# Formats ------------------------------------------------------------------------------------------


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def to_fp8_experts(tensors: Tensors, scale_dtype) -> Tensors:
    """FP4 experts as FP8 with 128 x 128 blocks, without loss; every scale in `scale_dtype`."""
    tensors = dict(tensors)
    for name in [name for name, data in tensors.items() if data.dtype == np.uint8]:
        scale_name = name.replace(".weight", ".scale")
        packed, scale = tensors[name], tensors[scale_name].astype(np.float64)
        rows, cols = packed.shape[0], 2 * packed.shape[1]
        values = E2M1[np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, cols)]
        values = values * np.repeat(scale, 32, axis=1)
        top = scale.reshape(rows // 128, 128, cols // 128, 4).max(axis=(1, 3)) / 2**6
        exact = values / np.kron(top, np.ones((128, 128)))
        tensors[name] = exact.astype(ml_dtypes.float8_e4m3fn)
        assert np.array_equal(tensors[name].astype(np.float64), exact)
        tensors[scale_name] = top
    for name in [name for name in tensors if name.endswith(".scale")]:
        tensors[name] = tensors[name].astype(np.float32).astype(scale_dtype)
    return tensors


@pytest.mark.parametrize(
    "scale_dtype", [np.float32, ml_dtypes.float8_e8m0fnu], ids=["F32", "F8_E8M0"]
)
@pytest.mark.parametrize("expert_dtype", ["fp8", "fp4", None])
def test_experts_in_fp8_load_whatever_the_config_says(tmp_path, scale_dtype, expert_dtype):
    tensors = to_fp8_experts(cut_tensors(), scale_dtype)
    assert tensors["layers.1.ffn.experts.1.w1.weight"].dtype == ml_dtypes.float8_e4m3fn
    assert tensors["layers.1.ffn.experts.1.w1.scale"].shape == (1, 2)
    config = cut_config() | {"expert_dtype": expert_dtype}
    model = load(write_folder(tmp_path / "base", tensors, config))
    assert_same_parameters(parameters(model), expected_parameters(tensors))
    assert model.cfg.expert_format == "fp8"
    w2 = model.stages[1].blocks[0].moe.w2.get_value()
    assert w2.block == (128, 128)
    official = Official(OFFICIAL)
    original = [official.weight(f"layers.2.ffn.experts.{e}.w2").T for e in range(2)]
    assert np.array_equal(w2.dequantize(), np.stack(original))


def test_base_models_with_f32_scales_are_written_back_byte_for_byte(tmp_path):
    tensors = to_fp8_experts(cut_tensors(), np.float32)
    folder = write_folder(tmp_path / "base", tensors, cut_config() | {"expert_dtype": "fp8"})
    save(load(folder), tmp_path / "new", like=Checkpoint(folder))
    assert_same_tensors(read_tensors(tmp_path / "new" / "model.safetensors"), tensors)
    assert read_config(tmp_path / "new")["expert_dtype"] == "fp8"


def test_fp4_experts_load_without_a_word_about_them_in_the_config(tmp_path):
    config = {key: value for key, value in cut_config().items() if key != "expert_dtype"}
    folder = write_folder(tmp_path / "x", cut_tensors(), config)
    assert Checkpoint(folder).config == from_hf(cut_config())


@pytest.mark.parametrize("dtype", [np.int32, np.int64], ids=["I32", "I64"])
def test_hash_tables_load_as_int32(tmp_path, dtype):
    tensors = cut_tensors()
    table = np.random.default_rng(0).integers(0, 2, (256, 2)).astype(dtype)
    tensors["layers.0.ffn.gate.tid2eid"] = table
    model = load(write_folder(tmp_path / "x", tensors, cut_config()))
    loaded = model.stages[0].blocks[0].moe.router.table.get_value()
    assert loaded.dtype == jnp.int32
    assert np.array_equal(loaded, table)


@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["F16", "F32"])
def test_checkpoints_in_other_float_formats_load_and_are_written_back(tmp_path, dtype):
    tensors = {
        name: data.astype(dtype) if data.dtype == ml_dtypes.bfloat16 else data
        for name, data in cut_tensors().items()
    }
    folder = write_folder(tmp_path / "x", tensors, cut_config())
    model = load(folder)
    assert_same_parameters(parameters(model), expected_parameters(tensors))
    save(model, tmp_path / "new", like=Checkpoint(folder))
    assert_same_tensors(read_tensors(tmp_path / "new" / "model.safetensors"), tensors)


# What is in a folder and is not loaded ------------------------------------------------------------


def test_the_draft_model_of_later_releases_is_left_out_with_a_note(tmp_path, caplog):
    tensors = cut_tensors()
    for name in [n for n in tensors if re.match(r"mtp\.0\.(e_proj|h_proj|enorm|hnorm|hc_head)", n)]:
        del tensors[name]
    main = {name: data for name, data in tensors.items() if not name.startswith("mtp.")}
    del tensors["mtp.0.norm.weight"]
    for name in [name for name in tensors if name.startswith("mtp.0.")]:
        for stage in (1, 2):
            tensors[name.replace("mtp.0.", f"mtp.{stage}.")] = tensors[name]
    tensors["mtp.0.main_proj.weight"] = np.zeros((256, 768), ml_dtypes.float8_e4m3fn)
    tensors["mtp.0.main_proj.scale"] = np.ones((2, 6), ml_dtypes.float8_e8m0fnu)
    tensors["mtp.0.main_norm.weight"] = np.ones(256, ml_dtypes.bfloat16)
    tensors["mtp.2.norm.weight"] = np.ones(256, ml_dtypes.bfloat16)
    for part in ("markov_head.markov_w1", "markov_head.markov_w2", "confidence_head.proj"):
        tensors[f"mtp.2.{part}.weight"] = np.zeros((1, 2), ml_dtypes.bfloat16)
    config = cut_config() | {
        "compress_ratios": [0, 4, 128, 0, 0, 0],
        "dspark_block_size": 5,
        "dspark_markov_rank": 256,
        "dspark_noise_token_id": 255,
        "dspark_target_layer_ids": [0, 1, 2],
    }
    checkpoint = Checkpoint(write_folder(tmp_path / "x", tensors, config))
    (note,) = checkpoint.notes
    assert "DSpark" in note and f"{len(tensors) - len(main)} tensors" in note
    assert checkpoint.config.mtp_layers == ()

    with caplog.at_level(logging.WARNING, logger="v4jax"):
        model = load(checkpoint)
    assert note in caplog.text
    assert_same_parameters(parameters(model), expected_parameters(main))


@pytest.mark.parametrize("name", ["mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"])
def test_copies_of_embedding_and_head_in_the_mtp_block_are_left_out(tmp_path, name):
    tensors = changed({name: cut_tensors()["embed.weight"]})
    checkpoint = Checkpoint(write_folder(tmp_path / "x", tensors, cut_config()))
    assert [note for note in checkpoint.notes if name in note] == checkpoint.notes != []
    model = load(checkpoint)
    assert_same_parameters(parameters(model), expected_parameters(cut_tensors()))


def test_a_folder_without_mtp_block_loads_without_one_and_says_so(tmp_path, caplog):
    tensors = {name: data for name, data in cut_tensors().items() if not name.startswith("mtp.")}
    with caplog.at_level(logging.WARNING, logger="v4jax"):
        model = load(write_folder(tmp_path / "x", tensors, cut_config()))
    assert "MTP" in caplog.text
    assert len(model.mtp) == 0


def test_an_ordinary_folder_gives_no_note():
    checkpoint = Checkpoint(OFFICIAL)
    assert checkpoint.notes == []
    assert checkpoint.config == from_hf(OFFICIAL)


# Errors -------------------------------------------------------------------------------------------

E4M3, E8M0, F32, I8 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, np.float32, np.uint8
# Tensors put in (or taken out: None), and how the lines of the error about it start.
BROKEN = {
    "missing": (
        {"layers.1.attn.compressor.ape": None},
        ["missing: layers.1.attn.compressor.ape"],
    ),
    "missing expert": (
        {"layers.2.ffn.experts.1.w3.weight": None, "layers.2.ffn.experts.1.w3.scale": None},
        ["missing: layers.2.ffn.experts.1.w3.weight"],
    ),
    "missing scale": (
        {"layers.1.attn.wq_a.scale": None},
        ["missing: layers.1.attn.wq_a.scale"],
    ),
    "missing scale of an expert": (
        {"mtp.0.ffn.experts.0.w1.scale": None},
        ["missing: mtp.0.ffn.experts.0.w1.scale"],
    ),
    "scale without its weight": (
        {"layers.0.attn.wo_b.weight": None},
        ["missing: layers.0.attn.wo_b.weight", "unknown: layers.0.attn.wo_b.scale"],
    ),
    "scale of a float": ({"head.scale": np.ones((2, 2), F32)}, ["unknown: head.scale"]),
    "unknown": (
        {"layers.0.attn.wkv_b.weight": np.ones(2, F32)},
        ["unknown: layers.0.attn.wkv_b.weight"],
    ),
    "one layer too many": (
        {"layers.3.attn_norm.weight": np.ones(256, F32)},
        ["unknown: layers.3.attn_norm.weight"],
    ),
    "one expert too many": (
        {"layers.0.ffn.experts.2.w1.weight": np.zeros((128, 128), I8)},
        ["unknown: layers.0.ffn.experts.2.w1.weight"],
    ),
    "bias in a hash-routed layer": (
        {"layers.0.ffn.gate.bias": np.zeros(2, F32)},
        ["unknown: layers.0.ffn.gate.bias"],
    ),
    "shape": (
        {"embed.weight": np.ones((255, 256), F32)},
        ["shape: embed.weight is [255, 256], expected [256, 256]"],
    ),
    "transposed": (
        {"layers.2.attn.wkv.weight": np.ones((256, 96), E4M3)},
        ["shape: layers.2.attn.wkv.weight is [256, 96], expected [96, 256]"],
    ),
    "unpacked FP4": (
        {"layers.0.ffn.experts.0.w2.weight": np.zeros((256, 128), I8)},
        ["shape: layers.0.ffn.experts.0.w2.weight is [256, 128], expected [256, 64]"],
    ),
    "shape of a scale": (
        {"layers.1.attn.wq_b.scale": np.ones((1, 3), F32)},
        ["shape: layers.1.attn.wq_b.scale is [1, 3], expected [3, 1]"],
    ),
    "FP8 scale of FP4": (
        {"layers.2.ffn.experts.0.w1.scale": np.ones((1, 2), E8M0)},
        ["shape: layers.2.ffn.experts.0.w1.scale is [1, 2], expected [128, 8]"],
    ),
    "integers for a norm": (
        {"norm.weight": np.ones(256, np.int32)},
        ["dtype: norm.weight is I32"],
    ),
    "floats for a hash table": (
        {"layers.0.ffn.gate.tid2eid": np.zeros((256, 2), F32)},
        ["dtype: layers.0.ffn.gate.tid2eid is F32"],
    ),
    "FP4 for a linear": (
        {"layers.0.attn.wq_a.weight": np.zeros((128, 128), I8)},
        ["dtype: layers.0.attn.wq_a.weight is I8"],
    ),
    "FP8 for the router": (
        {"layers.1.ffn.gate.weight": np.zeros((2, 256), E4M3)},
        ["dtype: layers.1.ffn.gate.weight is F8_E4M3"],
    ),
    "bfloat16 for a scale": (
        {"mtp.0.e_proj.scale": np.ones((2, 2), ml_dtypes.bfloat16)},
        ["dtype: mtp.0.e_proj.scale is BF16"],
    ),
    "formats mixed among experts": (
        {
            "layers.1.ffn.experts.1.w1.weight": np.zeros((128, 256), E4M3),
            "layers.1.ffn.experts.1.w1.scale": np.ones((1, 2), E8M0),
        },
        ["layers.1.ffn.experts.0.w1.weight and its likes are stored as ['F8_E4M3', 'I8']"],
    ),
}


def changed(changes: dict[str, np.ndarray | None]) -> Tensors:
    return {name: data for name, data in (cut_tensors() | changes).items() if data is not None}


def assert_refused(folder: pathlib.Path, problems: list[str]) -> None:
    with pytest.raises(CheckpointError) as info:
        load(folder)
    first, *lines = str(info.value).split("\n  ")
    assert str(folder) in first
    assert f"({len(problems)} problems" in first
    for problem in problems:
        matching = [line for line in lines if line.startswith(problem)]
        assert len(matching) == 1, (problem, lines)
    assert len(lines) == len(problems)


@pytest.mark.parametrize("changes, problems", BROKEN.values(), ids=BROKEN.keys())
def test_a_tensor_that_does_not_fit_is_refused_by_name(tmp_path, changes, problems):
    assert_refused(write_folder(tmp_path / "x", changed(changes), cut_config()), problems)


def test_everything_that_does_not_fit_is_listed_in_one_error(tmp_path):
    changes = dict(collections.ChainMap(*(changes for changes, _ in BROKEN.values())))
    problems = [line for _, lines in BROKEN.values() for line in lines]
    assert len(problems) > 20
    assert_refused(write_folder(tmp_path / "x", changed(changes), cut_config()), problems)


def test_a_config_of_other_sizes_is_refused(tmp_path):
    config = cut_config() | {"num_attention_heads": 8}
    with pytest.raises(
        CheckpointError, match=r"shape: layers\.0\.attn\.attn_sink is \[4\]"
    ) as info:
        load(write_folder(tmp_path / "x", cut_tensors(), config))
    assert "shape: mtp.0.attn.wq_b.weight is [384, 128], expected [768, 128]" in str(info.value)


@pytest.mark.parametrize(
    "name, index, code",
    [
        ("layers.1.attn.wq_b.weight", (383, 127), 0x7F),
        ("layers.2.attn.wo_a.weight", (0, 0), 0xFF),
        ("mtp.0.h_proj.scale", (1, 1), 0xFF),
        ("layers.0.ffn.experts.1.w2.scale", (255, 3), 0xFF),
    ],
)
def test_codes_for_nan_are_refused_with_the_name_of_the_tensor(tmp_path, name, index, code):
    tensors = cut_tensors()
    tensors[name] = tensors[name].copy()
    tensors[name].view(np.uint8)[index] = code
    folder = write_folder(tmp_path / "x", tensors, cut_config())
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}.*NaN"):
        load(folder)


def test_a_folder_without_config_is_refused(tmp_path):
    folder = write_folder(tmp_path / "x", cut_tensors(), cut_config())
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=rf"{folder}.*config\.json"):
        load(folder)


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(cut_config()), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}.*safetensors"):
        load(tmp_path)


def test_the_v41_architecture_is_refused_before_any_weight_is_read(tmp_path):
    config = {"model_type": "deepseek_v41", "text_config": cut_config()}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"DeepSeek-V4\.1"):
        load(tmp_path)


def in_two_files(path: pathlib.Path) -> pathlib.Path:
    """The cut checkpoint in `a` (embedding) and `b` (the rest) with an index."""
    folder = write_folder(path, cut_tensors(), cut_config())
    (folder / "model.safetensors").unlink()
    tensors = cut_tensors()
    write_file(folder / "a.safetensors", {"embed.weight": tensors.pop("embed.weight")})
    write_file(folder / "b.safetensors", tensors)
    weight_map = {name: "b.safetensors" for name in tensors}
    write_index(folder, weight_map | {"embed.weight": "a.safetensors"})
    return folder


def test_several_files_load_like_one_with_and_without_index(tmp_path):
    expected = expected_parameters(cut_tensors())
    folder = in_two_files(tmp_path / "x")
    assert_same_parameters(parameters(load(folder)), expected)
    (folder / "model.safetensors.index.json").unlink()
    assert_same_parameters(parameters(load(folder)), expected)


def test_files_that_the_index_does_not_name_are_ignored(tmp_path):
    folder = in_two_files(tmp_path / "x")
    write_file(folder / "old.safetensors", {"norm.weight": np.zeros(3, np.float32)})
    (folder / "broken.safetensors").write_bytes(b"")
    assert len(Checkpoint(folder).tensors) == len(cut_tensors())


def test_a_truncated_shard_is_refused_by_name(tmp_path):
    folder = in_two_files(tmp_path / "x")
    shard = folder / "b.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"b\.safetensors.*") as info:
        load(folder)
    assert "truncated" in str(info.value)


def test_missing_files_and_misplaced_tensors_of_the_index_are_all_named(tmp_path):
    folder = in_two_files(tmp_path / "x")
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    weight_map = index["weight_map"] | {
        "norm.weight": "c.safetensors",
        "hc_head_fn": "d.safetensors",
        "head.weight": "a.safetensors",
    }
    write_index(folder, weight_map)
    with pytest.raises(CheckpointError) as info:
        load(folder)
    message = str(info.value)
    assert "c.safetensors is listed" in message
    assert "d.safetensors is listed" in message
    assert "head.weight is not in a.safetensors" in message


@pytest.mark.parametrize("text", ["{", "{}", "[]"], ids=["not JSON", "no weight_map", "a list"])
def test_a_broken_index_is_refused_by_name(tmp_path, text):
    folder = in_two_files(tmp_path / "x")
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load(folder)


def test_one_tensor_in_two_files_is_refused(tmp_path):
    folder = write_folder(tmp_path / "x", cut_tensors(), cut_config())
    write_file(folder / "more.safetensors", {"norm.weight": cut_tensors()["norm.weight"]})
    with pytest.raises(CheckpointError, match=r"norm\.weight occurs twice"):
        load(folder)


# Under a mesh -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_weights_loaded_under_a_mesh_are_the_same_and_spread_over_it(tmp_path, scan_layers):
    with jax.set_mesh(make_mesh(fsdp=2, expert=2, tensor=2)):
        model = load(OFFICIAL, scan_layers=scan_layers)
    blocks = SCANNED if scan_layers else None
    assert_same_parameters(parameters(model), expected_parameters(official_tensors(), blocks))

    block = model.stages[1 if scan_layers else 2].blocks[0]
    layer_axis = (None,) if scan_layers else ()

    def placed(array: jax.Array) -> tuple:
        axes = tuple(array.sharding.spec) + (None,) * (array.ndim - len(array.sharding.spec))
        assert axes[: len(layer_axis)] == layer_axis
        shard = array.addressable_shards[0].data.shape
        return axes[len(layer_axis) :], shard[len(layer_axis) :]

    w1 = block.moe.w1.get_value()
    assert placed(w1.values) == (("expert", "fsdp", "tensor"), (4, 64, 64))
    assert placed(w1.scale) == (("expert", "fsdp", "tensor"), (4, 4, 64))
    w2 = block.moe.w2.get_value()
    assert placed(w2.values) == (("expert", "tensor", "fsdp"), (4, 32, 128))
    # Block scales: 2 blocks of inputs are split in two, 3 blocks of outputs and 1 are not.
    wq_a, wq_b = (getattr(block.attention, name).kernel.get_value() for name in ("wq_a", "wq_b"))
    assert placed(wq_a.scale) == (("fsdp", None), (1, 1))
    assert placed(wq_b.values) == ((None, "tensor"), (128, 192))
    assert placed(wq_b.scale) == ((None, None), (1, 3))
    wo_b = block.attention.wo_b.kernel.get_value()
    assert placed(wo_b.values) == (("tensor", "fsdp"), (64, 128))
    assert placed(wo_b.scale) == ((None, "fsdp"), (1, 1))
    assert model.embed.get_value().addressable_shards[0].data.shape == (128, 128)

    save(model, tmp_path / "new", like=Checkpoint(OFFICIAL))
    written = read_tensors(tmp_path / "new" / "model.safetensors")
    assert_same_tensors(written, official_tensors())


# Saving -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_a_loaded_model_is_written_back_byte_for_byte(tmp_path, scan_layers):
    model = load(OFFICIAL, scan_layers=scan_layers)
    save(model, tmp_path / "new")
    expected = {
        name: data.astype(np.int64) if name.endswith("tid2eid") else data  # as in the releases
        for name, data in official_tensors().items()
    }
    written = read_tensors(tmp_path / "new" / "model.safetensors")
    assert_same_tensors(
        {name: written[name] for name in sorted(written)}, dict(sorted(expected.items()))
    )
    assert from_hf(tmp_path / "new") == from_hf(OFFICIAL)


def test_a_model_is_written_like_its_checkpoint(tmp_path, official_model):
    save(official_model, tmp_path / "new", like=Checkpoint(OFFICIAL))
    written = tmp_path / "new" / "model.safetensors"
    assert_same_tensors(read_tensors(written), official_tensors())


def test_the_whole_file_comes_back_if_it_has_metadata(tmp_path, official_model):
    original = write_folder(tmp_path / "x", {}, read_config(OFFICIAL)) / "model.safetensors"
    write_file(original, official_tensors(), {"format": "pt", "release": "April"})
    save(official_model, tmp_path / "new", like=Checkpoint(tmp_path / "x"))
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == original.read_bytes()


def test_a_model_of_transformers_is_written_under_released_names(tmp_path):
    save(load(HF), tmp_path / "new")
    written = read_tensors(tmp_path / "new" / "model.safetensors")
    expected = {
        name: data.astype(np.int64) if name.endswith("tid2eid") else data
        for name, data in hf_tensors().items()
    }
    assert_same_tensors(dict(sorted(written.items())), dict(sorted(expected.items())))


def test_a_large_model_is_written_in_one_file_per_layer(tmp_path, official_model):
    save(official_model, tmp_path / "new", like=Checkpoint(OFFICIAL), single_file_limit=1_000_000)
    files = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00009.safetensors" for i in range(1, 10)]
    contents = {name: read_tensors(tmp_path / "new" / name) for name in files}
    starts = [
        "embed.",
        *(f"layers.{i}." for i in range(6)),
        ("head.", "norm.", "hc_head_"),
        "mtp.0.",
    ]
    for name, start in zip(files, starts, strict=True):
        assert contents[name].keys() == {n for n in official_tensors() if n.startswith(start)}

    raw = (tmp_path / "new" / "model.safetensors.index.json").read_text(encoding="utf-8")
    index = json.loads(raw)
    place = {tensor: name for name, tensors in contents.items() for tensor in tensors}
    assert index["weight_map"] == place
    total = sum(data.nbytes for data in official_tensors().values())
    assert index["metadata"]["total_size"] == total
    assert from_hf(tmp_path / "new") == from_hf(OFFICIAL)
    assert_same_parameters(parameters(load(tmp_path / "new")), parameters(official_model))


def test_the_limit_of_one_file_is_in_bytes_of_data(tmp_path):
    model = load(write_folder(tmp_path / "x", cut_tensors(), cut_config()))
    like = Checkpoint(tmp_path / "x")
    total = sum(data.nbytes for data in cut_tensors().values())
    save(model, tmp_path / "one", like=like, single_file_limit=total)
    save(model, tmp_path / "many", like=like, single_file_limit=total - 1)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 6


def test_the_other_files_of_a_checkpoint_are_copied(tmp_path):
    folder = write_folder(tmp_path / "x", cut_tensors(), cut_config())
    (folder / "tokenizer.json").write_text('{"model": "ä"}', encoding="utf-8")
    (folder / "LICENSE").write_text("MIT", encoding="utf-8")
    (folder / "model.safetensors.index.json.old").mkdir()
    save(load(folder), tmp_path / "new", like=Checkpoint(folder))
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == ["LICENSE", "config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "new" / "tokenizer.json").read_text(encoding="utf-8") == '{"model": "ä"}'


@pytest.mark.parametrize(
    "present", ["model.safetensors", "old.safetensors", "model.safetensors.index.json"]
)
def test_a_folder_with_a_checkpoint_is_not_written_to(tmp_path, official_model, present):
    (tmp_path / present).write_bytes(b"precious")
    with pytest.raises(ValueError, match=re.escape(present)):
        save(official_model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [present]
    assert (tmp_path / present).read_bytes() == b"precious"


@pytest.mark.parametrize("limit, num_written", [(10**9, 0), (1, 2)], ids=["one file", "shards"])
def test_config_comes_last_so_that_a_failed_save_is_no_checkpoint(
    tmp_path, monkeypatch, official_model, limit, num_written
):
    write, written = writer.write_safetensors, []

    def failing(path, *args):
        if len(written) == num_written:
            raise OSError("the disk is full")
        write(path, *args)
        written.append(pathlib.Path(path).name)

    monkeypatch.setattr(writer, "write_safetensors", failing)
    with pytest.raises(OSError, match="the disk is full"):
        save(official_model, tmp_path, single_file_limit=limit)
    assert len(written) == num_written
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(written)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(tmp_path)


# Released formats and back ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def float_model(official_model) -> Transformer:
    return to_float(official_model)


@pytest.fixture(scope="module")
def released_model(float_model) -> Transformer:
    return to_released(float_model)


def test_a_float_model_has_the_values_of_the_file(float_model):
    official = Official(OFFICIAL)
    tensors = {
        name: data if name.endswith("tid2eid") else official.tensor(name).astype(np.float32)
        for name, data in official_tensors().items()
        if not name.endswith(".scale")
    }
    for name in tensors:
        if name.endswith(".weight"):
            tensors[name] = official.weight(name.removesuffix(".weight")).astype(np.float32)
    assert_same_parameters(parameters(float_model), expected_parameters(tensors))


def test_bfloat16_holds_quantised_weights_exactly(official_model):
    one = official_model.stages[2].blocks[0].moe.w1.get_value()
    exact = np.asarray(one.dequantize(), np.float64)
    assert np.array_equal(np.asarray(one.dequantize(jnp.bfloat16), np.float64), exact)


def test_a_model_made_released_has_the_released_formats_and_shapes(tmp_path, released_model):
    save(released_model, tmp_path / "new")
    raw = (tmp_path / "new" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]
    written = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    assert written == released_table(read_config(OFFICIAL))


def quantised(model: Transformer) -> dict[str, QuantizedArray]:
    return {p: value for p, value in values_of(model).items() if isinstance(value, QuantizedArray)}


def scales_of_the_rule(weight: np.ndarray, is_fp4: bool) -> np.ndarray:
    """Smallest power of two that keeps every value of a block in range."""
    rows, cols = (32, 1) if is_fp4 else (128, 128)
    largest, floor = (6.0, 6 * 2.0**-126) if is_fp4 else (448.0, 1e-4)
    *batch, num_rows, num_cols = weight.shape
    padding = [(0, 0)] * len(batch) + [(0, -num_rows % rows), (0, -num_cols % cols)]
    padded = np.pad(np.abs(weight), padding)
    amax = padded.reshape(*batch, -1, rows, padded.shape[-1] // cols, cols).max(axis=(-3, -1))
    return power_of_two_above(np.maximum(amax, np.float32(floor)) * np.float32(1 / largest))


def without_negative_zeros(packed: np.ndarray) -> np.ndarray:
    packed = np.where(packed & 0x0F == 0x08, packed & 0xF0, packed)
    return np.where(packed & 0xF0 == 0x80, packed & 0x0F, packed)


def test_requantised_weights_have_the_scale_of_the_rule_and_lose_nothing(
    official_model, float_model, released_model
):
    """Where the file's scale is that of the rule, the bytes are the file's.

    Elsewhere rounding has brought the largest value of a block down to a power of two, and the rule
    gives half the scale for the same numbers.
    """
    floats, original = parameters(float_model), quantised(official_model)
    again = quantised(released_model)
    assert sorted(original) == sorted(again)
    num_same, num_blocks = collections.Counter(), collections.Counter()
    for path, value in again.items():
        scale = np.asarray(value.scale).astype(np.float32)
        assert np.array_equal(scale, scales_of_the_rule(floats[path][0], value.is_fp4)), path
        assert np.array_equal(value.dequantize(), floats[path][0]), path

        same = scale == np.asarray(original[path].scale).astype(np.float32)
        num_same[value.is_fp4] += same.sum()
        num_blocks[value.is_fp4] += same.size
        old, new = (np.asarray(q.values).view(np.uint8) for q in (original[path], value))
        if value.is_fp4:
            old = without_negative_zeros(old)
        rows, cols = (16, 1) if value.is_fp4 else (128, 128)
        same = np.repeat(np.repeat(same, rows, axis=-2), cols, axis=-1)
        same = same[..., : old.shape[-2], : old.shape[-1]]
        assert np.array_equal(old[same], new[same]), path
    assert num_same[True] > num_blocks[True] / 2
    assert num_same[False] > num_blocks[False] * 0.9


def test_making_a_released_model_released_changes_nothing(released_model, official_model):
    assert_same_parameters(parameters(to_released(released_model)), parameters(released_model))
    before, after = parameters(official_model), parameters(to_released(official_model))
    for path in quantised(official_model):
        for a, b in zip(before[path], after[path], strict=True):
            assert a.tobytes() == b.tobytes(), path


def test_conversions_leave_the_given_model_alone(official_model, float_model, released_model):
    expected = expected_parameters(official_tensors())
    assert_same_parameters(parameters(official_model), expected)
    assert not quantised(float_model)
