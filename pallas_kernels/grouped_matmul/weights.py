"""Weights as the kernels see them: what is copied to VMEM, and how it becomes matrices there.

Packed FP4. A 32-bit word of packed bytes (`quantize.py` says how) has the codes of four rows of a
block's first half and of four of its second. Moving bits makes e5m2 of them, four to a word, times
2**-14 (code 1, one half, becomes an e5m2 subnormal): six operations for eight weights of each of
1024 positions. The factor 2**14 goes into the scale.

Scales become one row per group of inputs (32 for FP4, 128 for FP8, whose scales are repeated along
outputs beforehand: 3 % of the weights' bytes). For bfloat16 and power-of-two scales a row is kept
as 32-bit words that hold the scale twice, so that spreading a word over eight sublanes gives a
bfloat16 register of sixteen rows without a conversion.

FP8 (e4m3fn) is read as e4m3b11fnuz: the same bits times 2**-4, which chips before v7x convert in
three operations instead of fifteen. Only minus zero, there a NaN, becomes zero first.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantize import FP8_WEIGHT_BLOCK, QuantizedArray, fp4_block

E5M2_EXPONENT = 14
BF16_SCALES = ("v6e", "v7x")  # chips that multiply in bfloat16
E4M3B11_EXPONENT = 4


@dataclasses.dataclass(frozen=True)
class Format:
    """How a weight is stored, and what a kernel makes of it."""

    kind: str  # "float", "fp8" or "fp4"
    num_inputs: int
    num_outputs: int
    dtype: jnp.dtype  # of the products' operands
    value_bytes: float  # of a weight in HBM, scale not counted
    scales_in_bf16: bool
    is_e4m3b11: bool = False  # e4m3 is read as e4m3b11fnuz

    @property
    def group(self) -> int:
        """Inputs of a scale (of a float weight all of them)."""
        return {"float": self.num_inputs, "fp4": 32, "fp8": FP8_WEIGHT_BLOCK[0]}[self.kind]

    @property
    def block(self) -> int:
        """Inputs that are unpacked together."""
        if self.kind == "fp4":
            return fp4_block(self.num_inputs)
        return 256 if self.num_inputs % 256 == 0 else self.num_inputs

    @property
    def is_packed(self) -> bool:
        """Whether it has scales."""
        return self.kind != "float"

    def vmem_bytes(self) -> float:
        """Of a weight in a block: two buffers, and scale rows and the matrix if it is packed."""
        size = 2 * self.value_bytes
        if self.is_packed:
            size += (4 + 2 * (1 if self.kind == "fp4" else 4)) / self.group + self.dtype.itemsize
        return size


def format_of(w: jax.Array | QuantizedArray, dtype, chip: str) -> Format:
    """The format of a weight [E, in, out] that meets rows of `dtype`."""
    dtype = jnp.dtype(dtype)
    if not isinstance(w, QuantizedArray):
        return Format("float", *w.shape[1:], dtype, w.dtype.itemsize, False)
    powers = w.scale.dtype == jnp.float8_e8m0fnu
    in_bf16 = powers and dtype == jnp.bfloat16 and chip in BF16_SCALES
    if w.is_fp4:
        return Format("fp4", *w.shape[1:], dtype, 0.5, in_bf16)
    return Format("fp8", *w.shape[1:], dtype, 1, in_bf16, is_e4m3b11=chip != "v7x")


def unsupported(w: jax.Array | QuantizedArray) -> str | None:
    """Why the kernels cannot take this weight."""
    if w.shape[1] % 128 or w.shape[2] % 128:
        return f"weights {w.shape} must have multiples of 128 inputs and outputs"
    if not isinstance(w, QuantizedArray):
        known = w.dtype in (jnp.float32, jnp.bfloat16)
        return None if known else f"weights must be float32 or bfloat16, not {w.dtype}"
    if w.is_fp4:
        if w.scale.dtype != jnp.float8_e8m0fnu:
            return f"scales of FP4 weights must be float8_e8m0fnu, not {w.scale.dtype}"
    elif w.block != FP8_WEIGHT_BLOCK:
        return f"FP8 weights must have blocks of {FP8_WEIGHT_BLOCK}, not {w.block}"
    return None


def operands(w: jax.Array | QuantizedArray) -> list[jax.Array]:
    """Arrays [E, ., out] the kernels read."""
    if not isinstance(w, QuantizedArray):
        return [w]
    if w.is_fp4:
        return [w.values, w.scale]
    scale = jnp.repeat(w.scale.astype(jnp.float32), FP8_WEIGHT_BLOCK[1], axis=-1)
    return [w.values, scale]


def rows_of_operands(fmt: Format, num_inputs: int) -> list[int]:
    """How many rows of each operand have `num_inputs` inputs."""
    match fmt.kind:
        case "fp4":
            return [num_inputs // 2, num_inputs // fmt.group]
        case "fp8":
            return [num_inputs, num_inputs // fmt.group]
        case _:
            return [num_inputs]


def scale_rows(fmt: Format, scale: jax.Array) -> jax.Array:
    """Scales [groups, out] as the 32-bit rows that `unpack` spreads."""
    bits = jax.lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint32)
    exponent = E5M2_EXPONENT if fmt.kind == "fp4" else E4M3B11_EXPONENT * fmt.is_e4m3b11
    bits = bits + (exponent << 23)
    if fmt.scales_in_bf16:
        bits = bits | bits >> 16
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def unpack(fmt: Format, values_ref, rows_ref, first, num_inputs: int, columns) -> jax.Array:
    """Inputs [first, first + num_inputs) and `columns` of a packed weight as a matrix.

    Args:
      rows_ref: what `scale_rows` gave.
      first: a multiple of `fmt.block`; may be traced.
    """
    parts = []
    num_groups = num_inputs // fmt.group
    rows = rows_ref[
        pl.ds(_aligned(first // fmt.group, fmt.block // fmt.group), num_groups), columns
    ]
    for group, values in enumerate(codes(fmt, values_ref, first, num_inputs, columns)):
        row = rows[group : group + 1]
        if not fmt.scales_in_bf16:
            parts.append((values.astype(jnp.float32) * row).astype(fmt.dtype))
            continue
        pairs = jnp.broadcast_to(row, (fmt.group // 2, row.shape[1]))
        parts.append(values.astype(jnp.bfloat16) * pltpu.bitcast(pairs, jnp.bfloat16))
    return jnp.concatenate(parts)


def codes(fmt: Format, values_ref, first, num_inputs: int, columns) -> list[jax.Array]:
    """The values of `unpack` before scaling, FP8, group by group."""
    if fmt.kind == "fp8":
        block = values_ref[pl.ds(_aligned(first, fmt.block), num_inputs), columns]
        blocks = [_e4m3b11(block) if fmt.is_e4m3b11 else block]
    else:
        half, blocks = fmt.block // 2, []
        for block in range(num_inputs // fmt.block):
            row = _aligned(first // 2 + block * half, half)
            blocks += _halves(values_ref[pl.ds(row, half), columns])
    return [
        block[i : i + fmt.group] for block in blocks for i in range(0, block.shape[0], fmt.group)
    ]


def _e4m3b11(values: jax.Array) -> jax.Array:
    """Finite e4m3fn -> e4m3b11fnuz, times 2**-4."""
    word = pltpu.bitcast(values, jnp.uint32)
    is_nonzero = (word & jnp.uint32(0x7F7F7F7F)) + jnp.uint32(0x7F7F7F7F)  # in the sign bits
    word = word & (is_nonzero | jnp.uint32(0x7F7F7F7F))
    return pltpu.bitcast(word, jnp.float8_e4m3b11fnuz)


def _halves(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint8 [r, n] of two codes each -> e5m2 [r, n] of the first ones and of the second."""
    word = pltpu.bitcast(packed, jnp.uint32)
    first = word & jnp.uint32(0x8E8E8E8E)
    second = ((word << 7) & jnp.uint32(0x80808080)) | ((word >> 3) & 0x0E0E0E0E)
    return pltpu.bitcast(first, jnp.float8_e5m2), pltpu.bitcast(second, jnp.float8_e5m2)


def dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int] = (1, 0)) -> jax.Array:
    """float32 product; float32 operands are not rounded."""
    return jax.lax.dot_general(
        *(a, b, ((contracted[:1], contracted[1:]), ((), ()))),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _aligned(row, multiple: int):
    return row if isinstance(row, int) else pl.multiple_of(row, multiple)
