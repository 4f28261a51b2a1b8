"""Architecture of the DeepSeek-V4 models as frozen, hashable values.

`flash()`, `pro()`, `flash_base()` and `pro_base()` are the released models, `nano()` the small one
that ships with this repository, and `tiny()` a random one for tests that has every kind of layer.
`v4jax.checkpoint.hf_config` reads and writes the `config.json` of checkpoints.

Values: DeepSeek-V4 report (arXiv 2606.19348) section 4.2.1 and the released `config.json` files.
"""

import dataclasses

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
