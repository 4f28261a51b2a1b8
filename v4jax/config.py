"""Architecture of the DeepSeek-V4 models as frozen, hashable values.

`flash()`, `pro()`, `flash_base()` and `pro_base()` are the released models, `nano()` the small one
that ships with this repository, and `tiny()` a random one for tests that has every kind of layer.
`v4jax.checkpoint.hf_config` reads and writes the `config.json` of checkpoints.

Values: DeepSeek-V4 report (arXiv 2606.19348) section 4.2.1 and the released `config.json` files.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

EXPERT_FORMATS = ("fp4", "fp8", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressorSpec:
    """How a layer turns tokens into compressed KV rows."""

    ratio: int  # tokens of a row
    overlap: bool = False  # a row pools two windows of `ratio` tokens: its own and the one before

    def __post_init__(self):
        if self.ratio < 1:
            raise ValueError(f"compressor ratio={self.ratio}: expected 1 or more tokens of a row.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerSpec:
    """Lightning indexer: which compressed rows a query attends to."""

    num_heads: int = 64
    head_dim: int = 128
    topk: int = 512

    def __post_init__(self):
        for name in ("num_heads", "head_dim", "topk"):
            if getattr(self, name) < 1:
                raise ValueError(f"indexer.{name}={getattr(self, name)}: expected 1 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What distinguishes one decoder layer from another. The parts are free to combine.

    Every layer attends to a sliding window. With a compressor it attends to compressed KV too: to all
    rows, or to those that its indexer picks. `window_layer`, `csa_layer` and `hca_layer` are the three
    kinds of the released models.

    A layer may use what an earlier one has made (cross-layer KV sharing: CLA, arXiv 2405.12981; YOCO,
    arXiv 2405.05254): its rows, by `entries_from`, or its rows and its picks, by `selection_from` too.
    `compressor` and `indexer` then say what those are, and equal the other layer's.
    """

    compressor: CompressorSpec | None = None
    indexer: IndexerSpec | None = None
    hash_routed: bool = False  # experts chosen by token id instead of by score
    entries_from: int | None = None  # index of the layer whose rows it attends to
    selection_from: int | None = None  # index of the layer whose picks it attends to

    def __post_init__(self):
        if self.indexer is not None and self.compressor is None:
            raise ValueError(
                "indexer without compressor: expected a compressor, whose rows the indexer picks from."
            )
        if self.entries_from is not None and self.compressor is None:
            raise ValueError(
                f"entries_from={self.entries_from} without compressor: expected the compressor of layer "
                f"{self.entries_from}, which says what its rows are."
            )
        if self.selection_from is not None and (self.indexer is None or self.entries_from is None):
            missing = "indexer" if self.indexer is None else "entries_from"
            raise ValueError(
                f"selection_from={self.selection_from} without {missing}: expected both indexer and "
                f"entries_from. Picks of layer {self.selection_from} are rows that it attends to."
            )

    @property
    def own_compressor(self) -> CompressorSpec | None:
        """The compressor that is a part of this layer: none where its rows are another layer's."""
        return self.compressor if self.entries_from is None else None

    @property
    def own_indexer(self) -> IndexerSpec | None:
        """The indexer that is a part of this layer: none where its picks are another layer's."""
        return self.indexer if self.selection_from is None else None

    @property
    def ratio(self) -> int:
        """Tokens of a compressed KV row; 0 without a compressor."""
        return self.compressor.ratio if self.compressor else 0

    @property
    def kind(self) -> str:
        """For printing: "window", "CSA", "HCA", or what differs from these, as "HCA ratio 64".

        With another layer's rows "reuse", or "reindex" with picks of its own among them: "CSA reuse".
        """
        if self.compressor is None:
            return "window"
        name, usual = ("CSA", CSA) if self.indexer else ("HCA", HCA)
        if self.compressor != usual:
            name += f" ratio {self.ratio}{' overlapping' if self.compressor.overlap else ''}"
        if self.entries_from is None:
            return name
        return f"{name} reindex" if self.own_indexer else f"{name} reuse"


def sources(layers: Sequence[LayerSpec]) -> frozenset[int]:
    """Indices of the layers whose compressed KV rows or picks others use."""
    named = {index for spec in layers for index in (spec.entries_from, spec.selection_from)}
    return frozenset(index for index in named if index is not None)


CSA = CompressorSpec(ratio=4, overlap=True)
HCA = CompressorSpec(ratio=128)


def window_layer(*, hash_routed: bool = False) -> LayerSpec:
    """Sliding-window attention alone."""
    return LayerSpec(hash_routed=hash_routed)


def csa_layer(indexer: IndexerSpec = IndexerSpec(), *, hash_routed: bool = False) -> LayerSpec:
    """Compressed sparse attention: KV compressed 4x, of which the indexer picks the top k."""
    return LayerSpec(compressor=CSA, indexer=indexer, hash_routed=hash_routed)


