"""FP4 and FP8 values in the registers of a TPU kernel, on their way to bfloat16 or float32.

What a conversion costs depends on the format, so values are read as the format that costs least,
and what this multiplies them by goes into their scales (`EXPONENTS`):

e2m1 codes become e5m2 by moving bits. It holds 2**-14 times every value (code 1, one half, becomes
a subnormal).

e4m3fn is read as e4m3b11fnuz, the same bits with another bias: 2**-4 times the value. Chips before
v7x convert it in three operations a register of bfloat16, and e4m3fn in fifteen (v7x: in 29 and
two). Its minus zero is NaN, so minus zeros become zeros first.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips

E5M2 = jnp.dtype(jnp.float8_e5m2)
E4M3 = jnp.dtype(jnp.float8_e4m3fn)
E4M3B11 = jnp.dtype(jnp.float8_e4m3b11fnuz)
EXPONENTS = {E5M2: 14, E4M3: 0, E4M3B11: 4}  # log2 of what a value read as this has lost


def e5m2_of_codes(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Words [r, n] of bytes of two e2m1 codes (`quantize.join_codes`) -> e5m2 [4 r, n], twice."""
    first = packed & jnp.uint32(0x8E8E8E8E)
    second = packed << 7 & jnp.uint32(0x80808080) | packed >> 3 & jnp.uint32(0x0E0E0E0E)
    return pltpu.bitcast(first, E5M2), pltpu.bitcast(second, E5M2)


def product_dtype(chip: str) -> jnp.dtype:
    """In which a chip multiplies values by their scales in the least time. Exact in both."""
    return jnp.dtype(jnp.bfloat16 if chips.CHIPS[chip].vector_bfloat16 else jnp.float32)


def best_e4m3(chip: str) -> jnp.dtype:
    """What e4m3fn is read as on a chip."""
    return E4M3 if chips.CHIPS[chip].native_e4m3 else E4M3B11


def read_e4m3(values: jax.Array, read_as: jnp.dtype) -> jax.Array:
    """Finite e4m3fn [r, n] as `E4M3` or `E4M3B11`."""
    if read_as == E4M3:
        return values
    words = pltpu.bitcast(values, jnp.uint32)
    is_nonzero = (words & jnp.uint32(0x7F7F7F7F)) + jnp.uint32(0x7F7F7F7F)  # in the sign bits
    return pltpu.bitcast(words & (is_nonzero | jnp.uint32(0x7F7F7F7F)), read_as)


def scale_words(bits: jax.Array, read_as: jnp.dtype, dtype: jax.typing.DTypeLike) -> jax.Array:
    """float32 bits of the scales of values that are read as something -> what `scaled` takes.

    For bfloat16, scales are powers of two, and a word holds one twice.
    """
    bits = bits + jnp.uint32(EXPONENTS[read_as] << 23)
    return bits | bits >> 16 if jnp.dtype(dtype) == jnp.bfloat16 else bits


def scaled(values: jax.Array, words: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """FP8 values [r, n] times the scales of a row [1, n] of `scale_words`, in `dtype`."""
    if jnp.dtype(dtype) == jnp.bfloat16:  # two rows to a word
        words = jnp.broadcast_to(words, (values.shape[0] // 2, words.shape[1]))
    return values.astype(dtype) * pltpu.bitcast(words, dtype)
