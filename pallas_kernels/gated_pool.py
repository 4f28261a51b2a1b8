"""Gated pooling: the weighted mean of a window of token rows, with one softmax per channel.

    pooled[d] = sum_r exp(gate[r, d]) * value[r, d] / sum_r exp(gate[r, d])

Both compressors of DeepSeek-V4 are this operation (report eqs. 9-14). It is kept in three parts,
like a streaming softmax, because a window is not always seen at once: a CSA entry joins two windows
(the previous one through other channels), and while decoding a window fills one token at a time.

    pool_windows   rows of each window -> partial sums of it
    Pool.join      partial sums of two disjoint sets of rows -> partial sums of their union
    Pool.mean      partial sums -> pooled value

All of it is float32. An empty window has `weight` zero and joins as nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

_LOWEST = -1e30  # finite, so that the difference of two empty windows is not NaN


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["peak", "weight", "total"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Pool:
    """Partial sums of a gated mean. All float32, any common shape."""

    peak: jax.Array  # largest gate seen
    weight: jax.Array  # sum of exp(gate - peak)
    total: jax.Array  # sum of exp(gate - peak) * value

    @staticmethod
    def empty(shape: tuple[int, ...]) -> "Pool":
        """The partial sums of no rows."""
        # Three buffers: a cache is donated, and a buffer can be donated once.
        peak = jnp.full(shape, _LOWEST, jnp.float32)
        return Pool(peak, jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

    def join(self, other: "Pool") -> "Pool":
        """The partial sums of the rows of both."""
        peak = jnp.maximum(self.peak, other.peak)
        mine, theirs = jnp.exp(self.peak - peak), jnp.exp(other.peak - peak)
        return Pool(
            peak,
            mine * self.weight + theirs * other.weight,
            mine * self.total + theirs * other.total,
        )

    def mean(self) -> jax.Array:
        """The pooled value; zero where no row was seen."""
        return self.total / jnp.where(self.weight == 0, 1.0, self.weight)


def pool_windows(
    value: jax.Array,  # [B, S, R, F]
    gate: jax.Array,  # [B, S, R, F]
    bias: jax.Array,  # [R, F] added to the gates of each window
    valid: jax.Array | None = None,  # [B, S, R] bool; rows that count (default: all)
) -> Pool:  # of [B, S, F]
    """Partial sums of S windows of R token rows each. Differentiable.

    Raises:
      ValueError: shapes do not agree.
    """
    if value.ndim != 4 or value.shape != gate.shape or bias.shape != value.shape[2:]:
        raise ValueError(
            f"value {value.shape} and gate {gate.shape} must both be [B, S, R, F] and bias "
            f"{bias.shape} [R, F]."
        )
    gate = gate.astype(jnp.float32) + bias
    if valid is not None:
        gate = jnp.where(valid[..., None], gate, _LOWEST)
    peak = jnp.max(gate, axis=2)
    weights = jnp.exp(gate - peak[:, :, None])
    if valid is not None:  # a window without any valid row has exp(0) everywhere
        weights = jnp.where(valid[..., None], weights, 0.0)
    return Pool(
        peak, jnp.sum(weights, axis=2), jnp.sum(weights * value.astype(jnp.float32), axis=2)
    )
