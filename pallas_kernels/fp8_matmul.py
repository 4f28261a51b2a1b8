"""Products of e4m3 by e4m3 with block scales, as the released FP8 kernels form them.

    out[t, n] = sum_k scale_x[t, k] * scale_w[k, n / 128] * sum_{i in block k} x8[t, i] * w8[i, n]

x is rounded to e4m3 with a scale per 128 inputs, w is held that way with one per 128 x 128. Both meet
the dot as they are and scales go to partial products: nothing is unpacked. Plain XLA: where the
matrix units take FP8 (TPU v7x) they get it, elsewhere the compiler widens the factors, which gives
the same products. Sums are float32, so the result differs from that of unpacked factors in the order
of the sum only.

Source: released `inference/kernel.py` (fp8_gemm).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.formats.quantize import FP8_WEIGHT_BLOCK, QuantizedArray, float32_scale
from pallas_kernels.formats.quantize_rows import quantize_rows


@jax.custom_vjp
def fp8_matmul(
    x: jax.Array,  # [..., in] float32 or bfloat16
    w: QuantizedArray,  # [in, out] in FP8, blocks of 128 x 128
) -> jax.Array:  # [..., out] float32
    """x rounded to e4m3, times w. The gradient of x is that of unrounded x; w has none.

    Raises:
      ValueError: w is no FP8 weight.
    """
    if not isinstance(w, QuantizedArray) or w.is_fp4 or w.block != FP8_WEIGHT_BLOCK:
        kind = f"float {w.dtype}" if not isinstance(w, QuantizedArray) else f"blocks of {w.block}"
        raise ValueError(
            f"w {w.shape} in {kind}: FP8 products need weights in e4m3 with blocks of "
            f"{FP8_WEIGHT_BLOCK}. Expand FP4 with quantize.expand_to_fp8, or choose another recipe."
        )
    block = FP8_WEIGHT_BLOCK[0]
    rows = x.reshape(-1, x.shape[-1])
    codes, scale = quantize_rows(rows, "fp8", block)
    scale = jax.lax.bitcast_convert_type(scale.astype(jnp.int32) << 23, jnp.float32)
    padding = -x.shape[-1] % block
    codes, values = (
        jnp.pad(codes, [(0, 0), (0, padding)]),
        jnp.pad(w.values, [(0, padding), (0, 0)]),
    )
    w_scale = jnp.repeat(float32_scale(w), block, axis=1)[:, : w.shape[1]]

    def add(k, total):
        part = jnp.matmul(
            jax.lax.dynamic_slice_in_dim(codes, k * block, block, axis=1),
            jax.lax.dynamic_slice_in_dim(values, k * block, block, axis=0),
            preferred_element_type=jnp.float32,
        )
        return total + part * (scale[:, k, None] * w_scale[k])

    total = jnp.zeros((rows.shape[0], w.shape[1]), jnp.float32)
    total = jax.lax.fori_loop(0, w.scale.shape[0], add, total)
    return total.reshape(*x.shape[:-1], w.shape[1])


def _forward(x, w):
    return fp8_matmul(x, w), (jnp.zeros((0,), x.dtype), w)


def _backward(residuals, d_out):
    like, w = residuals
    wide = jax.lax.Precision.HIGHEST
    return jnp.matmul(d_out, w.dequantize().T, precision=wide).astype(like.dtype), None


fp8_matmul.defvjp(_forward, _backward)
