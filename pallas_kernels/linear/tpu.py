"""Rows times packed weights for TPU, the weight read as it lies.

    out[:, columns of g] = x[:, inputs of g] @ w[:, columns of g]          g = 0 .. groups-1

Grid: (blocks of columns, tiles of rows). A block of columns lies within a group, so index maps find
the group's inputs in a row of x, and nothing is copied apart in HBM: not the weight, whose groups
lie side by side, nor rows, nor results. The whole contracted axis lies in VMEM.

FP8 scales come whole, one for 128 x 128, and are spread along outputs in VMEM. Of weights that are taller
than wide they come turned over: arrays of so few columns lie so on a TPU, and XLA would turn them.

Many rows: the first tile of a block unpacks it into the product (`grouped_matmul/weights.py`) and
leaves it in VMEM for the other tiles, if there are any. Few rows: one tile, and scales are applied to
partial products (`grouped_matmul/few_rows.py`). Few rows are rounded here, too, where a model rounds them,
and may come, or become, rows of heads: in registers of 8 heads, where a row of all channels lies along lanes.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.formats.quantize import FP8_WEIGHT_BLOCK, QuantizedArray
from pallas_kernels.formats.quantize_rows import rounded_lanes
from pallas_kernels.formats.records import Format as Rounding
from pallas_kernels.grouped_matmul import block_sizes, few_rows, order, weights
from pallas_kernels.grouped_matmul.block_sizes import BlockSizes
from pallas_kernels.grouped_matmul.reference import swiglu
from pallas_kernels.grouped_matmul.weights import Format

LANES = 128
HEADS = 8  # that lie in one register


@dataclasses.dataclass(frozen=True)
class Form:
    """What a product is, but for its arrays. See `ops.linear`. Hashable."""

    groups: int
    out_dtype: jnp.dtype
    rounding: Rounding | None = None
    in_width: int | None = None
    out_width: int | None = None
    limit: float | None = None  # of `ops.linear_swiglu`, which has two weights

    def of_many_rows(self) -> "Form":
        """Of rows that are rounded already, and of arrays as they are."""
        return Form(self.groups, self.out_dtype)


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
    form = Form(groups, jnp.dtype(jnp.float32))
    if sizes_for(x.size // x.shape[-1], w, form, x.dtype, chip) is None:
        return f"a row of {w.shape} weights is too long for the VMEM of {chip}"
    return None


def sizes_for(
    num_rows: int, w: QuantizedArray, form: Form, dtype, chip: str
) -> tuple[BlockSizes, bool] | None:
    """Blocks, and whether they are for few rows; None if none fit VMEM."""
    fmt = weights.format_of(w, dtype, chip)
    num_inputs, size = fmt.num_inputs, fmt.dtype.itemsize
    scales = 2 * 4 * w.scale.size if fmt.kind == "fp8" else 0
    is_one_tile = num_rows <= block_sizes.MAX_ROW_TILE
    count = 1 if form.limit is None else 2
    # A core has two blocks at least, or tiles: one is copied while another is worked on.
    choose = functools.partial(
        block_sizes.choose,
        chip,
        num_columns=fmt.num_outputs // form.groups,
        max_step=block_sizes.STEP_WEIGHTS[chip] // num_inputs // count,
        widest=fmt.num_outputs // block_sizes.CORES[chip] // (1 + is_one_tile),
    )
    rows = block_sizes.few_rows(num_rows, 1, num_inputs)
    if rows is not None:
        parts = few_rows.parts(fmt, block_sizes.MXU_DEPTH[chip])
        per_column = count * (fmt.vmem_bytes() - size) * num_inputs + 4 * 4 * rows
        fixed = (2 + parts) * rows * num_inputs * size + count * scales
        multiple = (form.out_width or 0) * HEADS or LANES
        if sizes := choose(rows=rows, fixed=fixed, per_column=int(per_column), multiple=multiple):
            return sizes, True
    rows = block_sizes.row_tile(num_rows)
    kept = 0 if is_one_tile else size
    per_column = (fmt.vmem_bytes() - size + kept) * num_inputs + 3 * 4 * rows
    fixed = 2 * rows * num_inputs * size + scales
    sizes = choose(rows=rows, fixed=fixed, per_column=int(per_column), multiple=LANES)
    return (sizes, False) if sizes else None


def are_few(num_rows: int, w: QuantizedArray, form: Form, dtype, chip: str) -> bool:
    """Whether the kernel for few rows takes them."""
    found = sizes_for(num_rows, w, form, dtype, chip)
    return found is not None and found[1]


def taken(num_rows: int, w: QuantizedArray, form: Form, dtype, chip: str) -> Form:
    """What of a form the kernel for so many rows does: heads come in whole registers, or not apart."""
    if not are_few(num_rows, w, form.of_many_rows(), dtype, chip):
        return form.of_many_rows()

    def of_heads(width: int | None, size: int) -> int | None:
        is_whole = width is not None and width % LANES == 0 and size % (HEADS * width) == 0
        return width if is_whole else None

    out_width = of_heads(form.out_width, w.shape[1] // form.groups)
    form = dataclasses.replace(form, in_width=of_heads(form.in_width, w.shape[0]), out_width=None)
    apart = dataclasses.replace(form, out_width=out_width)
    return apart if are_few(num_rows, w, apart, dtype, chip) else form


def linear(
    x: jax.Array,  # [P, groups * in]
    ws: Sequence[QuantizedArray],  # [in, groups * out]; two if the form has a limit
    form: Form,
    chip: str,
    *,
    interpret: bool = False,
) -> jax.Array:  # [P, groups * out] in `form.out_dtype`
    """Runs the kernel; the blocks must exist (`sizes_for`), and the form be as `taken` says."""
    w = ws[0]
    fmt = weights.format_of(w, x.dtype, chip)
    found = sizes_for(x.shape[0], w, form, x.dtype, chip)
    assert found is not None  # the caller has asked
    sizes, is_few = found
    num_rows, num_inputs, num_columns = x.shape[0], fmt.num_inputs, fmt.num_outputs
    blocks = num_columns // form.groups // sizes.columns  # of a group
    rows = num_rows if is_few else sizes.rows
    tiles = pl.cdiv(num_rows, rows)
    num_scales = num_inputs // fmt.group
    if is_few:
        depth = block_sizes.MXU_DEPTH[chip]
        kernel = functools.partial(_few_rows_kernel, fmt, sizes, depth, form, is_tall(w), len(ws))
        parts = few_rows.parts(fmt, depth)
        scratch = [
            *[pltpu.VMEM((num_scales, sizes.columns), jnp.float32) for _ in ws],
            pltpu.VMEM((parts * sizes.rows, num_inputs), x.dtype),
            pltpu.VMEM((sizes.rows, sizes.columns), jnp.float32),
        ]
    else:
        kernel = functools.partial(_kernel, fmt, sizes, is_tall(w))
        scratch = [pltpu.VMEM((num_scales, sizes.columns), jnp.uint32)]
        if tiles > 1:
            scratch.append(pltpu.VMEM((num_inputs, sizes.columns), x.dtype))
    scales = [w.scale for w in ws]
    scale_spec = pl.BlockSpec((num_scales, sizes.columns), lambda n, t: (0, n))
    if fmt.kind == "fp8":
        scales = [scale.T if is_tall(w) else scale for scale in scales]
        scale_spec = pl.BlockSpec(scales[0].shape, lambda n, t: (0, 0))
    weight_spec = pl.BlockSpec((w.values.shape[0], sizes.columns), lambda n, t: (0, n))
    x_spec = pl.BlockSpec((rows, num_inputs), lambda n, t: (t, n // blocks))
    out_spec = pl.BlockSpec((rows, sizes.columns), lambda n, t: (t, n))
    out_shape: tuple[int, ...] = (num_rows, num_columns)
    if form.in_width:
        x = x.reshape(num_rows, -1, form.in_width)
        heads = num_inputs // form.in_width
        x_spec = pl.BlockSpec((rows, heads, form.in_width), lambda n, t: (t, n // blocks, 0))
    if form.out_width:
        out_shape = (num_rows, num_columns // form.out_width, form.out_width)
        heads = sizes.columns // form.out_width
        out_spec = pl.BlockSpec((rows, heads, form.out_width), lambda n, t: (t, n, 0))
    out = pl.pallas_call(
        kernel,
        grid=(form.groups * blocks, tiles),
        in_specs=[x_spec, *[weight_spec, scale_spec] * len(ws)],
        out_specs=out_spec,
        scratch_shapes=scratch,
        out_shape=jax.ShapeDtypeStruct(out_shape, form.out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=sizes.vmem_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * num_inputs * num_columns * len(ws),
            bytes_accessed=sum(w.nbytes for w in ws)
            + x.nbytes
            + form.out_dtype.itemsize * num_rows * num_columns,
            transcendentals=0,
        ),
        interpret=interpret,
        name="linear_few_rows" if is_few else "linear",
    )(x, *(array for w, scale in zip(ws, scales) for array in (w.values, scale)))
    return out.reshape(num_rows, num_columns)


def is_tall(w: QuantizedArray) -> bool:
    """Whether its scales come turned over."""
    rows, columns = w.scale.shape
    return rows > columns


def _few_rows_kernel(
    fmt: Format,
    sizes: BlockSizes,
    depth: int,
    form: Form,
    is_turned: bool,
    count: int,
    x_ref,
    *refs,
):
    weight_refs, (out_ref, *scratch) = refs[: 2 * count], refs[2 * count :]
    own_scale_refs, (spread_ref, sums_ref) = scratch[:count], scratch[count:]
    for ref, scale_ref in zip(own_scale_refs, weight_refs[1::2]):
        ref[...] = own_scale(fmt, scale_ref, sizes.columns, pl.program_id(0), is_turned)
    x = x_ref[...]
    if form.in_width:
        x = jnp.concatenate([x[:, head] for head in range(x.shape[1])], axis=1)
    x = x.astype(jnp.float32)
    if form.rounding is not None:
        x = rounded_lanes(x, form.rounding.values)
    few_rows.spread(x, spread_ref, fmt, sizes.rows, depth)

    def step(j):
        columns = pl.ds(pl.multiple_of(j * sizes.step, sizes.step), sizes.step)
        products = [
            few_rows.packed_product(
                fmt, spread_ref, values_ref, scale_ref[:, columns], columns, depth, sizes.rows
            )
            for values_ref, scale_ref in zip(weight_refs[::2], own_scale_refs)
        ]
        out = products[0]
        if form.limit is not None:
            gate, up = (product.astype(out_ref.dtype) for product in products)
            out = swiglu(gate, up, form.limit)
        if form.out_width:
            sums_ref[:, columns] = out
        else:
            out_ref[:, columns] = out[: out_ref.shape[0]].astype(out_ref.dtype)

    _repeat(sizes.columns // sizes.step, step)
    if width := form.out_width:
        for row in range(out_ref.shape[0]):
            heads = [sums_ref[row : row + 1, i : i + width] for i in range(0, sizes.columns, width)]
            out_ref[row] = jnp.concatenate(heads).astype(out_ref.dtype)


def _kernel(
    fmt: Format,
    sizes: BlockSizes,
    is_turned: bool,
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
        scale = own_scale(fmt, scale_ref, sizes.columns, block, is_turned)
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


def own_scale(fmt: Format, scale_ref, num_columns: int, block, is_turned: bool) -> jax.Array:
    """float32 [n, num_columns]: the scales of a block's columns, of FP8 from those of all columns."""
    scale = scale_ref[...].astype(jnp.float32)
    if fmt.kind != "fp8":
        return scale
    # One lane (or sublane) for 128 columns; which one is known at run time.
    first = block * (num_columns // FP8_WEIGHT_BLOCK[1])
    along = 0 if is_turned else 1
    place = jax.lax.broadcasted_iota(jnp.int32, scale.shape, along)
    parts = []
    for i in range(num_columns // FP8_WEIGHT_BLOCK[1]):
        own = jnp.sum(jnp.where(place == first + i, scale, 0.0), axis=along, keepdims=True)
        own = order.turned(own) if is_turned else own
        parts.append(jnp.broadcast_to(own, (own.shape[0], FP8_WEIGHT_BLOCK[1])))
    return jnp.concatenate(parts, axis=1)
