"""Rows times packed weights for TPU, the weight read as it lies.

    out[:, columns of g] = x[:, inputs of g] @ w[:, columns of g]          g = 0 .. groups-1

Grid: (blocks of columns, tiles of rows). A block of columns lies within a group, so index maps find
the group's inputs in a row of x, and nothing is copied apart in HBM: not the weight, whose groups
lie side by side, nor rows, nor results. The whole contracted axis lies in VMEM.

FP8 scales come whole, one for 128 x 128, and are spread along outputs in VMEM.

Many rows: the first tile of a block unpacks it into the product (`grouped_matmul/weights.py`) and
leaves it in VMEM for the other tiles, if there are any. Few rows: one tile, and scales are applied to
partial products (`grouped_matmul/few_rows.py`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.formats.quantize import FP8_WEIGHT_BLOCK, QuantizedArray
from pallas_kernels.grouped_matmul import block_sizes, few_rows, weights
from pallas_kernels.grouped_matmul.block_sizes import BlockSizes
from pallas_kernels.grouped_matmul.weights import Format

LANES = 128


def unsupported(x: jax.Array, w: QuantizedArray, groups: int, chip: str) -> str | None:
    """Why the kernels cannot take these arguments, None if they can."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x must be float32 or bfloat16, not {x.dtype}"
    if x.size == 0:
        return "x has no rows"
    if reason := weights.unsupported(w):
        return reason
    if (width := w.shape[1] // groups) % LANES:
        return f"{groups} groups of w {w.shape} have {width} outputs, not a multiple of {LANES}"
    if sizes_for(x.size // x.shape[-1], w, groups, x.dtype, chip) is None:
        return f"a row of {w.shape} weights is too long for the VMEM of {chip}"
    return None


def sizes_for(
    num_rows: int, w: QuantizedArray, groups: int, dtype, chip: str
) -> tuple[BlockSizes, bool] | None:
    """Blocks, and whether they are for few rows; None if none fit VMEM."""
    fmt = weights.format_of(w, dtype, chip)
    num_inputs, size = fmt.num_inputs, fmt.dtype.itemsize
    scales = 2 * 4 * w.scale.size if fmt.kind == "fp8" else 0
    is_one_tile = num_rows <= block_sizes.MAX_ROW_TILE
    # A core has two blocks at least, or tiles: one is copied while another is worked on.
    choose = functools.partial(
        block_sizes.choose,
        chip,
        num_columns=fmt.num_outputs // groups,
        multiple=LANES,
        max_step=block_sizes.STEP_WEIGHTS[chip] // num_inputs,
        widest=fmt.num_outputs // block_sizes.CORES[chip] // (1 + is_one_tile),
    )
    rows = block_sizes.few_rows(num_rows, 1, num_inputs)
    if rows is not None:
        parts = few_rows.parts(fmt, block_sizes.MXU_DEPTH[chip])
        per_column = (fmt.vmem_bytes() - size) * num_inputs + 3 * 4 * rows
        fixed = (2 + parts) * rows * num_inputs * size + scales
        if sizes := choose(rows=rows, fixed=fixed, per_column=int(per_column)):
            return sizes, True
    rows = block_sizes.row_tile(num_rows)
    kept = 0 if is_one_tile else size
    per_column = (fmt.vmem_bytes() - size + kept) * num_inputs + 3 * 4 * rows
    fixed = 2 * rows * num_inputs * size + scales
    sizes = choose(rows=rows, fixed=fixed, per_column=int(per_column))
    return (sizes, False) if sizes else None


def linear(
    x: jax.Array,  # [P, groups * in]
    w: QuantizedArray,  # [in, groups * out]
    groups: int,
    chip: str,
    out_dtype: jnp.dtype,
    *,
    interpret: bool = False,
) -> jax.Array:  # [P, groups * out] in `out_dtype`
    """Runs the kernel; the blocks must exist (`sizes_for`)."""
    fmt = weights.format_of(w, x.dtype, chip)
    found = sizes_for(x.shape[0], w, groups, x.dtype, chip)
    assert found is not None  # the caller has asked
    sizes, is_few = found
    num_rows, num_inputs, num_columns = x.shape[0], fmt.num_inputs, fmt.num_outputs
    blocks = num_columns // groups // sizes.columns  # of a group
    rows = num_rows if is_few else sizes.rows
    tiles = pl.cdiv(num_rows, rows)
    num_scales = num_inputs // fmt.group
    if is_few:
        depth = block_sizes.MXU_DEPTH[chip]
        kernel = functools.partial(_few_rows_kernel, fmt, sizes, depth)
        parts = few_rows.parts(fmt, depth)
        scratch = [
            pltpu.VMEM((num_scales, sizes.columns), jnp.float32),
            pltpu.VMEM((parts * sizes.rows, num_inputs), x.dtype),
        ]
    else:
        kernel = functools.partial(_kernel, fmt, sizes)
        scratch = [pltpu.VMEM((num_scales, sizes.columns), jnp.uint32)]
        if tiles > 1:
            scratch.append(pltpu.VMEM((num_inputs, sizes.columns), x.dtype))
    if fmt.kind == "fp8":
        scale_spec = pl.BlockSpec(w.scale.shape, lambda n, t: (0, 0))
    else:
        scale_spec = pl.BlockSpec((num_scales, sizes.columns), lambda n, t: (0, n))
    return pl.pallas_call(
        kernel,
        grid=(groups * blocks, tiles),
        in_specs=[
            pl.BlockSpec((rows, num_inputs), lambda n, t: (t, n // blocks)),
            pl.BlockSpec((w.values.shape[0], sizes.columns), lambda n, t: (0, n)),
            scale_spec,
        ],
        out_specs=pl.BlockSpec((rows, sizes.columns), lambda n, t: (t, n)),
        scratch_shapes=scratch,
        out_shape=jax.ShapeDtypeStruct((num_rows, num_columns), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=sizes.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * num_inputs * num_columns,
            bytes_accessed=w.nbytes + x.nbytes + out_dtype.itemsize * num_rows * num_columns,
            transcendentals=0,
        ),
        interpret=interpret,
        name="linear_few_rows" if is_few else "linear",
    )(x, w.values, w.scale)


def _few_rows_kernel(
    fmt: Format,
    sizes: BlockSizes,
    depth: int,
    x_ref,
    values_ref,
    scale_ref,
    out_ref,
    own_scale_ref,
    spread_ref,
):
    own_scale_ref[...] = own_scale(fmt, scale_ref, sizes.columns, pl.program_id(0))
    few_rows.spread(x_ref[...].astype(jnp.float32), spread_ref, fmt, sizes.rows, depth)

    def step(j):
        columns = pl.ds(pl.multiple_of(j * sizes.step, sizes.step), sizes.step)
        out = few_rows.packed_product(
            fmt, spread_ref, values_ref, own_scale_ref[:, columns], columns, depth, sizes.rows
        )
        out_ref[:, columns] = out[: out_ref.shape[0]].astype(out_ref.dtype)

    _repeat(sizes.columns // sizes.step, step)


def _kernel(
    fmt: Format,
    sizes: BlockSizes,
    x_ref,
    values_ref,
    scale_ref,
    out_ref,
    words_ref,
    matrix_ref=None,
):
    """With one tile of rows there is no `matrix_ref`."""
    block, tile = pl.program_id(0), pl.program_id(1)

    def prepare():
        scale = own_scale(fmt, scale_ref, sizes.columns, block)
        words_ref[...] = weights.scale_rows(fmt, scale)

    def step(j, unpacks: bool):
        columns = pl.ds(pl.multiple_of(j * sizes.step, sizes.step), sizes.step)
        if unpacks:
            w = weights.unpack(fmt, values_ref, words_ref, 0, fmt.num_inputs, columns)
            if matrix_ref is not None:
                matrix_ref[:, columns] = w
        else:
            w = matrix_ref[:, columns]
        out_ref[:, columns] = weights.dot(x_ref[...], w).astype(out_ref.dtype)

    num_steps = sizes.columns // sizes.step
    if matrix_ref is None:
        prepare()
        _repeat(num_steps, lambda j: step(j, True))
        return
    # Branches are loops of no or one turn: their cycles are counted as often as they run.
    unpacking = jnp.where(tile == 0, num_steps, 0)
    _repeat(jnp.minimum(unpacking, 1), lambda _: prepare())
    _repeat(unpacking, lambda j: step(j, True))
    _repeat(num_steps - unpacking, lambda j: step(j, False))


def _repeat(times, body) -> None:
    def turn(i, carry):
        body(i)
        return carry

    jax.lax.fori_loop(0, times, turn, ())


def own_scale(fmt: Format, scale_ref, num_columns: int, block) -> jax.Array:
    """float32 [n, num_columns]: the scales of a block's columns, of FP8 from those of all columns."""
    scale = scale_ref[...].astype(jnp.float32)
    if fmt.kind != "fp8":
        return scale
    # One of a register's lanes for 128 columns; which one is known at run time.
    first = block * (num_columns // FP8_WEIGHT_BLOCK[1])
    lane = jax.lax.broadcasted_iota(jnp.int32, scale.shape, 1)
    parts = []
    for i in range(num_columns // FP8_WEIGHT_BLOCK[1]):
        own = jnp.sum(jnp.where(lane == first + i, scale, 0.0), axis=1, keepdims=True)
        parts.append(jnp.broadcast_to(own, (scale.shape[0], FP8_WEIGHT_BLOCK[1])))
    return jnp.concatenate(parts, axis=1)
