"""config.json of checkpoints, in the released form and in that of transformers 5.

`from_hf` reads both; `to_hf` writes the released form.
"""

import copy
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from pallas_kernels.formats.records import FP8_WEIGHTS
from v4jax import stores
from v4jax.checkpoint.errors import ConfigError, read_json
from v4jax.config import (
    CSA,
    HCA,
    VARIANTS,
    CompressorSpec,
    IndexerSpec,
    LayerSpec,
    MoEConfig,
    RopeConfig,
    V4Config,
    csa_layer,
    hca_layer,
    window_layer,
)

# Keys whose value this implementation fixes: anything else is another architecture.
_FIXED = {
    "model_type": ("deepseek_v4",),
    "num_key_value_heads": (1,),
    "n_shared_experts": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "attention_dropout": (0, 0.0),
}
# Keys that say nothing about the function computed here.
_IGNORED = frozenset(
    (
        "_name_or_path",
        "architectures",
        "auto_map",
        "dsv4_reasoning_effort_profile",  # of prompts: v4jax/text/release.py
        "dtype",
        "initializer_range",
        "name_or_path",
        "output_router_logits",
        "pad_token_id",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)
# Keys of the draft model of the 0731 / 0813 releases (not part of the decoder).
_DRAFTER_PREFIX = "dspark_"
_WINDOW, _CSA, _HCA = _LAYER_TYPES = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
_RATES = {_CSA: CSA.ratio, _HCA: HCA.ratio}
_OWN_LAYERS = (
    "v4jax_layers"  # layers that the released form cannot say; other code does not know it
)
_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
_QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [FP8_WEIGHTS.block, FP8_WEIGHTS.outputs],
}


def from_hf(source: str | os.PathLike | Mapping[str, Any]) -> V4Config:
    """Reads a released `config.json`, or one written by transformers 5.

    Args:
      source: the file, the folder that holds it, the URL of either, or its parsed contents.

    Raises:
      ConfigError: a key or value that is unknown or describes another architecture; the message
        names it.
    """
    if isinstance(source, Mapping):
        raw = dict(source)
    else:
        raw = read_json(stores.in_folder(source, "config.json"), ConfigError)
    return _Reader(raw).config()


