"""Manifold-constrained hyper-connections: four residual streams around each sub-layer.

    pre, post, comb = coefficients(streams)          comb doubly stochastic after Sinkhorn
    u               = sum_i pre[i] * streams[i]       input of the sub-layer
    streams'[k]     = post[k] * f(u) + sum_j comb[j, k] * streams[j]

`comb` is contracted over its FIRST index. Streams are kept flat, [B, T, M * D] with stream i in
channels i * D .. (i + 1) * D, so that the last two axes tile well on an accelerator. Coefficients
and sums are float32; each result is rounded once, to the dtype of the streams. All four operations
are differentiable in every array.

Source: report section 2.3 (eqs. 1-8); orientation, epsilons and the order of the Sinkhorn steps as
in the released `inference/model.py` (the softmax counts as the first row step, and the last step
is a column step).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from pallas_kernels import dispatch
from pallas_kernels.hyper_connections import block_sizes, reference, tpu, xla
from pallas_kernels.hyper_connections.phases import Static


@dispatch.operation
def hc_pre(
    streams: Float[jax.Array, "B T MD"],
    fn: Float[jax.Array, "MD W"],  # W = (2 + M) * M columns: pre, post, comb (row-major)
    base: Float[jax.Array, " W"],
    scale: Float[jax.Array, " 3"],  # pre, post, comb
    *,
    num_streams: int,
    sinkhorn_iters: int,
    eps: float,
    norm_eps: float,
    implementation: dispatch.Implementation = None,
) -> tuple[Float[jax.Array, "B T D"], Float32[jax.Array, "B T M"], Float32[jax.Array, "B T M M"]]:
    """Coefficients of one site, and the input they collapse the streams to.

    Returns:
      u [B, T, D] in the dtype of the streams, post [B, T, M] and comb [B, T, M, M] in float32.

    Raises:
      ValueError: shapes do not agree, or `implementation` is unknown or cannot run.
    """
    m = num_streams
    _check_site(streams, fn, base, scale, m)
    chosen = dispatch.choose(implementation, unsupported=_unsupported(streams, m))
    options: dict[str, Any] = dict(num_streams=m, sinkhorn_iters=sinkhorn_iters, eps=eps)
    if chosen == "reference":
        return reference.hc_pre(streams, fn, base, scale, norm_eps=norm_eps, **options)
    if chosen == "xla":
        u, raw = xla.collapse(streams, fn, scale[0], base[:m], eps, norm_eps)
        return u, *xla.coefficients(raw, base, scale, **options)
    static = Static(m, sinkhorn_iters, eps, norm_eps, chosen == "interpret")
    u, post, comb = tpu.collapse(_rows(streams), fn, base[None], scale[None], static)
    shape = streams.shape[:2]
    return u.reshape(*shape, -1), post.T.reshape(*shape, m), comb.T.reshape(*shape, m, m)


@dispatch.operation
def hc_post(
    f: Float[jax.Array, "B T D"],  # output of the sub-layer
    streams: Float[jax.Array, "B T MD"],
    post: Float32[jax.Array, "B T M"],
    comb: Float32[jax.Array, "B T M M"],
    *,
    implementation: dispatch.Implementation = None,
) -> Float[jax.Array, "B T MD"]:
    """Mixes the streams and adds the output of the sub-layer to each.

    Raises:
      ValueError: shapes do not agree, or `implementation` is unknown or cannot run.
    """
    _check_mix(f, streams, post, comb)
    m = post.shape[-1]
    chosen = dispatch.choose(implementation, unsupported=_unsupported(streams, m))
    if chosen == "reference":
        return reference.hc_post(f, streams, post, comb)
    if chosen == "xla":
        return xla.mix(f, streams, post, comb)
    static = Static(m, 0, 0.0, 0.0, chosen == "interpret")
    post, comb = _by_row(post, comb)
    mixed = tpu.mix(_rows(f), _rows(streams), post, comb, static)
    return mixed.reshape(streams.shape)


@dispatch.operation
def hc_post_pre(
    f: Float[jax.Array, "B T D"],  # output of a sub-layer
    streams: Float[jax.Array, "B T MD"],
    post: Float32[jax.Array, "B T M"],  # of its site
    comb: Float32[jax.Array, "B T M M"],  # of its site
    fn: Float[jax.Array, "MD W"],  # of the next site
    base: Float[jax.Array, " W"],  # of the next site
    scale: Float[jax.Array, " 3"],  # of the next site
    *,
    num_streams: int,
    sinkhorn_iters: int,
    eps: float,
    norm_eps: float,
    implementation: dispatch.Implementation = None,
) -> tuple[
    Float[jax.Array, "B T MD"],
    Float[jax.Array, "B T D"],
    Float32[jax.Array, "B T M"],
    Float32[jax.Array, "B T M M"],
]:
    """`hc_post` of one site, then `hc_pre` of the next, without reading the streams again.

    Returns:
      the new streams, and what `hc_pre` makes of them: u, post and comb.

    Raises:
      ValueError: shapes do not agree, or `implementation` is unknown or cannot run.
    """
    m = num_streams
    _check_mix(f, streams, post, comb)
    _check_site(streams, fn, base, scale, m)
    chosen = dispatch.choose(implementation, unsupported=_unsupported(streams, m))
    options: dict[str, Any] = dict(
        num_streams=m, sinkhorn_iters=sinkhorn_iters, eps=eps, norm_eps=norm_eps
    )
    if chosen in ("reference", "xla"):
        streams = hc_post(f, streams, post, comb, implementation=chosen)
        return streams, *hc_pre(streams, fn, base, scale, implementation=chosen, **options)
    static = Static(m, sinkhorn_iters, eps, norm_eps, chosen == "interpret")
    by_row = _by_row(post, comb)
    mixed, u, next_post, next_comb = tpu.mix_collapse(
        _rows(f), _rows(streams), by_row[0], by_row[1], fn, base[None], scale[None], static
    )
    return (
        mixed.reshape(streams.shape),
        u.reshape(f.shape),
        next_post.T.reshape(post.shape),
        next_comb.T.reshape(comb.shape),
    )


@dispatch.operation
def hc_head(
    streams: Float[jax.Array, "B T MD"],
    fn: Float[jax.Array, "MD M"],
    base: Float[jax.Array, " M"],
    scale: Float[jax.Array, " 1"],
    *,
    eps: float,
    norm_eps: float,
    implementation: dispatch.Implementation = None,
) -> Float[jax.Array, "B T D"]:
    """The final collapse: a sigmoid-weighted sum of the streams, without Sinkhorn.

    Raises:
      ValueError: shapes do not agree, or `implementation` is unknown or cannot run.
    """
    m = base.shape[0]
    _check_streams(streams, m)
    if fn.shape != (streams.shape[-1], m) or scale.shape != (1,):
        raise ValueError(
            f"fn {fn.shape}, base {base.shape} and scale {scale.shape} must be [M * D, M], [M] and "
            f"[1] for streams {streams.shape}."
        )
    chosen = dispatch.choose(implementation, unsupported=_unsupported(streams, m))
    if chosen == "reference":
        return reference.hc_head(streams, fn, base, scale, eps=eps, norm_eps=norm_eps)
    if chosen == "xla":
        return xla.collapse(streams, fn, scale[0], base, eps, norm_eps)[0]
    static = Static(m, 0, eps, norm_eps, chosen == "interpret")
    fn, base = jnp.pad(fn, ((0, 0), (0, 8 - m))), jnp.pad(base, (0, 8 - m))
    (u,) = tpu.collapse(_rows(streams), fn, base[None], scale[None], static)
    return u.reshape(*streams.shape[:2], -1)


# Between [B, T, ...] and the kernels' [N, ...] ----------------------------------------------------


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _by_row(post: jax.Array, comb: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[M, N] and [M * M, N], which the kernels gave."""
    return _rows(post).T, comb.reshape(-1, comb.shape[-1] ** 2).T


