import copy
import dataclasses
import json
import pathlib

import pytest

from v4jax.checkpoint.hf_config import ConfigError, from_hf, to_hf
from v4jax.config import (
    VARIANTS,
    CompressorSpec,
    IndexerSpec,
    LayerSpec,
    MoEConfig,
    RopeConfig,
    V4Config,
    csa_layer,
    flash,
    flash_base,
    hca_layer,
    nano,
    pro,
    pro_base,
    tiny,
    window_layer,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"

# What the published config.json files say, written out.
FLASH_RATIOS = [0, 0, *[4, 128] * 20, 4]
PRO_RATIOS = [128, 128, *[4, 128] * 29, 4]
FLASH = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_ratios": [*FLASH_RATIOS, 0],
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 129280,
}
PRO = FLASH | {
    "compress_ratios": [*PRO_RATIOS, 0],
    "hidden_size": 7168,
    "index_topk": 1024,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
}
# Keys without which there is no model. The others have the one value that the code computes.
REQUIRED = [
    "model_type",
    "compress_ratios",
    "compress_rope_theta",
    "hc_eps",
    "hc_mult",
    "hc_sinkhorn_iters",
    "head_dim",
    "hidden_size",
    "index_head_dim",
    "index_n_heads",
    "index_topk",
    "max_position_embeddings",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hash_layers",
    "num_hidden_layers",
    "o_groups",
    "o_lora_rank",
    "q_lora_rank",
    "qk_rope_head_dim",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "routed_scaling_factor",
    "sliding_window",
    "swiglu_limit",
    "vocab_size",
]
LAYER_TYPES = {
    0: "sliding_attention",
    4: "compressed_sparse_attention",
    128: "heavily_compressed_attention",
}


def in_transformers_form(released: dict) -> dict:
    """The same config as transformers 5 writes it."""
    raw = copy.deepcopy(released)
    num_layers, num_hash = raw["num_hidden_layers"], raw.pop("num_hash_layers")
    raw["layer_types"] = [LAYER_TYPES[r] for r in raw.pop("compress_ratios")[:num_layers]]
    raw["mlp_layer_types"] = ["hash_moe"] * num_hash + ["moe"] * (num_layers - num_hash)
    raw["partial_rotary_factor"] = raw["qk_rope_head_dim"] / raw["head_dim"]
    yarn = raw.pop("rope_scaling")
    raw["rope_parameters"] = {
        "compress": {
            "attention_factor": 1.0,
            "beta_fast": yarn["beta_fast"],
            "beta_slow": yarn["beta_slow"],
            "factor": yarn["factor"],
            "original_max_position_embeddings": yarn["original_max_position_embeddings"],
            "partial_rotary_factor": raw["partial_rotary_factor"],
            "rope_theta": float(raw["compress_rope_theta"]),
            "rope_type": "yarn",
        },
        "main": {
            "partial_rotary_factor": raw["partial_rotary_factor"],
            "rope_theta": float(raw["rope_theta"]),
            "rope_type": "default",
        },
    }
    raw["compress_rates"] = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    raw["dtype"] = raw.pop("torch_dtype")
    del raw["expert_dtype"], raw["quantization_config"], raw["topk_method"]
    return raw | {
        "mlp_bias": False,
        "output_router_logits": False,
        "pad_token_id": None,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }


def ratios(layers: tuple[LayerSpec, ...]) -> list[int]:
    return [spec.ratio for spec in layers]


