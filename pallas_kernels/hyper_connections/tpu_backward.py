"""Gradients of the TPU kernels: each stream and each cotangent is read once.

`collapse`: with d_pre[k] = <d_u, streams[k]> and the gradient of `raw` complete,

    d_streams[k] = pre[k] * d_u + fn @ (d_raw / rms) + g * streams[k],   d_fn = streams^T (d_raw / rms)

where g = -sum(d_raw * raw) / (M * D * rms^2) is the derivative of the norm. `d_pre` needs a pass
over all channels before the first `d_streams`: both passes work on the block in VMEM. Under
hc_post_pre the cotangent of the new streams is added on the way.

`mix`: d_f = sum_k post[k] * d_k, d_streams[j] = sum_k comb[j, k] * d_k, and twenty sums over the
channels, d_post[k] = <d_k, f> and d_comb[j, k] = <d_k, streams[j]>.

Grid: blocks of tokens, in order for `collapse`, whose d_fn is summed in VMEM.

`fn` and d_raw / rms are cut into two bfloat16 each, and the three larger of the four products kept:
2^-16 beside the 2^-9 of the results' rounding. float32 streams take float32 products.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.hyper_connections import block_sizes, phases, tpu_sinkhorn
from pallas_kernels.hyper_connections.phases import GROUP, LANES, Operand, Static

# Channels of one step.
FIRST_CHANNELS = 1024
SECOND_CHANNELS = 512  # of one stream
MIX_CHANNELS = 2048


def collapse(
    streams: jax.Array,  # [N, M * D]
    fn: jax.Array,  # [M * D, E]
    base: jax.Array,  # [1, E]
    scale: jax.Array,  # [1, 3], or [1, 1] for the head
    raw: jax.Array,  # [E + 8, N]
    d_streams: jax.Array | None,  # [N, M * D] to be added
    d_u: jax.Array,  # [N, D]
    d_coefficients: Sequence[jax.Array],  # of post [M, N] and comb [M * M, N]; none for the head
    static: Static,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of the streams, of `fn`, of `base` and of `scale`."""
    n, width = streams.shape
    e, m = fn.shape[1], static.num_streams
    if streams.dtype == jnp.bfloat16:
        high, low = phases.cut(fn.T, 2)
        parts = jnp.concatenate([high, low, high]).astype(jnp.bfloat16)
    else:
        parts = fn.T
    if d_coefficients:
        d_post, d_comb = d_coefficients
        of_others = tpu_sinkhorn.d_logits(raw, d_post, d_comb, base, scale, static)
    else:
        of_others = jnp.zeros((e, n), jnp.float32)
    added = [] if d_streams is None else [Operand(d_streams, 0)]
    d_streams, d_fn, of_pre = phases.launch(
        functools.partial(_collapse_kernel, num_tokens=n, adds=bool(added)),
        "hc_grad_pre",
        [
            Operand(streams, 0),
            Operand(d_u, 0),
            *added,
            Operand(raw, 1),
            Operand(of_others, 1),
            Operand(parts, None),
            Operand(base, None),
            Operand(scale, None),
        ],
        [
            Operand(jax.ShapeDtypeStruct((n, width), streams.dtype), 0),
            Operand(jax.ShapeDtypeStruct((e, width), jnp.float32), None),
            Operand(jax.ShapeDtypeStruct((8, n), jnp.float32), 1),
        ],
        lambda tokens: [
            pltpu.VMEM((8, tokens, LANES), jnp.float32),
            pltpu.VMEM((m, tokens, LANES), jnp.float32),
        ],
        flops_per_byte=2 * e,
        static=static,
        sequential=True,
    )
    # In a scan over layers XLA would fuse the write of the stacked d_fn into the kernel, and forget the
    # kernel's VMEM limit.
    d_fn = jax.lax.optimization_barrier(d_fn)
    d_logits = of_others + jnp.pad(of_pre, ((0, e - 8), (0, 0)))
    d_scales = jnp.sum(d_logits * raw[:e], axis=1)
    if scale.shape[1] > 1:
        d_scales = jnp.stack([jnp.sum(x) for x in jnp.split(d_scales, (m, 2 * m))])
    else:
        d_scales = jnp.sum(d_scales)
    return d_streams, d_fn.T, jnp.sum(d_logits, axis=1)[None], d_scales.reshape(scale.shape)


