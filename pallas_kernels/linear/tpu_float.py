"""Few rows times a bfloat16 weight for TPU: head, router and compressors while decoding.

Why a kernel: the weight is read as it lies. XLA on v7x wants tiles of 16 rows, so it brings every such
weight into them, the tables of the vocabulary too, and keeps both.

Grid: blocks of outputs. The whole contracted axis lies in VMEM.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.block_sizes import FEW_ROWS, MIB
from pallas_kernels.grouped_matmul.weights import dot

LANES = 128
BLOCK_BYTES = 4 * MIB  # of weights, of which two blocks lie in VMEM
LEAST_BLOCKS = 4  # of which the first is waited for, where there are so many


def unsupported(x: jax.Array, w: jax.Array) -> str | None:
    """Why the kernel cannot take these arguments, None if it can."""
    if x.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
        return f"x is {x.dtype} and w {w.dtype}: the kernel takes bfloat16"
    num_rows, width = x.size // max(x.shape[-1], 1), x.shape[-1]
    if width % LANES or not 0 < num_rows <= max(FEW_ROWS):
        return f"{num_rows} rows of {width}: the kernel takes 1 to {max(FEW_ROWS)} of whole {LANES}"
    return None


def block(num_inputs: int, num_outputs: int) -> int:
    """Outputs of a block."""
    most = max(BLOCK_BYTES // (2 * num_inputs) // LANES, 1)
    return LANES * min(most, pl.cdiv(num_outputs, LEAST_BLOCKS * LANES))


def linear(
    x: jax.Array,  # [P, in]
    w: jax.Array,  # [in, out], or [out, in] if it is turned
    is_turned: bool,
    *,
    interpret: bool = False,
) -> jax.Array:  # [P, out] float32
    """Runs the kernel."""
    num_rows, num_inputs = x.shape
    num_outputs = w.shape[0] if is_turned else w.shape[1]
    own = min(block(num_inputs, num_outputs), num_outputs)
    if is_turned:
        spec = pl.BlockSpec((own, num_inputs), lambda n: (n, 0))
    else:
        spec = pl.BlockSpec((num_inputs, own), lambda n: (0, n))
    return pl.pallas_call(
        functools.partial(_kernel, (1, 1) if is_turned else (1, 0)),
        grid=(pl.cdiv(num_outputs, own),),
        in_specs=[pl.BlockSpec(x.shape, lambda n: (0, 0)), spec],
        out_specs=pl.BlockSpec((num_rows, own), lambda n: (0, n)),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_outputs), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * w.size,
            bytes_accessed=x.nbytes + w.nbytes + 4 * num_rows * num_outputs,
            transcendentals=0,
        ),
        interpret=interpret,
        name="linear_floats",
    )(x, w)


def _kernel(contracted: tuple[int, int], x_ref, w_ref, out_ref) -> None:
    out_ref[...] = dot(x_ref[...], w_ref[...], contracted)
