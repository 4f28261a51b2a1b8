"""The coefficients post and comb from the projections, with 1024 tokens in every register.

The matrices are arrays [M, M, 8, 128], every entry a register of tokens: a Sinkhorn step is
additions, four reciprocals and sixteen products of registers. XLA would run forty programs of a few
kilobytes.

The backward kernel runs the steps again, keeps each step's result and divisors in VMEM (3.3 MB) and
goes back through them: for c' = c / (s + eps) with s the sum of a row or column,

    dc = (dc' - sum(dc' * c')) / (s + eps)

Grid: blocks of 1024 tokens. Layout in HBM: [E, N], tokens on lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.hyper_connections.block_sizes import COEFFICIENT_TOKENS as TOKENS
from pallas_kernels.hyper_connections.phases import LANES, Static

SUBLANES = TOKENS // LANES
_COLUMN, _ROW = 0, 1  # the axes a column or a row is summed over


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def coefficients(
    raw: jax.Array,  # [E + 8, N] float32; the last 8 rows are not read
    affine: jax.Array,  # [E, 2] float32: scale and base of each row
    static: Static,
) -> jax.Array:  # [E, N] float32
    """Rows pre, post, comb."""
    e = affine.shape[0]
    return _launch(
        *(_kernel, "hc_coefficients", [raw], affine, e, static),
        [pltpu.VMEM((e, SUBLANES, LANES), jnp.float32)],
    )


def _launch(kernel, name, arrays, affine, rows, static, scratch):
    n = arrays[0].shape[1]
    e = affine.shape[0]
    return pl.pallas_call(
        functools.partial(kernel, static=static),
        grid=(pl.cdiv(n, TOKENS),),
        in_specs=[
            *(pl.BlockSpec((e, TOKENS), lambda i: (0, i)) for _ in arrays),
            pl.BlockSpec(affine.shape, lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((rows, TOKENS), lambda i: (0, i)),
        out_shape=jax.ShapeDtypeStruct((rows, n), jnp.float32),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=60 * n * static.sinkhorn_iters * static.num_streams,
            bytes_accessed=8 * n * e,
            transcendentals=n * e,
        ),
        interpret=static.interpret,
        name=name,
    )(*arrays, affine)


def _unpack(x: jax.Array, ref) -> None:
    """[rows, 1024] -> [rows, 8, 128]: the tokens of a row fill a register."""
    for i in range(SUBLANES):
        ref[:, i] = x[:, i * LANES : (i + 1) * LANES]


def _pack(ref, out_ref) -> None:
    for i in range(SUBLANES):
        out_ref[:, i * LANES : (i + 1) * LANES] = ref[:, i]


def _logits(raw_ref, affine_ref):
    return raw_ref[...] * affine_ref[:, 0:1] + affine_ref[:, 1:2]


def _matrices(entries_ref, m):
    """[M, M, 8, 128]"""
    return entries_ref[2 * m :].reshape(m, m, SUBLANES, LANES)


def _softmax(logits):
    weights = jnp.exp(logits - jnp.max(logits, axis=_ROW, keepdims=True))
    return weights * (1 / jnp.sum(weights, axis=_ROW, keepdims=True))


def _normalize(c, axis, eps):
    """One step: the matrices, and the inverses of what they were divided by."""
    inverse = 1 / (jnp.sum(c, axis=axis, keepdims=True) + eps)
    return c * inverse, inverse


def _kernel(raw_ref, affine_ref, out_ref, entries_ref, *, static):
    m, eps = static.num_streams, static.eps
    _unpack(_logits(raw_ref, affine_ref), entries_ref)
    entries_ref[:m] = jax.nn.sigmoid(entries_ref[:m]) + eps
    entries_ref[m : 2 * m] = 2 * jax.nn.sigmoid(entries_ref[m : 2 * m])
    c = _normalize(_softmax(_matrices(entries_ref, m)) + eps, _COLUMN, eps)[0]

    def body(_, c):
        return _normalize(_normalize(c, _ROW, eps)[0], _COLUMN, eps)[0]

    c = jax.lax.fori_loop(0, static.sinkhorn_iters - 1, body, c)
    entries_ref[2 * m :] = c.reshape(m * m, SUBLANES, LANES)
    _pack(entries_ref, out_ref)


def _backward_kernel(
    raw_ref,  # [E, 1024]
    d_out_ref,  # [E, 1024]
    affine_ref,  # [E, 2]
    d_logits_ref,  # [E, 1024]
    entries_ref,  # [E, 8, 128]
    d_ref,  # [E, 8, 128]
    steps_ref,  # [2 * iters, M, M, 8, 128]: the matrices after a step
    inverses_ref,  # [2 * iters, M, 8, 128]: the inverses of its divisors
    *,
    static,
):
    m, eps, iters = static.num_streams, static.eps, static.sinkhorn_iters
    _unpack(_logits(raw_ref, affine_ref), entries_ref)
    _unpack(d_out_ref[...], d_ref)
    for rows, factor in ((slice(0, m), 1), (slice(m, 2 * m), 2)):
        s = jax.nn.sigmoid(entries_ref[rows])
        d_ref[rows] = d_ref[rows] * s * (1 - s) * factor

    def forward(step, c, axis):
        c, inverse = _normalize(c, axis, eps)
        steps_ref[step] = c
        inverses_ref[step] = inverse.reshape(m, SUBLANES, LANES)
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
    d_ref[2 * m :] = d.reshape(m * m, SUBLANES, LANES)
    _pack(d_ref, d_logits_ref)


def _fwd(raw, affine, static):
    return coefficients(raw, affine, static), (raw, affine)


def _bwd(static, saved, d_out):
    raw, affine = saved
    e, steps = affine.shape[0], 2 * static.sinkhorn_iters
    m = static.num_streams
    d_logits = _launch(
        *(_backward_kernel, "hc_grad_coefficients", [raw, d_out], affine, e, static),
        [
            pltpu.VMEM((e, SUBLANES, LANES), jnp.float32),
            pltpu.VMEM((e, SUBLANES, LANES), jnp.float32),
            pltpu.VMEM((steps, m, m, SUBLANES, LANES), jnp.float32),
            pltpu.VMEM((steps, m, SUBLANES, LANES), jnp.float32),
        ],
    )
    d_raw = jnp.pad(d_logits * affine[:, :1], ((0, raw.shape[0] - e), (0, 0)))
    return d_raw, d_affine(d_logits, raw)


def d_affine(d_logits: jax.Array, raw: jax.Array) -> jax.Array:
    """Gradient [E, 2] of the scale and base of each row of the logits [E, N]."""
    return jnp.stack([(d_logits * raw[: d_logits.shape[0]]).sum(-1), d_logits.sum(-1)], axis=-1)


coefficients.defvjp(_fwd, _bwd)
