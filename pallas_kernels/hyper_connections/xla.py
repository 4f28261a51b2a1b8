"""Hyper-connections in jax.numpy, for any backend, with their gradients written out.

Going forward the streams stay flat, [B, T, M * D], and are used in M slices: an axis of four streams
would tile badly on an accelerator. The gradients of the coefficients are sums over channels, written
as batched products of [M, D] matrices: left to autodiff, or taken pair by pair, they cost several
passes over the streams.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import compact
from pallas_kernels.formats.quantize import cast

_HIGHEST = jax.lax.Precision.HIGHEST


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def collapse(
    streams: jax.Array,  # [B, T, M * D]
    fn: jax.Array,  # [M * D, E] float32: the first M columns are pre
    scale: jax.Array,  # [] float32, of pre
    base: jax.Array,  # [M] float32, of pre
    eps: float,
    norm_eps: float,
) -> tuple[jax.Array, jax.Array]:
    """u [B, T, D] = sum_k pre[k] * streams[k], and raw [B, T, E] = streams @ fn / rms(streams)."""
    return _collapse(streams, fn, scale, base, eps, norm_eps)[:2]


def _collapse(streams, fn, scale, base, eps, norm_eps):
    m = base.shape[0]
    x = streams.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + norm_eps)
    raw = _product(x, fn) * inverse_rms
    pre = jax.nn.sigmoid(raw[..., :m] * scale + base) + eps
    u = sum(pre[..., k, None] * part for k, part in enumerate(_split(streams, m)))
    return cast(u, streams.dtype), raw, inverse_rms


def _collapse_fwd(streams, fn, scale, base, eps, norm_eps):
    u, raw, inverse_rms = _collapse(streams, fn, scale, base, eps, norm_eps)
    return (u, raw), (streams, fn, scale, base, raw, inverse_rms)


def _collapse_bwd(eps, norm_eps, saved, d_out):
    streams, fn, scale, base, raw, inverse_rms = saved
    d_u, d_raw = d_out
    m, (width, e) = base.shape[0], fn.shape
    x = streams.astype(jnp.float32)
    d_u = d_u.astype(jnp.float32)
    d_pre = _einsum("btkd,btd->btk", _apart(x, m), d_u)
    s = jax.nn.sigmoid(raw[..., :m] * scale + base)
    d_logits = d_pre * s * (1 - s)
    d_raw = d_raw + jnp.pad(d_logits * scale, ((0, 0), (0, 0), (0, e - m)))
    d_x, d_fn = jax.vjp(_product, x, fn)[1](d_raw * inverse_rms)
    of_norm = -jnp.sum(d_raw * raw, axis=-1, keepdims=True) * jnp.square(inverse_rms) / width
    of_u = (s + eps)[..., None] * d_u[:, :, None]
    d_x += of_norm * x + of_u.reshape(x.shape)
    d_scale = jnp.sum(d_logits * raw[..., :m])
    return cast(d_x, streams.dtype), d_fn, d_scale, jnp.sum(d_logits, axis=(0, 1))


@jax.custom_vjp
def mix(
    f: jax.Array,  # [B, T, D]
    streams: jax.Array,  # [B, T, M * D]
    post: jax.Array,  # [B, T, M] float32
    comb: jax.Array,  # [B, T, M, M] float32
) -> jax.Array:  # [B, T, M * D]
    """streams'[k] = post[k] * f + sum_j comb[j, k] * streams[j]."""
    m = post.shape[-1]
    f = f.astype(jnp.float32)
    parts = _split(streams, m)
    mixed = [
        post[..., k, None] * f + sum(comb[..., j, k, None] * parts[j] for j in range(m))
        for k in range(m)
    ]
    return cast(jnp.concatenate(mixed, axis=-1), streams.dtype)


def _mix_fwd(f, streams, post, comb):
    return mix(f, streams, post, comb), (f, streams, post, comb)


def _mix_bwd(saved, d_mixed):
    f, streams, post, comb = saved
    m = post.shape[-1]
    x, d_y = (_apart(a.astype(jnp.float32), m) for a in (streams, d_mixed))
    d_f = _einsum("btk,btkd->btd", post, d_y)
    d_x = _einsum("btjk,btkd->btjd", comb, d_y)
    d_post = _einsum("btkd,btd->btk", d_y, f.astype(jnp.float32))
    d_comb = _einsum("btjd,btkd->btjk", x, d_y)
    return cast(d_f, f.dtype), cast(d_x.reshape(streams.shape), streams.dtype), d_post, d_comb


def coefficients(
    raw: jax.Array,  # [B, T, (2 + M) * M] float32
    base: jax.Array,  # [(2 + M) * M]
    scale: jax.Array,  # [3]
    *,
    num_streams: int,
    sinkhorn_iters: int,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """post [B, T, M] and comb [B, T, M, M]."""
    m = num_streams
    post = 2 * jax.nn.sigmoid(raw[..., m : 2 * m] * scale[1] + base[m : 2 * m])
    logits = raw[..., 2 * m :] * scale[2] + base[2 * m :]
    return post, sinkhorn(logits.reshape(*logits.shape[:-1], m, m), sinkhorn_iters, eps)


def sinkhorn(logits: jax.Array, iters: int, eps: float) -> jax.Array:
    """`reference.sinkhorn` with tokens on the last axis: whole vectors in the tiny steps."""
    m = logits.shape[-1]
    batch = logits.shape[:-2]
    c = jax.nn.softmax(logits, axis=-1).reshape(-1, m, m).transpose(1, 2, 0) + eps

    def column(c):
        return c / (jnp.sum(c, axis=0, keepdims=True) + eps)

    def body(c, _):
        c = c / (jnp.sum(c, axis=1, keepdims=True) + eps)
        return column(c), None

    c, _ = jax.lax.scan(body, column(c), length=iters - 1)
    return c.transpose(2, 0, 1).reshape(*batch, m, m)


def _product(x: jax.Array, fn: jax.Array) -> jax.Array:
    return compact.matmul(x, fn, precision=_HIGHEST)


def _einsum(formula: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(formula, *operands, precision=_HIGHEST)


def _apart(streams: jax.Array, m: int) -> jax.Array:
    """[B, T, M * D] -> [B, T, M, D]"""
    return streams.reshape(*streams.shape[:2], m, streams.shape[-1] // m)


def _split(streams: jax.Array, m: int) -> list[jax.Array]:
    return [part.astype(jnp.float32) for part in jnp.split(streams, m, axis=-1)]


collapse.defvjp(_collapse_fwd, _collapse_bwd)
mix.defvjp(_mix_fwd, _mix_bwd)
