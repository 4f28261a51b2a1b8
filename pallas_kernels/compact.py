"""Forms of small operations that XLA makes less, or better, code of.

A program of many small operations takes a CPU longer to compile than to run, and what it takes is
decided by how many different kernels there are. docs/measurements/compile_time.md has the figures.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import target_platform

_STEP = 32  # values of an axis that XLA reduces in one step
_FEW = 1024  # values; of more, parts would be kernels of their own


def matmul(x: jax.Array, w: jax.Array, **options) -> jax.Array:
    """`jnp.matmul` of x [..., in] and w [in, out], see `einsum`."""
    return einsum("...i,io->...o", x, w, **options)


def einsum(formula: str, x: jax.Array, w: jax.Array, **options) -> jax.Array:
    """`jnp.einsum` of rows x [..., in] or [..., groups, in], whose axes come first in the result too.

    A row alone goes twice. On a CPU it would become a loop of its own, which LLVM takes 25 to 50 ms to
    compile for every product of a program; two rows or more go to a library, which is there already.
    On a TPU it would go through the vector unit: 2.6 ms for the output head of Flash on v6e, where
    reading the weight takes 0.65 (docs/measurements/step.md).
    """
    ends = formula.split(",")[0].replace("...", "")
    lead = x.shape[: x.ndim - len(ends)]
    if target_platform() not in ("cpu", "tpu") or not lead or math.prod(lead) != 1:
        return jnp.einsum(formula, x, w, **options)
    row = x.reshape(1, *x.shape[len(lead) :])
    out = jnp.einsum(formula, jnp.concatenate([row, row]), w, **options)[:1]
    return out.reshape(*lead, *out.shape[1:])


def running_sum(x: jax.Array) -> jax.Array:
    """`jnp.cumsum` over the last axis of integers, which is short: one sum in place of several."""
    place = jnp.arange(x.shape[-1])
    return jnp.sum(jnp.where(place <= place[:, None], x[..., None, :], 0), axis=-1, dtype=x.dtype)


def largest(x: jax.Array) -> jax.Array:
    """`jnp.max` over the last axis.

    XLA on a CPU reduces more than 32 values in two steps, neither of which is joined with what comes
    before it. Where values are few, parts of 32 meet first, which is joined, and one step is left.
    """
    count = x.shape[-1] // _STEP
    few = x.size <= _FEW and x.shape[-1] % _STEP == 0 and count > 1
    if target_platform() == "cpu" and few:
        x = functools.reduce(jnp.maximum, jnp.split(x, count, axis=-1))
    return jnp.max(x, axis=-1)
