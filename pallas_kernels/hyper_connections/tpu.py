"""Hyper-connections as TPU kernels: each stream is read once and written once.

XLA reads the streams of a site three times (norm, projection, collapse), and runs Sinkhorn as forty
tiny programs. Here a block of tokens with all its streams is held in VMEM, and four phases work on
it (`phases.py`):

    mix       streams'[k] = post[k] * f + sum_j comb[j, k] * streams[j]
    project   raw = streams' @ fn / rms(streams')       one pass: matrix unit and sum of squares
    weights   pre = sigmoid(raw * scale + base) + eps
    collapse  u = sum_k pre[k] * streams'[k]

    sinkhorn  post and comb of the next site

`mix` alone is hc_post, the others are hc_pre, all of them hc_post_pre; hc_head has no Sinkhorn. `post`
and `comb` are not needed for `u`: of many tokens `tpu_sinkhorn.py` makes them in a kernel of its own.

Grid: blocks of tokens, independent of each other.

Layout: streams [N, M * D], N tokens on sublanes and channels on lanes. What is per token and not per
channel has tokens on lanes: `raw` [E, N], E = (2 + M) * M rows pre, post, comb (comb row-major), post
[M, N] and comb [M * M, N]; for the head E is 8, of which M rows are used. What multiplies channels is
put in order once per block: pre is transposed and spread over 128 lanes, post and comb become the maps
that `phases.mapped` takes. Kernels take and give all of these as they lie, and `base` and `scale` too:
for a few tokens XLA's operations between two kernels took longer than the kernels.

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

from pallas_kernels.hyper_connections import phases, tpu_backward, tpu_sinkhorn
from pallas_kernels.hyper_connections.phases import LANES, Operand, Static

FEW_TOKENS = 128  # of which one block takes all


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def collapse(
    streams: jax.Array,  # [N, M * D]
    fn: jax.Array,  # [M * D, E] float32
    base: jax.Array,  # [1, E] float32
    scale: jax.Array,  # [1, 3] float32, of pre, post and comb; [1, 1] for the head
    static: Static,
) -> tuple[jax.Array, ...]:
    """u [N, D], and of a site post [M, N] and comb [M * M, N]."""
    u, _, *coefficients = _collapse(streams, fn, base, scale, static)
    return u, *coefficients


def _collapse(streams, fn, base, scale, static):
    """u, `raw`, and of a site post and comb."""
    parts = _projection(fn, streams)
    found = phases.launch(
        _collapse_kernel,
        "hc_pre",
        [Operand(streams, 0), Operand(parts, None), Operand(base, None), Operand(scale, None)],
        _collapse_results(streams, fn, static),
        lambda tokens: _collapse_scratch(tokens, parts, streams, static),
        flops_per_byte=fn.shape[1],
        static=static,
    )
    return [*found, *_coefficients_of_many(found[1], base, scale, static)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def mix(
    f: jax.Array,  # [N, D]
    streams: jax.Array,  # [N, M * D]
    post: jax.Array,  # [M, N] float32
    comb: jax.Array,  # [M * M, N] float32
    static: Static,
) -> jax.Array:  # [N, M * D]
    """The new streams."""
    (mixed,) = phases.launch(
        functools.partial(phases.mix, num_tokens=len(f)),
        "hc_post",
        [Operand(f, 0), Operand(streams, 0), Operand(post, 1), Operand(comb, 1)],
        [Operand(jax.ShapeDtypeStruct(streams.shape, streams.dtype), 0)],
        lambda tokens: [_maps(tokens, streams, static)],
        flops_per_byte=static.num_streams,
        static=static,
    )
    return mixed


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def mix_collapse(
    f: jax.Array,  # [N, D]
    streams: jax.Array,  # [N, M * D]
    post: jax.Array,  # [M, N] float32
    comb: jax.Array,  # [M * M, N] float32
    fn: jax.Array,  # [M * D, E] float32
    base: jax.Array,  # [1, E] float32
    scale: jax.Array,  # [1, 3] float32
    static: Static,
) -> tuple[jax.Array, ...]:
    """The new streams, and what `collapse` makes of them."""
    mixed, u, _, *coefficients = _mix_collapse(f, streams, post, comb, fn, base, scale, static)
    return mixed, u, *coefficients


def _mix_collapse(f, streams, post, comb, fn, base, scale, static):
    """The new streams, u, `raw`, post and comb."""
    parts = _projection(fn, streams)
    found = phases.launch(
        functools.partial(_mix_collapse_kernel, num_tokens=len(f)),
        "hc_fused",
        [
            Operand(f, 0),
            Operand(streams, 0),
            Operand(post, 1),
            Operand(comb, 1),
            Operand(parts, None),
            Operand(base, None),
            Operand(scale, None),
        ],
        [
            Operand(jax.ShapeDtypeStruct(streams.shape, streams.dtype), 0),
            *_collapse_results(streams, fn, static),
        ],
        lambda tokens: [
            *_collapse_scratch(tokens, parts, streams, static),
            _maps(tokens, streams, static),
        ],
        flops_per_byte=fn.shape[1],
        static=static,
    )
    return [*found, *_coefficients_of_many(found[2], base, scale, static)]


def _coefficients_of_many(raw, base, scale, static) -> list[jax.Array]:
    """post and comb of a site, which of few tokens were written with `raw`."""
    is_site = scale.shape[1] > 1
    if not is_site or raw.shape[1] <= FEW_TOKENS:
        return []
    return tpu_sinkhorn.coefficients(raw, base, scale, static)


def _projection(fn: jax.Array, streams: jax.Array) -> jax.Array:
    """[M * D, E] as the kernels take it.

    For bfloat16 streams of many tokens [3 * E, M * D] bfloat16. Of few tokens one block takes all, and
    cuts [E, M * D] float32 itself, which XLA would take longer for than the kernel.
    """
    if streams.dtype == jnp.bfloat16 and len(streams) > FEW_TOKENS:
        return jnp.concatenate(phases.cut(fn.T, 3)).astype(jnp.bfloat16)
    return fn.T


def _collapse_results(streams, fn, static):
    """u, `raw` with the inverse rms in 8 equal rows below it, and of few tokens post and comb."""
    n, width = streams.shape
    m, e = static.num_streams, fn.shape[1]
    u = jax.ShapeDtypeStruct((n, width // m), streams.dtype)
    is_site = e == (2 + m) * m
    rows = [e + 8, m, m * m] if is_site and n <= FEW_TOKENS else [e + 8]
    return [
        Operand(u, 0),
        *(Operand(jax.ShapeDtypeStruct((r, n), jnp.float32), 1) for r in rows),
    ]


def _collapse_scratch(tokens, parts, streams, static):
    m = static.num_streams
    rows = parts.shape[0] * (1 if parts.dtype == streams.dtype else 3)
    return [
        pltpu.VMEM((8, tokens, LANES), jnp.float32),
        pltpu.VMEM((tokens, LANES), jnp.float32),
        pltpu.VMEM((rows, tokens), jnp.float32),
        tpu_sinkhorn.entries(tokens, m),
    ]


def _maps(tokens, streams, static):
    """From f and the streams to the new streams."""
    m = static.num_streams
    return phases.maps(tokens, 1 + m, m, streams.dtype)


def _collapse_kernel(
    x_ref,  # [tokens, M * D]
    fn_ref,  # [3 * E, M * D], or [E, M * D] float32
    base_ref,  # [1, E]
    scale_ref,  # [1, 3]
    u_ref,  # [tokens, D]
    raw_ref,  # [E + 8, tokens]
    *refs,  # of few tokens post and comb of the next site; scratch
    static: Static,
    worked: int,
):
    *coefficient_refs, spread_ref, square_ref, product_ref, entries_ref = refs
    m, norm_eps = static.num_streams, static.norm_eps
    phases.project(
        fn_ref, x_ref, raw_ref, square_ref, product_ref, norm_eps=norm_eps, worked=worked
    )
    scale, base = phases.affine(base_ref, scale_ref, m)
    pre = phases.pre_weights(raw_ref, scale, base, static.eps)
    phases.spread(pre, spread_ref, range(m))
    phases.collapse(spread_ref, x_ref, u_ref, m=m, worked=worked)
    if coefficient_refs:
        post_ref, comb_ref = coefficient_refs
        tpu_sinkhorn.write(raw_ref, scale, base, post_ref, comb_ref, entries_ref, static)


def _mix_collapse_kernel(
    f_ref,  # [tokens, D]
    x_ref,  # [tokens, M * D]
    post_ref,  # [M, tokens]
    comb_ref,  # [M * M, tokens]
    fn_ref,  # [3 * E, M * D], or [E, M * D] float32
    base_ref,  # [1, E]
    scale_ref,  # [1, 3]
    y_ref,  # [tokens, M * D]
    u_ref,  # [tokens, D]
    raw_ref,  # [E + 8, tokens]
    *refs,  # those of `_collapse_kernel`, and the maps
    static: Static,
    worked: int,
    num_tokens: int,
):
    *others, maps_ref = refs
    phases.mix(
        f_ref,
        x_ref,
        post_ref,
        comb_ref,
        y_ref,
        maps_ref,
        static=static,
        worked=worked,
        num_tokens=num_tokens,
    )
    _collapse_kernel(
        y_ref, fn_ref, base_ref, scale_ref, u_ref, raw_ref, *others, static=static, worked=worked
    )


def _collapse_fwd(streams, fn, base, scale, static):
    u, raw, *coefficients = _collapse(streams, fn, base, scale, static)
    return (u, *coefficients), (streams, fn, base, scale, raw)


def _collapse_bwd(static, saved, d_out):
    streams, fn, base, scale, raw = saved
    d_u, *d_coefficients = d_out
    return tpu_backward.collapse(streams, fn, base, scale, raw, None, d_u, d_coefficients, static)


def _mix_fwd(f, streams, post, comb, static):
    return mix(f, streams, post, comb, static), (f, streams, post, comb)


def _mix_bwd(static, saved, d_mixed):
    f, streams, post, comb = saved
    return tpu_backward.mix(f, streams, post, comb, d_mixed, static)


def _mix_collapse_fwd(f, streams, post, comb, fn, base, scale, static):
    mixed, u, raw, *coefficients = _mix_collapse(f, streams, post, comb, fn, base, scale, static)
    saved = f, streams, post, comb, mixed, fn, base, scale, raw
    return (mixed, u, *coefficients), saved


def _mix_collapse_bwd(static, saved, d_out):
    f, streams, post, comb, mixed, fn, base, scale, raw = saved
    d_mixed, d_u, *d_coefficients = d_out
    d_mixed, *d_site = tpu_backward.collapse(
        mixed, fn, base, scale, raw, d_mixed, d_u, d_coefficients, static
    )
    return *tpu_backward.mix(f, streams, post, comb, d_mixed, static), *d_site


collapse.defvjp(_collapse_fwd, _collapse_bwd)
mix.defvjp(_mix_fwd, _mix_bwd)
mix_collapse.defvjp(_mix_collapse_fwd, _mix_collapse_bwd)
