"""Grouped matmuls for TPU: few rows an expert, as in decoding, where reading weights is all.

A visit is an expert and up to `rows` of its rows, starting at its first row wherever that is: all
rows lie in VMEM as float32, and a window of whole registers is rotated to begin there. So an expert
with a few rows is visited once. The visit's results are rotated back and stored under a mask.

Scales are not applied to weights, of which there are many, but to partial products, of which there
are few: with the rows of a tile laid out as

    x0  0   0  ..       x0: the first group of inputs of each row
    0   x1  0  ..       x1: the second, ..
    0   0   x2 ..

one pass through the matrix unit (`MXU_DEPTH` inputs) gives each group's product by itself, in rows
of its own, and those are scaled and added in float32. FP8 values, and the e5m2 made of FP4 codes,
go into the matrix unit as they are. It is busy with loading weights, so the longer left operand
costs little; the vector unit does two operations per group and register of results instead of four
and more per register of weights.

Rows need not lie in order: given the pair of token and expert at each place (`pair`), the kernel puts
rows in order as it makes them float32, those of its experts alone; given the place of each pair
(`position`), it adds the results of a token's pairs. Both are lost in the time that the next weights
take to come, where gathers of XLA were launches of their own.

Grid: (blocks of columns, visits).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.formats import quantize, tpu_formats
from pallas_kernels.formats.quantize_rows import rounded_lanes
from pallas_kernels.formats.records import Format as Rounding
from pallas_kernels.grouped_matmul import block_sizes, order
from pallas_kernels.grouped_matmul.block_sizes import BlockSizes
from pallas_kernels.grouped_matmul.tpu import Product, Weight
from pallas_kernels.grouped_matmul.visits import Visits
from pallas_kernels.grouped_matmul.weights import (
    Format,
    codes,
    dot,
    format_of,
    operands,
    rows_of_operands,
    scale_rows,
)

SUBLANES = 8  # rows of a register of 32-bit values


def sizes_for(chip: str, rows: int, formats: Sequence[Format], num_rows: int) -> BlockSizes | None:
    """Blocks for these weights, None if none fit VMEM."""
    first = formats[0]
    padded = _padded(num_rows, rows)
    fixed = 4 * padded * (first.num_inputs + 2 * 128) + 2 * first.num_inputs * 16 * rows
    per_column = sum(f.vmem_bytes() - f.is_packed * f.dtype.itemsize for f in formats)
    per_column = per_column * first.num_inputs + padded * (4 + 2 * first.dtype.itemsize)
    max_step = block_sizes.STEP_WEIGHTS[chip] // (first.num_inputs * len(formats))
    limits = (fixed, int(per_column), 128, max_step)
    return block_sizes.choose(chip, rows, first.num_outputs, *limits)


def grouped_product(
    product: Product,
    x: jax.Array,  # [P, in]
    ws: Sequence[Weight],  # [E, in, out]
    visits: Visits,
    rows: int,
    chip: str,
    *,
    row_values: Sequence[jax.Array] = (),  # [P] float32
    pair: jax.Array | None = None,  # [P] which pair is at each place
    position: jax.Array | None = None,  # [T, K] the place of each pair
    rounding: Rounding | None = None,  # what x is rounded to
    interpret: bool = False,
) -> jax.Array:  # [P, out]
    """Runs the kernel; the blocks must exist (`sizes_for`).

    Args:
      pair: x is [.., T, in], rows of at most P / 3 tokens (`can_order`), which devices may have sent; pair i
        is of token i // (P / T).
      position: the result is [T, out] float32, sums over a token's pairs.
    """
    formats = [format_of(w, x.dtype, chip) for w in ws]
    num_rows = x.shape[0] if pair is None else pair.shape[0]
    num_inputs = x.shape[-1]
    num_columns = ws[0].shape[2]
    sizes = sizes_for(chip, rows, formats, num_rows)
    assert sizes is not None  # the caller has asked
    depth = block_sizes.MXU_DEPTH[chip]
    padded = _padded(num_rows, rows)
    row_arrays = [x, *(a.reshape(1, num_rows) for a in row_values)]

    def weight_at(n, v, start_row, expert, *_):
        return expert[v], 0, n

    in_specs = [
        pl.BlockSpec(a.shape, lambda *_, n=a.ndim: (0,) * n, pipeline_mode=pl.Buffered(1))
        for a in row_arrays
    ]
    arrays = []
    for w, fmt in zip(ws, formats):
        for array, height in zip(operands(w), rows_of_operands(fmt, num_inputs)):
            in_specs.append(pl.BlockSpec((None, height, sizes.columns), weight_at))
            arrays.append(array)
    spread_rows = rows * max(parts(fmt, depth) for fmt in formats)
    scratch = [
        pltpu.VMEM((padded, num_inputs), jnp.float32),
        *[pltpu.VMEM((padded, 128), jnp.float32) for _ in row_values],
        pltpu.VMEM((spread_rows, num_inputs), x.dtype),
        pltpu.VMEM((padded, sizes.columns), jnp.float32),
    ]
    places = []
    if pair is not None:
        places.append(pair)
        scratch.append(pltpu.VMEM((x.size // num_inputs, num_inputs), jnp.float32))
    out_rows, out_dtype = num_rows, product.result_dtypes[0]
    if position is not None:
        places.append(position.reshape(-1))
        out_rows, out_dtype = position.shape[0], jnp.float32
    is_given = pair is not None, position is not None
    static = product, formats, sizes, depth, rounding, len(row_values), is_given
    return pl.pallas_call(
        functools.partial(_kernel, *static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5 + len(places),
            grid=(num_columns // sizes.columns, visits.count),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((out_rows, sizes.columns), lambda n, v, *_: (0, n)),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((out_rows, num_columns), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=sizes.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * num_inputs * num_columns * len(ws),
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*row_arrays, *arrays)),
            transcendentals=0,
        ),
        interpret=interpret,
        name=f"{product.name}_few_rows",
    )(visits.count[None], *visits[1:], *places, *row_arrays, *arrays)


def _padded(num_rows: int, rows: int) -> int:
    """Rows with room for the window of a tile that begins with the last."""
    return -(-num_rows // SUBLANES) * SUBLANES + -(-rows // SUBLANES) * SUBLANES


def can_order(num_tokens: int, num_rows: int) -> bool:
    """Whether rows of tokens, as float32 too, take no more room than those of pairs they stand for."""
    return 3 * num_tokens <= num_rows


def parts(fmt: Format, depth: int) -> int:
    """Groups of inputs that go through the matrix unit together."""
    return math.gcd(depth // fmt.group, fmt.num_inputs // fmt.group) if fmt.is_packed else 1


def spread(x: jax.Array, spread_ref, fmt: Format, rows: int, depth: int) -> None:
    """Lays out float32 rows [up to `rows`, in], `rows` for each of the groups of a pass."""
    count = parts(fmt, depth)
    group = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) // fmt.group % count
    for part in range(count):
        own = x if count == 1 else jnp.where(group == part, x, 0.0)
        spread_ref[part * rows : part * rows + x.shape[0], :] = own.astype(spread_ref.dtype)


def _kernel(
    product: Product, formats, sizes: BlockSizes, depth, rounding, num_row_values, is_given, *refs
):
    (count, expert, tile, start, end), others = refs[:5], list(refs[5:])
    del expert, start
    has_pair, has_position = is_given
    pair_ref: Any = others.pop(0) if has_pair else None
    position_ref: Any = others.pop(0) if has_position else None
    given_ref, *others = others
    given_row_refs, others = others[:num_row_values], others[num_row_values:]
    weight_refs = []
    for fmt in formats:
        weight_refs.append(others[: 1 + fmt.is_packed])
        others = others[1 + fmt.is_packed :]
    out_ref, x_ref, *others = others
    row_refs, others = others[:num_row_values], others[num_row_values:]
    spread_ref, sums_ref, *unordered = others
    v = pl.program_id(1)
    first_row, rows = tile[v], sizes.rows

    def begin(_, carry):
        # What is past the last row reaches no result: products of rows stay apart.
        (to_x_ref,) = unordered if has_pair else [x_ref]
        x = given_ref[...]
        x = x if x.ndim == 2 else jnp.concatenate([x[device] for device in range(x.shape[0])])
        x = x.astype(jnp.float32)
        x = x if rounding is None else rounded_lanes(x, rounding.values)
        to_x_ref[: x.shape[0], :] = x
        for given, ref in zip(given_row_refs, row_refs, strict=True):
            num_rows = given.shape[1]
            for first in range(0, num_rows, 128):
                column = order.turned(given[:, first : min(first + 128, num_rows)])
                ref[first : first + column.shape[0], :] = jnp.broadcast_to(
                    column, (column.shape[0], 128)
                )
        if has_pair:
            put_in_order(to_x_ref)
        sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)
        return carry

    def put_in_order(tokens_ref):
        choices = pair_ref.shape[0] // tokens_ref.shape[0]

        def put(place, carry):
            token = jax.lax.div(pair_ref[place], choices)
            x_ref[pl.ds(place, 1), :] = tokens_ref[pl.ds(token, 1), :]
            return carry

        jax.lax.fori_loop(0, end[count[0] - 1], put, ())  # rows of no expert are behind

    jax.lax.fori_loop(0, jnp.where(v == 0, 1, 0), begin, ())

    # Rows are loaded and stored in windows of whole registers (8 rows).
    window_rows = -(-rows // SUBLANES) * SUBLANES + SUBLANES
    inside = jax.lax.rem(first_row, SUBLANES)
    window = pl.ds(pl.multiple_of(first_row - inside, SUBLANES), window_rows)
    to_front = jax.lax.rem(window_rows - inside, window_rows)

    def own_rows(ref):
        return pltpu.roll(ref[window, :], to_front, 0)[:rows]

    spread(own_rows(x_ref), spread_ref, formats[0], rows, depth)
    row_values = [own_rows(ref)[:, :1] for ref in row_refs]
    row = jax.lax.broadcasted_iota(jnp.int32, (window_rows, 1), 0) - inside
    mine = (row >= 0) & (row < jnp.minimum(end[v] - first_row, rows))

    def step(j, carry):
        columns = pl.ds(pl.multiple_of(j * sizes.step, sizes.step), sizes.step)
        products = [
            _product(fmt, spread_ref, w_refs, columns, depth, rows)
            for fmt, w_refs in zip(formats, weight_refs)
        ]
        (value,) = product.epilogue(products, row_values)
        padding = jnp.zeros((window_rows - rows, sizes.step), jnp.float32)
        value = jnp.concatenate([value, padding])
        value = pltpu.roll(value, inside, 0)
        sums_ref[window, columns] = jnp.where(mine, value, sums_ref[window, columns])
        return carry

    jax.lax.fori_loop(0, sizes.columns // sizes.step, step, ())

    def finish(_, carry):
        if has_position:
            add_pairs()
        else:
            out_ref[...] = sums_ref[: out_ref.shape[0], :].astype(out_ref.dtype)
        return carry

    def add_pairs():
        """In the order of a token's choices; zero where a pair is of no expert here."""
        sums_ref[...] = quantize.rounded_to(sums_ref[...], product.result_dtypes[0])
        choices = position_ref.shape[0] // out_ref.shape[0]

        def add(token, carry):
            total = jnp.zeros((1, out_ref.shape[1]), jnp.float32)
            for choice in range(choices):
                total += sums_ref[pl.ds(position_ref[token * choices + choice], 1), :]
            out_ref[pl.ds(token, 1), :] = total
            return carry

        jax.lax.fori_loop(0, out_ref.shape[0], add, ())

    jax.lax.fori_loop(0, jnp.where(v == count[0] - 1, 1, 0), finish, ())


