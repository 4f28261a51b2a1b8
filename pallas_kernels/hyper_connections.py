"""Manifold-constrained hyper-connections: four residual streams around each sub-layer.

    pre, post, comb = coefficients(streams)          comb doubly stochastic after Sinkhorn
    u               = sum_i pre[i] * streams[i]       input of the sub-layer
    streams'[k]     = post[k] * f(u) + sum_j comb[j, k] * streams[j]

`comb` is contracted over its FIRST index. Streams are kept flat, [B, T, M * D] with stream i in
channels i * D .. (i + 1) * D, so that the last two axes tile well on an accelerator. Coefficients
and sums are float32; each result is rounded once, to the dtype of the streams.

Source: report section 2.3 (eqs. 1-8); orientation, epsilons and the order of the Sinkhorn steps as
in the released `inference/model.py` (the softmax counts as the first row step, and the last step
is a column step).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import cast

_HIGHEST = jax.lax.Precision.HIGHEST


def hc_pre(
    streams: jax.Array,  # [B, T, M * D]
    fn: jax.Array,  # [M * D, (2 + M) * M] float32: columns pre, post, comb (row-major)
    base: jax.Array,  # [(2 + M) * M] float32
    scale: jax.Array,  # [3] float32: pre, post, comb
    *,
    num_streams: int,
    sinkhorn_iters: int,
    eps: float,
    norm_eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Coefficients of one site, and the input they collapse the streams to.

    Returns:
      u [B, T, D] in the dtype of the streams, post [B, T, M] and comb [B, T, M, M] in float32.
    """
    m = num_streams
    raw = _project(streams, fn, norm_eps)
    pre = jax.nn.sigmoid(raw[..., :m] * scale[0] + base[:m]) + eps
    post = 2 * jax.nn.sigmoid(raw[..., m : 2 * m] * scale[1] + base[m : 2 * m])
    logits = raw[..., 2 * m :] * scale[2] + base[2 * m :]
    comb = sinkhorn(logits.reshape(*logits.shape[:-1], m, m), sinkhorn_iters, eps)
    return _weighted_sum(pre, streams), post, comb


def hc_post(
    f: jax.Array,  # [B, T, D] output of the sub-layer
    streams: jax.Array,  # [B, T, M * D]
    post: jax.Array,  # [B, T, M] float32
    comb: jax.Array,  # [B, T, M, M] float32
) -> jax.Array:  # [B, T, M * D]
    """Mixes the streams and adds the output of the sub-layer to each."""
    m = post.shape[-1]
    parts = _split(streams, m)
    f = f.astype(jnp.float32)
    mixed = [
        post[..., k, None] * f + sum(comb[..., j, k, None] * parts[j] for j in range(m))
        for k in range(m)
    ]
    return cast(jnp.concatenate(mixed, axis=-1), streams.dtype)


def hc_head(
    streams: jax.Array,  # [B, T, M * D]
    fn: jax.Array,  # [M * D, M] float32
    base: jax.Array,  # [M] float32
    scale: jax.Array,  # [1] float32
    *,
    eps: float,
    norm_eps: float,
) -> jax.Array:  # [B, T, D]
    """The final collapse: a sigmoid-weighted sum of the streams, without Sinkhorn."""
    weights = jax.nn.sigmoid(_project(streams, fn, norm_eps) * scale + base) + eps
    return _weighted_sum(weights, streams)


def sinkhorn(logits: jax.Array, iters: int, eps: float) -> jax.Array:
    """Row softmax, then alternating column and row normalisations, ending on a column step.

    Args:
      logits: [..., M, M] float32; rows are the second-last axis.
      iters: number of row steps and of column steps; the softmax is the first row step.
      eps: added after the softmax and to every divisor.
    """
    m = logits.shape[-1]
    batch = logits.shape[:-2]
    # Tokens on the last axis: the 2 * iters tiny steps then work on whole vectors.
    c = jax.nn.softmax(logits, axis=-1).reshape(-1, m, m).transpose(1, 2, 0) + eps

    def column(c):
        return c / (jnp.sum(c, axis=0, keepdims=True) + eps)

    def body(c, _):
        c = c / (jnp.sum(c, axis=1, keepdims=True) + eps)
        return column(c), None

    c, _ = jax.lax.scan(body, column(c), length=iters - 1)
    return c.transpose(2, 0, 1).reshape(*batch, m, m)


def _project(streams: jax.Array, fn: jax.Array, norm_eps: float) -> jax.Array:
    """RMS-normalised streams times `fn`; the norm is divided out after the product."""
    x = streams.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + norm_eps)
    return jnp.matmul(x, fn, precision=_HIGHEST) * inverse_rms


def _split(streams: jax.Array, m: int) -> list[jax.Array]:
    return [part.astype(jnp.float32) for part in jnp.split(streams, m, axis=-1)]


def _weighted_sum(weights: jax.Array, streams: jax.Array) -> jax.Array:
    m = weights.shape[-1]
    parts = _split(streams, m)
    return cast(sum(weights[..., i, None] * parts[i] for i in range(m)), streams.dtype)
