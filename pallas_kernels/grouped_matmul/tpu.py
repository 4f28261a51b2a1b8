"""Grouped matmuls for TPU: many rows an expert.

    out[rows of e] = f(x[rows of e] @ w[e])          e = 0 .. E-1

Grid: (blocks of columns, visits). A visit is an expert and a tile of rows that begins at its first,
or at the 16 rows that has it (`visits.py`). Visits of one expert are consecutive, so a block of its
weights is fetched once; most have one. A tile's last rows may be the next expert's: they are
multiplied, and not stored. Experts without rows cost nothing. The whole contracted axis lies in VMEM, so
a product has no partial sums to carry.

Packed weights stay packed in HBM. The first visit of an expert unpacks a block into the product
(`weights.py`) and also leaves it in VMEM for the expert's other visits, which are plain bfloat16
products. XLA would write the unpacked matrices of every expert to HBM and read them back.

SwiGLU: gate and up share the rows; clamp, activation and row weight follow in registers.

Gradients: d_x contracts over the outputs, with blocks of whole rows of the same packed weights; the
gradient of SwiGLU computes gate and up again. `gradients.py` has that of the weights.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.formats.quantize import QuantizedArray
from pallas_kernels.grouped_matmul import block_sizes
from pallas_kernels.grouped_matmul.block_sizes import PACKED_ROWS, BlockSizes
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
    per_column += (2 * rows + PACKED_ROWS) * results + 2 * rows * num_extras * size
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
    given, contracted = xs[0].shape
    padding = ((0, -given % PACKED_ROWS), (0, 0))
    if padding[0][1]:
        xs, row_values, column_values = (
            [jnp.pad(x, padding) for x in group] for group in (xs, row_values, column_values)
        )
    num_rows, num_groups = given + padding[0][1], ws[0].shape[0]
    num_columns = ws[0].shape[1 if product.transposed else 2]
    num_blocks = num_columns // sizes.columns

    def rows_at(n, v, count, expert, tile, start, end):
        return tile[v] * PACKED_ROWS, 0

    def columns_at(n, v, count, expert, tile, start, end):
        return tile[v] * PACKED_ROWS, n * sizes.columns

    def weight_at(n, v, count, expert, tile, start, end):
        e = jnp.minimum(expert[v], num_groups - 1)
        return (e, n, 0) if product.transposed else (e, 0, n)

    def tile_spec(width, index_map):
        return pl.BlockSpec((pl.Element(rows), pl.Element(width)), index_map)

    in_specs = [tile_spec(contracted, rows_at) for _ in xs]
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
    in_specs += [tile_spec(1, rows_at) for _ in row_values]
    in_specs += [tile_spec(sizes.columns, columns_at) for _ in column_values]
    shape = (num_rows, num_columns)
    out_shape: list[Any] = [jax.ShapeDtypeStruct(shape, d) for d in product.result_dtypes]
    widths = [sizes.columns] * len(out_shape)
    if product.has_row_sums:
        # XLA would put what it sums next in VMEM, where copies take the vector unit.
        out_shape.append(pltpu.HBM((num_rows, num_blocks * LANES), jnp.float32))
        widths.append(LANES)

    buffers = [pltpu.VMEM((2, rows, width), s.dtype) for width, s in zip(widths, out_shape)]
    kept = [pltpu.VMEM((PACKED_ROWS, width), s.dtype) for width, s in zip(widths, out_shape)]
    num_extras = len(row_values) + len(column_values)
    results = pl.pallas_call(
        functools.partial(_kernel, product, formats, sizes, num_groups, len(xs), num_extras),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(num_blocks, visits.count),
            in_specs=in_specs,
            out_specs=[pl.BlockSpec(memory_space=pltpu.HBM) for _ in out_shape],
            scratch_shapes=[
                *buffers,
                *kept,
                pltpu.SemaphoreType.DMA((len(out_shape), 2)),
                *weight_scratch,
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=sizes.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * contracted * num_columns * len(ws),
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*arrays, *column_values))
            + sum(math.prod(s.shape) * s.dtype.itemsize for s in out_shape),
            transcendentals=0,
        ),
        interpret=interpret,
        name=product.name,
    )(visits.count[None], *visits[1:], *arrays, *row_values, *column_values)
    results = [result[:given] for result in results]
    if product.has_row_sums:
        *results, partial = results
        results = [*results, jnp.sum(partial, axis=1)]
    return results


class _Results:
    """Tiles of results in VMEM, and their way to HBM, in whole groups of `PACKED_ROWS`.

    A visit copies the groups that its rows complete. A last group that has rows of the next visit,
    too, is kept, and that visit puts its own rows into it. So a group is copied once, and copies may
    be under way in any order.
    """

    def __init__(self, block, visits, out_refs, buffers, kept, semaphores):
        self.block, (self.tile, self.start, self.end) = block, visits
        self.out_refs, self.buffers, self.kept = out_refs, buffers, kept
        self.semaphores = semaphores

    def join(self, v) -> None:
        """Completes the first group with rows of earlier visits, and keeps the last."""
        most = self.buffers[0].shape[1] // PACKED_ROWS - 1
        first = self.start[v] // PACKED_ROWS
        last = jnp.minimum(self.end[v] // PACKED_ROWS - self.tile[v], most)
        row = jax.lax.broadcasted_iota(jnp.int32, (PACKED_ROWS, 1), 0)
        mine = row >= self.start[v] - first * PACKED_ROWS
        for buffer, kept_ref in zip(self.buffers, self.kept):
            at = (v % 2, _groups(first - self.tile[v], 1), slice(None))
            buffer[at] = jnp.where(mine, buffer[at], kept_ref[...])
            kept_ref[...] = buffer[v % 2, _groups(last, 1), :]

    def start_copies(self, v) -> None:
        """Of the groups that visit `v` completed."""
        self._each_copy(v, lambda copy: copy.start())

    def wait(self, v) -> None:
        """Until they are in HBM."""
        self._each_copy(v, lambda copy: copy.wait())

    def _each_copy(self, v, act) -> None:
        first = self.start[v] // PACKED_ROWS
        count = self.end[v] // PACKED_ROWS - first
        most = self.buffers[0].shape[1] // PACKED_ROWS
        # A copy's size is static: one for each bit of the number of groups.
        for size in (1 << bit for bit in reversed(range(most.bit_length()))):

            @pl.when((count & size) != 0)
            def _(size=size):
                larger = count & -(2 * size)
                here = _groups(first - self.tile[v] + larger, size)
                there = _groups(first + larger, size)
                for i, (out_ref, buffer) in enumerate(zip(self.out_refs, self.buffers)):
                    width = buffer.shape[2]
                    columns = pl.ds(pl.multiple_of(self.block * width, LANES), width)
                    source, target = buffer.at[v % 2, here], out_ref.at[there, columns]
                    act(pltpu.make_async_copy(source, target, self.semaphores.at[i, v % 2]))


def _groups(first, count: int):
    """The rows of groups of `PACKED_ROWS`."""
    return pl.ds(pl.multiple_of(first * PACKED_ROWS, PACKED_ROWS), count * PACKED_ROWS)


def _kernel(product: Product, formats, sizes: BlockSizes, num_groups, num_x, num_extras, *all_refs):
    count, expert, tile, start, end, *refs = all_refs
    x_refs, refs = refs[:num_x], refs[num_x:]
    weight_refs = []
    for fmt in formats:
        weight_refs.append(refs[: 1 + fmt.is_packed])
        refs = refs[1 + fmt.is_packed :]
    extra_refs, refs = refs[:num_extras], refs[num_extras:]
    num_results = len(product.result_dtypes) + product.has_row_sums
    out_refs, refs = refs[:num_results], refs[num_results:]
    buffers, refs = refs[:num_results], refs[num_results:]
    kept, (semaphores, *scratch) = refs[:num_results], refs[num_results:]
    block, v = pl.program_id(0), pl.program_id(1)
    results = _Results(block, (tile, start, end), out_refs, buffers, kept, semaphores)
    slot = v % 2
    has_expert = (expert[v] < num_groups).astype(jnp.int32)
    is_first_of_expert = ((v == 0) | (expert[v] != expert[jnp.maximum(v - 1, 0)])).astype(jnp.int32)

    def zero(_, carry):
        for buffer in buffers:
            buffer[slot] = jnp.zeros(buffer.shape[1:], buffer.dtype)
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
        for buffer, value in zip(buffers, values[: len(product.result_dtypes)]):
            buffer[slot, :, columns] = value.astype(buffer.dtype)
        if product.has_row_sums:
            terms, sums_ref = values[-1], buffers[-1]
            part = sum(terms[:, i : i + LANES] for i in range(0, sizes.step, LANES))
            sums_ref[slot] = part + jnp.where(j == 0, 0.0, sums_ref[slot])
        return ()

    def compute(_, carry, unpacks: bool):
        if unpacks:
            for i, (fmt, w_refs) in enumerate(zip(formats, weight_refs)):
                scratch[2 * i][...] = scale_rows(fmt, w_refs[1][...])
        num_steps = sizes.columns // sizes.step
        jax.lax.fori_loop(0, num_steps, lambda j, _: step(j, unpacks), ())
        return carry

    pl.when(v >= 2)(lambda: results.wait(v - 2))  # whose buffer this visit fills
    # Branches, as loops that turn once or not at all: a schedule says how long each is.
    unpacking = 0
    if formats[0].is_packed:
        unpacking = has_expert * is_first_of_expert
        jax.lax.fori_loop(0, unpacking, functools.partial(compute, unpacks=True), ())
    plain = has_expert - unpacking
    jax.lax.fori_loop(0, plain, functools.partial(compute, unpacks=False), ())
    jax.lax.fori_loop(0, 1 - has_expert, zero, ())
    results.join(v)
    results.start_copies(v)

    under_way = jnp.where(v == count[0] - 1, jnp.minimum(v + 1, 2), 0)
    jax.lax.fori_loop(0, under_way, lambda i, _: results.wait(v - i), None)