def _product(fmt: Format, spread_ref, w_refs, columns, depth, rows) -> jax.Array:
    """float32 [rows, columns] of a tile of rows."""
    if not fmt.is_packed:
        return dot(spread_ref[...], w_refs[0][:, columns].astype(spread_ref.dtype))
    scale = w_refs[1][:, columns]
    return packed_product(fmt, spread_ref, w_refs[0], scale, columns, depth, rows)


def packed_product(fmt: Format, spread_ref, values_ref, scale, columns, depth, rows) -> jax.Array:
    """float32 [rows, columns] of rows that `spread` laid out.

    Args:
      scale: [in / group, columns].
    """
    dtype = spread_ref.dtype
    # The matrix unit takes e4m3 as it is.
    read_as = fmt.read_as if fmt.kind == "fp4" else tpu_formats.E4M3
    fmt = dataclasses.replace(fmt, read_as=read_as, scale_dtype=jnp.dtype(jnp.float32))
    scale = jax.lax.bitcast_convert_type(scale_rows(fmt, scale), jnp.float32)
    values = codes(fmt, values_ref, 0, fmt.num_inputs, columns)
    if dtype == jnp.float32:
        values = [value.astype(jnp.float32) for value in values]
    count = parts(fmt, depth)
    terms = []
    for group in range(0, len(values), count):
        inputs = slice(group * fmt.group, (group + count) * fmt.group)
        partial = dot(spread_ref[:, inputs], jnp.concatenate(values[group : group + count]))
        for part in range(count):
            own = partial[part * rows : (part + 1) * rows]
            terms.append(own * scale[group + part : group + part + 1])
    return functools.reduce(jnp.add, terms)
