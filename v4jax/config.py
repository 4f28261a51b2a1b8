"""Architecture of the DeepSeek-V4 models as frozen, hashable values.

`flash()`, `pro()`, `flash_base()` and `pro_base()` are the released models, `nano()` the small one
that ships with this repository, and `tiny()` a random one for tests that has every kind of layer.
`from_hf` reads the `config.json` of a released checkpoint or of one written by transformers 5, and
`to_hf` writes the released form.

Values: DeepSeek-V4 report (arXiv 2606.19348) section 4.2.1 and the released `config.json` files.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

CSA_RATIO = 4
HCA_RATIO = 128
EXPERT_FORMATS = ("fp4", "fp8", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What distinguishes one decoder layer from another."""

    compress_ratio: int  # 0: sliding window only, 4: CSA, 128: HCA
    hash_routed: bool = False  # experts chosen by token id instead of by score

    def __post_init__(self):
        if self.compress_ratio not in (0, CSA_RATIO, HCA_RATIO):
            raise ValueError(
                f"compress_ratio={self.compress_ratio}: expected 0 (sliding window), "
                f"{CSA_RATIO} (CSA) or {HCA_RATIO} (HCA)."
            )

    @property
    def is_csa(self) -> bool:
        """Compressed sparse attention: overlapping windows of 4 tokens and a top-k indexer."""
        return self.compress_ratio == CSA_RATIO

    @property
    def is_hca(self) -> bool:
        """Heavily compressed attention: windows of 128 tokens, all of them attended."""
        return self.compress_ratio == HCA_RATIO


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. Layers with a compressor use `compress_theta` and YaRN, others neither."""

    theta: float = 10_000.0
    compress_theta: float = 160_000.0
    yarn_factor: float = 16.0
    yarn_original_length: int = 65_536
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """Lightning indexer of the CSA layers."""

    num_heads: int = 64
    head_dim: int = 128
    topk: int = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts. The shared expert has the shape of a routed one."""

    num_experts: int
    experts_per_token: int
    expert_dim: int
    routed_scale: float
    swiglu_limit: float = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class V4Config:
    """Architecture of one DeepSeek-V4 variant. Hashable, so usable as a static argument."""

    name: str = "custom"
    vocab_size: int
    embed_dim: int
    num_heads: int
    head_dim: int
    rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int  # per group
    window: int  # tokens seen by the sliding window, the current one included
    layers: tuple[LayerSpec, ...]
    mtp_layers: tuple[LayerSpec, ...] = ()
    indexer: IndexerConfig = IndexerConfig()
    moe: MoEConfig
    rope: RopeConfig = RopeConfig()
    num_streams: int = 4  # residual streams of the hyper-connections (hc_mult)
    sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    norm_eps: float = 1e-6
    max_length: int = 1_048_576
    bos_id: int = 0
    eos_id: int = 1
    expert_format: str | None = "fp4"  # storage of routed experts: "fp4", "fp8" or None (float)

    def __post_init__(self):
        def require(ok: bool, name: str, expected: str):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}.")

        require(len(self.layers) > 0, "layers", "at least one layer")
        require(
            0 < self.rope_head_dim <= self.head_dim and self.rope_head_dim % 2 == 0,
            "rope_head_dim",
            f"an even number in 2..head_dim ({self.head_dim})",
        )
        require(
            self.rope_head_dim <= self.indexer.head_dim,
            "rope_head_dim",
            f"at most the indexer's head width ({self.indexer.head_dim})",
        )
        require(
            self.o_groups > 0 and self.num_heads % self.o_groups == 0,
            "o_groups",
            f"a divisor of num_heads ({self.num_heads})",
        )
        require(self.window > 0, "window", "a positive number of tokens")
        require(self.expert_format in EXPERT_FORMATS, "expert_format", f"one of {EXPERT_FORMATS}")
        require(
            all(spec.compress_ratio == 0 and not spec.hash_routed for spec in self.mtp_layers),
            "mtp_layers",
            "sliding-window layers routed by score",
        )
        if not 0 < self.moe.experts_per_token <= self.moe.num_experts:
            raise ValueError(
                f"moe.experts_per_token={self.moe.experts_per_token}: expected 1..num_experts "
                f"({self.moe.num_experts})."
            )
        if self.indexer.head_dim & (self.indexer.head_dim - 1):
            raise ValueError(
                f"indexer.head_dim={self.indexer.head_dim}: expected a power of two "
                "(the Hadamard transform needs one)."
            )

    @property
    def nope_head_dim(self) -> int:
        """Channels of a head that are not rotated (they come first)."""
        return self.head_dim - self.rope_head_dim


