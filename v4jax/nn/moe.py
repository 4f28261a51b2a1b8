"""Mixture of experts: router, routed experts and the shared one.

    score   = sqrt(softplus(x @ gate))                            float32
    experts = table[token id]  (hash-routed layers)  or  top-k of score + bias
    weight  = score[experts] / sum * routed_scale                 the bias only selects
    out     = sum_e weight_e * expert_e(x) + shared(x)            summed in float32

An expert is w2(weight * silu(min(w1 x, limit)) * clip(w3 x, -limit, limit)); the routing weight
is applied before w2, and the shared expert has the same clamp and no weight.

Source: report section 2.4; released `inference/model.py` (Gate, Expert, MoE).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Float32, Int32

from pallas_kernels import signatures
from pallas_kernels.formats.quantize import cast
from pallas_kernels.grouped_matmul import by_expert, of_pairs, pairs_by_expert, summed, swiglu
from pallas_kernels.router import scores as scores_of
from pallas_kernels.router import top_experts, weights_of
from sharding import collectives
from sharding.expert_parallel import apply_experts
from v4jax.config import LayerSpec
from v4jax.nn.documents import Documents, alignment, sums
from v4jax.nn.layers import (
    HashTable,
    Linear,
    Matrix,
    ModelContext,
    RoutingBias,
    WideLinear,
    copied,
)
from v4jax.nn.placement import entered


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["balance_loss", "counts", "experts"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """What training needs to know of the routing."""

    balance_loss: jax.Array  # scalar; 1 when perfectly balanced, 0 for hash-routed layers; a share
    counts: jax.Array  # [E] int32 tokens sent to each expert, from all devices
    experts: jax.Array  # [B, T, K] int32 of each token, of this device


class Router(nnx.Module):
    """Chooses the experts of each token, and their weights."""

    def __init__(self, context: ModelContext, spec: LayerSpec):
        cfg, moe = context.cfg, context.cfg.moe
        self.gate = WideLinear(context, cfg.embed_dim, moe.num_experts)
        table = functools.partial(
            context.param,
            (cfg.vocab_size, moe.experts_per_token),
            (None, None),
            stored="int",
            init=functools.partial(_init_table, num_experts=moe.num_experts),
            kind=HashTable,
            matrix=False,
        )
        bias = functools.partial(
            context.param,
            (moe.num_experts,),
            (None,),
            stored="f32",
            init=nnx.initializers.zeros,
            kind=RoutingBias,
        )
        self.bias = None if spec.hash_routed else bias()
        self.table = table() if spec.hash_routed else None
        self.moe, self.align, self.numerics = moe, alignment(cfg), context.numerics

    @signatures.shaped
    def __call__(
        self,
        x: Float[jax.Array, "B T D"],
        tokens: Int32[jax.Array, "B T"],
        documents: Documents | None = None,
        chosen: Int32[jax.Array, "B T K"] | None = None,  # see `Choices`
    ) -> tuple[Int32[jax.Array, "B T K"], Float32[jax.Array, "B T K"], RouterStats]:
        """Experts, their weights, and statistics."""
        logits, scale = self.gate(x), self.moe.routed_scale
        if self.table is not None:
            experts = jnp.take(self.table[...], tokens, axis=0)
            weights = weights_of(logits, experts, scale)
        else:
            assert self.bias is not None  # a router has a table or biases
            experts, weights = top_experts(
                logits,
                self.bias[...],
                k=self.moe.experts_per_token,
                scale=scale,
                implementation=self.numerics.implementation,
            )
        if chosen is not None:
            experts = jnp.where(chosen[..., :1] < 0, experts, chosen)
            weights = weights_of(logits, experts, scale)
        scores = scores_of(logits)
        if documents is None:
            return experts, weights, self._stats(scores, experts)
        return experts, weights, self._stats_of_documents(scores, experts, documents)

    def scores(self, x: jax.Array) -> jax.Array:
        """Of every expert, before any bias: [B, T, D] -> [B, T, E] float32."""
        return scores_of(self.gate(x))

    def _stats(self, scores: jax.Array, experts: jax.Array) -> RouterStats:
        """Sequence-wise balance loss (V3 report, eqs. 17-20): sum_e f_e P_e per sequence."""
        num_experts, k = self.moe.num_experts, self.moe.experts_per_token
        counts = jax.vmap(lambda e: jnp.bincount(e.reshape(-1), length=num_experts))(experts)
        total = collectives.psum(jnp.sum(counts, axis=0), "batch", "seq")
        if self.table is not None:
            return RouterStats(jnp.zeros(()), total, experts)
        batch, length = (
            experts.shape[0] * collectives.axis_size("batch"),
            experts.shape[1] * collectives.axis_size("seq"),
        )
        fraction = collectives.psum(counts, "seq") * (num_experts / (k * length))  # [B, E]
        share = jnp.sum(scores / jnp.sum(scores, axis=-1, keepdims=True), axis=1) / length
        return RouterStats(jnp.sum(fraction * share) / batch, total, experts)

    def _stats_of_documents(
        self, scores: jax.Array, experts: jax.Array, documents: Documents
    ) -> RouterStats:
        """The same per document of a row, without padding; a mean over documents."""
        num_experts, k = self.moe.num_experts, self.moe.experts_per_token
        chosen = jnp.sum(jax.nn.one_hot(experts, num_experts), axis=2)  # [B, T, E]
        chosen = jnp.where(documents.valid[..., None], chosen, 0)
        total = collectives.psum(jnp.sum(chosen, axis=(0, 1)), "batch", "seq").astype(jnp.int32)
        if self.table is not None:
            return RouterStats(jnp.zeros(()), total, experts)
        share = scores / jnp.sum(scores, axis=-1, keepdims=True)
        counts = collectives.psum(sums(chosen, documents, self.align), "seq")  # [B, n, E]
        share = sums(share, documents, self.align)
        length = jnp.sum(counts, axis=-1, keepdims=True) / k
        fraction = counts * num_experts / (k * jnp.maximum(length, 1) ** 2)
        count = collectives.psum(jnp.sum(length > 0), "batch")
        balance = jnp.sum(fraction * share) / jnp.maximum(count, 1)
        return RouterStats(balance, total, experts)


class ExpertLinear(Matrix):
    """One matrix of every routed expert: [E, in, out]."""

    def __init__(
        self, context: ModelContext, in_dim: int, out_dim: int, axes: tuple[str | None, str | None]
    ):
        stored = context.cfg.expert_format or "bf16"
        shape = (context.cfg.moe.num_experts, in_dim, out_dim)
        super().__init__(context, shape, ("expert", *axes), stored=stored)

    def __call__(
        self, rows: jax.Array, sizes: jax.Array, numbers: jax.Array | None = None
    ) -> jax.Array:
        """Rows [P, in] that are sorted by expert, `sizes` [E] of each: [P, out].

        Args:
          numbers: [P] of the rows' adapters, where they have their own.
        """
        out = self.numerics.grouped_matmul(rows, self.kernel[...], sizes)
        if numbers is None:
            return self._adapted(rows, out, sizes)
        return self._adapted(rows, out, sizes, numbers)


class MoE(nnx.Module):
    """[B, T, D] -> [B, T, D]"""

    def __init__(self, context: ModelContext, spec: LayerSpec):
        dim, moe = context.cfg.embed_dim, context.cfg.moe
        up, down = ("expert_embed", "expert_dim"), ("expert_dim", "expert_embed")
        self.router = Router(context, spec)
        self.w1 = ExpertLinear(context, dim, moe.expert_dim, up)
        self.w2 = ExpertLinear(context, moe.expert_dim, dim, down)
        self.w3 = ExpertLinear(context, dim, moe.expert_dim, up)
        self.shared = SharedExpert(context)
        self.limit, self.numerics = moe.swiglu_limit, context.numerics

    @signatures.shaped
    def __call__(
        self,
        x: Float[jax.Array, "B T D"],
        tokens: Int32[jax.Array, "B T"],  # for hash routing
        documents: Documents | None = None,
        chosen: Int32[jax.Array, "B T K"] | None = None,  # see `Choices`
    ) -> tuple[Float[jax.Array, "B T D"], RouterStats]:
        """The sum of each token's experts and of the shared one."""
        with jax.named_scope("moe/route"):
            experts, weights, stats = self.router(x, tokens, documents, chosen)
        with jax.named_scope("moe/experts"):
            routed = self._experts(x, experts, weights)
        with jax.named_scope("moe/shared"):
            shared = self.shared(x).astype(jnp.float32)
        return cast(routed.reshape(x.shape) + shared, self.numerics.dtype), stats

    def _experts(self, x: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
        """Tokens x [B, T, D] through K experts each: float32 sums [B * T, D]."""
        k, matrices = experts.shape[-1], (self.w1, self.w3, self.w2)
        of_row = next((m.adapter_of_row for m in matrices if m.adapter is not None), None)
        numbers = None if of_row is None else jnp.repeat(of_row, x.shape[1])
        x = x.reshape(-1, x.shape[-1])
        rounds_late = self.numerics.rounds_few(x.shape[0])
        x = x if rounds_late else self.numerics.round_input(x)
        x, weights = collectives.copy_to((x, weights), "expert_dim")
        implementation = self.numerics.implementation
        out = apply_experts(
            functools.partial(_grouped_experts, self.limit, rounds_late),
            functools.partial(by_expert, implementation=implementation),
            functools.partial(pairs_by_expert, implementation=implementation),
            [_entered(matrix) for matrix in matrices],
            x,
            experts.reshape(-1, k),
            weights.reshape(-1, k),
            self.w1.kernel[...].shape[0],
            labels=numbers,
        )
        return collectives.reduce_from(out, "expert_dim")


def _entered(matrix: ExpertLinear) -> ExpertLinear:
    """With an adapter that takes part in work that is cut over `expert_dim`."""
    if matrix.adapter is None:
        return matrix
    matrix = copied(matrix)
    matrix.adapter = entered(matrix.adapter, "expert_dim")
    return matrix


def _grouped_experts(limit: float, rounds: bool, matrices, x, order, weights, numbers):
    """Rows x [.., T, D] of tokens through the experts' matrices.

    Args:
      rounds: whether rows are not rounded yet.
      weights: [P] of pairs, by place.
      numbers: [T] of the tokens' adapters, where they have their own.
    """
    w1, w3, w2 = matrices
    numerics, position = w1.numerics, order.position.reshape(x.size // x.shape[-1], -1)
    if any(matrix.adapter is not None for matrix in matrices):
        x = x.reshape(-1, x.shape[-1])
        x = numerics.round_input(x) if rounds else x
        rows = of_pairs(x, order.row)
        if numbers is not None:
            numbers = numbers[order.row // position.shape[1]]
        out = _adapted_experts(limit, matrices, rows, order.sizes, weights, numbers)
        return summed(out, position)
    args = (x, w1.kernel[...], w3.kernel[...], order.sizes, weights)
    hidden = numerics.grouped_swiglu(*args, limit=limit, pair=order.row, rounds=rounds)
    return numerics.grouped_matmul(
        hidden, w2.kernel[...], order.sizes, position=position, rounds=True
    )


def _adapted_experts(limit: float, matrices, rows, sizes, row_weights, numbers):
    """Rows sorted by expert, with their routing weights, where a matrix has an adapter."""
    w1, w3, w2 = matrices
    numerics = w1.numerics
    if w1.adapter is None and w3.adapter is None:
        args = (rows, w1.kernel[...], w3.kernel[...], sizes, row_weights)
        hidden = numerics.grouped_swiglu(*args, limit=limit)
    else:
        hidden = swiglu(w1(rows, sizes, numbers), w3(rows, sizes, numbers), limit)
        hidden = cast(row_weights[:, None] * hidden, rows.dtype)
    return w2(numerics.round_input(hidden), sizes, numbers)


class SharedExpert(nnx.Module):
    """The expert that every token passes through."""

    def __init__(self, context: ModelContext):
        dim, hidden = context.cfg.embed_dim, context.cfg.moe.expert_dim
        up, down = ("embed", "expert_dim"), ("expert_dim", "embed")
        self.w1 = Linear(context, dim, hidden, up)
        self.w2 = Linear(context, hidden, dim, down)
        self.w3 = Linear(context, dim, hidden, up)
        self.limit = context.cfg.moe.swiglu_limit

    @signatures.shaped
    def __call__(self, x: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B T D"]:
        """[B, T, D] -> [B, T, D]"""
        x, w1, w3 = collectives.copy_to(x, "expert_dim"), self.w1, self.w3
        if w1.adapter is None and w3.adapter is None:
            hidden = w1.numerics.swiglu(x, w1.kernel[...], w3.kernel[...], self.limit)
        else:
            hidden = cast(swiglu(w1(x), w3(x), self.limit), x.dtype)
        return self.w2(hidden)


def _init_table(key, shape, dtype, out_sharding=None, *, num_experts: int) -> jax.Array:
    """K distinct experts per token id, drawn at random; the released table is unpublished."""
    del dtype
    vocab, k = shape
    noise = jax.random.uniform(key, (vocab, num_experts))
    return jax.lax.top_k(noise, k)[1].astype(jnp.int32)