class _Reader:
    """Takes keys out of a config and complains about what is left."""

    def __init__(self, raw: dict[str, Any]):
        if raw.get("model_type") == "deepseek_v41" or "text_config" in raw:
            raise ConfigError(
                f"model_type={raw.get('model_type')!r}: this is a DeepSeek-V4.1 config, another "
                "architecture. v4jax reads DeepSeek-V4 (model_type='deepseek_v4')."
            )
        if "model_type" not in raw:
            raise ConfigError("model_type is missing: expected model_type='deepseek_v4'.")
        self.raw = raw

    def take(self, key: str, *default: Any) -> Any:
        if key in self.raw:
            return self.raw.pop(key)
        if default:
            return default[0]
        raise ConfigError(f"{key} is missing from the config.")

    def integer(self, key: str, *default: int, least: int = 1, most: int = 1 << 24) -> int:
        return _integer(key, self.take(key, *default), least, most)

    def number(self, key: str) -> float:
        return _positive(key, self.take(key))

    def items(self, key: str) -> list | None:
        """A list, or None if there is none."""
        value = self.take(key, None)
        if value is not None and not isinstance(value, list | tuple):
            raise ConfigError(f"{key}={_shown(value)}: expected a list.")
        return None if value is None else list(value)

    def mapping(self, key: str) -> dict[str, Any] | None:
        """An object, or None if there is none."""
        value = self.take(key, None)
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{key}={_shown(value)}: expected an object.")
        return None if value is None else dict(value)

    def token(self, key: str, default: int) -> int:
        """An id; of several, the first. transformers writes a number, a list or null."""
        value = self.take(key, default)
        value = default if value is None or value == [] else value
        return _integer(key, value[0] if isinstance(value, list) else value, 0, 1 << 24)

    def config(self) -> V4Config:
        for key, accepted in _FIXED.items():
            value = self.take(key, accepted[0])
            same = any(
                value == a and isinstance(value, bool) == isinstance(a, bool) for a in accepted
            )
            if not same:
                raise ConfigError(f"{key}={_shown(value)}: expected {accepted[0]!r}.")
        for key in [k for k in self.raw if k in _IGNORED or k.startswith(_DRAFTER_PREFIX)]:
            self.raw.pop(key)

        num_layers = self.integer("num_hidden_layers", most=4096)
        num_mtp = self.integer("num_nextn_predict_layers", 0, least=0, most=64)
        head_dim = self.integer("head_dim")
        rope_head_dim = self.integer("qk_rope_head_dim")
        factor = self.take("partial_rotary_factor", None)
        if (
            factor is not None
            and round(_positive("partial_rotary_factor", factor) * head_dim) != rope_head_dim
        ):
            raise ConfigError(
                f"partial_rotary_factor={factor} does not give qk_rope_head_dim={rope_head_dim} "
                f"of head_dim={head_dim}."
            )
        quantization = self.mapping("quantization_config") or {}
        for key, expected in _QUANTIZATION.items():
            if quantization.get(key, expected) != expected:
                raise ConfigError(
                    f"quantization_config.{key}={_shown(quantization[key])}: expected {expected!r}."
                )
        values = dict(
            vocab_size=self.integer("vocab_size"),
            embed_dim=self.integer("hidden_size"),
            num_heads=self.integer("num_attention_heads"),
            head_dim=head_dim,
            rope_head_dim=rope_head_dim,
            q_lora_rank=self.integer("q_lora_rank"),
            o_groups=self.integer("o_groups"),
            o_lora_rank=self.integer("o_lora_rank"),
            window=self.integer("sliding_window"),
            layers=self.layers(num_layers),
            mtp_layers=(window_layer(),) * num_mtp,
            moe=MoEConfig(
                num_experts=self.integer("n_routed_experts", most=1 << 16),
                experts_per_token=self.integer("num_experts_per_tok"),
                expert_dim=self.integer("moe_intermediate_size"),
                routed_scale=self.number("routed_scaling_factor"),
                swiglu_limit=self.number("swiglu_limit"),
            ),
            rope=self.rope(),
            num_streams=self.integer("hc_mult", most=64),
            sinkhorn_iters=self.integer("hc_sinkhorn_iters", least=0, most=1000),
            hc_eps=self.number("hc_eps"),
            norm_eps=self.number("rms_norm_eps"),
            max_length=self.integer("max_position_embeddings", most=1 << 31),
            bos_id=self.token("bos_token_id", 0),
            eos_id=self.token("eos_token_id", 1),
            expert_format=self.take("expert_dtype", None),
        )
        if self.raw:
            unknown = ", ".join(f"{k}={_shown(v)}" for k, v in sorted(self.raw.items()))
            raise ConfigError(f"unknown config keys: {unknown}.")
        for name in ("bos", "eos"):
            if values[f"{name}_id"] >= values["vocab_size"]:
                raise ConfigError(
                    f"{name}_token_id={values[f'{name}_id']}: expected less than "
                    f"vocab_size={values['vocab_size']}."
                )
        try:
            config = V4Config(**values)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for variant in VARIANTS.values():
            if dataclasses.replace(config, name=variant().name) == variant():
                return variant()
        return config

    def layers(self, num_layers: int) -> tuple[LayerSpec, ...]:
        own = self.items(_OWN_LAYERS)
        if own is not None:
            if len(own) != num_layers:
                raise ConfigError(
                    f"{_OWN_LAYERS} has {len(own)} layers: expected num_hidden_layers={num_layers}."
                )
            return tuple(_own_layer(i, layer) for i, layer in enumerate(own))
        indexer = IndexerSpec(
            num_heads=self.integer("index_n_heads"),
            head_dim=self.integer("index_head_dim"),
            topk=self.integer("index_topk"),
        )
        types, rates = self.layer_types(num_layers)
        parts = {
            _WINDOW: LayerSpec(),
            _CSA: LayerSpec(
                compressor=CompressorSpec(ratio=rates[_CSA], overlap=True), indexer=indexer
            ),
            _HCA: LayerSpec(compressor=CompressorSpec(ratio=rates[_HCA])),
        }
        return tuple(
            dataclasses.replace(parts[kind], hash_routed=hashed)
            for kind, hashed in zip(types, self.hash_routed(num_layers), strict=True)
        )

    def layer_types(self, num_layers: int) -> tuple[list[str], dict[str, int]]:
        """The kind of each layer in the words of transformers, and the ratios of the kinds."""
        rates = {**_RATES, **(self.mapping("compress_rates") or {})}
        if set(rates) != set(_RATES):
            raise ConfigError(
                f"compress_rates has {_shown(sorted(map(str, rates)))}: expected {sorted(_RATES)}."
            )
        rates = {kind: _integer("compress_rates", rate, 1, 1 << 24) for kind, rate in rates.items()}
        by_ratio = {0: _WINDOW, rates[_CSA]: _CSA, rates[_HCA]: _HCA}
        ratios, types = self.items("compress_ratios"), self.items("layer_types")
        if ratios is None and types is None:
            raise ConfigError(
                "compress_ratios is missing: expected it (released form) or layer_types "
                "(transformers form); there is no safe default."
            )
        for layer_type in types or ():
            if not isinstance(layer_type, str) or layer_type not in _LAYER_TYPES:
                raise ConfigError(
                    f"layer_types has {_shown(layer_type)}: expected one of {sorted(_LAYER_TYPES)}."
                )
        if ratios is not None:
            ratios = [_integer("compress_ratios", ratio, 0, 1 << 24) for ratio in ratios]
            of_types = [{_WINDOW: 0, **rates}[t] for t in types or ()]
            if ratios[: len(of_types)] != of_types:
                raise ConfigError("compress_ratios and layer_types contradict each other.")
            if any(ratios[num_layers:]):
                raise ConfigError(
                    f"compress_ratios[{num_layers}:]={ratios[num_layers:]}: expected 0 for MTP blocks."
                )
            unknown = next((ratio for ratio in ratios if ratio not in by_ratio), None)
            if unknown is not None or (types is None and len(by_ratio) < 3):
                raise ConfigError(
                    f"compress_ratios has {unknown}: expected 0 (sliding window), {rates[_CSA]} (CSA) "
                    f"or {rates[_HCA]} (HCA). With layer_types, compress_rates may name other ratios."
                )
        if types is None:
            types = [by_ratio[ratio] for ratio in ratios or ()]
        if len(types) < num_layers:
            raise ConfigError(
                f"compress_ratios/layer_types has {len(types)} layers: expected at least "
                f"num_hidden_layers={num_layers}."
            )
        return types[:num_layers], rates

    def hash_routed(self, num_layers: int) -> list[bool]:
        """Which layers choose experts by token id."""
        num_hash = self.take("num_hash_layers", None)
        if num_hash is not None:
            num_hash = _integer("num_hash_layers", num_hash, 0, num_layers)
        mlp_types = self.items("mlp_layer_types")
        if mlp_types is not None:
            hashed = [t == "hash_moe" for t in mlp_types]
            known = all(isinstance(t, str) and t in ("hash_moe", "moe") for t in mlp_types)
            if not known or len(hashed) != num_layers:
                raise ConfigError(
                    f"mlp_layer_types={_shown(mlp_types)}: expected {num_layers} of 'hash_moe' or 'moe'."
                )
            if num_hash is not None and sum(hashed) != num_hash:
                raise ConfigError(
                    f"num_hash_layers={num_hash} contradicts mlp_layer_types, which has "
                    f"{sum(hashed)} of 'hash_moe'."
                )
        elif num_hash is not None:
            hashed = [i < num_hash for i in range(num_layers)]
        else:
            raise ConfigError("num_hash_layers is missing from the config.")
        return hashed

    def rope(self) -> RopeConfig:
        nested, yarn = self.mapping("rope_parameters"), self.mapping("rope_scaling")
        theta = self.take("rope_theta", None)
        compress_theta = self.take("compress_rope_theta", None)
        if nested is not None:
            if set(nested) != {"main", "compress"}:
                raise ConfigError(
                    f"rope_parameters has keys {sorted(nested)}: expected 'main' and 'compress'."
                )
            for name, part in nested.items():
                if not isinstance(part, Mapping):
                    raise ConfigError(f"rope_parameters.{name}={_shown(part)}: expected an object.")
            main, yarn = dict(nested["main"]), dict(nested["compress"])
            if main.get("rope_type", "default") != "default":
                raise ConfigError(
                    f"rope_parameters.main.rope_type={main['rope_type']!r}: expected 'default'."
                )
            theta = main.pop("rope_theta", theta)
            compress_theta = yarn.pop("rope_theta", compress_theta)
            unknown = set(main) - {"rope_type", "partial_rotary_factor"}
            if unknown:
                raise ConfigError(f"unknown keys in rope_parameters.main: {sorted(unknown)}.")
        if theta is None or compress_theta is None or yarn is None:
            raise ConfigError(
                "rope_theta, compress_rope_theta and rope_scaling (or rope_parameters) are needed."
            )
        yarn = dict(yarn)
        kind = yarn.pop("rope_type", None) or yarn.pop("type", None)
        yarn.pop("type", None)
        if kind != "yarn":
            raise ConfigError(f"rope_scaling type={kind!r}: expected 'yarn'.")
        if yarn.pop("attention_factor", None) not in (None, 1, 1.0):
            raise ConfigError("rope_scaling.attention_factor: expected 1 (V4 scales nothing).")
        yarn.pop("partial_rotary_factor", None)
        missing = [key for key in _YARN if key not in yarn]
        if missing:
            raise ConfigError(f"rope_scaling.{missing[0]} is missing.")
        factor, length, fast, slow = (yarn.pop(key) for key in _YARN)
        rope = RopeConfig(
            theta=_positive("rope_theta", theta),
            compress_theta=_positive("compress_rope_theta", compress_theta),
            yarn_factor=_positive("rope_scaling.factor", factor),
            yarn_original_length=_integer(f"rope_scaling.{_YARN[1]}", length, 1, 1 << 31),
            yarn_beta_fast=_positive("rope_scaling.beta_fast", fast),
            yarn_beta_slow=_positive("rope_scaling.beta_slow", slow),
        )
        if yarn:
            raise ConfigError(f"unknown keys in rope_scaling: {sorted(yarn)}.")
        return rope