def _unsupported(streams: jax.Array, m: int) -> str | None:
    """Why the kernels cannot take these streams."""
    if m != 4:
        return f"the kernels are for 4 streams, not {m}"
    if streams.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernels are for bfloat16 and float32 streams, not {streams.dtype}"
    if streams.shape[-1] % (m * block_sizes.LANES):
        return f"streams {streams.shape} are not a multiple of {block_sizes.LANES} channels wide"
    if streams.size == 0:
        return "there are no tokens"
    chip = dispatch.target_chip()
    if not block_sizes.fits(chip, streams.shape[-1] // m, m, streams.dtype.itemsize):
        return f"a block of {streams.dtype} streams {streams.shape} does not fit in VMEM of {chip}"
    return None


# Validation ---------------------------------------------------------------------------------------


def _check_streams(streams, m):
    if streams.ndim != 3 or m < 1 or streams.shape[-1] % m:
        raise ValueError(f"streams {streams.shape} must be [B, T, M * D] with M={m}.")


def _check_site(streams, fn, base, scale, m):
    _check_streams(streams, m)
    width = (2 + m) * m
    if (fn.shape, base.shape, scale.shape) != ((streams.shape[-1], width), (width,), (3,)):
        raise ValueError(
            f"fn {fn.shape}, base {base.shape} and scale {scale.shape} must be "
            f"[M * D, {width}], [{width}] and [3] for streams {streams.shape} with M={m}."
        )


def _check_mix(f, streams, post, comb):
    m = post.shape[-1]
    _check_streams(streams, m)
    batch = streams.shape[:2]
    if f.shape != (*batch, streams.shape[-1] // m) or f.dtype != streams.dtype:
        raise ValueError(
            f"f {f.shape} {f.dtype} must be [B, T, D] in the dtype of streams {streams.shape} "
            f"{streams.dtype}, M={m}."
        )
    if post.shape != (*batch, m) or comb.shape != (*batch, m, m):
        raise ValueError(
            f"post {post.shape} and comb {comb.shape} must be [B, T, M] and [B, T, M, M] for "
            f"streams {streams.shape}."
        )