# Variants -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, in_flash, in_pro",
    [
        ("vocab_size", 129280, 129280),
        ("embed_dim", 4096, 7168),
        ("num_heads", 64, 128),
        ("head_dim", 512, 512),
        ("rope_head_dim", 64, 64),
        ("nope_head_dim", 448, 448),
        ("q_lora_rank", 1024, 1536),
        ("o_groups", 8, 16),
        ("o_lora_rank", 1024, 1024),
        ("window", 128, 128),
        ("indexer.num_heads", 64, 64),
        ("indexer.head_dim", 128, 128),
        ("indexer.topk", 512, 1024),
        ("moe.num_experts", 256, 384),
        ("moe.experts_per_token", 6, 6),
        ("moe.expert_dim", 2048, 3072),
        ("moe.routed_scale", 1.5, 2.5),
        ("moe.swiglu_limit", 10.0, 10.0),
        ("rope.theta", 10000.0, 10000.0),
        ("rope.compress_theta", 160000.0, 160000.0),
        ("rope.yarn_factor", 16.0, 16.0),
        ("rope.yarn_original_length", 65536, 65536),
        ("rope.yarn_beta_fast", 32.0, 32.0),
        ("rope.yarn_beta_slow", 1.0, 1.0),
        ("num_streams", 4, 4),
        ("sinkhorn_iters", 20, 20),
        ("hc_eps", 1e-6, 1e-6),
        ("norm_eps", 1e-6, 1e-6),
        ("max_length", 1048576, 1048576),
        ("bos_id", 0, 0),
        ("eos_id", 1, 1),
        ("expert_format", "fp4", "fp4"),
    ],
)
def test_flash_and_pro_have_the_published_values(field, in_flash, in_pro):
    def value(config):
        for name in field.split("."):
            config = getattr(config, name)
        return config

    assert (value(flash()), value(pro())) == (in_flash, in_pro)


@pytest.mark.parametrize(
    "config, expected, num_csa, num_hca",
    [(flash(), FLASH_RATIOS, 21, 20), (pro(), PRO_RATIOS, 30, 31)],
    ids=["flash", "pro"],
)
def test_layers_have_the_published_ratios_and_the_first_three_are_hash_routed(
    config, expected, num_csa, num_hca
):
    assert ratios(config.layers) == expected
    assert sum(spec.kind == "CSA" for spec in config.layers) == num_csa
    assert sum(spec.kind == "HCA" for spec in config.layers) == num_hca
    hashed = [i for i, spec in enumerate(config.layers) if spec.hash_routed]
    assert hashed == [0, 1, 2]
    assert config.mtp_layers == (window_layer(),)


@pytest.mark.parametrize(
    "base, chat", [(flash_base(), flash()), (pro_base(), pro())], ids=["flash", "pro"]
)
def test_base_models_differ_in_name_and_expert_format_only(base, chat):
    assert base != chat
    assert base.expert_format == "fp8"
    assert dataclasses.replace(base, name=chat.name, expert_format="fp4") == chat


def test_tiny_and_nano_have_every_kind_of_layer():
    for config in (tiny(), nano()):
        assert set(ratios(config.layers)) == {0, 4, 128}
        assert {spec.hash_routed for spec in config.layers} == {True, False}
        assert len(config.mtp_layers) == 1


def test_variants_are_found_under_their_own_names():
    assert set(VARIANTS) == {"flash", "pro", "flash-base", "pro-base", "tiny", "nano"}
    assert {name: make().name for name, make in VARIANTS.items()} == {n: n for n in VARIANTS}


# The dataclasses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [-4, 0])
def test_a_ratio_of_no_tokens_is_refused(ratio):
    with pytest.raises(ValueError, match=rf"compressor ratio={ratio}: .*1 or more"):
        CompressorSpec(ratio=ratio)


def test_an_indexer_needs_something_to_pick_from():
    with pytest.raises(ValueError, match="indexer without compressor"):
        LayerSpec(indexer=IndexerSpec())
    with pytest.raises(ValueError, match=r"indexer\.topk=0"):
        IndexerSpec(topk=0)


def test_layers_are_told_apart_by_what_they_are_made_of():
    layers = (
        window_layer(),
        csa_layer(),
        hca_layer(),
        LayerSpec(compressor=CompressorSpec(ratio=64)),
        LayerSpec(compressor=CompressorSpec(ratio=8, overlap=True), indexer=IndexerSpec()),
    )
    kinds = ["window", "CSA", "HCA", "HCA ratio 64", "CSA ratio 8 overlapping"]
    assert [spec.kind for spec in layers] == kinds
    assert [spec.ratio for spec in layers] == [0, 4, 128, 64, 8]


