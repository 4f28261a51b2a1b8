"""The TPU kernels as differentiable operations: which kernel runs, and what its gradient needs.

Results are those of `xla.py`: float32 accumulation, gate and up rounded to the dtype of x on the way
forward and not on the way back, no gradient for packed weights.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import target_chip
from pallas_kernels.formats.quantize import QuantizedArray
from pallas_kernels.formats.quantize_rows import round_rows
from pallas_kernels.formats.records import Format as Rounding
from pallas_kernels.grouped_matmul import (
    block_sizes,
    few_rows,
    gradients,
    order,
    tpu,
    visits,
    weights,
)
from pallas_kernels.grouped_matmul.reference import swiglu


def unsupported(x: jax.Array, ws: list[tpu.Weight]) -> str | None:
    """Why the kernels cannot take these arguments, None if they can."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x must be float32 or bfloat16, not {x.dtype}"
    if x.shape[0] == 0:
        return "x has no rows"
    reasons = [weights.unsupported(w) for w in ws]
    if any(reasons):
        return next(r for r in reasons if r)
    if len({(w.shape, *(a.dtype for a in jax.tree.leaves(w))) for w in ws}) > 1:
        return "gate and up must have one shape and format"
    chip, rows = target_chip(), block_sizes.MAX_GROUP_TILE
    formats = [weights.format_of(w, x.dtype, chip) for w in ws]
    dtypes = (x.dtype,) * len(ws)
    again = tpu.Product("", lambda products, _: products, dtypes, has_row_sums=True)  # gradient's
    for product in (again, transposed(x.dtype)):
        if tpu.sizes_for(product, chip, rows, formats, 1) is None:
            return f"a row of {ws[0].shape} weights is too long for the VMEM of {chip}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x, w, group_sizes, interpret):
    """See `ops.grouped_matmul`."""
    return forward(matmul_product(x.dtype), x, [w], group_sizes, [], interpret)


def _matmul_fwd(x, w, group_sizes, interpret):
    return grouped_matmul(x, w, group_sizes, interpret), (x, w, group_sizes)


def _matmul_bwd(interpret, residuals, d_out):
    x, w, group_sizes = residuals
    d_x = _product(transposed(x.dtype), [d_out], [w], group_sizes, interpret=interpret)[0]
    return d_x, _weight_gradient(x, w, d_out, group_sizes, interpret), None


grouped_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def summed_matmul(x, w, group_sizes, position, rounding, interpret):
    """`ops.grouped_matmul` with `position`."""
    product, options = matmul_product(x.dtype), dict(position=position, rounding=rounding)
    return forward(product, x, [w], group_sizes, [], interpret, **options)


def _summed_fwd(x, w, group_sizes, position, rounding, interpret):
    out = summed_matmul(x, w, group_sizes, position, rounding, interpret)
    return out, (x, w, group_sizes, position)


def _summed_bwd(rounding, interpret, residuals, d_out):
    x, w, group_sizes, position = residuals

    def in_steps(x, w):
        x = rounded(x, rounding, interpret)
        out = grouped_matmul(x, w, group_sizes, interpret)
        return order.summed(out, position)

    return *gradients_of(in_steps, (x, w), d_out), None, None


