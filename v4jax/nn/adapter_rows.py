"""Several LoRA adapters of one model at once: every row of a batch has its own, or none.

    model = with_adapters(base, [first, second])     copies of `base` with an adapter each
    model = choosing(model, jnp.array([0, 2, 1]))    inside a step: no adapter, second, first
    out   = x @ kernel + scale[row] * (x @ A[row]) @ B[row]

A matrix that any of N models has an adapter for holds the factors of all of them in one array: number n
is that of model n, number 0 is zeros, as is what a model does not adapt. Ranks are filled up with zeros
to the largest. Of routed experts, which see rows of many sequences, the factors lie side by side, and a
row keeps what those of its own adapter give: its number goes with it to the expert, over a mesh too
(`sharding.expert_parallel`). Which adapter a row has is an array, so that a step is compiled once,
whatever requests are in it; the engine keeps that array with what else a slot holds of its request
(`v4jax.inference.steps.Slots.adapters`).

Source: arXiv 2310.18547 (Punica), where a kernel gathers the factors; XLA does here.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.formats.quantize import cast
from pallas_kernels.grouped_matmul import grouped_matmul
from sharding import collectives
from v4jax.nn.layers import copied
from v4jax.nn.lora import LowRank, matrices
from v4jax.nn.model import Transformer
from v4jax.nn.placement import mesh_of, on_mesh


class _Several(nnx.Module):
    """The adapters of one matrix (or of its stacked layers), of which every row has one.

    Attributes:
      rows: [B] numbers of the rows' adapters, inside a step; None: nothing has been chosen.
    """

    a: nnx.Variable
    b: nnx.Variable

    def __init__(self, adapters: Sequence[LowRank | None]):
        some = next(adapter for adapter in adapters if adapter is not None)
        scales = [0.0, *(0.0 if one is None else one.lora.scale for one in adapters)]
        value = some.a.get_value()
        lead = value.shape[: value.ndim - len(some.a.axes)]  # stacked layers
        scale = jnp.broadcast_to(jnp.array(scales, jnp.float32), (*lead, len(scales)))
        self.scale = nnx.Param(scale, stored="f32", axes=(None,), matrix=False)
        self.rows: nnx.Variable | None = nnx.data(None)


class LowRankRows(_Several):
    """Of a dense matrix, or of one in groups, whose A has columns for each group."""

    def __init__(self, adapters: Sequence[LowRank | None], dtype: jax.typing.DTypeLike):
        super().__init__(adapters)
        some = next(adapter for adapter in adapters if adapter is not None)
        self.summed, self.groups = some.summed, some.groups
        every_a = [None if one is None else one.a for one in adapters]
        every_b = [None if one is None else one.b for one in adapters]
        self.a = _stacked(every_a, -1, dtype, groups=self.groups)
        self.b = _stacked(every_b, -2, dtype)

    def __call__(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """x [B, T, in] and the matrix's product out [B, T, out], with its row's adapter added."""
        assert self.rows is not None, "`choosing` says which adapters"
        rows = self.rows[...]
        a, b, scale = (factor[...][rows] for factor in (self.a, self.b, self.scale))
        groups = self.groups // (collectives.axis_size("heads") if self.groups > 1 else 1)
        hidden = _product(x, a, groups)
        if self.summed:
            hidden = collectives.reduce_from(hidden, self.summed)
        added = _product(cast(hidden, x.dtype), b, groups)
        return cast(out + scale[:, None, None] * added, out.dtype)


class LowRankExpertRows(_Several):
    """Of a matrix of every routed expert. Columns of A, and rows of B, of all adapters side by side.

    An expert's rows are multiplied with all of them, and keep what comes of their own adapter's: they
    stay sorted by expert alone.
    """

    def __init__(self, adapters: Sequence[LowRank | None], dtype: jax.typing.DTypeLike):
        super().__init__(adapters)
        have = [(number, one) for number, one in enumerate(adapters, 1) if one is not None]
        self.a = _joined([one.a for _, one in have], -1, dtype)
        self.b = _joined([one.b for _, one in have], -2, dtype)
        # The number of the adapter of each column.
        self.owners = tuple(number for number, one in have for _ in range(one.lora.rank))

    def __call__(
        self, x: jax.Array, out: jax.Array, sizes: jax.Array, numbers: jax.Array | None = None
    ) -> jax.Array:
        """x [P, in] sorted by expert, `sizes` [E] of each, and `numbers` [P] of the rows' adapters."""
        assert numbers is not None, "`choosing` says which adapters"
        hidden = grouped_matmul(x, self.a[...], sizes)
        hidden = jnp.where(numbers[:, None] == jnp.array(self.owners), hidden, 0)
        added = grouped_matmul(hidden, self.b[...], sizes).astype(jnp.float32)
        return cast(out + self.scale[...][numbers][:, None] * added, out.dtype)