def _interleaved(first: tuple[int, ...], num_layers: int) -> tuple[LayerSpec, ...]:
    """`first`, then CSA and HCA in turn; the first three layers are hash-routed."""
    rest = tuple(CSA_RATIO if i % 2 == 0 else HCA_RATIO for i in range(len(first), num_layers))
    ratios = first + rest
    return tuple(LayerSpec(compress_ratio=r, hash_routed=i < 3) for i, r in enumerate(ratios))


def flash() -> V4Config:
    """DeepSeek-V4-Flash: 284B parameters, 13B active."""
    return V4Config(
        name="flash",
        vocab_size=129_280,
        embed_dim=4096,
        num_heads=64,
        head_dim=512,
        rope_head_dim=64,
        q_lora_rank=1024,
        o_groups=8,
        o_lora_rank=1024,
        window=128,
        layers=_interleaved((0, 0), 43),
        mtp_layers=(LayerSpec(compress_ratio=0),),
        moe=MoEConfig(num_experts=256, experts_per_token=6, expert_dim=2048, routed_scale=1.5),
    )


def pro() -> V4Config:
    """DeepSeek-V4-Pro: 1.6T parameters, 49B active."""
    return V4Config(
        name="pro",
        vocab_size=129_280,
        embed_dim=7168,
        num_heads=128,
        head_dim=512,
        rope_head_dim=64,
        q_lora_rank=1536,
        o_groups=16,
        o_lora_rank=1024,
        window=128,
        layers=_interleaved((HCA_RATIO, HCA_RATIO), 61),
        mtp_layers=(LayerSpec(compress_ratio=0),),
        indexer=IndexerConfig(topk=1024),
        moe=MoEConfig(num_experts=384, experts_per_token=6, expert_dim=3072, routed_scale=2.5),
    )


def flash_base() -> V4Config:
    """DeepSeek-V4-Flash-Base: Flash before post-training, its experts in FP8."""
    return dataclasses.replace(flash(), name="flash-base", expert_format="fp8")


def pro_base() -> V4Config:
    """DeepSeek-V4-Pro-Base: Pro before post-training, its experts in FP8."""
    return dataclasses.replace(pro(), name="pro-base", expert_format="fp8")


def tiny() -> V4Config:
    """Every kind of layer once, small enough to compile on a laptop in seconds."""
    ratios = (0, CSA_RATIO, HCA_RATIO, CSA_RATIO, HCA_RATIO, CSA_RATIO)
    return V4Config(
        name="tiny",
        vocab_size=256,
        embed_dim=128,
        num_heads=4,
        head_dim=96,
        rope_head_dim=32,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=32,
        window=16,
        layers=tuple(LayerSpec(compress_ratio=r, hash_routed=i < 2) for i, r in enumerate(ratios)),
        mtp_layers=(LayerSpec(compress_ratio=0),),
        indexer=IndexerConfig(num_heads=4, head_dim=32, topk=16),
        moe=MoEConfig(
            num_experts=8, experts_per_token=2, expert_dim=64, routed_scale=1.5, swiglu_limit=1.0
        ),
        rope=RopeConfig(yarn_original_length=256),
        max_length=65_536,
    )


def nano() -> V4Config:
    """The model that ships with this repository (docs/nano.md)."""
    ratios = (0, CSA_RATIO, HCA_RATIO, CSA_RATIO, HCA_RATIO)
    return V4Config(
        name="nano",
        vocab_size=1280,
        embed_dim=256,
        num_heads=4,
        head_dim=96,
        rope_head_dim=32,
        q_lora_rank=128,
        o_groups=2,
        o_lora_rank=64,
        window=64,
        layers=tuple(LayerSpec(compress_ratio=r, hash_routed=i < 1) for i, r in enumerate(ratios)),
        mtp_layers=(LayerSpec(compress_ratio=0),),
        indexer=IndexerConfig(num_heads=4, head_dim=64, topk=32),
        moe=MoEConfig(num_experts=8, experts_per_token=2, expert_dim=128, routed_scale=1.5),
        rope=RopeConfig(yarn_original_length=8192),
        max_length=131_072,
    )


VARIANTS = {f.__name__.replace("_", "-"): f for f in (flash, pro, flash_base, pro_base, tiny, nano)}


