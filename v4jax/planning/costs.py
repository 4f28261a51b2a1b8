"""What a token costs: FLOP, cache bytes and weight bytes, by kind of layer, with V3.2 beside it.

    from v4jax import pro

    from v4jax.planning import costs
    costs.decode_flops(pro(), 10**6).fp8_equivalent / costs.v32_decode_flops(10**6).fp8_equivalent

Formulas, nothing is traced. A multiply-add is 2 FLOP. Norms, softmax, rotary embedding, Hadamard
transform and the top-k itself are left out, as is the MTP block.

The report's figures at 10**6 tokens (27 % of V3.2's FLOP and 10 % of its cache for Pro, 10 % and 7 %
for Flash; section 1) come out with these weights, which it does not state: FP8 products count 1,
bfloat16 products 2, FP4 products of the indexer 0.5, FP4 experts times FP8 activations 1, and the
grouped output projection counts as FP8. V3.2 is taken in absorbed-MLA form with 2048 selected tokens.
Source of V3.2's sizes: its report (arXiv 2512.02556) and released config.
"""

import collections
import dataclasses

from pallas_kernels.formats.records import FP4_WEIGHTS, FP8_WEIGHTS, INDEX_KEYS, KV_ROWS
from pallas_kernels.selection import ENTRIES_PER_WORD_ROW
from v4jax.config import IndexerSpec, LayerSpec, V4Config
from v4jax.nn.remat import require_policy

_FP8_WEIGHT = 1 + 1 / (FP8_WEIGHTS.block * FP8_WEIGHTS.outputs)  # bytes, with its share of a scale


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What weights and caches are held in, in bytes: of a weight (its scales included) and of rows.

    `experts=None` takes the config's own storage format, `channel=None` the packed layouts.
    """

    linears: float = _FP8_WEIGHT  # attention projections and shared expert
    wide: float = 2.0  # compressors, router, head
    streams: float = 4.0  # hyper-connections
    experts: float | None = None
    channel: float | None = None  # of a cache row or indexer key; None: packed


RELEASED = Recipe()  # FP8, and FP4 experts; packed caches
RELEASED_WIDE_CACHE = Recipe(channel=2.0)  # the same, caches in bfloat16
BFLOAT16 = Recipe(linears=2.0, streams=2.0, experts=2.0, channel=2.0)
FLOAT32 = Recipe(linears=4.0, wide=4.0, experts=4.0, channel=4.0)


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOP of one token (or of many, added), by the precision they are done in."""

    linear: float = 0.0  # FP8 or FP4 weights times FP8 activations
    wide: float = 0.0  # bfloat16 or float32: compressors, router, hyper-connections, head
    attention: float = 0.0  # bfloat16: scores and weighted sum over window and entries
    indexer: float = 0.0  # FP4 in V4, FP8 in V3.2: scores over compressed keys
    indexer_weight: float = 0.5  # cost of an indexer FLOP in FP8 FLOP

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.linear + other.linear,
            self.wide + other.wide,
            self.attention + other.attention,
            self.indexer + other.indexer,
            max(self.indexer_weight, other.indexer_weight),
        )

    def __mul__(self, times: float) -> "Flops":
        return Flops(
            times * self.linear,
            times * self.wide,
            times * self.attention,
            times * self.indexer,
            self.indexer_weight,
        )

    @property
    def total(self) -> float:
        """All FLOP alike."""
        return self.linear + self.wide + self.attention + self.indexer

    @property
    def fp8_equivalent(self) -> float:
        """FLOP weighted by what they cost beside an FP8 FLOP: bfloat16 2, indexer in FP4 0.5."""
        return self.linear + 2 * (self.wide + self.attention) + self.indexer_weight * self.indexer


def layer_flops(cfg: V4Config, spec: LayerSpec, context: float) -> Flops:
    """One layer, one token that `context` tokens precede (itself included).

    Args:
      context: tokens; a mean over many tokens is allowed where attention is linear in it (the
        callers below do that exactly).
    """
    return _fixed_flops(cfg, spec) + _context_flops(cfg, spec, context)


def decode_flops(cfg: V4Config, context: int) -> Flops:
    """One token at the end of a context of that many tokens, all layers and the head."""
    layers = (layer_flops(cfg, spec, context) for spec in cfg.layers)
    return sum(layers, head_flops(cfg))


