"""Float weights with the values that the released format would hold, for training with the rounding in
the loop (docs/low_precision.md).
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.formats.quantize import (
    FP4_WEIGHT_BLOCK,
    FP8_WEIGHT_BLOCK,
    cast,
    quantize_weight,
)

BLOCKS = {"fp8": FP8_WEIGHT_BLOCK, "fp4": FP4_WEIGHT_BLOCK}  # [in, out] that share a scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rounded(value: jax.Array, stored: str) -> jax.Array:
    """A weight with the values that its released format would hold, in its own dtype.

    The gradient is that of the identity (the straight-through estimator).

    Args:
      value: [..., in, out]; "bf16", "f32" and "int" take any shape, and the latter two round nothing.
    """
    match stored:
        case "f32" | "int":
            return value
        case "bf16":
            return cast(value, jnp.bfloat16).astype(value.dtype)
        case _:
            # Of a layer's part of stacked weights: without this XLA rounds the whole stack before the loop.
            value = jax.lax.optimization_barrier(value)
            return quantize_weight(value, stored).dequantize(value.dtype)


def _forward(value: jax.Array, stored: str) -> tuple[jax.Array, None]:
    return rounded(value, stored), None


def _backward(stored: str, _: None, d_out: jax.Array) -> tuple[jax.Array]:
    del stored
    return (d_out,)


rounded.defvjp(_forward, _backward)