def test_variants_of_a_config():
    cfg = tiny().with_indexer(topk=4)
    assert cfg.indexer == dataclasses.replace(tiny().indexer, topk=4)
    assert cfg.with_indexer(topk=16) == tiny()
    dense = tiny().map_layers(lambda layer: dataclasses.replace(layer, indexer=None))
    assert dense.indexer is None
    assert ratios(dense.layers) == ratios(tiny().layers)


@pytest.mark.parametrize("value", [flash(), tiny(), tiny().moe, tiny().rope, tiny().layers[0]])
def test_configs_are_frozen(value):
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, getattr(value, field.name))


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS.keys())
def test_configs_are_equal_by_value_and_hashable(make):
    assert make() is not make()
    assert make() == make()
    assert hash(make()) == hash(make())
    assert len({variant() for variant in VARIANTS.values()} | {make()}) == len(VARIANTS)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": flash().layers[:-1]},
        {"moe": dataclasses.replace(flash().moe, routed_scale=2.5)},
        {"rope": RopeConfig(yarn_factor=8.0)},
        {"layers": flash().with_indexer(topk=256).layers},
        {"hc_eps": 1e-5},
    ],
    ids=["layers", "moe", "rope", "indexer", "hc_eps"],
)
def test_configs_that_differ_in_one_value_are_unequal(change):
    assert dataclasses.replace(flash(), **change) != flash()