class _Rows(nnx.Variable):
    """[B] int32: the number of each row's adapter."""


def with_adapters(model: Transformer, adapted: Sequence[Transformer]) -> Transformer:
    """A copy of a model, with the same arrays, that holds the adapters of all of these.

    Args:
      adapted: copies of the model with LoRA adapters, by `add_lora` or `load_adapter`.

    Raises:
      ValueError: the model has an adapter already.
    """
    model = copied(model)
    others = [dict(matrices(one)) for one in adapted]
    with on_mesh(mesh_of(model)):
        for path, matrix in matrices(model):
            if matrix.adapter is not None:
                raise ValueError(
                    f"{path} has an adapter already: merge it (merge_lora), or give the model without."
                )
            found = [matrices_of[path].adapter for matrices_of in others]
            adapters = [one if isinstance(one, LowRank) else None for one in found]
            if all(adapter is None for adapter in adapters):
                continue
            kind = LowRankExpertRows if "expert" in matrix.kernel.axes else LowRankRows
            matrix.adapter = kind(adapters, model.numerics.dtype)
    return model


def choosing(model: Transformer, rows: jax.Array) -> Transformer:
    """The model, whose row b takes the adapter of number `rows[b]`. Inside a step; changes the model."""
    for _, matrix in matrices(model):
        if isinstance(matrix.adapter, _Several):
            lead = matrix.adapter.scale[...].shape[:-1]
            every = jnp.broadcast_to(rows, (*lead, *rows.shape))
            matrix.adapter.rows = _Rows(every, axes=("batch",), stored="int")
    return model


def _product(x: jax.Array, factors: jax.Array, groups: int) -> jax.Array:
    """x [B, T, groups * in] with each row's factor [B, in, groups * out], group by group.

    float32, as `pallas_kernels.linear` gives it.
    """
    product = jnp.einsum(
        "btgi,bigo->btgo",
        x.reshape(*x.shape[:-1], groups, -1),
        factors.reshape(*factors.shape[:-1], groups, -1),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
    )
    return product.reshape(*x.shape[:-1], -1)


def _stacked(
    factors: Sequence[nnx.Variable | None],
    rank_axis: int,
    dtype: jax.typing.DTypeLike,
    groups: int = 1,
) -> nnx.Variable:
    """Factors [..., in, out] as one [..., N + 1, in, out] of a rank; None and number 0: zeros.

    Args:
      groups: parts of the axis of ranks, each of which is filled up.
    """
    have = [factor for factor in factors if factor is not None]
    rank = max(factor.get_value().shape[rank_axis] for factor in have) // groups

    def filled(value: jax.Array) -> jax.Array:
        shape, axis = value.shape, value.ndim + rank_axis
        apart = value.astype(dtype).reshape(*shape[:axis], groups, -1, *shape[axis + 1 :])
        padding = [(0, 0)] * apart.ndim
        padding[axis + 1] = (0, rank - apart.shape[axis + 1])
        return jnp.pad(apart, padding).reshape(*shape[:axis], groups * rank, *shape[axis + 1 :])

    values = [None if factor is None else filled(factor.get_value()) for factor in factors]
    nothing = jnp.zeros_like(next(value for value in values if value is not None))
    every = [nothing, *(nothing if value is None else value for value in values)]
    axes = (None, *have[0].axes)
    return nnx.Param(jnp.stack(every, axis=-3), stored="f32", axes=axes, matrix=True)


def _joined(
    factors: Sequence[nnx.Variable], rank_axis: int, dtype: jax.typing.DTypeLike
) -> nnx.Variable:
    """Factors [..., E, in, out] side by side along their ranks."""
    values = [factor.get_value().astype(dtype) for factor in factors]
    joined = jnp.concatenate(values, axis=rank_axis)
    return nnx.Param(joined, stored="f32", axes=factors[0].axes, matrix=True)
