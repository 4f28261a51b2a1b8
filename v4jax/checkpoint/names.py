"""Names of tensors: this project's parameters, the released checkpoints, and transformers.

A `Slot` ties a parameter of a module to a tensor of the released checkpoints. Matrices are stored
[out, in] there and [in, out] here, hence `transposed`. Everything else in `v4jax.checkpoint` speaks
released names; `from_transformers` and `to_transformers` translate those that transformers 5 writes.

Source: `inference/convert.py` of the releases; transformers 5.23 `models/deepseek_v4`.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Slot:
    """One parameter and its released tensor (one per expert if the name has `{e}`)."""

    path: str  # attributes from the block, MTP block or model to the parameter
    name: str  # released name behind the prefix of the layer
    transposed: bool = False

    @property
    def per_expert(self) -> bool:
        """The parameter stacks one tensor per expert."""
        return "{e}" in self.name


def _hyper(path: str, name: str) -> tuple[Slot, ...]:
    return (
        Slot(f"{path}.fn", f"{name}_fn", transposed=True),
        Slot(f"{path}.base", f"{name}_base"),
        Slot(f"{path}.scale", f"{name}_scale"),
    )


def _linear(path: str, name: str) -> Slot:
    return Slot(f"{path}.kernel", f"{name}.weight", transposed=True)


def _norm(path: str, name: str) -> Slot:
    return Slot(f"{path}.weight", f"{name}.weight")


def _compressor(path: str, name: str) -> tuple[Slot, ...]:
    return (
        Slot(f"{path}.ape", f"{name}.ape"),
        _linear(f"{path}.wkv", f"{name}.wkv"),
        _linear(f"{path}.wgate", f"{name}.wgate"),
        _norm(f"{path}.norm", f"{name}.norm"),
    )


BLOCK = (
    *_hyper("attn_hc", "hc_attn"),
    *_hyper("ffn_hc", "hc_ffn"),
    _norm("attn_norm", "attn_norm"),
    _norm("ffn_norm", "ffn_norm"),
    Slot("attention.sink", "attn.attn_sink"),
    _linear("attention.wq_a", "attn.wq_a"),
    _norm("attention.q_norm", "attn.q_norm"),
    _linear("attention.wq_b", "attn.wq_b"),
    _linear("attention.wkv", "attn.wkv"),
    _norm("attention.kv_norm", "attn.kv_norm"),
    _linear("attention.wo_a", "attn.wo_a"),
    _linear("attention.wo_b", "attn.wo_b"),
    *_compressor("attention.compressor", "attn.compressor"),
    _linear("attention.indexer.wq_b", "attn.indexer.wq_b"),
    _linear("attention.indexer.weights_proj", "attn.indexer.weights_proj"),
    *_compressor("attention.indexer.compressor", "attn.indexer.compressor"),
    _linear("moe.router.gate", "ffn.gate"),
    Slot("moe.router.bias", "ffn.gate.bias"),
    Slot("moe.router.table", "ffn.gate.tid2eid"),
    _linear("moe.w1", "ffn.experts.{e}.w1"),
    _linear("moe.w2", "ffn.experts.{e}.w2"),
    _linear("moe.w3", "ffn.experts.{e}.w3"),
    _linear("moe.shared.w1", "ffn.shared_experts.w1"),
    _linear("moe.shared.w2", "ffn.shared_experts.w2"),
    _linear("moe.shared.w3", "ffn.shared_experts.w3"),
)
MTP = (
    _linear("e_proj", "e_proj"),
    _linear("h_proj", "h_proj"),
    _norm("enorm", "enorm"),
    _norm("hnorm", "hnorm"),
    _norm("norm", "norm"),
    *_hyper("hc_head", "hc_head"),
    *(dataclasses.replace(slot, path=f"block.{slot.path}") for slot in BLOCK),
)
TOP = (
    Slot("embed.table", "embed.weight"),
    Slot("head.table", "head.weight"),
    _norm("norm", "norm"),
    *_hyper("hc_head", "hc_head"),
)

# Tensors that some checkpoints carry and that say nothing new: copies of embedding and head.
DUPLICATES = re.compile(r"mtp\.\d+\.(emb\.tok_emb|head)\.weight")
# Tensors that only the DSpark draft model of the 0731 / 0813 releases has.
DRAFTER = re.compile(r"mtp\.\d+\.(main_proj|main_norm|markov_head|confidence_head)\.")


def scale_name(weight_name: str) -> str:
    """`x.weight` -> `x.scale`."""
    return weight_name.removesuffix(".weight") + ".scale"


# transformers ------------------------------------------------------------------------------------

# transformers 5 has names of its own in memory (`state_dict`), and on disk mostly the released ones
# behind `model.`, a few of them changed on the way back. Both are read.
_HF_TOP = {
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
}
_HF_BLOCK = {
    "attn.norm.weight": "attn.kv_norm.weight",  # as save_pretrained writes it
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "attn_hc.fn": "hc_attn_fn",
    "attn_hc.base": "hc_attn_base",
    "attn_hc.scale": "hc_attn_scale",
    "ffn_hc.fn": "hc_ffn_fn",
    "ffn_hc.base": "hc_ffn_base",
    "ffn_hc.scale": "hc_ffn_scale",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.kv_proj.weight": "attn.compressor.wkv.weight",
    "self_attn.compressor.gate_proj.weight": "attn.compressor.wgate.weight",
    "self_attn.compressor.kv_norm.weight": "attn.compressor.norm.weight",
    "self_attn.compressor.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "attn.indexer.weights_proj.weight",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "self_attn.compressor.indexer.kv_proj.weight": "attn.indexer.compressor.wkv.weight",
    "self_attn.compressor.indexer.gate_proj.weight": "attn.indexer.compressor.wgate.weight",
    "self_attn.compressor.indexer.kv_norm.weight": "attn.indexer.compressor.norm.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
}
_HF_LAYER = re.compile(r"layers\.(\d+)\.(.*)")
# Stacked experts: [E, 2 * hidden, D] with the gate rows first, and [E, D, hidden].
_HF_STACKED = {
    "mlp.experts.gate_up_proj": ("w1", "w3"),
    "mlp.experts.down_proj": ("w2",),
}


@dataclasses.dataclass(frozen=True)
class StackedExperts:
    """A tensor of transformers that holds all experts of a layer."""

    prefix: str  # "layers.3."
    parts: tuple[str, ...]  # expert matrices that lie one after the other on axis 1
    is_scale: bool

    def released_name(self, expert: int, part: str) -> str:
        """The tensor of one expert in the released layout."""
        suffix = "scale" if self.is_scale else "weight"
        return f"{self.prefix}ffn.experts.{expert}.{part}.{suffix}"


def from_transformers(name: str) -> str | StackedExperts:
    """Released name of a tensor that transformers wrote; other names come back without `model.`."""
    name = name.removeprefix("model.")
    if name in _HF_TOP:
        return _HF_TOP[name]
    match = _HF_LAYER.fullmatch(name)
    if not match:
        return name
    prefix, rest = f"layers.{match[1]}.", match[2]
    for stacked, parts in _HF_STACKED.items():
        if rest in (stacked, f"{stacked}_scale_inv"):
            return StackedExperts(prefix, parts, rest != stacked)
    weight = rest.removesuffix("_scale_inv")
    released = _HF_BLOCK.get(weight, weight)
    return prefix + (released if weight == rest else scale_name(released))


_TO_HF = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "head.weight",
    "norm.weight": "model.norm.weight",
    **{f"hc_head_{part}": f"model.hc_head.hc_{part}" for part in ("fn", "base", "scale")},
}


def to_transformers(name: str) -> str:
    """Name of a released tensor in a folder that `save_pretrained` of transformers 5 wrote.

    MTP blocks keep their names: transformers has none and leaves `mtp.*` alone.
    """
    if name in _TO_HF:
        return _TO_HF[name]
    if not _HF_LAYER.fullmatch(name):
        return name
    return "model." + name.replace(".attn.kv_norm.weight", ".attn.norm.weight")


_TO_HF_BLOCK = {released: theirs for theirs, released in _HF_BLOCK.items()}


def transformers_module(module: str) -> str | None:
    """Name in memory of the module of transformers 5 that has a released matrix of a layer.

    `layers.3.attn.wq_a` is `model.layers.3.self_attn.q_a_proj`. None of what has no module of its own:
    routed experts, which lie in one tensor, and MTP blocks.
    """
    match = _HF_LAYER.fullmatch(f"{module}.weight")
    theirs = match and _TO_HF_BLOCK.get(match[2])
    return f"model.layers.{match[1]}.{theirs.removesuffix('.weight')}" if match and theirs else None
