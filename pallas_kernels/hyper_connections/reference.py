"""The specification: hyper-connections as their formulas stand, float32 inside."""

import jax
import jax.numpy as jnp

from pallas_kernels.formats.quantize import cast

_HIGHEST = jax.lax.Precision.HIGHEST


def hc_pre(streams, fn, base, scale, *, num_streams, sinkhorn_iters, eps, norm_eps):
    """u, post and comb (`ops.hc_pre`)."""
    m = num_streams
    raw = _project(streams, fn, norm_eps)
    pre = jax.nn.sigmoid(raw[..., :m] * scale[0] + base[:m]) + eps
    post = 2 * jax.nn.sigmoid(raw[..., m : 2 * m] * scale[1] + base[m : 2 * m])
    logits = raw[..., 2 * m :] * scale[2] + base[2 * m :]
    comb = sinkhorn(logits.reshape(*logits.shape[:-1], m, m), sinkhorn_iters, eps)
    return _collapse(pre, streams), post, comb


def hc_post(f, streams, post, comb):
    """The new streams (`ops.hc_post`)."""
    x = _apart(streams, post.shape[-1])
    mixed = jnp.einsum("btjk,btjd->btkd", comb, x, precision=_HIGHEST)
    mixed += post[..., None] * f.astype(jnp.float32)[:, :, None]
    return cast(mixed.reshape(streams.shape), streams.dtype)


def hc_post_pre(f, streams, post, comb, fn, base, scale, **options):
    """The new streams, and u, post and comb of the next site (`ops.hc_post_pre`)."""
    streams = hc_post(f, streams, post, comb)
    return streams, *hc_pre(streams, fn, base, scale, **options)


def hc_head(streams, fn, base, scale, *, eps, norm_eps):
    """The final collapse (`ops.hc_head`)."""
    weights = jax.nn.sigmoid(_project(streams, fn, norm_eps) * scale + base) + eps
    return _collapse(weights, streams)


def sinkhorn(logits: jax.Array, iters: int, eps: float) -> jax.Array:
    """Row softmax, then column and row normalisations in turn, ending on a column step.

    Args:
      logits: [..., M, M] float32; rows are the second-last axis.
      iters: number of row steps and of column steps; the softmax is the first row step.
      eps: added after the softmax and to every divisor.
    """

    def normalize(c, axis):
        return c / (c.sum(axis=axis, keepdims=True) + eps)

    c = normalize(jax.nn.softmax(logits, axis=-1) + eps, axis=-2)
    return jax.lax.fori_loop(0, iters - 1, lambda _, c: normalize(normalize(c, -1), -2), c)


def _project(streams, fn, norm_eps):
    x = streams.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + norm_eps)
    return jnp.matmul(x, fn, precision=_HIGHEST) * inverse_rms


def _apart(streams, m):
    return streams.reshape(*streams.shape[:2], m, -1).astype(jnp.float32)


def _collapse(weights, streams):
    u = jnp.einsum("btk,btkd->btd", weights, _apart(streams, weights.shape[-1]), precision=_HIGHEST)
    return cast(u, streams.dtype)