def hca_layer(*, hash_routed: bool = False) -> LayerSpec:
    """Heavily compressed attention: KV compressed 128x, all of it attended."""
    return LayerSpec(compressor=HCA, hash_routed=hash_routed)


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
        for indexer in {spec.indexer for spec in self.layers if spec.indexer}:
            require(
                self.rope_head_dim <= indexer.head_dim,
                "rope_head_dim",
                f"at most the indexer's head width ({indexer.head_dim})",
            )
        require(
            self.o_groups > 0 and self.num_heads % self.o_groups == 0,
            "o_groups",
            f"a divisor of num_heads ({self.num_heads})",
        )
        require(self.window > 0, "window", "a positive number of tokens")
        require(self.expert_format in EXPERT_FORMATS, "expert_format", f"one of {EXPERT_FORMATS}")
        require(
            all(spec == window_layer() for spec in self.mtp_layers),
            "mtp_layers",
            "sliding-window layers routed by score",
        )
        if not 0 < self.moe.experts_per_token <= self.moe.num_experts:
            raise ValueError(
                f"moe.experts_per_token={self.moe.experts_per_token}: expected 1..num_experts "
                f"({self.moe.num_experts})."
            )
        for index in range(len(self.layers)):
            _check_sources(self.layers, index)

    @property
    def nope_head_dim(self) -> int:
        """Channels of a head that are not rotated (they come first)."""
        return self.head_dim - self.rope_head_dim

    @property
    def indexer(self) -> IndexerSpec | None:
        """The indexer of the first layer that has one; None if no layer has."""
        return next((spec.indexer for spec in self.layers if spec.indexer), None)

    def map_layers(self, change: Callable[[LayerSpec], LayerSpec]) -> "V4Config":
        """A config whose layers are `change(layer)`.

        `cfg.map_layers(lambda layer: dataclasses.replace(layer, indexer=None))` attends to all rows;
        where layers share picks, with `selection_from=None` too.
        """
        return dataclasses.replace(self, layers=tuple(change(spec) for spec in self.layers))

    def with_indexer(self, **changes: int) -> "V4Config":
        """A config whose indexers are changed: `cfg.with_indexer(topk=256)`."""

        def change(spec: LayerSpec) -> LayerSpec:
            if spec.indexer is None:
                return spec
            return dataclasses.replace(spec, indexer=dataclasses.replace(spec.indexer, **changes))

        return self.map_layers(change)


def _check_sources(layers: tuple[LayerSpec, ...], index: int) -> None:
    """Refuses a layer that names others which do not make what it takes of them."""
    spec, name = layers[index], f"layers[{index}]"

    def source(field: str, part: str, own: str) -> LayerSpec | None:
        number = getattr(spec, field)
        if number is None:
            return None
        if number not in range(index):
            expected = f"an earlier layer, 0..{index - 1}" if index else "None: no layer is earlier"
            raise ValueError(f"{name}.{field}={number}: expected {expected}.")
        other = layers[number]
        if getattr(other, own) is None:
            another = getattr(other, field)
            which = "a layer that has one" if another is None else f"{another}, whose it uses"
            raise ValueError(
                f"{name}.{field}={number}: layer {number} has no {part} of its own. Expected {which}."
            )
        if getattr(other, part) != getattr(spec, part):
            raise ValueError(
                f"{name}.{part}={getattr(spec, part)}, and {field}={number}: expected that of layer "
                f"{number}, {getattr(other, part)}."
            )
        return other

    rows = source("entries_from", "compressor", "own_compressor")
    if rows is not None and (rows.indexer is None) != (spec.indexer is None):
        raise ValueError(
            f"{name}.indexer={spec.indexer}, and entries_from={spec.entries_from}: expected "
            f"{'an indexer, as' if rows.indexer else 'None, as in'} layer {spec.entries_from}"
            f"{' has one' if rows.indexer else ''}. Rows are kept either for all to be read or for some."
        )
    picks = source("selection_from", "indexer", "own_indexer")
    if picks is None:
        return
    theirs = spec.selection_from if picks.entries_from is None else picks.entries_from
    if spec.entries_from != theirs:
        raise ValueError(
            f"{name}.selection_from={spec.selection_from}, and entries_from={spec.entries_from}: layer "
            f"{spec.selection_from} picks from rows of layer {theirs}. Expected entries_from={theirs}."
        )


def _layers(kinds: str, indexer: IndexerSpec, num_hash: int) -> tuple[LayerSpec, ...]:
    """Layers by letter, W(indow), C(SA) or H(CA), of which the first `num_hash` are hash-routed."""
    make: dict[str, Callable[..., LayerSpec]] = {
        "W": window_layer,
        "C": functools.partial(csa_layer, indexer),
        "H": hca_layer,
    }
    return tuple(make[kind](hash_routed=i < num_hash) for i, kind in enumerate(kinds))


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
        layers=_layers("WW" + 20 * "CH" + "C", IndexerSpec(), num_hash=3),
        mtp_layers=(window_layer(),),
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
        layers=_layers("HH" + 29 * "CH" + "C", IndexerSpec(topk=1024), num_hash=3),
        mtp_layers=(window_layer(),),
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
    indexer = IndexerSpec(num_heads=4, head_dim=32, topk=16)
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
        layers=_layers("WCHCHC", indexer, num_hash=2),
        mtp_layers=(window_layer(),),
        moe=MoEConfig(
            num_experts=8, experts_per_token=2, expert_dim=64, routed_scale=1.5, swiglu_limit=1.0
        ),
        rope=RopeConfig(yarn_original_length=256),
        max_length=65_536,
    )


def nano() -> V4Config:
    """The model that ships with this repository (docs/nano.md)."""
    indexer = IndexerSpec(num_heads=4, head_dim=64, topk=32)
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
        layers=_layers("WCHCH", indexer, num_hash=1),
        mtp_layers=(window_layer(),),
        moe=MoEConfig(num_experts=8, experts_per_token=2, expert_dim=128, routed_scale=1.5),
        rope=RopeConfig(yarn_original_length=8192),
        max_length=131_072,
    )


VARIANTS = {f.__name__.replace("_", "-"): f for f in (flash, pro, flash_base, pro_base, tiny, nano)}