def prefill_flops(cfg: V4Config, length: int, *, masked: bool = False) -> Flops:
    """A prompt of `length` tokens, causal, the head for its last token only.

    Args:
      masked: attention of CSA layers counts all entries before a query, as the prefill kernels compute
        them under a mask; else those that a query chooses.
    """
    flops = head_flops(cfg)
    for spec in cfg.layers:
        flops += _fixed_flops(cfg, spec) * length
        flops += _prefill_context_flops(cfg, spec, length, masked=masked)
    return flops


def training_flops(
    cfg: V4Config, length: int, *, remat: str = "layers", trainable: str = "all"
) -> Flops:
    """One sequence of `length` tokens forward and backward, with its MTP blocks.

    A backward pass is two forward passes' work, and one where weights stay, which need no gradient of
    their own. Adapters are not counted.

    Args:
      remat: a policy of `v4jax.nn.remat`. What it computes again is counted: a forward pass of "layers" and
        "offload", of the others what they do not keep. The head's logits, which are formed twice under
        every policy, are left out of "none", so that it is the work of the model alone.
      trainable: "all"; "no-experts", where routed experts stay; "lora", where all weights do; or
        "indexer", a warm-up: a forward pass without MTP and with attention to all entries, and for
        layers with an indexer the scores of attention again, and the indexer's backward pass.

    Raises:
      ValueError: another `trainable` or `remat`.
    """
    require_policy(remat)
    if trainable not in ("all", "no-experts", "lora", "indexer"):
        raise ValueError(
            f"trainable={trainable!r}: expected 'all', 'no-experts', 'lora' or 'indexer'."
        )
    if trainable == "indexer":
        return _warmup_flops(cfg, length, remat=remat)
    flops = prefill_flops(cfg, length) + head_flops(cfg) * (length - 1)
    for spec in cfg.mtp_layers:
        flops += _fixed_flops(cfg, spec) * length + _prefill_context_flops(cfg, spec, length)
        flops += head_flops(cfg) * length
        flops += Flops(linear=2.0 * (1 + cfg.num_streams) * cfg.embed_dim**2) * length
    blocks = len(cfg.layers) + len(cfg.mtp_layers)
    experts = 6.0 * cfg.moe.experts_per_token * cfg.embed_dim * cfg.moe.expert_dim * length * blocks
    stays = {
        "all": Flops(),
        "no-experts": Flops(linear=experts),
        "lora": Flops(linear=flops.linear, wide=flops.wide),
    }[trainable]
    again = Flops() if remat == "none" else flops + _spared_flops(cfg, length, remat) * -1
    return flops * 3 + again + stays * -1


def _spared_flops(cfg: V4Config, length: int, remat: str) -> Flops:
    """Forward FLOP of a sequence whose results a policy keeps, though it computes other parts again."""
    spared = Flops()
    if remat in ("outputs", "attention"):
        # The last matrices of attention, experts and shared expert.
        moe, latent = cfg.moe, cfg.o_groups * cfg.o_lora_rank
        inputs = latent + (moe.experts_per_token + 1) * moe.expert_dim
        spared += Flops(linear=2.0 * inputs * cfg.embed_dim * length * len(cfg.layers))
    if remat == "attention":
        for spec in cfg.layers:
            spared += _prefill_context_flops(cfg, spec, length)
    return spared


