"""The gradient of rows that were multiplied by a packed weight, for TPU. The weight is read packed.

    d_x[:, inputs of g] = d_out[:, columns of g] @ w[:, columns of g].T      g = 0 .. groups-1

Grid: (groups, blocks of inputs, tiles of rows, blocks of columns); the last adds up in VMEM. Every tile of
rows unpacks the weight again, which is less work than its products.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.formats.quantize import FP8_WEIGHT_BLOCK, QuantizedArray, float32_scale
from pallas_kernels.grouped_matmul import block_sizes, weights
from pallas_kernels.grouped_matmul.weights import Format
from pallas_kernels.linear.tpu import own_scale

ROWS = 1024  # of a tile
BLOCKS = (1024, 512, 384, 256, 128)  # of inputs and of columns
SUBLANES = 8


def row_gradient(
    d_out: jax.Array,  # [P, groups * out]
    w: QuantizedArray,  # [in, groups * out]
    groups: int,
    chip: str,
    *,
    interpret: bool = False,
) -> jax.Array:  # [P, groups * in] in the dtype of d_out
    """Runs the kernel, for weights that `tpu.unsupported` has nothing against."""
    fmt = weights.format_of(w, d_out.dtype, chip)
    num_rows, num_inputs, num_columns = len(d_out), fmt.num_inputs, fmt.num_outputs // groups
    inputs = largest_block(num_inputs, fmt.block)
    columns = largest_block(num_columns, FP8_WEIGHT_BLOCK[1])
    rows = min(ROWS, -(-num_rows // SUBLANES) * SUBLANES)
    column_blocks, input_blocks = num_columns // columns, num_inputs // inputs
    scale_rows = inputs // fmt.group
    scale = w.scale
    scale_spec = pl.BlockSpec((scale_rows, columns), lambda g, i, t, k: (i, g * column_blocks + k))
    if fmt.kind == "fp8":  # a block's rows of them, of all columns
        scale = float32_scale(w).reshape(input_blocks, scale_rows, -1)
        scale_spec = pl.BlockSpec((None, *scale.shape[1:]), lambda g, i, t, k: (i, 0, 0))
    value_rows = w.values.shape[0] // input_blocks
    return pl.pallas_call(
        functools.partial(_kernel, fmt, column_blocks),
        grid=(groups, input_blocks, pl.cdiv(num_rows, rows), column_blocks),
        in_specs=[
            pl.BlockSpec((rows, columns), lambda g, i, t, k: (t, g * column_blocks + k)),
            pl.BlockSpec((value_rows, columns), lambda g, i, t, k: (i, g * column_blocks + k)),
            scale_spec,
        ],
        out_specs=pl.BlockSpec((rows, inputs), lambda g, i, t, k: (t, g * input_blocks + i)),
        scratch_shapes=[
            pltpu.VMEM((scale_rows, columns), jnp.uint32),
            pltpu.VMEM((rows, inputs), jnp.float32),
        ],
        out_shape=jax.ShapeDtypeStruct((num_rows, groups * num_inputs), d_out.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=block_sizes.VMEM_LIMIT[chip],
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * d_out.size * num_inputs,
            bytes_accessed=w.nbytes * pl.cdiv(num_rows, rows)
            + d_out.dtype.itemsize * (d_out.size * input_blocks + num_rows * groups * num_inputs),
            transcendentals=0,
        ),
        interpret=interpret,
        name="linear_row_gradient",
    )(d_out, w.values, scale)


def largest_block(width: int, multiple: int) -> int:
    """What divides a width and is a multiple of what cannot be parted."""
    fitting = (size for size in BLOCKS if width % size == 0 and size % multiple == 0)
    return next(fitting, multiple)


def _kernel(
    fmt: Format, column_blocks: int, d_ref, values_ref, scale_ref, out_ref, words_ref, sum_ref
):
    block = pl.program_id(3)
    inputs, columns = out_ref.shape[1], d_ref.shape[1]
    own = pl.program_id(0) * column_blocks + block
    scale = own_scale(fmt, scale_ref, columns, own, False)
    words_ref[...] = weights.scale_rows(fmt, scale)
    w = weights.unpack(fmt, values_ref, words_ref, 0, inputs, slice(None))
    total = weights.dot(d_ref[...], w, (1, 1)) + jnp.where(block == 0, 0.0, sum_ref[...])
    sum_ref[...] = total
    out_ref[...] = total.astype(out_ref.dtype)