def _integer(key: str, value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"{key}={_shown(value)}: expected a whole number in {least}..{most}.")
    return value


def _positive(key: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < 1e30:
        raise ConfigError(f"{key}={_shown(value)}: expected a positive number.")
    return float(value)


def _shown(value: Any) -> str:
    """A value for a message, without what is too long for one."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of thousands of digits
        text = f"a {type(value).__name__} too deep or too large to show"
    return text if len(text) <= 100 else f"{text[:100]} ..."


def _own_layer(index: int, layer: Any) -> LayerSpec:
    """A layer of `v4jax_layers`."""
    name = f"{_OWN_LAYERS}[{index}]"
    try:
        parts = dict(layer)
        for key, part in (("compressor", CompressorSpec), ("indexer", IndexerSpec)):
            values = dict(parts.get(key) or {})
            for field in values.keys() - {"overlap"}:
                _integer(f"{name}.{key}.{field}", values[field], 1, 1 << 24)
            parts[key] = part(**values) if values else None
        for key in ("entries_from", "selection_from"):
            if parts.get(key) is not None:
                _integer(f"{name}.{key}", parts[key], 0, 4095)
        return LayerSpec(**parts)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name}={_shown(layer)}: expected compressor (ratio, overlap), indexer (num_heads, "
            f"head_dim, topk), hash_routed, entries_from and selection_from. {error}"
        ) from error


def _released_layers(config: V4Config) -> dict[str, Any]:
    """The layers in the keys of the released form, or in our own where that cannot say them."""
    layers, indexer = config.layers, config.indexer or IndexerSpec()
    num_hash = sum(spec.hash_routed for spec in layers)
    usual = {csa_layer(indexer), hca_layer(), window_layer()}
    if all(dataclasses.replace(spec, hash_routed=False) in usual for spec in layers) and all(
        spec.hash_routed for spec in layers[:num_hash]
    ):
        return {
            "num_hash_layers": num_hash,
            "compress_ratios": [spec.ratio for spec in layers + config.mtp_layers],
            "index_n_heads": indexer.num_heads,
            "index_head_dim": indexer.head_dim,
            "index_topk": indexer.topk,
        }
    return {_OWN_LAYERS: [dataclasses.asdict(spec) for spec in layers]}


def to_hf(config: V4Config) -> dict[str, Any]:
    """The released `config.json` of a config; `from_hf` reads it back to an equal one.

    Layers that no release has, say with another ratio, are written under `v4jax_layers`.
    """
    raw = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "moe_intermediate_size": config.moe.expert_dim,
        "num_hidden_layers": len(config.layers),
        "num_nextn_predict_layers": len(config.mtp_layers),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": 1,
        "head_dim": config.head_dim,
        "qk_rope_head_dim": config.rope_head_dim,
        "q_lora_rank": config.q_lora_rank,
        "o_groups": config.o_groups,
        "o_lora_rank": config.o_lora_rank,
        "sliding_window": config.window,
        **_released_layers(config),
        "compress_rope_theta": config.rope.compress_theta,
        "rope_theta": config.rope.theta,
        "rope_scaling": {
            "type": "yarn",
            "factor": config.rope.yarn_factor,
            "beta_fast": config.rope.yarn_beta_fast,
            "beta_slow": config.rope.yarn_beta_slow,
            "original_max_position_embeddings": config.rope.yarn_original_length,
        },
        "n_routed_experts": config.moe.num_experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": config.moe.experts_per_token,
        "scoring_func": "sqrtsoftplus",
        "norm_topk_prob": True,
        "topk_method": "noaux_tc",
        "routed_scaling_factor": config.moe.routed_scale,
        "swiglu_limit": config.moe.swiglu_limit,
        "hc_mult": config.num_streams,
        "hc_sinkhorn_iters": config.sinkhorn_iters,
        "hc_eps": config.hc_eps,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "torch_dtype": "bfloat16",
    }
    if config.expert_format is not None:
        raw["expert_dtype"] = config.expert_format
        raw["quantization_config"] = copy.deepcopy(_QUANTIZATION)
    return raw
