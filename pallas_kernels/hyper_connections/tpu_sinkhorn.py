"""The coefficients post and comb from the projections, and their gradient.

The matrices are arrays [M, M, S, 128], every entry S * 128 tokens: a Sinkhorn step is additions, four
reciprocals and sixteen products of registers. XLA would run forty programs of a few kilobytes.

Of up to 128 tokens this is a phase of the kernels that make the projections (`write`): it takes no
longer than in a kernel of its own, which would have to start. Of more tokens a kernel has 1024 of them
in every register, where a block of the others would have 256 and wait as long for each step.

The backward kernel runs the steps again, keeps each step's result and divisors in VMEM (3.3 MB) and
goes back through them: for c' = c / (s + eps) with s the sum of a row or column,

    dc = (dc' - sum(dc' * c')) / (s + eps)

Grid: blocks of 1024 tokens. Layout in HBM: tokens on lanes, [E, N] and of post and comb [M, N] and
[M * M, N].
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.hyper_connections import phases
from pallas_kernels.hyper_connections.block_sizes import COEFFICIENT_TOKENS as TOKENS
from pallas_kernels.hyper_connections.phases import LANES, Static

_COLUMN, _ROW = 0, 1  # the axes a column or a row is summed over


def entries(tokens: int, m: int) -> Any:
    """Scratch for the entries of `tokens` tokens."""
    return pltpu.VMEM(((2 + m) * m, tokens // LANES, LANES), jnp.float32)


def _unpack(x: jax.Array, ref) -> None:
    """[rows, S * 128] -> [rows, S, 128]: the tokens of a row on whole registers."""
    for i in range(ref.shape[1]):
        ref[:, i] = x[:, i * LANES : (i + 1) * LANES]


def _pack(ref, out_ref) -> None:
    for i in range(ref.shape[1]):
        out_ref[:, i * LANES : (i + 1) * LANES] = ref[:, i]


def _matrices(entries_ref, m):
    """[M, M, S, 128]"""
    return entries_ref[2 * m :].reshape(m, m, *entries_ref.shape[1:])


def _softmax(logits):
    weights = jnp.exp(logits - jnp.max(logits, axis=_ROW, keepdims=True))
    return weights * (1 / jnp.sum(weights, axis=_ROW, keepdims=True))


def _normalize(c, axis, eps):
    """One step: the matrices, and the inverses of what they were divided by."""
    inverse = 1 / (jnp.sum(c, axis=axis, keepdims=True) + eps)
    return c * inverse, inverse


def write(
    raw_ref,  # [E or more, tokens], of which E rows are read
    scale: jax.Array,  # [E, 1]
    base: jax.Array,  # [E, 1]
    post_ref,  # [M, tokens]
    comb_ref,  # [M * M, tokens]
    entries_ref,  # as `entries` says
    static: Static,
) -> None:
    """Writes post and comb of a block."""
    m, eps = static.num_streams, static.eps
    _unpack(raw_ref[: len(scale)] * scale + base, entries_ref)
    entries_ref[m : 2 * m] = 2 * jax.nn.sigmoid(entries_ref[m : 2 * m])
    c = _normalize(_softmax(_matrices(entries_ref, m)) + eps, _COLUMN, eps)[0]

    def body(_, c):
        return _normalize(_normalize(c, _ROW, eps)[0], _COLUMN, eps)[0]

    c = jax.lax.fori_loop(0, static.sinkhorn_iters - 1, body, c)
    entries_ref[2 * m :] = c.reshape(m * m, *entries_ref.shape[1:])
    _pack(entries_ref.at[m : 2 * m], post_ref)
    _pack(entries_ref.at[2 * m :], comb_ref)


def coefficients(
    raw: jax.Array,  # [E + 8, N] float32; the last 8 rows are not read
    base: jax.Array,  # [1, E]
    scale: jax.Array,  # [1, 3]
    static: Static,
) -> list[jax.Array]:
    """post [M, N] and comb [M * M, N]."""
    m = static.num_streams
    arrays, scratch = [(raw, base.shape[1])], [entries(TOKENS, m)]
    results = [m, m * m]
    return _launch(_kernel, "hc_coefficients", arrays, base, scale, results, scratch, static)


def d_logits(
    raw: jax.Array,  # [E + 8, N]; the last 8 rows are not read
    d_post: jax.Array,  # [M, N]
    d_comb: jax.Array,  # [M * M, N]
    base: jax.Array,  # [1, E]
    scale: jax.Array,  # [1, 3]
    static: Static,
) -> jax.Array:  # [E, N]; zero in the rows of pre
    """Gradient of raw * scale + base through post and comb."""
    m, e, steps = static.num_streams, base.shape[1], 2 * static.sinkhorn_iters
    arrays = [(raw, e), (d_post, m), (d_comb, m * m)]
    scratch = [
        entries(TOKENS, m),
        entries(TOKENS, m),
        pltpu.VMEM((steps, m, m, TOKENS // LANES, LANES), jnp.float32),
        pltpu.VMEM((steps, m, TOKENS // LANES, LANES), jnp.float32),
    ]
    name = "hc_grad_coefficients"
    (found,) = _launch(_backward_kernel, name, arrays, base, scale, [e], scratch, static)
    return found


def _launch(kernel, name, arrays, base, scale, results, scratch, static):
    """Runs `kernel` on blocks of arrays, each with the rows that are read, to results of so many."""
    n, e = arrays[0][0].shape[1], base.shape[1]

    def block(rows):
        return pl.BlockSpec((rows, TOKENS), lambda i: (0, i))

    return pl.pallas_call(
        functools.partial(kernel, static=static),
        grid=(pl.cdiv(n, TOKENS),),
        in_specs=[
            *(block(rows) for _, rows in arrays),
            *(pl.BlockSpec(a.shape, lambda i: (0, 0)) for a in (base, scale)),
        ],
        out_specs=[block(rows) for rows in results],
        out_shape=[jax.ShapeDtypeStruct((rows, n), jnp.float32) for rows in results],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=60 * n * static.sinkhorn_iters * static.num_streams,
            bytes_accessed=8 * n * e,
            transcendentals=n * e,
        ),
        interpret=static.interpret,
        name=name,
    )(*(array for array, _ in arrays), base, scale)


def _kernel(raw_ref, base_ref, scale_ref, post_ref, comb_ref, entries_ref, *, static):
    scale, base = phases.affine(base_ref, scale_ref, static.num_streams)
    write(raw_ref, scale, base, post_ref, comb_ref, entries_ref, static)


def _backward_kernel(
    raw_ref,  # [E, 1024]
    d_post_ref,  # [M, 1024]
    d_comb_ref,  # [M * M, 1024]
    base_ref,  # [1, E]
    scale_ref,  # [1, 3]
    d_logits_ref,  # [E, 1024]
    entries_ref,  # [E, 8, 128]
    d_ref,  # [E, 8, 128]
    steps_ref,  # [2 * iters, M, M, 8, 128]: the matrices after a step
    inverses_ref,  # [2 * iters, M, 8, 128]: the inverses of its divisors
    *,
    static,
):
    m, eps, iters = static.num_streams, static.eps, static.sinkhorn_iters
    scale, base = phases.affine(base_ref, scale_ref, m)
    _unpack(raw_ref[...] * scale + base, entries_ref)
    d_ref[:m] = jnp.zeros_like(d_ref[:m])
    _unpack(d_post_ref[...], d_ref.at[m : 2 * m])
    _unpack(d_comb_ref[...], d_ref.at[2 * m :])
    s = jax.nn.sigmoid(entries_ref[m : 2 * m])
    d_ref[m : 2 * m] = d_ref[m : 2 * m] * s * (1 - s) * 2

    def forward(step, c, axis):
        c, inverse = _normalize(c, axis, eps)
        steps_ref[step] = c
        inverses_ref[step] = inverse.reshape(inverses_ref.shape[1:])
        return c

    def backward(step, d, axis):
        inverse = jnp.expand_dims(inverses_ref[step], axis)
        return (d - jnp.sum(d * steps_ref[step], axis=axis, keepdims=True)) * inverse

    def forth(i, c):
        return forward(2 * i + 1, forward(2 * i, c, _ROW), _COLUMN)

    def back(i, d):
        i = iters - 1 - i
        return backward(2 * i, backward(2 * i + 1, d, _COLUMN), _ROW)

    softmax = _softmax(_matrices(entries_ref, m))
    steps_ref[0] = softmax  # the first row step
    jax.lax.fori_loop(1, iters, forth, forward(1, softmax + eps, _COLUMN))
    d = jax.lax.fori_loop(0, iters - 1, back, _matrices(d_ref, m))
    d = backward(1, d, _COLUMN)
    softmax = steps_ref[0]
    d = softmax * (d - jnp.sum(d * softmax, axis=_ROW, keepdims=True))
    d_ref[2 * m :] = d.reshape(m * m, *d_ref.shape[1:])
    _pack(d_ref, d_logits_ref)
