"""Hyper-connections as TPU kernels: each stream is read once and written once.

XLA reads the streams of a site three times (norm, projection, collapse), and runs Sinkhorn as forty
tiny programs. Here a block of tokens with all its streams is held in VMEM, and four phases work on
it (`phases.py`):

    mix       streams'[k] = post[k] * f + sum_j comb[j, k] * streams[j]
    project   raw = streams' @ fn / rms(streams')       one pass: matrix unit and sum of squares
    weights   pre = sigmoid(raw * scale + base) + eps
    collapse  u = sum_k pre[k] * streams'[k]

`mix` alone is hc_post, the last three are hc_pre and hc_head, all four hc_post_pre. `post` and
`comb` are not needed for `u`: `tpu_sinkhorn.py` makes them from `raw` in a kernel of its own, which
has 1024 tokens in every vector register where a block of these kernels would have 128.

Grid: blocks of tokens, independent of each other.

Layout: streams [N, M * D], N tokens on sublanes and channels on lanes. What is per token and not per
channel has tokens on lanes: `raw` and `coefficients` [E, N], E = (2 + M) * M rows pre, post, comb
(comb row-major); for the head E is 8, of which M rows are used. A coefficient that multiplies
channels is transposed and spread over 128 lanes once per block.

Exact products: `fn` is float32. It is cut into three bfloat16 arrays that sum to it, so that one
pass of the matrix unit over 3 * E rows gives what a float32 product would (bfloat16 streams are
exact as they are; float32 streams take the matrix unit's float32 passes). The tokens are the
stationary operand: `raw` comes out with tokens on lanes. XLA cuts it once for many tokens; for few,
where that would take longer than the kernel, the kernel does.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.hyper_connections import phases, tpu_backward
from pallas_kernels.hyper_connections.phases import LANES, Operand, Static

FEW_TOKENS = 128  # of which one block takes all


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def collapse(
    streams: jax.Array,  # [N, M * D]
    fn: jax.Array,  # [M * D, E] float32
    affine: jax.Array,  # [E, 2] float32: scale and base of each row
    static: Static,
) -> tuple[jax.Array, jax.Array]:
    """u [N, D], and [E + 8, N] float32: `raw`, then the inverse rms in 8 equal rows."""
    parts = _projection(fn, streams)
    u, raw = phases.launch(
        *(_collapse_kernel, "hc_pre"),
        [Operand(streams, 0), Operand(parts, None), Operand(affine, None)],
        _collapse_results(streams, fn, static),
        lambda tokens: _collapse_scratch(tokens, parts, streams),
        flops_per_byte=fn.shape[1],
        static=static,
    )
    return u, raw


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def mix(
    f: jax.Array,  # [N, D]
    streams: jax.Array,  # [N, M * D]
    coefficients: jax.Array,  # [E, N] float32
    static: Static,
) -> jax.Array:  # [N, M * D]
    """The new streams."""
    (mixed,) = phases.launch(
        *(functools.partial(_mix_kernel, num_tokens=len(f)), "hc_post"),
        [Operand(f, 0), Operand(streams, 0), _maps(coefficients, streams, static)],
        [Operand(jax.ShapeDtypeStruct(streams.shape, streams.dtype), 0)],
        lambda tokens: [],
        flops_per_byte=static.num_streams,
        static=static,
    )
    return mixed


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def mix_collapse(
    f: jax.Array,  # [N, D]
    streams: jax.Array,  # [N, M * D]
    coefficients: jax.Array,  # [E, N] float32
    fn: jax.Array,  # [M * D, E] float32
    affine: jax.Array,  # [E, 2] float32
    static: Static,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The new streams, and what `collapse` makes of them."""
    parts = _projection(fn, streams)
    mixed, u, raw = phases.launch(
        *(functools.partial(_mix_collapse_kernel, num_tokens=len(f)), "hc_fused"),
        [
            *(Operand(f, 0), Operand(streams, 0), _maps(coefficients, streams, static)),
            *(Operand(parts, None), Operand(affine, None)),
        ],
        [
            Operand(jax.ShapeDtypeStruct(streams.shape, streams.dtype), 0),
            *_collapse_results(streams, fn, static),
        ],
        lambda tokens: _collapse_scratch(tokens, parts, streams),
        flops_per_byte=fn.shape[1],
        static=static,
    )
    return mixed, u, raw