def mix(
    f: jax.Array,  # [N, D]
    streams: jax.Array,  # [N, M * D]
    post: jax.Array,  # [M, N]
    comb: jax.Array,  # [M * M, N]
    d_mixed: jax.Array,  # [N, M * D]
    static: Static,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of the four arguments of `tpu.mix`."""
    n, m = len(f), static.num_streams
    groups = pl.cdiv(n, GROUP)
    d_f, d_streams, sums = phases.launch(
        functools.partial(_mix_kernel, num_tokens=n),
        "hc_grad_post",
        [
            Operand(f, 0),
            Operand(streams, 0),
            Operand(d_mixed, 0),
            Operand(post, 1),
            Operand(comb, 1),
        ],
        [
            *(Operand(jax.ShapeDtypeStruct(a.shape, a.dtype), 0) for a in (f, streams)),
            Operand(jax.ShapeDtypeStruct((groups * 8, LANES), jnp.float32), 0, GROUP // 8),
        ],
        lambda tokens: [
            phases.maps(tokens, m, 1 + m, streams.dtype),
            pltpu.VMEM(((1 + m) * tokens, m * GROUP), jnp.float32),
        ],
        flops_per_byte=2 * m,
        static=static,
    )
    sums = sums.reshape(groups, 8, LANES)[:, : 1 + m, : m * GROUP]
    sums = sums.reshape(groups, 1 + m, m, GROUP).transpose(1, 2, 0, 3)
    sums = sums.reshape((1 + m) * m, -1)[:, :n]
    return d_f, d_streams, sums[:m], sums[m:]


def _sum_lanes(ref) -> list[jax.Array]:
    """[R, tokens, 128] -> R arrays [8, tokens] of equal rows."""
    rows, tokens, _ = ref.shape
    sums = phases.sum_lanes(ref[...].reshape(rows * tokens, LANES))
    return [sums[:, i * tokens : (i + 1) * tokens] for i in range(rows)]


def _collapse_kernel(*refs, static, worked, num_tokens, adds):
    x_ref, d_u_ref = refs[:2]
    added_ref = refs[2] if adds else None
    raw_ref, of_others_ref, fn_ref, base_ref, scale_ref = refs[2 + adds : 7 + adds]
    d_x_ref, d_fn_ref, of_pre_ref, spread_ref, sums_ref = refs[7 + adds :]
    m, e = static.num_streams, base_ref.shape[1]
    tokens, width = x_ref.shape
    d = width // m
    real = num_tokens - pl.program_id(0) * tokens  # tokens there are from this block on

    @pl.when(pl.program_id(0) == 0)
    def _():
        d_fn_ref[...] = jnp.zeros_like(d_fn_ref)

    # First pass: the gradient of pre, and with it what is per token.
    sums_ref[...] = jnp.zeros_like(sums_ref)

    def first(rows, start, size, _):
        d_u = phases.read(d_u_ref, rows, start, size)
        for k in range(m):
            x = phases.read(x_ref, rows, k * d + start, size)
            sums_ref[k, rows] += phases.fold(d_u * x)

    phases.pieces(worked, d, FIRST_CHANNELS, first)
    row = jax.lax.broadcasted_iota(jnp.int32, (8, tokens), 0)
    d_pre = sum(jnp.where(row == k, s, 0) for k, s in enumerate(_sum_lanes(sums_ref)))
    scale, base = phases.affine(base_ref, scale_ref, m)
    pre = phases.pre_weights(raw_ref, scale, base, static.eps)
    s = pre - static.eps
    of_pre = d_pre * s * (1 - s)
    of_pre_ref[...] = of_pre
    d_logits = of_others_ref[:8] + of_pre
    if e > 8:
        d_logits = jnp.concatenate([d_logits, of_others_ref[8:]])
    d_raw = d_logits * scale
    inverse_rms = raw_ref[e : e + 1]
    d_product = d_raw * inverse_rms
    along = jnp.sum(d_raw * raw_ref[:e], axis=0, keepdims=True)
    of_norm = -along * inverse_rms * inverse_rms / width
    phases.spread(jnp.where(row < m, pre, of_norm), spread_ref, range(m + 1))
    if num_tokens % tokens:  # what lies behind the last token is not to be summed
        token = jax.lax.broadcasted_iota(jnp.int32, d_product.shape, 1)
        d_product = jnp.where(token < real, d_product, 0)
    left, right = _factors(d_product, x_ref.dtype)

    # Second pass.
    size = block_sizes.width(d, SECOND_CHANNELS)

    def second(i, _):
        start = pl.multiple_of(i * size, size)
        channels = pl.ds(start, size)
        of_u = pl.multiple_of(start % d, size)
        stream = start // d
        x = x_ref[:, channels]
        if num_tokens % tokens:
            token = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
            x = jnp.where(token < real, x.astype(jnp.float32), 0).astype(x.dtype)
        products = phases.dot(right, x, 1, 0)
        d_fn_ref[:, channels] += sum(products[i : i + e] for i in range(0, len(products), e))
        through_fn = phases.dot(left, fn_ref[:, channels], 1, 0)
        for g in range(0, worked, GROUP):
            rows = pl.ds(g, GROUP)
            d_x = through_fn[g : g + GROUP]
            d_x += phases.tile(spread_ref[stream, rows], size) * phases.read(
                d_u_ref, rows, of_u, size
            )
            d_x += phases.tile(spread_ref[m, rows], size) * phases.read(x_ref, rows, start, size)
            if adds:
                d_x += phases.read(added_ref, rows, start, size)
            d_x_ref[rows, channels] = d_x.astype(d_x_ref.dtype)
        return 0

    jax.lax.fori_loop(0, width // size, second, 0)


def _factors(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """[E, tokens] as left factor [tokens, rows of `parts`] and, for d_fn, [E or 2 * E, tokens]."""
    if dtype != jnp.bfloat16:
        return x.T, x
    high, low = phases.cut(x, 2)
    left = jnp.concatenate([high, high, low]).T.astype(jnp.bfloat16)
    return left, jnp.concatenate([high, low]).astype(jnp.bfloat16)


def _mix_kernel(
    f_ref,  # [tokens, D]
    x_ref,  # [tokens, M * D]
    d_y_ref,  # [tokens, M * D]
    post_ref,  # [M, tokens]
    comb_ref,  # [M * M, tokens]
    d_f_ref,  # [tokens, D]
    d_x_ref,  # [tokens, M * D]
    sums_ref,  # [tokens / 2, 128]: 8 rows a group, of which 1 + M: inputs; lanes: M outputs, token
    maps_ref,  # from the cotangents of the new streams to those of f and the streams
    products_ref,  # [(1 + M) * tokens, M * 16]: <input, d_output> of all tokens of a group
    *,
    static: Static,
    worked: int,
    num_tokens: int,
):
    m, d = static.num_streams, f_ref.shape[1]
    height = (1 + m) * GROUP
    load = phases.loader(f_ref.shape[0], num_tokens)
    products_ref[...] = jnp.zeros_like(products_ref)
    rows_of = [
        [phases.row(post_ref, k) for k in range(m)],
        *([phases.row(comb_ref, j * m + k) for k in range(m)] for j in range(m)),
    ]
    phases.arrange(rows_of, maps_ref, x_ref.dtype, num_tokens, worked)

    def body(rows, start, size, _):
        d_y = [load(d_y_ref, rows, k * d + start, size) for k in range(m)]
        d_f, *d_x = phases.mapped(maps_ref, rows, d_y, 1 + m)
        d_f_ref[rows, pl.ds(start, size)] = d_f.astype(d_f_ref.dtype)
        for j in range(m):
            d_x_ref[rows, pl.ds(j * d + start, size)] = d_x[j].astype(d_x_ref.dtype)
        x = [load(f_ref, rows, start, size)]
        x += [load(x_ref, rows, j * d + start, size) for j in range(m)]
        products = phases.dot(jnp.concatenate(x), jnp.concatenate(d_y), 1, 1)
        products_ref[_group(rows.start, height), :] += products

    phases.pieces(worked, d, MIX_CHANNELS, body)

    def own(i, _):
        products = products_ref[_group(i * GROUP, height), :]
        row, lane = (jax.lax.broadcasted_iota(jnp.int32, products.shape, axis) for axis in (0, 1))
        products = jnp.where(row % GROUP == lane % GROUP, products, 0.0)
        sums = jnp.sum(products.reshape(1 + m, GROUP, -1), axis=1)
        sums = jnp.pad(sums, ((0, 7 - m), (0, LANES - m * GROUP)))
        sums_ref[pl.ds(pl.multiple_of(i * 8, 8), 8), :] = sums
        return 0

    jax.lax.fori_loop(0, worked // GROUP, own, 0)


def _group(token, height: int):
    """Rows of the group that begins with `token`, if each has `height`."""
    return pl.ds(pl.multiple_of(token // GROUP * height, GROUP), height)