@pytest.mark.parametrize(
    "change, named",
    [
        ({"layers": ()}, r"layers=\(\)"),
        ({"rope_head_dim": 31}, "rope_head_dim=31"),
        ({"rope_head_dim": 0}, "rope_head_dim=0"),
        ({"rope_head_dim": 98}, "rope_head_dim=98"),
        (
            {"layers": (csa_layer(IndexerSpec(head_dim=16)),)},
            "rope_head_dim=32: .*16",
        ),
        ({"o_groups": 3}, r"o_groups=3: .*num_heads \(4\)"),
        ({"o_groups": 0}, "o_groups=0"),
        ({"window": 0}, "window=0"),
        ({"expert_format": "int4"}, "expert_format='int4': .*fp4.*fp8"),
        ({"mtp_layers": (csa_layer(),)}, "mtp_layers"),
        ({"mtp_layers": (window_layer(hash_routed=True),)}, "mtp_layers"),
        (
            {"moe": dataclasses.replace(tiny().moe, experts_per_token=9)},
            r"moe\.experts_per_token=9: .*\(8\)",
        ),
        ({"moe": dataclasses.replace(tiny().moe, experts_per_token=0)}, "experts_per_token=0"),
    ],
)
def test_impossible_architectures_are_refused_with_the_value(change, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(tiny(), **change)


# Reading config.json ------------------------------------------------------------------------------


def test_reads_the_released_flash_config():
    assert from_hf(FLASH) == flash()


def test_reads_the_released_pro_config():
    assert from_hf(PRO) == pro()


def test_reads_the_config_of_the_base_models():
    assert from_hf(FLASH | {"expert_dtype": "fp8"}) == flash_base()
    assert from_hf(PRO | {"expert_dtype": "fp8"}) == pro_base()


def test_reads_the_config_of_the_0731_release_as_flash():
    raw = FLASH | {
        "compress_ratios": [*FLASH_RATIOS, 0, 0, 0],
        "dspark_block_size": 5,
        "dspark_markov_rank": 256,
        "dspark_noise_token_id": 128799,
        "dspark_target_layer_ids": [40, 41, 42],
    }
    assert len(raw["compress_ratios"]) == 46
    assert from_hf(raw) == flash()


def test_a_config_without_expert_dtype_says_nothing_about_experts_and_is_else_the_same():
    raw = {key: value for key, value in FLASH.items() if key != "expert_dtype"}
    config = from_hf(raw)
    assert config.expert_format is None
    assert dataclasses.replace(config, name="flash", expert_format="fp4") == flash()


@pytest.mark.parametrize(
    "released, expected", [(FLASH, flash()), (PRO, pro())], ids=["flash", "pro"]
)
def test_the_transformers_form_gives_the_same_architecture(released, expected):
    config = from_hf(in_transformers_form(released))
    assert config.expert_format is None  # transformers writes float weights
    assert dataclasses.replace(config, name=expected.name, expert_format="fp4") == expected


def test_the_transformers_form_may_say_num_hash_layers_too():
    raw = in_transformers_form(FLASH)
    assert from_hf(raw | {"num_hash_layers": 3}) == from_hf(raw)


def test_yarn_may_be_called_rope_type_as_well_as_type():
    scaling = dict(FLASH["rope_scaling"])
    scaling["rope_type"] = scaling.pop("type")
    assert from_hf(FLASH | {"rope_scaling": scaling}) == flash()
    assert from_hf(FLASH | {"rope_scaling": scaling | {"type": "yarn"}}) == flash()


def test_reads_the_golden_config_of_transformers():
    assert from_hf(GOLDEN / "hf_small" / "config.json") == V4Config(
        vocab_size=256,
        embed_dim=128,
        num_heads=4,
        head_dim=64,
        rope_head_dim=16,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=32,
        window=16,
        layers=(
            window_layer(hash_routed=True),
            window_layer(hash_routed=True),
            csa_layer(IndexerSpec(num_heads=16, head_dim=32, topk=16)),
            hca_layer(),
            csa_layer(IndexerSpec(num_heads=16, head_dim=32, topk=16)),
            hca_layer(),
        ),
        mtp_layers=(window_layer(),),
        moe=MoEConfig(
            num_experts=8, experts_per_token=2, expert_dim=64, routed_scale=1.5, swiglu_limit=0.7
        ),
        rope=RopeConfig(yarn_original_length=256),
        max_length=4096,
        expert_format=None,
    )


def test_reads_the_golden_config_of_the_official_code():
    assert from_hf(GOLDEN / "official_small" / "config.json") == V4Config(
        vocab_size=256,
        embed_dim=256,
        num_heads=4,
        head_dim=96,
        rope_head_dim=32,
        q_lora_rank=128,
        o_groups=2,
        o_lora_rank=64,
        window=16,
        layers=(
            window_layer(hash_routed=True),
            window_layer(hash_routed=True),
            csa_layer(IndexerSpec(num_heads=16, head_dim=64, topk=16)),
            hca_layer(),
            csa_layer(IndexerSpec(num_heads=16, head_dim=64, topk=16)),
            hca_layer(),
        ),
        mtp_layers=(window_layer(),),
        moe=MoEConfig(
            num_experts=8, experts_per_token=2, expert_dim=128, routed_scale=1.5, swiglu_limit=1.0
        ),
        rope=RopeConfig(yarn_original_length=256),
        max_length=4096,
        expert_format="fp4",
    )


def test_a_folder_a_file_and_its_contents_read_alike(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FLASH), encoding="utf-8")
    assert from_hf(tmp_path) == from_hf(path) == from_hf(str(path)) == from_hf(FLASH)


@pytest.mark.parametrize(
    "raw", [FLASH, in_transformers_form(FLASH)], ids=["released", "transformers"]
)
def test_reading_leaves_the_given_mapping_alone(raw):
    before = copy.deepcopy(raw)
    from_hf(raw)
    assert raw == before


# What is refused ----------------------------------------------------------------------------------


def test_unknown_keys_are_refused_by_name_all_at_once():
    with pytest.raises(ConfigError, match=r"(?s)engram_vocab_size=7.*index_share_layers=\[1\]"):
        from_hf(FLASH | {"index_share_layers": [1], "engram_vocab_size": 7})


def test_an_unknown_key_in_rope_scaling_is_refused_by_name():
    with pytest.raises(ConfigError, match="mscale_all_dim"):
        from_hf(FLASH | {"rope_scaling": FLASH["rope_scaling"] | {"mscale_all_dim": 1.0}})


@pytest.mark.parametrize("part", ["main", "compress"])
def test_an_unknown_key_in_rope_parameters_is_refused_by_name(part):
    raw = in_transformers_form(FLASH)
    raw["rope_parameters"][part]["mscale_all_dim"] = 1.0
    with pytest.raises(ConfigError, match="mscale_all_dim"):
        from_hf(raw)


