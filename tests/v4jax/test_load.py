"""Checkpoints become the right parameters, or an error that lists what is wrong."""

import collections
import json
import logging
import pathlib
import re
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from tests.reference.checkpoints import (
    HF,
    HYPER,
    OFFICIAL,
    SCANNED,
    Tensors,
    assert_same_parameters,
    assert_same_tensors,
    cut_config,
    cut_tensors,
    expected_parameters,
    hf_tensors,
    official_tensors,
    parameters,
    read_config,
    write_file,
    write_folder,
    write_index,
)
from tests.reference.official import Official, read_tensors
from v4jax.checkpoint import Checkpoint, CheckpointError, load, save
from v4jax.checkpoint.hf_config import ConfigError, from_hf


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
    w2 = model.stages[1].blocks[0].moe.w2.kernel.get_value()
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
    assert_same_parameters(parameters(load(tmp_path / "new")), parameters(model))


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

E4M3, E8M0, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16
F32, I32, I8 = np.float32, np.int32, np.uint8
UNKNOWN, MISSING = "unknown: {}", "missing: {}"
# A tensor that is put in (or taken out: None), and how the lines of the error about it start.
BROKEN = [
    ("layers.1.attn.compressor.ape", None, MISSING),
    ("layers.1.attn.wq_a.scale", None, MISSING),
    ("mtp.0.ffn.experts.0.w1.scale", None, MISSING),
    ("layers.0.attn.wo_b.weight", None, MISSING, "unknown: layers.0.attn.wo_b.scale"),
    (
        "layers.2.ffn.experts.1.w3.weight",
        None,
        MISSING,
        "unknown: layers.2.ffn.experts.1.w3.scale",
    ),
    ("layers.0.attn.wkv_b.weight", np.ones(2, F32), UNKNOWN),
    ("layers.3.attn_norm.weight", np.ones(256, F32), UNKNOWN),
    ("layers.0.ffn.experts.2.w1.weight", np.zeros((128, 128), I8), UNKNOWN),
    ("layers.0.ffn.gate.bias", np.zeros(2, F32), UNKNOWN),  # of a hash-routed layer
    ("head.scale", np.ones((2, 2), F32), UNKNOWN),  # of a float
    ("embed.weight", np.ones((255, 256), F32), "shape: {} is [255, 256], expected [256, 256]"),
    (
        "layers.2.attn.wkv.weight",
        np.ones((256, 96), E4M3),
        "shape: {} is [256, 96], expected [96, 256]",
    ),
    (
        "layers.0.ffn.experts.0.w2.weight",
        np.zeros((256, 128), I8),  # one value per byte
        "shape: {} is [256, 128], expected [256, 64]",
    ),
    ("layers.1.attn.wq_b.scale", np.ones((1, 3), F32), "shape: {} is [1, 3], expected [3, 1]"),
    (
        "layers.2.ffn.experts.0.w1.scale",
        np.ones((1, 2), E8M0),  # as if the weight were FP8
        "shape: {} is [1, 2], expected [128, 8]",
    ),
    ("norm.weight", np.ones(256, I32), "dtype: {} is I32"),
    ("layers.0.ffn.gate.tid2eid", np.zeros((256, 2), F32), "dtype: {} is F32"),
    ("layers.0.attn.wq_a.weight", np.zeros((128, 128), I8), "dtype: {} is I8"),
    ("layers.1.ffn.gate.weight", np.zeros((2, 256), E4M3), "dtype: {} is F8_E4M3"),
    ("mtp.0.e_proj.scale", np.ones((2, 2), BF16), "dtype: {} is BF16"),
    (
        "layers.1.ffn.experts.1.w1.weight",
        np.zeros((128, 256), E4M3),
        "shape: layers.1.ffn.experts.1.w1.scale is [128, 8], expected [1, 2]",
        "layers.1.ffn.experts.0.w1.weight and its likes are stored as ['F8_E4M3', 'I8']",
    ),
]


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


@pytest.mark.parametrize(
    "name, data, problems", [(n, d, p) for n, d, *p in BROKEN], ids=[row[0] for row in BROKEN]
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(tmp_path, name, data, problems):
    folder = write_folder(tmp_path / "x", changed({name: data}), cut_config())
    assert_refused(folder, [problem.format(name) for problem in problems])


def test_everything_that_does_not_fit_is_listed_in_one_error(tmp_path):
    changes = {name: data for name, data, *_ in BROKEN}
    problems = [problem.format(name) for name, _, *rest in BROKEN for problem in rest]
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


def test_a_byte_order_mark_before_json_does_not_matter(tmp_path):
    folder = in_two_files(tmp_path / "x")
    for name in ("config.json", "model.safetensors.index.json"):
        path = folder / name
        path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")

    assert Checkpoint(folder).tensors.keys() == cut_tensors().keys()


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
    with pytest.raises(CheckpointError, match=r"norm\.weight, which occurs twice"):
        load(folder)


# Costs --------------------------------------------------------------------------------------------


def test_loading_compiles_nothing(compilations):
    load(OFFICIAL)

    assert compilations() == 0


def test_loading_holds_little_more_than_the_model():
    """NumPy memory above what stays: about the largest parameter, as the files are mapped."""
    load(OFFICIAL)  # what is allocated once
    tracemalloc.start()
    model = load(OFFICIAL)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(model))]
    assert peak - now <= 1.5 * max(sizes) + 2**21  # and 2 MiB of Python objects
    assert sum(sizes) > 10 * max(sizes)