summed_matmul.defvjp(_summed_fwd, _summed_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def grouped_swiglu(x, w_gate, w_up, group_sizes, row_weights, limit, interpret):
    """See `ops.grouped_swiglu`."""
    product, weight = swiglu_product(x.dtype, limit), row_weights.astype(jnp.float32)
    return forward(product, x, [w_gate, w_up], group_sizes, [weight], interpret)


def _swiglu_fwd(x, w_gate, w_up, group_sizes, row_weights, limit, interpret):
    out = grouped_swiglu(x, w_gate, w_up, group_sizes, row_weights, limit, interpret)
    return out, (x, w_gate, w_up, group_sizes, row_weights)


def _swiglu_bwd(limit, interpret, residuals, d_out):
    x, w_gate, w_up, group_sizes, row_weights = residuals
    ws = [w_gate, w_up]

    def epilogue(products, extras):
        weight, d_rows = extras
        d_rows = d_rows.astype(jnp.float32)
        gate, up = products
        hidden, d_gate, d_up = _swiglu_with_gradients(gate, up, limit)
        d_hidden = weight * d_rows
        return d_hidden * d_gate, d_hidden * d_up, hidden * d_rows

    dtypes = (x.dtype, x.dtype)
    product = tpu.Product("grouped_swiglu_gradient", epilogue, dtypes, has_row_sums=True)
    d_gate, d_up, d_weights = _product(
        *(product, [x], ws, group_sizes),
        row_values=[row_weights.astype(jnp.float32)[:, None]],
        column_values=[d_out],
        interpret=interpret,
    )
    d_x = _product(transposed(x.dtype), [d_gate, d_up], ws, group_sizes, interpret=interpret)[0]
    d_ws = [_weight_gradient(x, w, d, group_sizes, interpret) for w, d in zip(ws, (d_gate, d_up))]
    return d_x, *d_ws, None, d_weights.astype(row_weights.dtype)


grouped_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def swiglu_of_pairs(x, w_gate, w_up, group_sizes, row_weights, pair, limit, rounding, interpret):
    """`ops.grouped_swiglu` with `pair`."""
    product, weight = swiglu_product(x.dtype, limit), row_weights.astype(jnp.float32)
    ws, options = [w_gate, w_up], dict(pair=pair, rounding=rounding)
    return forward(product, x, ws, group_sizes, [weight], interpret, **options)


def _pairs_fwd(x, w_gate, w_up, group_sizes, row_weights, pair, limit, rounding, interpret):
    args = x, w_gate, w_up, group_sizes, row_weights, pair
    return swiglu_of_pairs(*args, limit, rounding, interpret), args


def _pairs_bwd(limit, rounding, interpret, residuals, d_out):
    x, w_gate, w_up, group_sizes, row_weights, pair = residuals

    def in_steps(x, w_gate, w_up, row_weights):
        tokens = rounded(x.reshape(-1, x.shape[-1]), rounding, interpret)
        rows = order.of_pairs(tokens, pair)
        return grouped_swiglu(rows, w_gate, w_up, group_sizes, row_weights, limit, interpret)

    args = x, w_gate, w_up, row_weights
    d_x, d_gate, d_up, d_weights = gradients_of(in_steps, args, d_out)
    return d_x, d_gate, d_up, None, d_weights, None


swiglu_of_pairs.defvjp(_pairs_fwd, _pairs_bwd)


def rounded(x: jax.Array, rounding: Rounding | None, interpret: bool) -> jax.Array:
    """Rows as a kernel for few of them rounds them."""
    if rounding is None:
        return x
    names = ("interpret", "xla") if interpret else None
    return round_rows(x, rounding.values, rounding.block, implementation=names)


def gradients_of(f, args, d_out) -> list:
    """Of `f(*args)` in each argument; None for packed weights."""
    is_packed = [isinstance(a, QuantizedArray) for a in args]

    def of_floats(*floats):
        given = iter(floats)
        return f(*(a if packed else next(given) for a, packed in zip(args, is_packed)))

    floats = [a for a, packed in zip(args, is_packed) if not packed]
    found = iter(jax.vjp(of_floats, *floats)[1](d_out))
    return [None if packed else next(found) for packed in is_packed]


def _swiglu_with_gradients(gate, up, limit):
    """swiglu, and what to multiply a cotangent with for gate's and up's."""
    low = jnp.minimum(gate, limit)
    clipped = jnp.clip(up, -limit, limit)
    sigmoid = jax.nn.sigmoid(low)
    silu = low * sigmoid
    d_gate = jnp.where(gate < limit, sigmoid * (1 + low * (1 - sigmoid)) * clipped, 0.0)
    d_up = jnp.where(jnp.abs(up) < limit, silu, 0.0)
    return silu * clipped, d_gate, d_up


def matmul_product(dtype: jax.typing.DTypeLike) -> tpu.Product:
    """Plain products, in `dtype`."""
    return tpu.Product("grouped_matmul", lambda products, _: products, (dtype,))


def swiglu_product(dtype: jax.typing.DTypeLike, limit: float) -> tpu.Product:
    """Gate and up, rounded to `dtype`, to what the second half takes."""

    def epilogue(products, extras):
        gate, up = (p.astype(dtype) for p in products)
        return (extras[0] * swiglu(gate, up, limit),)

    return tpu.Product("grouped_swiglu", epilogue, (dtype,))


def transposed(dtype: jax.typing.DTypeLike) -> tpu.Product:
    """Products with the transposed weights, summed over them: the gradient of the rows."""
    name = "grouped_matmul_transposed"
    return tpu.Product(name, lambda products, _: products, (dtype,), transposed=True)


def forward(
    product,
    x,
    ws,
    group_sizes,
    row_values,
    interpret,
    *,
    pair=None,
    position=None,
    rounding=None,
) -> jax.Array:
    """The product [P, out], by the kernel that is made for so many rows.

    Args:
      pair: see `ops.grouped_swiglu`.
      position, rounding: see `ops.grouped_matmul`.
    """
    chip = target_chip()
    num_rows = x.shape[0] if pair is None else pair.shape[0]
    rows = block_sizes.few_rows(num_rows, ws[0].shape[0], x.shape[-1])
    formats = [weights.format_of(w, x.dtype, chip) for w in ws]
    if rows is not None and few_rows.sizes_for(chip, rows, formats, num_rows) is None:
        rows = None
    num_tokens = x.size // x.shape[-1] if position is None else position.shape[0]
    if rows is None or not few_rows.can_order(num_tokens, num_rows):
        x, rounding = rounded(x.reshape(-1, x.shape[-1]), rounding, interpret), None
        if pair is not None:
            x = order.of_pairs(x, pair)
        if position is not None:
            out = forward(product, x, ws, group_sizes, row_values, interpret)
            return order.summed(out, position)
        pair = None
    if rows is None:
        columns = [values[:, None] for values in row_values]
        (out,) = _product(product, [x], ws, group_sizes, row_values=columns, interpret=interpret)
        return out
    found = visits.from_first_rows(group_sizes, num_rows, rows, interpret=interpret)
    return few_rows.grouped_product(
        product,
        x,
        ws,
        found,
        rows,
        chip,
        row_values=row_values,
        pair=pair,
        position=position,
        rounding=rounding,
        interpret=interpret,
    )


def _product(product, xs, ws, group_sizes, **kwargs):
    num_rows = xs[0].shape[0]
    rows = block_sizes.group_tile(num_rows, ws[0].shape[0])
    found = visits.tiled(group_sizes, block_sizes.whole(num_rows), rows)
    return tpu.grouped_product(product, xs, ws, found, rows, target_chip(), **kwargs)


def _weight_gradient(x, w, d_out, group_sizes, interpret):
    if isinstance(w, QuantizedArray):
        return None
    rows = block_sizes.group_tile(x.shape[0], w.shape[0])
    num_rows = block_sizes.whole(x.shape[0])
    found = visits.tiled(group_sizes, num_rows, rows, visit_empty=True)
    x, d_out = (jnp.pad(a, ((0, num_rows - a.shape[0]), (0, 0))) for a in (x, d_out))
    return gradients.weight_gradient(
        x, d_out, found, w.shape[0], rows, target_chip(), w.dtype, interpret=interpret
    )
