"""Rows times a weight, which may be packed: the dense linears of the model.

A packed weight comes to VMEM in its own bytes, from where it lies, and is unpacked there (`tpu.py`).
XLA on a TPU unpacks it in HBM first, at 4 bytes a weight: 8192 x 4096 in FP8 times 8 rows takes
790,000 cycles on v6e instead of the 37,000 that reading the weight takes
(docs/measurements/kernels.md). The gradient of the rows reads it packed, too
(`tpu_gradient.py`). A bfloat16 weight is a kernel's for few rows alone (`tpu_float.py`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float

from pallas_kernels import compact
from pallas_kernels.dispatch import Implementation, choose, operation, target_chip
from pallas_kernels.formats.quantize import QuantizedArray, cast
from pallas_kernels.formats.quantize_rows import round_rows
from pallas_kernels.formats.records import Format
from pallas_kernels.grouped_matmul.reference import swiglu
from pallas_kernels.linear import tpu, tpu_float, tpu_gradient
from pallas_kernels.linear.tpu import Form


@operation
def linear(
    x: Float[jax.Array, "*rows inputs"],
    w: Float[jax.Array, "group_inputs outputs"] | QuantizedArray,
    *,
    groups: int = 1,
    rounding: Format | None = None,
    in_width: int | None = None,
    out_width: int | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: Implementation = None,
) -> Float[jax.Array, "*rows outputs"]:  # in `out_dtype`
    """Each group of inputs times its own columns of w. Differentiable in x, and in w if it is float.

    Sums are float32. bfloat16 factors are multiplied as they are (their products are exact in
    float32); if either factor is float32, both are, at full precision.

    Args:
      groups: how many parts inputs and outputs have.
      rounding: what x is rounded to before, as `quantize_rows.round_rows` does. Of few rows the kernel
        does it.
      in_width, out_width: x comes from rows of heads [.., N, width], and the result becomes such. It is
        no other result: a kernel for few rows reads, or writes, heads apart, so that XLA has nothing to
        do where the caller reshapes.
      out_dtype: what sums are rounded to; float32 or bfloat16.
      implementation: see `pallas_kernels.dispatch`; of float weights, only few bfloat16 rows are a
        kernel's.

    Raises:
      ValueError: shapes do not agree, or `implementation` cannot run.
    """
    if w.ndim != 2 or x.shape[-1] != groups * w.shape[0] or w.shape[1] % groups:
        raise ValueError(
            f"x {x.shape} must be [..., groups * in] and w {w.shape} [in, groups * out], for "
            f"groups={groups}."
        )
    if isinstance(w, QuantizedArray):
        chip = target_chip()
        chosen = choose(implementation, unsupported=tpu.unsupported(x, w, groups, chip))
        if chosen in ("tpu", "interpret"):
            form = Form(groups, jnp.dtype(out_dtype), rounding, in_width, out_width)
            form = tpu.taken(x.size // x.shape[-1], w, form, x.dtype, chip)
            x = x if form.rounding else _rounded(x, rounding, implementation)
            return _packed(x, (w,), form, chosen == "interpret")
        w = w.dequantize(x.dtype)
    elif groups == 1:
        x = _rounded(x, rounding, implementation)
        return cast(_of_floats(x, w, False, implementation), out_dtype)
    return cast(_xla(_rounded(x, rounding, implementation), w, groups), out_dtype)


@operation
def linear_swiglu(
    x: Float[jax.Array, "*rows inputs"],
    w_gate: Float[jax.Array, "inputs outputs"] | QuantizedArray,
    w_up: Float[jax.Array, "inputs outputs"] | QuantizedArray,
    *,
    limit: float,
    rounding: Format | None = None,
    implementation: Implementation = None,
) -> Float[jax.Array, "*rows outputs"]:  # in the dtype of x
    """silu(min(gate, limit)) * clip(up, -limit, limit) of two `linear`s, each rounded to the dtype of x.

    Differentiable as they are. Of few rows and packed weights it is one kernel.

    Args:
      rounding: see `linear`.
      implementation: see `linear`.

    Raises:
      ValueError: shapes do not agree, or `implementation` cannot run.
    """
    if w_gate.shape != w_up.shape:
        raise ValueError(f"w_gate {w_gate.shape} and w_up {w_up.shape} must have one shape.")
    if (
        isinstance(w_gate, QuantizedArray)
        and isinstance(w_up, QuantizedArray)
        and w_gate.shape[0] == x.shape[-1]
    ):
        form, chip = Form(1, x.dtype, rounding, limit=limit), target_chip()
        reason = tpu.unsupported(x, w_gate, 1, chip) or tpu.unsupported(x, w_up, 1, chip)
        chosen = choose(implementation, unsupported=reason)
        num_rows = x.size // x.shape[-1]
        if chosen in ("tpu", "interpret") and tpu.are_few(num_rows, w_gate, form, x.dtype, chip):
            return _packed(x, (w_gate, w_up), form, chosen == "interpret")

    x = _rounded(x, rounding, implementation)
    gate = linear(x, w_gate, out_dtype=x.dtype, implementation=implementation)
    up = linear(x, w_up, out_dtype=x.dtype, implementation=implementation)
    return cast(swiglu(gate, up, limit), x.dtype)


@operation
def row_products(
    x: Float[jax.Array, "*rows inputs"],
    table: Float[jax.Array, "outputs inputs"],
    *,
    implementation: Implementation = None,
) -> Float[jax.Array, "*rows outputs"]:  # float32
    """Products with every row of a table: `linear` with the table turned over, which is read as it lies.

    Args:
      implementation: see `linear`.

    Raises:
      ValueError: shapes do not agree, or `implementation` cannot run.
    """
    if table.ndim != 2 or x.shape[-1] != table.shape[1]:
        raise ValueError(f"x {x.shape} must be [..., in] and the table {table.shape} [out, in].")
    return _of_floats(x, table, True, implementation)


def _rounded(x: jax.Array, rounding: Format | None, implementation: Implementation) -> jax.Array:
    if rounding is None:
        return x
    return round_rows(x, rounding.values, rounding.block, implementation=implementation)


def _of_floats(x, w, is_turned: bool, implementation: Implementation) -> jax.Array:
    """float32 products with w [in, out], or [out, in] if it is turned."""
    reason = tpu_float.unsupported(x, w)
    chosen = "xla" if reason else choose(implementation)
    if chosen in ("tpu", "interpret"):
        if (
            not is_turned and w.shape[1] < tpu_float.LANES
        ):  # so few columns lie turned over on a TPU
            w, is_turned = w.T, True
        return _few_rows(x, w, is_turned, chosen == "interpret")
    return _xla(x, w.T if is_turned else w, 1)


def _xla(x: jax.Array, w: jax.Array, groups: int) -> jax.Array:
    if x.dtype != w.dtype:
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    options = dict(
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    if groups == 1:
        return compact.matmul(x, w, **options)
    x, w = x.reshape(*x.shape[:-1], groups, -1), w.reshape(w.shape[0], groups, -1)
    out = compact.einsum("...gi,igo->...go", x, w, **options)
    return out.reshape(*out.shape[:-2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _few_rows(x, w, is_turned, interpret):
    out = tpu_float.linear(x.reshape(-1, x.shape[-1]), w, is_turned, interpret=interpret)
    return out.reshape(*x.shape[:-1], -1)


def _few_fwd(x, w, is_turned, interpret):
    return _few_rows(x, w, is_turned, interpret), (x, w)


def _few_bwd(is_turned, interpret, residuals, d_out):
    """By XLA."""
    del interpret
    return jax.vjp(lambda x, w: _xla(x, w.T if is_turned else w, 1), *residuals)[1](d_out)


_few_rows.defvjp(_few_fwd, _few_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _packed(x, ws, form: Form, interpret):
    rows = x.reshape(-1, x.shape[-1])
    out = tpu.linear(rows, ws, form, target_chip(), interpret=interpret)
    return out.reshape(*x.shape[:-1], ws[0].shape[1])


def _packed_fwd(x, ws, form, interpret):
    return _packed(x, ws, form, interpret), (x, ws)


def _packed_bwd(form: Form, interpret, residuals, d_out):
    """Of x alone: packed weights are frozen. Rounding is as if it did nothing."""
    x, ws = residuals
    limit = form.limit
    if limit is not None:

        def in_steps(x):
            one = dataclasses.replace(form, limit=None)
            gate, up = (_packed(x, (w,), one, interpret) for w in ws)
            return cast(swiglu(gate, up, limit), x.dtype)

        return jax.vjp(in_steps, x)[1](d_out)[0], None
    (w,) = ws
    d_out = d_out.reshape(-1, w.shape[1]).astype(x.dtype)
    d_x = tpu_gradient.row_gradient(d_out, w, form.groups, target_chip(), interpret=interpret)
    return d_x.reshape(x.shape), None


_packed.defvjp(_packed_fwd, _packed_bwd)
