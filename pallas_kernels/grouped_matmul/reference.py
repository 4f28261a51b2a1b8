"""The specification: every group by itself, in float32. Materialises one product per expert."""

import jax
import jax.numpy as jnp

from pallas_kernels.formats.quantize import QuantizedArray


def dense_weight(w: jax.Array | QuantizedArray) -> jax.Array:
    """float32 [..., in, out] of a weight in any storage."""
    return w.dequantize() if isinstance(w, QuantizedArray) else w.astype(jnp.float32)


def expert_of_row(group_sizes: jax.Array, num_rows: int) -> jax.Array:
    """[num_rows] int32: which group each row belongs to."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(num_rows), side="right")


def grouped_matmul_reference(x, w, group_sizes):
    """See `ops.grouped_matmul`."""
    w = dense_weight(w)
    out = jnp.einsum("pk,ekn->epn", x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
    expert = expert_of_row(group_sizes, x.shape[0])
    own = jnp.take_along_axis(out, expert[None, :, None], axis=0, mode="fill", fill_value=0)
    return own[0].astype(x.dtype)  # zero past the last expert's rows


def swiglu(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    """silu(min(gate, limit)) * clip(up, -limit, limit), in float32."""
    gate = jnp.minimum(gate.astype(jnp.float32), limit)
    return jax.nn.silu(gate) * jnp.clip(up.astype(jnp.float32), -limit, limit)


def grouped_swiglu_reference(x, w_gate, w_up, group_sizes, row_weights, limit):
    """See `ops.grouped_swiglu`."""
    gate = grouped_matmul_reference(x, w_gate, group_sizes)
    up = grouped_matmul_reference(x, w_up, group_sizes)
    return (row_weights[:, None] * swiglu(gate, up, limit)).astype(x.dtype)
