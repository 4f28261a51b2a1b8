"""Forms of small operations of which XLA's CPU backend makes less code.

A program of many small operations takes a CPU longer to compile than to run, and what it takes is
decided by how many different kernels there are. docs/measurements/compile_time.md has the figures.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import target_platform

_STEP = 32  # values of an axis that XLA reduces in one step


def matmul(x: jax.Array, w: jax.Array, **options) -> jax.Array:
    """`jnp.matmul` of x [..., in] and w [in, out], or [..., g, in] and [g, in, out] with an axis g.

    On a CPU, a row alone times a matrix becomes a loop of its own, which LLVM takes 25 to 50 ms to
    compile for every product of a program; two rows or more go to Eigen, which is there already.
    So a row goes twice.
    """
    if target_platform() != "cpu" or w.ndim != 2 or math.prod(x.shape[:-1]) != 1:
        return jnp.matmul(x, w, **options)
    row = x.reshape(1, -1)
    out = jnp.matmul(jnp.concatenate([row, row]), w, **options)
    return out[:1].reshape(*x.shape[:-1], w.shape[-1])


def running_sum(x: jax.Array) -> jax.Array:
    """`jnp.cumsum` over the last axis of integers, which is short: one sum in place of several."""
    place = jnp.arange(x.shape[-1])
    return jnp.sum(jnp.where(place <= place[:, None], x[..., None, :], 0), axis=-1, dtype=x.dtype)


def largest(x: jax.Array) -> jax.Array:
    """`jnp.max` over the last axis.

    XLA on a CPU takes maxima of more than 32 values in two steps, neither of which is joined with
    what comes before it. Maxima over two short axes are one step, joined.
    """
    width = x.shape[-1]
    if target_platform() != "cpu" or width <= _STEP or width % _STEP or width > _STEP**2:
        return jnp.max(x, axis=-1)
    return jnp.max(x.reshape(*x.shape[:-1], width // _STEP, _STEP), axis=(-2, -1))
