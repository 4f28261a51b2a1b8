"""Gradient of grouped weights: d_w[e] = x[rows of e].T @ d_out[rows of e], for TPU.

Grid: (blocks of inputs, blocks of outputs, visits). Visits of one expert are consecutive and add to
a block in VMEM, which is cast and written when the expert's last is done. Experts without rows are
visited too, with an empty range, so that their gradient is zero.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import block_sizes
from pallas_kernels.grouped_matmul.block_sizes import PACKED_ROWS
from pallas_kernels.grouped_matmul.visits import Visits
from pallas_kernels.grouped_matmul.weights import dot


def weight_gradient(
    x: jax.Array,  # [P, in]
    d_out: jax.Array,  # [P, out]
    visits: Visits,  # of empty experts too
    num_groups: int,
    rows: int,
    chip: str,
    dtype: jax.typing.DTypeLike,
    *,
    interpret: bool = False,
) -> jax.Array:  # [E, in, out] in `dtype`
    """Runs the kernel."""
    (num_rows, num_inputs), num_outputs = x.shape, d_out.shape[1]
    inputs, outputs = map(block_sizes.gradient_block, (num_inputs, num_outputs))
    return pl.pallas_call(
        functools.partial(_kernel, rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(num_inputs // inputs, num_outputs // outputs, visits.count),
            in_specs=[
                pl.BlockSpec(
                    (pl.Element(rows), pl.Element(inputs)),
                    lambda i, o, v, c, e, tile, *_: (tile[v] * PACKED_ROWS, i * inputs),
                ),
                pl.BlockSpec(
                    (pl.Element(rows), pl.Element(outputs)),
                    lambda i, o, v, c, e, tile, *_: (tile[v] * PACKED_ROWS, o * outputs),
                ),
            ],
            out_specs=pl.BlockSpec(
                (None, inputs, outputs), lambda i, o, v, c, expert, *_: (expert[v], i, o)
            ),
            scratch_shapes=[pltpu.VMEM((inputs, outputs), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((num_groups, num_inputs, num_outputs), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=block_sizes.VMEM_LIMIT[chip],
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * num_inputs * num_outputs,
            bytes_accessed=(x.size + d_out.size) * x.dtype.itemsize
            + num_groups * num_inputs * num_outputs * jnp.dtype(dtype).itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_weight_gradient",
    )(visits.count[None], *visits[1:], x, d_out)


def _kernel(rows, count, expert, tile, start, end, x_ref, d_ref, out_ref, sum_ref):
    v = pl.program_id(2)
    is_first = (v == 0) | (expert[v] != expert[jnp.maximum(v - 1, 0)])
    is_last = (v == count[0] - 1) | (expert[v] != expert[jnp.minimum(v + 1, count[0] - 1)])
    row = tile[v] * PACKED_ROWS + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    mine = (row >= start[v]) & (row < end[v])
    # Both: zero times what another expert's row holds need not be zero.
    x, d = (jnp.where(mine, ref[...], jnp.zeros_like(ref[...])) for ref in (x_ref, d_ref))
    term = dot(x, d, (0, 0))
    sum_ref[...] = term + jnp.where(is_first, 0.0, sum_ref[...])

    @pl.when(is_last)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)