# Reading and writing config.json ------------------------------------------------------------------

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
    "compress_rates": (
        {"compressed_sparse_attention": CSA_RATIO, "heavily_compressed_attention": HCA_RATIO},
    ),
}
# Keys that say nothing about the function computed here.
_IGNORED = frozenset(
    (
        "_name_or_path",
        "architectures",
        "auto_map",
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
_LAYER_TYPES = {
    "sliding_attention": 0,
    "compressed_sparse_attention": CSA_RATIO,
    "heavily_compressed_attention": HCA_RATIO,
}
_QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


class ConfigError(ValueError):
    """A config.json that this implementation does not compute."""


def from_hf(source: str | os.PathLike | Mapping[str, Any]) -> V4Config:
    """Reads a released `config.json`, or one written by transformers 5.

    Args:
      source: the file, the folder that holds it, or its parsed contents.

    Raises:
      ConfigError: a key or value that is unknown or describes another architecture; the message
        names it.
    """
    if isinstance(source, Mapping):
        raw = dict(source)
    else:
        path = os.fspath(source)
        path = os.path.join(path, "config.json") if os.path.isdir(path) else path
        with open(path, encoding="utf-8") as file:
            try:
                raw = json.load(file)
            except ValueError as error:
                raise ConfigError(f"{path} is not JSON: {error}.") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} holds a {type(raw).__name__}: expected an object.")
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

    def integer(self, key: str, *default: int) -> int:
        value = self.take(key, *default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"{key}={value!r}: expected a whole number.")
        return value

    def number(self, key: str) -> float:
        value = self.take(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{key}={value!r}: expected a number.")
        return float(value)

    def config(self) -> V4Config:
        for key, accepted in _FIXED.items():
            value = self.take(key, accepted[0])
            if value not in accepted:
                raise ConfigError(f"{key}={value!r}: expected {accepted[0]!r}.")
        for key in [k for k in self.raw if k in _IGNORED or k.startswith(_DRAFTER_PREFIX)]:
            self.raw.pop(key)

        num_layers = self.integer("num_hidden_layers")
        num_mtp = self.integer("num_nextn_predict_layers", 0)
        head_dim = self.integer("head_dim")
        rope_head_dim = self.integer("qk_rope_head_dim")
        factor = self.take("partial_rotary_factor", None)
        if factor is not None and round(factor * head_dim) != rope_head_dim:
            raise ConfigError(
                f"partial_rotary_factor={factor} does not give qk_rope_head_dim={rope_head_dim} "
                f"of head_dim={head_dim}."
            )
        quantization = self.take("quantization_config", None) or {}
        if not isinstance(quantization, Mapping):
            raise ConfigError(f"quantization_config={quantization!r}: expected an object.")
        for key, expected in _QUANTIZATION.items():
            if quantization.get(key, expected) != expected:
                raise ConfigError(
                    f"quantization_config.{key}={quantization[key]!r}: expected {expected!r}."
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
            mtp_layers=(LayerSpec(compress_ratio=0),) * num_mtp,
            indexer=IndexerConfig(
                num_heads=self.integer("index_n_heads"),
                head_dim=self.integer("index_head_dim"),
                topk=self.integer("index_topk"),
            ),
            moe=MoEConfig(
                num_experts=self.integer("n_routed_experts"),
                experts_per_token=self.integer("num_experts_per_tok"),
                expert_dim=self.integer("moe_intermediate_size"),
                routed_scale=self.number("routed_scaling_factor"),
                swiglu_limit=self.number("swiglu_limit"),
            ),
            rope=self.rope(),
            num_streams=self.integer("hc_mult"),
            sinkhorn_iters=self.integer("hc_sinkhorn_iters"),
            hc_eps=self.number("hc_eps"),
            norm_eps=self.number("rms_norm_eps"),
            max_length=self.integer("max_position_embeddings"),
            bos_id=self.integer("bos_token_id", 0),
            eos_id=self.integer("eos_token_id", 1),
            expert_format=self.take("expert_dtype", None),
        )
        if self.raw:
            unknown = ", ".join(f"{k}={v!r}" for k, v in sorted(self.raw.items()))
            raise ConfigError(f"unknown config keys: {unknown}.")
        try:
            config = V4Config(**values)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for variant in VARIANTS.values():
            if dataclasses.replace(config, name=variant().name) == variant():
                return variant()
        return config

    def layers(self, num_layers: int) -> tuple[LayerSpec, ...]:
        ratios = self.take("compress_ratios", None)
        types = self.take("layer_types", None)
        if ratios is None and types is None:
            raise ConfigError(
                "compress_ratios is missing: expected it (released form) or layer_types "
                "(transformers form); there is no safe default."
            )
        if types is not None:
            for layer_type in types:
                if layer_type not in _LAYER_TYPES:
                    raise ConfigError(
                        f"layer_types has {layer_type!r}: expected one of {sorted(_LAYER_TYPES)}."
                    )
            of_types = [_LAYER_TYPES[t] for t in types]
            if ratios is not None and list(ratios[: len(of_types)]) != of_types:
                raise ConfigError("compress_ratios and layer_types contradict each other.")
            ratios = of_types if ratios is None else ratios
        if len(ratios) < num_layers:
            raise ConfigError(
                f"compress_ratios/layer_types has {len(ratios)} entries: expected at least "
                f"num_hidden_layers={num_layers}."
            )
        if any(ratios[num_layers:]):
            raise ConfigError(
                f"compress_ratios[{num_layers}:]={ratios[num_layers:]}: expected 0 for MTP blocks."
            )
        num_hash = self.take("num_hash_layers", None)
        mlp_types = self.take("mlp_layer_types", None)
        if mlp_types is not None:
            hashed = [t == "hash_moe" for t in mlp_types]
            if set(mlp_types) - {"hash_moe", "moe"} or len(hashed) != num_layers:
                raise ConfigError(
                    f"mlp_layer_types={mlp_types}: expected {num_layers} of 'hash_moe' or 'moe'."
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
        try:
            return tuple(
                LayerSpec(compress_ratio=r, hash_routed=h)
                for r, h in zip(ratios[:num_layers], hashed, strict=True)
            )
        except ValueError as error:
            raise ConfigError(f"compress_ratios: {error}") from error

    def rope(self) -> RopeConfig:
        nested = self.take("rope_parameters", None)
        yarn = self.take("rope_scaling", None)
        theta = self.take("rope_theta", None)
        compress_theta = self.take("compress_rope_theta", None)
        if nested is not None:
            if set(nested) != {"main", "compress"}:
                raise ConfigError(
                    f"rope_parameters has keys {sorted(nested)}: expected 'main' and 'compress'."
                )
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
        try:
            rope = RopeConfig(
                theta=float(theta),
                compress_theta=float(compress_theta),
                yarn_factor=float(yarn.pop("factor")),
                yarn_original_length=yarn.pop("original_max_position_embeddings"),
                yarn_beta_fast=float(yarn.pop("beta_fast")),
                yarn_beta_slow=float(yarn.pop("beta_slow")),
            )
        except KeyError as error:
            raise ConfigError(f"rope_scaling.{error.args[0]} is missing.") from error
        if yarn:
            raise ConfigError(f"unknown keys in rope_scaling: {sorted(yarn)}.")
        return rope


def to_hf(config: V4Config) -> dict[str, Any]:
    """The released `config.json` of a config; `from_hf` reads it back to an equal one."""
    num_hash = sum(spec.hash_routed for spec in config.layers)
    if not all(spec.hash_routed for spec in config.layers[:num_hash]):
        raise ConfigError("layers: the released form needs all hash-routed layers to come first.")
    raw = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "moe_intermediate_size": config.moe.expert_dim,
        "num_hidden_layers": len(config.layers),
        "num_hash_layers": num_hash,
        "num_nextn_predict_layers": len(config.mtp_layers),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": 1,
        "head_dim": config.head_dim,
        "qk_rope_head_dim": config.rope_head_dim,
        "q_lora_rank": config.q_lora_rank,
        "o_groups": config.o_groups,
        "o_lora_rank": config.o_lora_rank,
        "sliding_window": config.window,
        "compress_ratios": [s.compress_ratio for s in config.layers + config.mtp_layers],
        "compress_rope_theta": config.rope.compress_theta,
        "rope_theta": config.rope.theta,
        "rope_scaling": {
            "type": "yarn",
            "factor": config.rope.yarn_factor,
            "beta_fast": config.rope.yarn_beta_fast,
            "beta_slow": config.rope.yarn_beta_slow,
            "original_max_position_embeddings": config.rope.yarn_original_length,
        },
        "index_n_heads": config.indexer.num_heads,
        "index_head_dim": config.indexer.head_dim,
        "index_topk": config.indexer.topk,
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
