"""Rows times a weight, which may be packed: the dense linears of the model.

A packed weight comes to VMEM in its own bytes, from where it lies, and is unpacked there (`tpu.py`).
XLA on a TPU unpacks it in HBM first, at 4 bytes a weight: 8192 x 4096 in FP8 times 8 rows takes
790,000 cycles on v6e instead of the 37,000 that reading the weight takes
(docs/measurements/kernels.md). The gradient of the rows reads it packed, too
(`tpu_gradient.py`).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float

from pallas_kernels import compact
from pallas_kernels.dispatch import Implementation, choose, operation, target_chip
from pallas_kernels.formats.quantize import QuantizedArray, cast
from pallas_kernels.linear import tpu, tpu_gradient


@operation
def linear(
    x: Float[jax.Array, "*rows inputs"],
    w: Float[jax.Array, "group_inputs outputs"] | QuantizedArray,
    *,
    groups: int = 1,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: Implementation = None,
) -> Float[jax.Array, "*rows outputs"]:  # in `out_dtype`
    """Each group of inputs times its own columns of w. Differentiable in x, and in w if it is float.

    Sums are float32. bfloat16 factors are multiplied as they are (their products are exact in
    float32); if either factor is float32, both are, at full precision.

    Args:
      groups: how many parts inputs and outputs have.
      out_dtype: what sums are rounded to; float32 or bfloat16.
      implementation: see `pallas_kernels.dispatch`; of packed weights, float ones are XLA's.

    Raises:
      ValueError: shapes do not agree, or `implementation` cannot run.
    """
    if w.ndim != 2 or x.shape[-1] != groups * w.shape[0] or w.shape[1] % groups:
        raise ValueError(
            f"x {x.shape} must be [..., groups * in] and w {w.shape} [in, groups * out], for "
            f"groups={groups}."
        )
    if not isinstance(w, QuantizedArray):
        return cast(_xla(x, w, groups), out_dtype)
    match choose(implementation, unsupported=tpu.unsupported(x, w, groups, target_chip())):
        case "tpu" | "interpret" as kernel:
            return _packed(x, w, groups, jnp.dtype(out_dtype), kernel == "interpret")
        case _:
            return cast(_xla(x, w.dequantize(x.dtype), groups), out_dtype)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _packed(x, w, groups, out_dtype, interpret):
    rows = x.reshape(-1, x.shape[-1])
    out = tpu.linear(rows, w, groups, target_chip(), out_dtype, interpret=interpret)
    return out.reshape(*x.shape[:-1], w.shape[1])


def _packed_fwd(x, w, groups, out_dtype, interpret):
    return _packed(x, w, groups, out_dtype, interpret), (x, w)


def _packed_bwd(groups, out_dtype, interpret, residuals, d_out):
    """Of x alone: packed weights are frozen."""
    del out_dtype
    x, w = residuals
    d_out = d_out.reshape(-1, w.shape[1]).astype(x.dtype)
    d_x = tpu_gradient.row_gradient(d_out, w, groups, target_chip(), interpret=interpret)
    return d_x.reshape(x.shape), None


_packed.defvjp(_packed_fwd, _packed_bwd)