def kept_bytes(
    cfg: V4Config, spec: LayerSpec, length: int, remat: str, *, tensor: int = 1, width: int = 2
) -> float | None:
    """Bytes of device memory that a layer keeps of each token for the backward pass.

    Args:
      length: tokens of a sequence, which picks are bits of the entries of (as TPU kernels have them).
      tensor: parts that heads are cut into.
      width: bytes of an activation.

    Returns:
      None for "none", which keeps what the compiler does not compute again.

    Raises:
      ValueError: another `remat`.
    """
    require_policy(remat)
    if remat == "none":
        return None
    channels = {"offload": 0, "layers": cfg.num_streams}.get(remat, cfg.num_streams + 2)
    kept = float(width * channels * cfg.embed_dim)
    if remat == "attention":
        kept += (width * cfg.head_dim + 4) * cfg.num_heads / tensor
        if spec.own_indexer and spec.compressor:
            kept += -(-(length // spec.ratio) // ENTRIES_PER_WORD_ROW) * ENTRIES_PER_WORD_ROW / 8
    return kept


def kept_by_layers(cfg: V4Config, length: int, remat: str, *, tensor: int = 1) -> float | None:
    """`kept_bytes` of all layers together, in bfloat16."""
    kept = [kept_bytes(cfg, spec, length, remat, tensor=tensor) for spec in cfg.layers]
    return None if remat == "none" else sum(one for one in kept if one is not None)


def _warmup_flops(cfg: V4Config, length: int, *, remat: str) -> Flops:
    again = remat != "none"
    flops = prefill_flops(cfg, length, masked=True) + head_flops(cfg) * (length - 1)
    for spec in cfg.layers:
        if not (spec.own_indexer and spec.compressor):
            continue
        index, seen = spec.own_indexer, _prefill_context_flops(cfg, spec, length, masked=True)
        halves = 2 if spec.compressor.overlap else 1
        own = Flops(
            linear=2.0 * cfg.q_lora_rank * index.num_heads * index.head_dim * length,
            wide=2.0 * cfg.embed_dim * (index.num_heads + 2 * halves * index.head_dim) * length,
            indexer=seen.indexer,
        )
        # What attention looks at: its scores, half of what it computes, once more if made again.
        flops += own * (2 + again) + Flops(attention=seen.attention / 2) * (1 + again)
    return flops


def kv_row_bytes(cfg: V4Config) -> int:
    """A packed cache row: e4m3 channels, bfloat16 rotated channels, one scale byte per 64.

    Rounded up to 8 bytes, as in the released kernels' layout (584 for 512 channels).
    """
    nope = cfg.nope_head_dim
    return -(-(nope + 2 * cfg.rope_head_dim + -(-nope // KV_ROWS.block)) // 8) * 8


def index_key_bytes(indexer: IndexerSpec | None) -> int:
    """A packed indexer key: e2m1, one scale byte per 32 channels, in whole words of 4 bytes.

    68 for 128 channels, 0 without an indexer.
    """
    if indexer is None:
        return 0
    width = indexer.head_dim
    return -(-(width // 2 + width // INDEX_KEYS.block) // 4) * 4


def cache_bytes_per_token(cfg: V4Config) -> float:
    """Bytes by which a packed cache grows with each token of context."""
    row = kv_row_bytes(cfg)
    rows = sum(row / spec.ratio for spec in cfg.layers if spec.own_compressor)
    keys = sum(
        index_key_bytes(spec.own_indexer) / spec.ratio for spec in cfg.layers if spec.compressor
    )
    return rows + keys


def cache_bytes(cfg: V4Config, context: int) -> float:
    """A sequence's packed cache: what grows, and the windows. Open pools are not counted."""
    windows = len(cfg.layers) * cfg.window * kv_row_bytes(cfg)
    return windows + context * cache_bytes_per_token(cfg)


def cache_bytes_read(
    cfg: V4Config, spec: LayerSpec, context: int, recipe: Recipe = RELEASED
) -> float:
    """Bytes of cache that one token reads in a layer: window, chosen or all entries, all index keys.

    Entries of another layer are read as its own would be.
    """
    row, key = _row_bytes(cfg, spec, recipe)
    rows, keys = _rows_seen(cfg, spec, context)
    return row * rows + key * keys


def layer_cache_bytes(
    cfg: V4Config, spec: LayerSpec, context: int, recipe: Recipe = RELEASED
) -> float:
    """Bytes of a layer's cache for a sequence. Open pools are not counted."""
    row, key = _row_bytes(cfg, spec, recipe)
    rows = context / spec.ratio if spec.own_compressor else 0
    keys = context / spec.ratio if spec.own_indexer else 0
    return row * (cfg.window + rows) + key * keys


def layer_weight_bytes(
    cfg: V4Config, spec: LayerSpec, tokens: int, recipe: Recipe = RELEASED
) -> float:
    """Bytes of a layer's weights that a step reads for that many tokens: its experts are those hit."""
    moe = cfg.moe
    linear, wide, streams = _layer_weights(cfg, spec)
    shared = 3 * cfg.embed_dim * moe.expert_dim
    experts = experts_hit(cfg, tokens) * expert_bytes(cfg, recipe)
    return (
        recipe.linears * (linear + shared) + recipe.wide * wide + recipe.streams * streams + experts
    )


def decode_bytes(cfg: V4Config, context: int, batch: int, recipe: Recipe = RELEASED) -> float:
    """Bytes that one step reads for `batch` sequences of that context: weights once, caches each."""
    weights = sum(layer_weight_bytes(cfg, spec, batch, recipe) for spec in cfg.layers)
    caches = sum(cache_bytes_read(cfg, spec, context, recipe) for spec in cfg.layers)
    return weights + batch * caches + recipe.wide * cfg.vocab_size * cfg.embed_dim


@dataclasses.dataclass(frozen=True)
class KindCosts:
    """One layer of a kind, one token at the end of a context."""

    kind: str
    layers: int  # of this kind in the model
    flops: Flops
    weight_bytes: float  # read for this token alone
    cache_bytes_read: float
    cache_bytes: float  # held


def by_kind(cfg: V4Config, context: int, recipe: Recipe = RELEASED) -> list[KindCosts]:
    """Costs of each kind of layer of a model, in the order they first appear.

    Layers that differ in whose rows or picks they use alone are of one kind.
    """

    def alike(spec: LayerSpec) -> LayerSpec:
        return dataclasses.replace(
            spec,
            entries_from=None if spec.entries_from is None else 0,
            selection_from=None if spec.selection_from is None else 0,
        )

    return [
        KindCosts(
            f"{spec.kind}{', hash-routed' if spec.hash_routed else ''}",
            number,
            layer_flops(cfg, spec, context),
            layer_weight_bytes(cfg, spec, 1, recipe),
            cache_bytes_read(cfg, spec, context, recipe),
            layer_cache_bytes(cfg, spec, context, recipe),
        )
        for spec, number in collections.Counter(map(alike, cfg.layers)).items()
    ]


def expert_bytes(cfg: V4Config, recipe: Recipe = RELEASED) -> float:
    """Weights of one routed expert: as stored (FP4 with a scale byte per 32, FP8, or bfloat16)."""
    size = 3 * cfg.embed_dim * cfg.moe.expert_dim
    if recipe.experts is not None:
        return size * recipe.experts
    match cfg.expert_format:
        case "fp4":
            return size * (0.5 + 1 / FP4_WEIGHTS.block)
        case "fp8":
            return size * _FP8_WEIGHT
        case _:
            return size * 2.0


def experts_hit(cfg: V4Config, tokens: float) -> float:
    """Expected number of experts that a layer reads for that many tokens, routed at random."""
    share = cfg.moe.experts_per_token / cfg.moe.num_experts
    return cfg.moe.num_experts * (1 - (1 - share) ** tokens)


# Parts of V4 --------------------------------------------------------------------------------------


def _layer_weights(cfg: V4Config, spec: LayerSpec) -> tuple[int, int, int]:
    """Weights that every token meets, shared expert left out: FP8 linears, wide ones, and streams'."""
    dim, heads_dim, moe = cfg.embed_dim, cfg.num_heads * cfg.head_dim, cfg.moe
    linear = (
        dim * cfg.q_lora_rank
        + cfg.q_lora_rank * heads_dim
        + dim * cfg.head_dim
        + heads_dim * cfg.o_lora_rank  # G groups of heads_dim / G inputs
        + cfg.o_groups * cfg.o_lora_rank * dim
    )
    wide = 0 if spec.hash_routed else dim * moe.num_experts
    halves = 2 if spec.compressor and spec.compressor.overlap else 1
    if spec.own_compressor:
        wide += 2 * dim * cfg.head_dim * halves  # value and gate
    if spec.own_indexer:
        index = spec.own_indexer
        linear += cfg.q_lora_rank * index.num_heads * index.head_dim
        wide += dim * index.num_heads + 2 * dim * halves * index.head_dim
    streams = cfg.num_streams
    return linear, wide, 2 * streams * dim * (2 + streams) * streams  # around attention and experts


def _fixed_flops(cfg: V4Config, spec: LayerSpec) -> Flops:
    """What does not depend on the context."""
    linear, wide, coefficients = _layer_weights(cfg, spec)
    experts = (cfg.moe.experts_per_token + 1) * 3 * cfg.embed_dim * cfg.moe.expert_dim
    streams = cfg.num_streams
    mixing = 2 * cfg.embed_dim * (streams + streams + streams * streams)  # collapse, expand, mix
    return Flops(linear=2.0 * (linear + experts), wide=2.0 * (wide + coefficients + mixing))


def _rows_seen(cfg: V4Config, spec: LayerSpec, context: float) -> tuple[float, float]:
    """Rows of window and entries, and indexer keys, that a token with that context sees."""
    rows, keys = min(context, cfg.window), 0.0
    if spec.compressor:
        entries = context // spec.ratio
        keys = entries if spec.own_indexer else 0.0
        rows += min(entries, spec.indexer.topk) if spec.indexer else entries
    return rows, keys


def _row_bytes(cfg: V4Config, spec: LayerSpec, recipe: Recipe) -> tuple[float, float]:
    """Of a cache row and of an indexer key (0 without an indexer)."""
    if recipe.channel is None:
        return kv_row_bytes(cfg), index_key_bytes(spec.indexer)
    width = spec.indexer.head_dim if spec.indexer else 0
    return recipe.channel * cfg.head_dim, recipe.channel * width


def _scoring_flops(spec: LayerSpec, keys: float) -> float:
    """Of an indexer's queries with that many keys; none with another layer's picks."""
    index = spec.own_indexer
    return 2.0 * index.num_heads * index.head_dim * keys if index else 0.0


def _context_flops(cfg: V4Config, spec: LayerSpec, context: float) -> Flops:
    """Attention and indexer of one token that sees `context` tokens."""
    rows, keys = _rows_seen(cfg, spec, context)
    return Flops(
        attention=4.0 * cfg.num_heads * cfg.head_dim * rows,
        indexer=_scoring_flops(spec, keys),
    )


def _prefill_context_flops(
    cfg: V4Config, spec: LayerSpec, length: int, *, masked: bool = False
) -> Flops:
    """The sum of `_context_flops` over contexts 1 .. length, or with all entries where it is masked."""
    rows = _sum_of_minima(length, cfg.window, 1)
    keys = 0
    if spec.indexer:
        keys = _sum_of_minima(length, length, spec.ratio)
        rows += keys if masked else _sum_of_minima(length, spec.indexer.topk, spec.ratio)
    elif spec.compressor:
        rows += _sum_of_minima(length, length, spec.ratio)
    return Flops(
        attention=4.0 * cfg.num_heads * cfg.head_dim * rows,
        indexer=_scoring_flops(spec, keys),
    )


def _sum_of_minima(length: int, bound: int, ratio: int) -> int:
    """sum over t = 1 .. length of min(t // ratio, bound)."""
    free = min(length, bound * ratio)  # up to here t // ratio <= bound
    full, rest = divmod(free + 1, ratio)  # t = 0 .. free: `full` whole runs of `ratio` equal values
    return ratio * full * (full - 1) // 2 + full * rest + bound * (length - free)


def head_flops(cfg: V4Config) -> Flops:
    """Logits of one token."""
    streams = cfg.num_streams * cfg.embed_dim
    collapse = streams * cfg.num_streams + streams
    return Flops(wide=2.0 * (cfg.vocab_size * cfg.embed_dim + collapse))


# DeepSeek-V3.2 ------------------------------------------------------------------------------------

_V32 = dict(
    layers=61,
    dense_layers=3,
    dim=7168,
    heads=128,
    q_rank=1536,
    kv_rank=512,
    rope=64,
    nope=128,
    experts=256,
    active=9,  # eight routed, one shared
    expert_dim=2048,
    dense_dim=18_432,
    vocab=129_280,
    index_heads=64,
    index_dim=128,
    topk=2048,
)


def v32_decode_flops(context: int) -> Flops:
    """DeepSeek-V3.2, one token: absorbed MLA over 2048 selected tokens, FP8 indexer."""
    v = _V32
    rows, width = min(context, v["topk"]), v["kv_rank"] + v["rope"]
    attention = (
        v["dim"] * v["q_rank"]
        + v["q_rank"] * v["heads"] * (v["nope"] + v["rope"])
        + v["dim"] * width
        + v["kv_rank"] * v["heads"] * 2 * v["nope"]
        + v["heads"] * v["nope"] * v["dim"]
    )
    index = v["q_rank"] * v["index_heads"] * v["index_dim"] + v["dim"] * v["index_dim"]
    moe_layers = v["layers"] - v["dense_layers"]
    linear = (
        v["layers"] * (attention + index)
        + moe_layers * v["active"] * 3 * v["dim"] * v["expert_dim"]
        + v["dense_layers"] * 3 * v["dim"] * v["dense_dim"]
    )
    wide = (
        v["vocab"] * v["dim"]
        + moe_layers * v["dim"] * v["experts"]
        + v["layers"] * v["dim"] * v["index_heads"]
    )
    return Flops(
        linear=2.0 * linear,
        wide=2.0 * wide,
        attention=2.0 * v["layers"] * v["heads"] * rows * (width + v["kv_rank"]),
        indexer=2.0 * v["layers"] * v["index_heads"] * v["index_dim"] * context,
        indexer_weight=1.0,
    )


def v32_cache_bytes(context: int) -> float:
    """V3.2's cache: per layer FP8 latent with 4 float32 scales, bfloat16 rope, FP8 key with a scale."""
    v = _V32
    row = v["kv_rank"] + 4 * (v["kv_rank"] // 128) + 2 * v["rope"] + v["index_dim"] + 4
    return float(v["layers"] * row * context)
