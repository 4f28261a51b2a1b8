"""Weights as the kernels see them: what is copied to VMEM, and how it becomes matrices there.

Packed FP4. A 32-bit word of packed bytes (`quantize.py` says how) has the codes of four rows of a
block's first half and of four of its second. Moving bits makes e5m2 of them, four to a word: six
operations for eight weights of each of 1024 positions. FP8 is read as the format the chip converts
best. Factors of both go into the scale (`tpu_formats.py`).

Scales become one row per group of inputs (32 for FP4, 128 for FP8, whose scales are repeated along
outputs beforehand: 3 % of the weights' bytes).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.formats import tpu_formats
from pallas_kernels.formats.quantize import (
    FP4_WEIGHT_BLOCK,
    FP8_WEIGHT_BLOCK,
    QuantizedArray,
    float32_scale,
    fp4_block,
)


@dataclasses.dataclass(frozen=True)
class Format:
    """How a weight is stored, and what a kernel makes of it."""

    kind: str  # "float", "fp8" or "fp4"
    num_inputs: int
    num_outputs: int
    dtype: jnp.dtype  # of the products' operands
    value_bytes: float  # of a weight in HBM, scale not counted
    read_as: jnp.dtype | None = None  # what packed values are in registers
    scale_dtype: jnp.dtype | None = None  # what they are multiplied by their scales in

    @property
    def group(self) -> int:
        """Inputs of a scale (of a float weight all of them)."""
        return {"float": self.num_inputs, "fp4": FP4_WEIGHT_BLOCK[0], "fp8": FP8_WEIGHT_BLOCK[0]}[
            self.kind
        ]

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
    """The format of a weight [..., in, out] that meets rows of `dtype`."""
    dtype = jnp.dtype(dtype)
    *_, num_inputs, num_outputs = w.shape
    if not isinstance(w, QuantizedArray):
        return Format("float", num_inputs, num_outputs, dtype, w.dtype.itemsize)
    powers = w.scale.dtype == jnp.float8_e8m0fnu
    fits_bf16 = powers and dtype == jnp.bfloat16
    scale_dtype = tpu_formats.product_dtype(chip) if fits_bf16 else jnp.dtype(jnp.float32)
    if w.is_fp4:
        read_as = tpu_formats.E5M2
        return Format("fp4", num_inputs, num_outputs, dtype, 0.5, read_as, scale_dtype)
    read_as = tpu_formats.best_e4m3(chip)
    return Format("fp8", num_inputs, num_outputs, dtype, 1, read_as, scale_dtype)


def unsupported(w: jax.Array | QuantizedArray) -> str | None:
    """Why the kernels cannot take this weight."""
    if w.shape[-2] % 128 or w.shape[-1] % 128:
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
    scale = jnp.repeat(float32_scale(w), FP8_WEIGHT_BLOCK[1], axis=-1)
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
    """Scales [groups, out] as the 32-bit rows that `unpack` takes."""
    assert fmt.read_as is not None and fmt.scale_dtype is not None  # it is packed
    if scale.dtype == jnp.float8_e8m0fnu:  # an exponent, as it stands in float32
        bits = pltpu.bitcast(scale, jnp.uint8).astype(jnp.uint32) << 23
    else:
        bits = jax.lax.bitcast_convert_type(scale, jnp.uint32)
    return tpu_formats.scale_words(bits, fmt.read_as, fmt.scale_dtype)


def unpack(fmt: Format, values_ref, rows_ref, first, num_inputs: int, columns) -> jax.Array:
    """Inputs [first, first + num_inputs) and `columns` of a packed weight as a matrix.

    Args:
      rows_ref: what `scale_rows` gave.
      first: a multiple of `fmt.block`; may be traced.
    """
    assert fmt.scale_dtype is not None  # it is packed
    parts = []
    num_groups = num_inputs // fmt.group
    rows = rows_ref[
        pl.ds(_aligned(first // fmt.group, fmt.block // fmt.group), num_groups), columns
    ]
    for group, values in enumerate(codes(fmt, values_ref, first, num_inputs, columns)):
        row = rows[group : group + 1]
        parts.append(tpu_formats.scaled(values, row, fmt.scale_dtype).astype(fmt.dtype))
    return jnp.concatenate(parts)


def codes(fmt: Format, values_ref, first, num_inputs: int, columns) -> list[jax.Array]:
    """The values of `unpack` as FP8, before scaling, group by group."""
    if fmt.kind == "fp8":
        block = values_ref[pl.ds(_aligned(first, fmt.block), num_inputs), columns]
        assert fmt.read_as is not None
        blocks = [tpu_formats.read_e4m3(block, fmt.read_as)]
    else:
        half, blocks = fmt.block // 2, []
        for block in range(num_inputs // fmt.block):
            row = _aligned(first // 2 + block * half, half)
            packed = pltpu.bitcast(values_ref[pl.ds(row, half), columns], jnp.uint32)
            blocks += tpu_formats.e5m2_of_codes(packed)
    return [
        block[i : i + fmt.group] for block in blocks for i in range(0, block.shape[0], fmt.group)
    ]


def dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int] = (1, 0)) -> jax.Array:
    """float32 product; float32 operands are not rounded."""
    return jax.lax.dot_general(
        *(a, b, ((contracted[:1], contracted[1:]), ((), ()))),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _aligned(row, multiple: int):
    return row if isinstance(row, int) else pl.multiple_of(row, multiple)
