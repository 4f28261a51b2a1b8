"""Several LoRA adapters of one model at once: every row of a batch has its own, or none.

    model = with_adapters(base, [first, second])     copies of `base` with an adapter each
    model = choosing(model, jnp.array([0, 2, 1]))    inside a step: no adapter, second, first
    out   = x @ kernel + scale[row] * (x @ A[row]) @ B[row]

A matrix that any of N models has an adapter for holds the factors of all of them in one array: number n
is that of model n, number 0 is zeros, as is what a model does not adapt. Ranks are filled up with zeros
to the largest. Which adapter a row has is an array, so that a step is compiled once, whatever requests
are in it; the engine keeps that array with what else a slot holds of its request
(`v4jax.inference.steps.Slots.adapters`).

Source: arXiv 2310.18547 (Punica), where a kernel gathers the factors; XLA does here.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.formats.quantize import cast
from sharding import collectives
from v4jax.nn.layers import copied
from v4jax.nn.lora import LowRank, matrices
from v4jax.nn.model import Transformer
from v4jax.nn.placement import mesh_of, on_mesh


class LowRankRows(nnx.Module):
    """The adapters of one matrix (or of its stacked layers), of which every row has one."""

    def __init__(self, adapters: Sequence[LowRank | None], dtype: jax.typing.DTypeLike):
        some = next(adapter for adapter in adapters if adapter is not None)
        self.summed = some.summed
        self.a = _together([None if one is None else one.a for one in adapters], -1, dtype)
        self.b = _together([None if one is None else one.b for one in adapters], -2, dtype)
        scales = [0.0, *(0.0 if one is None else one.lora.scale for one in adapters)]
        lead = some.a.get_value().shape[:-2]  # stacked layers
        scale = jnp.broadcast_to(jnp.array(scales, jnp.float32), (*lead, len(scales)))
        self.scale = nnx.Param(scale, stored="f32", axes=(None,), matrix=False)
        self.rows: nnx.Variable | None = nnx.data(None)

    def __call__(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """x [B, T, in] and the matrix's product out [B, T, out], with its row's adapter added."""
        assert self.rows is not None, "`choosing` says which adapters"
        rows = self.rows[...]
        a, b, scale = (factor[...][rows] for factor in (self.a, self.b, self.scale))
        hidden = _product(x, a)
        if self.summed:
            hidden = collectives.reduce_from(hidden, self.summed)
        added = _product(cast(hidden, x.dtype), b)
        return cast(out + scale[:, None, None] * added, out.dtype)


class _Rows(nnx.Variable):
    """[B] int32: the number of each row's adapter."""


def with_adapters(model: Transformer, adapted: Sequence[Transformer]) -> Transformer:
    """A copy of a model, with the same arrays, that holds the adapters of all of these.

    Args:
      adapted: copies of the model with LoRA adapters, by `add_lora` or `load_adapter`.

    Raises:
      ValueError: the model has an adapter already, or one is of experts or of a grouped matrix.
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
            if "expert" in matrix.kernel.axes or matrix.groups > 1:
                what = "routed experts" if matrix.groups == 1 else "a matrix in groups"
                raise ValueError(
                    f"{path}: an adapter of {what} cannot be one of several. Expected adapters of "
                    "attention and shared experts; serve this one alone (load_adapter gives a model "
                    "that has it), or merge it (merge_lora, v4jax convert --adapter)."
                )
            matrix.adapter = LowRankRows(adapters, model.numerics.dtype)
    return model


def choosing(model: Transformer, rows: jax.Array) -> Transformer:
    """The model, whose row b takes the adapter of number `rows[b]`. Inside a step; changes the model."""
    for _, matrix in matrices(model):
        if isinstance(matrix.adapter, LowRankRows):
            lead = matrix.adapter.scale[...].shape[:-1]
            every = jnp.broadcast_to(rows, (*lead, *rows.shape))
            matrix.adapter.rows = _Rows(every, axes=("batch",), stored="int")
    return model


def _product(x: jax.Array, factors: jax.Array) -> jax.Array:
    """x [B, T, in] with each row's factor [B, in, out]: float32, as `pallas_kernels.linear` gives it."""
    return jnp.einsum(
        "bti,bio->bto",
        x,
        factors,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
    )


def _together(
    factors: Sequence[nnx.Variable | None], rank_axis: int, dtype: jax.typing.DTypeLike
) -> nnx.Variable:
    """Factors [..., in, out] as one [..., N + 1, in, out] of a rank; None and number 0: zeros."""
    have = [factor for factor in factors if factor is not None]
    rank = max(factor.get_value().shape[rank_axis] for factor in have)

    def filled(value: jax.Array) -> jax.Array:
        padding = [(0, 0)] * value.ndim
        padding[rank_axis] = (0, rank - value.shape[rank_axis])
        return jnp.pad(value.astype(dtype), padding)

    values = [None if factor is None else filled(factor.get_value()) for factor in factors]
    nothing = jnp.zeros_like(next(value for value in values if value is not None))
    every = [nothing, *(nothing if value is None else value for value in values)]
    axes = (None, *have[0].axes)
    return nnx.Param(jnp.stack(every, axis=-3), stored="f32", axes=axes, matrix=True)