def _projection(fn: jax.Array, streams: jax.Array) -> jax.Array:
    """[M * D, E] as the kernels take it.

    For bfloat16 streams of many tokens [3 * E, M * D] bfloat16. Of few tokens one block takes all, and
    cuts [E, M * D] float32 itself, which XLA would take longer for than the kernel.
    """
    if streams.dtype == jnp.bfloat16 and len(streams) > FEW_TOKENS:
        return jnp.concatenate(phases.cut(fn.T, 3)).astype(jnp.bfloat16)
    return fn.T


def _collapse_results(streams, fn, static):
    n, width = streams.shape
    u = jax.ShapeDtypeStruct((n, width // static.num_streams), streams.dtype)
    raw = jax.ShapeDtypeStruct((fn.shape[1] + 8, n), jnp.float32)
    return [Operand(u, 0), Operand(raw, 1)]


def _collapse_scratch(tokens, parts, streams):
    rows = parts.shape[0] * (1 if parts.dtype == streams.dtype else 3)
    return [
        pltpu.VMEM((8, tokens, LANES), jnp.float32),
        pltpu.VMEM((tokens, LANES), jnp.float32),
        pltpu.VMEM((rows, tokens), jnp.float32),
    ]


def _maps(coefficients, streams, static) -> Operand:
    """From f and the streams to the new streams."""
    m = static.num_streams
    return phases.maps(coefficients[m:].reshape(1 + m, m, -1), streams.dtype)


def _mix_kernel(f_ref, x_ref, maps_ref, y_ref, *, static, worked, num_tokens):
    sizes = dict(m=static.num_streams, worked=worked, num_tokens=num_tokens)
    phases.mix(maps_ref, f_ref, x_ref, y_ref, **sizes)


def _collapse_kernel(
    x_ref,  # [tokens, M * D]
    fn_ref,  # [3 * E, M * D], or [E, M * D] float32
    affine_ref,  # [E, 2]
    u_ref,  # [tokens, D]
    raw_ref,  # [E + 8, tokens]
    spread_ref,  # [8, tokens, 128]
    square_ref,  # [tokens, 128]
    product_ref,  # [3 * E or E, tokens]
    *,
    static: Static,
    worked: int,
):
    m = static.num_streams
    phases.project(
        *(fn_ref, x_ref, raw_ref, square_ref, product_ref),
        norm_eps=static.norm_eps,
        worked=worked,
    )
    phases.spread(phases.pre_weights(raw_ref, affine_ref, static.eps), spread_ref, range(m))
    phases.collapse(spread_ref, x_ref, u_ref, m=m, worked=worked)


def _mix_collapse_kernel(
    f_ref, x_ref, maps_ref, fn_ref, affine_ref, y_ref, *refs, static, worked, num_tokens
):
    options = dict(static=static, worked=worked)
    _mix_kernel(f_ref, x_ref, maps_ref, y_ref, num_tokens=num_tokens, **options)
    _collapse_kernel(y_ref, fn_ref, affine_ref, *refs, **options)


def _collapse_fwd(streams, fn, affine, static):
    u, raw = collapse(streams, fn, affine, static)
    return (u, raw), (streams, fn, affine, raw)


def _collapse_bwd(static, saved, d_out):
    streams, fn, affine, raw = saved
    d_u, d_raw = d_out
    return tpu_backward.collapse(streams, fn, affine, raw, None, d_u, d_raw, static)


def _mix_fwd(f, streams, coefficients, static):
    return mix(f, streams, coefficients, static), (f, streams, coefficients)


def _mix_bwd(static, saved, d_mixed):
    f, streams, coefficients = saved
    return tpu_backward.mix(f, streams, coefficients, d_mixed, static)


def _mix_collapse_fwd(f, streams, coefficients, fn, affine, static):
    mixed, u, raw = mix_collapse(f, streams, coefficients, fn, affine, static)
    return (mixed, u, raw), (f, streams, coefficients, mixed, fn, affine, raw)


def _mix_collapse_bwd(static, saved, d_out):
    f, streams, coefficients, mixed, fn, affine, raw = saved
    d_mixed, d_u, d_raw = d_out
    d_mixed, d_fn, d_affine = tpu_backward.collapse(
        mixed, fn, affine, raw, d_mixed, d_u, d_raw, static
    )
    return *tpu_backward.mix(f, streams, coefficients, d_mixed, static), d_fn, d_affine


collapse.defvjp(_collapse_fwd, _collapse_bwd)
mix.defvjp(_mix_fwd, _mix_bwd)
mix_collapse.defvjp(_mix_collapse_fwd, _mix_collapse_bwd)