@pytest.mark.parametrize(
    "raw",
    [
        {"model_type": "deepseek_v41", "architectures": ["DeepseekV41ForCausalLM"]},
        {"model_type": "deepseek_v41", "text_config": FLASH, "vision_config": {}},
        FLASH | {"model_type": "deepseek_v41"},
    ],
)
def test_the_v41_architecture_is_refused_by_name(raw):
    with pytest.raises(ConfigError, match=r"deepseek_v41.*DeepSeek-V4\.1.*another architecture"):
        from_hf(raw)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama", None])
def test_another_model_type_is_refused(model_type):
    with pytest.raises(ConfigError, match=f"model_type={model_type!r}: expected 'deepseek_v4'"):
        from_hf(FLASH | {"model_type": model_type})


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key):
    raw = {k: v for k, v in FLASH.items() if k != key}
    with pytest.raises(ConfigError, match=key):
        from_hf(raw)


@pytest.mark.parametrize(
    "key", ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow"]
)
def test_a_key_missing_in_rope_scaling_is_named(key):
    scaling = {k: v for k, v in FLASH["rope_scaling"].items() if k != key}
    with pytest.raises(ConfigError, match=rf"rope_scaling\.{key} is missing"):
        from_hf(FLASH | {"rope_scaling": scaling})


@pytest.mark.parametrize(
    "key, value",
    [
        ("scoring_func", "sigmoid"),
        ("topk_method", "greedy"),
        ("norm_topk_prob", False),
        ("num_key_value_heads", 8),
        ("n_shared_experts", 2),
        ("tie_word_embeddings", True),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("hidden_act", "gelu"),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_a_value_that_is_not_computed_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        from_hf(FLASH | {key: value})


@pytest.mark.parametrize(
    "key, value",
    [
        ("weight_block_size", [32, 32]),
        ("scale_fmt", "float32"),
        ("fmt", "e5m2"),
        ("quant_method", "gptq"),
    ],
)
def test_another_quantisation_is_refused_by_name(key, value):
    quantization = FLASH["quantization_config"] | {key: value}
    with pytest.raises(ConfigError, match=rf"quantization_config\.{key}"):
        from_hf(FLASH | {"quantization_config": quantization})


@pytest.mark.parametrize(
    "change, named",
    [
        ({"type": "linear"}, "linear"),
        ({"rope_type": "llama3"}, "llama3"),
        ({"attention_factor": 1.277}, "attention_factor"),
    ],
)
def test_another_kind_of_rope_scaling_is_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        from_hf(FLASH | {"rope_scaling": FLASH["rope_scaling"] | change})


def test_scaling_of_the_main_rope_is_refused():
    raw = in_transformers_form(FLASH)
    raw["rope_parameters"]["main"]["rope_type"] = "yarn"
    with pytest.raises(ConfigError, match=r"rope_parameters\.main"):
        from_hf(raw)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"compress_ratios": [*FLASH_RATIOS[:-1], 2]}, "compress_ratios has 2: .*0 .*4 .*128"),
        ({"compress_ratios": FLASH_RATIOS[:-1]}, "42 layers.*num_hidden_layers=43"),
        ({"compress_ratios": []}, "0 layers"),
        ({"expert_dtype": "int4"}, "expert_format='int4'"),
        ({"num_experts_per_tok": 257}, "experts_per_token=257"),
        ({"o_groups": 7}, "o_groups=7"),
    ],
)
def test_an_inconsistent_released_config_is_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        from_hf(FLASH | change)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"layer_types": ["full_attention"] * 43}, "full_attention"),
        ({"layer_types": ["sliding_attention"] * 42}, "42 layers"),
        ({"mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 39}, "mlp_layer_types"),
        ({"mlp_layer_types": ["dense"] * 3 + ["moe"] * 40}, "mlp_layer_types"),
        ({"num_hash_layers": 2}, "num_hash_layers=2"),
        ({"rope_parameters": {"main": {"rope_theta": 1e4}}}, "rope_parameters"),
    ],
)
def test_an_inconsistent_transformers_config_is_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        from_hf(in_transformers_form(FLASH) | change)


