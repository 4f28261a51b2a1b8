"""Grouped matmuls for TPU: many rows an expert.

    out[rows of e] = f(x[rows of e] @ w[e])          e = 0 .. E-1

Grid: (blocks of columns, visits). A visit is a tile of rows and an expert that has some of them
(`visits.py`); visits of one expert are consecutive, so a block of its weights is fetched once, and
tiles with rows of several experts are stored under a mask. Empty experts cost nothing. The whole
contracted axis lies in VMEM, so a product has no partial sums to carry.

Packed weights stay packed in HBM. The first visit of an expert unpacks a block into the product
(`weights.py`) and also leaves it in VMEM for the expert's other visits, which are plain bfloat16
products. XLA would write the unpacked matrices of every expert to HBM and read them back.

SwiGLU: gate and up share the rows; clamp, activation and row weight follow in registers.

Gradients: d_x contracts over the outputs, with blocks of whole rows of the same packed weights; the
gradient of SwiGLU computes gate and up again. `gradients.py` has that of the weights.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.formats.quantize import QuantizedArray
from pallas_kernels.grouped_matmul import block_sizes
from pallas_kernels.grouped_matmul.block_sizes import BlockSizes
from pallas_kernels.grouped_matmul.visits import Visits
from pallas_kernels.grouped_matmul.weights import (
    Format,
    dot,
    format_of,
    operands,
    rows_of_operands,
    scale_rows,
    unpack,
)

LANES = 128
Weight = jax.Array | QuantizedArray


@dataclasses.dataclass(frozen=True)
class Product:
    """What a kernel computes: products of rows with weights, and what follows them.

    `epilogue(products, extras)` gets the float32 products of a tile with some columns, and those
    columns of the extra operands. It returns the values of the results there, in the same order as
    `result_dtypes`, and, if `has_row_sums`, the terms of a sum over all columns.
    """

    name: str
    epilogue: Callable[[list[jax.Array], list[jax.Array]], Sequence[jax.Array]]
    result_dtypes: tuple
    transposed: bool = False  # contract over outputs; the products of all weights are summed
    has_row_sums: bool = False


def sizes_for(
    product: Product, chip: str, rows: int, formats: Sequence[Format], num_extras: int
) -> BlockSizes | None:
    """Blocks for these weights, None if none fit VMEM."""
    first = formats[0]
    if product.transposed:
        contracted, num_columns = first.num_outputs, first.num_inputs
    else:
        contracted, num_columns = first.num_inputs, first.num_outputs
    size = first.dtype.itemsize
    num_x = len(formats) if product.transposed else 1
    fixed = 2 * rows * (num_x * contracted * size + 4 * LANES * (1 + 2 * product.has_row_sums))
    per_column = sum(f.vmem_bytes() for f in formats) * contracted
    results = sum(jnp.dtype(dtype).itemsize for dtype in product.result_dtypes)
    per_column += rows * (3 * results + 2 * num_extras * size)
    multiple = first.block if product.transposed else LANES
    max_step = block_sizes.STEP_WEIGHTS[chip] // (contracted * len(formats))
    return block_sizes.choose(chip, rows, num_columns, fixed, int(per_column), multiple, max_step)


def grouped_product(
    product: Product,
    xs: Sequence[jax.Array],  # [P, contracted]: one, or one per weight if transposed
    ws: Sequence[Weight],  # [E, in, out]
    visits: Visits,
    rows: int,
    chip: str,
    *,
    row_values: Sequence[jax.Array] = (),  # [P, 1]
    column_values: Sequence[jax.Array] = (),  # [P, columns]
    interpret: bool = False,
) -> list[jax.Array]:  # [P, columns] each, then [P] row sums
    """Runs the kernel; the blocks must exist (`sizes_for`)."""
    formats = [format_of(w, xs[0].dtype, chip) for w in ws]
    sizes = sizes_for(product, chip, rows, formats, len(column_values))
    assert sizes is not None  # the caller has asked
    num_rows, contracted = xs[0].shape
    num_columns = ws[0].shape[1 if product.transposed else 2]
    num_blocks = num_columns // sizes.columns

    def rows_at(n, v, expert, tile, start, end):
        return tile[v], 0

    def columns_at(n, v, expert, tile, start, end):
        return tile[v], n

    def weight_at(n, v, expert, tile, start, end):
        return (expert[v], n, 0) if product.transposed else (expert[v], 0, n)

    in_specs = [pl.BlockSpec((rows, contracted), rows_at) for _ in xs]
    weight_scratch, arrays = [], list(xs)
    for w, fmt in zip(ws, formats):
        width = fmt.num_outputs if product.transposed else sizes.columns
        inputs = sizes.columns if product.transposed else fmt.num_inputs
        for array, height in zip(operands(w), rows_of_operands(fmt, inputs)):
            in_specs.append(pl.BlockSpec((None, height, width), weight_at))
            arrays.append(array)
        if fmt.is_packed:
            weight_scratch.append(pltpu.VMEM((inputs // fmt.group, width), jnp.uint32))
            weight_scratch.append(pltpu.VMEM((inputs, width), fmt.dtype))
    in_specs += [pl.BlockSpec((rows, 1), rows_at) for _ in row_values]
    in_specs += [pl.BlockSpec((rows, sizes.columns), columns_at) for _ in column_values]
    out_specs = [pl.BlockSpec((rows, sizes.columns), columns_at) for _ in product.result_dtypes]
    out_shape = [jax.ShapeDtypeStruct((num_rows, num_columns), d) for d in product.result_dtypes]
    if product.has_row_sums:
        out_specs.append(
            pl.BlockSpec((None, rows, LANES), lambda n, v, e, tile, *_: (n, tile[v], 0))
        )
        out_shape.append(jax.ShapeDtypeStruct((num_blocks, num_rows, LANES), jnp.float32))

    kept = [pltpu.VMEM((rows, sizes.columns), s.dtype) for s in out_shape]
    if product.has_row_sums:
        kept[-1] = pltpu.VMEM((rows, LANES), jnp.float32)
    num_extras = len(row_values) + len(column_values)
    results = pl.pallas_call(
        functools.partial(_kernel, product, formats, sizes, len(xs), num_extras),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(num_blocks, visits.count),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=kept + weight_scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=sizes.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * contracted * num_columns * len(ws),
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*arrays, *column_values))
            + sum(s.size * s.dtype.itemsize for s in out_shape),
            transcendentals=0,
        ),
        interpret=interpret,
        name=product.name,
    )(*visits[1:], *arrays, *row_values, *column_values)
    if product.has_row_sums:
        *results, partial = results
        results = [*results, jnp.sum(partial, axis=(0, 2))]
    return results


def _kernel(product: Product, formats, sizes: BlockSizes, num_x, num_extras, *all_refs):
    expert, tile, start, end, *refs = all_refs
    x_refs, refs = refs[:num_x], refs[num_x:]
    weight_refs = []
    for fmt in formats:
        weight_refs.append(refs[: 1 + fmt.is_packed])
        refs = refs[1 + fmt.is_packed :]
    extra_refs, refs = refs[:num_extras], refs[num_extras:]
    num_results = len(product.result_dtypes) + product.has_row_sums
    out_refs, refs = refs[:num_results], refs[num_results:]
    kept_refs, scratch = refs[:num_results], refs[num_results:]

    v = pl.program_id(1)
    before = jnp.maximum(v - 1, 0)
    is_first_of_expert = (v == 0) | (expert[v] != expert[before])
    is_first_of_tile = (v == 0) | (tile[v] != tile[before])
    row = tile[v] * sizes.rows + jax.lax.broadcasted_iota(jnp.int32, (sizes.rows, 1), 0)
    mine = (row >= start[v]) & (row < end[v])

    # Visits that share a tile keep what the others wrote: put aside before, put back after.
    is_shared = (start[v] > tile[v] * sizes.rows) | (end[v] < (tile[v] + 1) * sizes.rows)
    num_shared = is_shared.astype(jnp.int32)

    def put_aside(_, carry):
        for out_ref, kept_ref in zip(out_refs, kept_refs):
            kept = out_ref[...]
            kept_ref[...] = jnp.where(is_first_of_tile, jnp.zeros_like(kept), kept)
        return carry

    def put_back(_, carry):
        for out_ref, kept_ref in zip(out_refs, kept_refs):
            out_ref[...] = jnp.where(mine, out_ref[...], kept_ref[...])
        return carry

    def prepare(_, carry):
        for i, (fmt, w_refs) in enumerate(zip(formats, weight_refs)):
            scratch[2 * i][...] = scale_rows(fmt, w_refs[1][...])
        return carry

    def step(j, unpacks: bool):
        first = pl.multiple_of(j * sizes.step, sizes.step)
        columns = pl.ds(first, sizes.step)
        spare, products = list(scratch), []
        for i, (fmt, w_refs) in enumerate(zip(formats, weight_refs)):
            whole = slice(None)
            at = (columns, whole) if product.transposed else (whole, columns)
            if not fmt.is_packed:
                w = w_refs[0][at].astype(fmt.dtype)
            else:
                rows_ref, matrix_ref = spare[:2]
                del spare[:2]
                if unpacks and product.transposed:
                    w = unpack(fmt, w_refs[0], rows_ref, first, sizes.step, whole)
                elif unpacks:
                    w = unpack(fmt, w_refs[0], rows_ref, 0, fmt.num_inputs, columns)
                if unpacks:
                    matrix_ref[at] = w
                else:
                    w = matrix_ref[at]
            x = x_refs[min(i, num_x - 1)][...]
            products.append(dot(x, w, (1, 1) if product.transposed else (1, 0)))
        if product.transposed:
            total: Any = sum(products)
            products = [total]
        extras = [ref[...] if ref.shape[1] == 1 else ref[:, columns] for ref in extra_refs]
        values = product.epilogue(products, extras)
        for ref, value in zip(out_refs, values[: len(product.result_dtypes)]):
            ref[:, columns] = value.astype(ref.dtype)
        if product.has_row_sums:
            terms, sums_ref = values[-1], out_refs[-1]
            part = sum(terms[:, i : i + LANES] for i in range(0, sizes.step, LANES))
            sums_ref[...] = part + jnp.where(j == 0, 0.0, sums_ref[...])
        return ()

    jax.lax.fori_loop(0, num_shared, put_aside, ())
    num_steps = sizes.columns // sizes.step
    if formats[0].is_packed:
        unpacking = jnp.where(is_first_of_expert, num_steps, 0)
        jax.lax.fori_loop(0, jnp.minimum(unpacking, 1), prepare, ())
        jax.lax.fori_loop(0, unpacking, lambda j, _: step(j, True), ())
        jax.lax.fori_loop(0, num_steps - unpacking, lambda j, _: step(j, False), ())
    else:
        jax.lax.fori_loop(0, num_steps, lambda j, _: step(j, False), ())
    jax.lax.fori_loop(0, num_shared, put_back, ())