# Writing config.json ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS.keys())
def test_what_is_written_reads_back_equal(make):
    assert from_hf(json.loads(json.dumps(to_hf(make())))) == make()


def test_a_config_that_is_no_variant_reads_back_equal():
    config = dataclasses.replace(
        tiny(),
        name="custom",
        mtp_layers=(),
        rope=RopeConfig(
            theta=5e3,
            compress_theta=8e4,
            yarn_factor=4.0,
            yarn_original_length=512,
            yarn_beta_fast=16.0,
            yarn_beta_slow=2.0,
        ),
        hc_eps=1e-5,
        norm_eps=1e-4,
        sinkhorn_iters=7,
        num_streams=2,
        bos_id=3,
        eos_id=4,
        expert_format=None,
    )
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize("released, config", [(FLASH, flash()), (PRO, pro())], ids=["flash", "pro"])
def test_what_is_written_says_what_the_released_file_says(released, config):
    about_software = {"attention_dropout", "initializer_range", "transformers_version", "use_cache"}
    written = to_hf(config)
    assert {key: written[key] for key in written.keys() & released.keys()} == {
        key: value for key, value in released.items() if key not in about_software
    }
    assert written.keys() <= released.keys()


def test_a_float_model_is_written_without_quantisation():
    written = to_hf(dataclasses.replace(flash(), expert_format=None))
    assert not {"expert_dtype", "quantization_config"} & written.keys()


@pytest.mark.parametrize(
    "layers",
    [
        (window_layer(), hca_layer(hash_routed=True)),  # not hash-routed first
        (LayerSpec(compressor=CompressorSpec(ratio=64)), csa_layer()),
        (LayerSpec(compressor=CompressorSpec(ratio=8, overlap=True), indexer=IndexerSpec()),),
        (csa_layer(IndexerSpec(topk=8)), csa_layer(IndexerSpec(topk=16))),
    ],
)
def test_layers_that_no_release_has_are_written_in_keys_of_our_own(layers):
    cfg = dataclasses.replace(tiny(), name="custom", layers=layers)
    written = json.loads(json.dumps(to_hf(cfg)))
    assert "v4jax_layers" in written and "compress_ratios" not in written
    assert from_hf(written) == cfg


@pytest.mark.parametrize(
    "change, named",
    [
        ({"compressor": {"ratio": "8"}}, r"v4jax_layers\[1\]\.compressor\.ratio='8'"),
        ({"compressor": {"rate": 8}}, r"v4jax_layers\[1\].*expected compressor \(ratio, overlap\)"),
        ({"compressor": None, "indexer": {"topk": 4}}, "indexer without compressor"),
        ("HCA", r"v4jax_layers\[1\]='HCA'"),
        (None, r"v4jax_layers\[1\]=None"),
    ],
)
def test_a_wrong_layer_of_our_own_is_named(change, named):
    layers = (window_layer(), LayerSpec(compressor=CompressorSpec(ratio=64)))
    written = to_hf(dataclasses.replace(tiny(), layers=layers))
    layer = written["v4jax_layers"][1]
    written["v4jax_layers"][1] = layer | change if isinstance(change, dict) else change
    with pytest.raises(ConfigError, match=named):
        from_hf(written)
    with pytest.raises(ConfigError, match=r"has 2 layers: .*num_hidden_layers=3"):
        from_hf(written | {"num_hidden_layers": 3})


def test_ratios_of_transformers_configs_are_read():
    raw = in_transformers_form(FLASH)
    raw["compress_rates"] = {"compressed_sparse_attention": 8, "heavily_compressed_attention": 64}
    assert ratios(from_hf(raw).layers)[:4] == [0, 0, 8, 64]
    raw["compress_rates"]["other"] = 2
    with pytest.raises(ConfigError, match=r"compress_rates has .*other"):
        from_hf(raw)
    raw["compress_rates"] = {"compressed_sparse_attention": 0}
    with pytest.raises(ConfigError, match="compress_rates=0"):
        from_hf(raw)
