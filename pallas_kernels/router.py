"""Which experts a token goes to, and with which weights.

    score   = sqrt(softplus(logit))                                float32
    experts = the k of largest score + bias, ties to the lowest    the bias only selects
    weight  = score / sum of the chosen scores * scale

Why a kernel: of one token XLA makes eight operations of it, a sort of all experts among them. Here the
largest is found k times, in registers.

Source: report section 2.4; released `inference/model.py` (Gate).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Float32, Int32

from pallas_kernels import dispatch

LANES = 128
MOST_EXPERTS = 1024
BLOCK_ROWS = 64


@dispatch.operation
def top_experts(
    logits: Float32[jax.Array, "*rows E"],
    bias: Float[jax.Array, " E"],
    *,
    k: int,
    scale: float,
    implementation: dispatch.Implementation = None,
) -> tuple[Int32[jax.Array, "*rows k"], Float32[jax.Array, "*rows k"]]:
    """Experts and weights of each token, by score. Weights are differentiable in the logits.

    Args:
      scale: what weights add up to.
      implementation: see `dispatch.choose`; "xla" is the specification, too.

    Raises:
      ValueError: shapes do not agree, k is not in 1 .. E, or an implementation that cannot run.
    """
    num_experts = logits.shape[-1]
    if bias.shape != (num_experts,) or not 1 <= k <= num_experts:
        raise ValueError(
            f"bias {bias.shape} and {k=}: expected [{num_experts}] and 1..{num_experts}."
        )
    chosen = dispatch.choose(implementation, unsupported=_unsupported(logits))
    if chosen in ("tpu", "interpret"):
        return _kernel_form(logits, bias, k, scale, chosen == "interpret")
    experts = _experts_xla(logits, bias, k)
    return experts, weights_of(logits, experts, scale)


def scores(logits: jax.Array) -> jax.Array:
    """Of experts, before any bias; float32."""
    return jnp.sqrt(jax.nn.softplus(logits))


def weights_of(logits: jax.Array, experts: jax.Array, scale: float) -> jax.Array:
    """Weights [..., k] of experts that were chosen in whatever way."""
    chosen = jnp.take_along_axis(scores(logits), experts, axis=-1, mode="clip")
    return chosen / jnp.sum(chosen, axis=-1, keepdims=True) * scale


def _experts_xla(logits: jax.Array, bias: jax.Array, k: int) -> jax.Array:
    return jax.lax.top_k(jax.lax.stop_gradient(scores(logits)) + bias, k)[1]


def _unsupported(logits: jax.Array) -> str | None:
    if logits.dtype != jnp.float32:
        return f"logits are {logits.dtype}: the kernel takes float32"
    width = logits.shape[-1]
    if not logits.size or width % LANES or width > MOST_EXPERTS:
        return (
            f"logits {logits.shape}: the kernel takes whole {LANES} experts, {MOST_EXPERTS} at most"
        )
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _kernel_form(logits, bias, k, scale, interpret):
    return _call(logits, bias, k, scale, interpret)


def _fwd(logits, bias, k, scale, interpret):
    experts, weights = _call(logits, bias, k, scale, interpret)
    return (experts, weights), (logits, bias, experts)


def _bwd(k, scale, interpret, residuals, cotangents):
    logits, bias, experts = residuals
    _, vjp = jax.vjp(lambda logits: weights_of(logits, experts, scale), logits)
    return *vjp(cotangents[1]), jnp.zeros_like(bias)


_kernel_form.defvjp(_fwd, _bwd)


def _call(logits, bias, k, scale, interpret):
    *batch, width = logits.shape
    rows = logits.reshape(-1, width)
    own = min(BLOCK_ROWS, rows.shape[0])
    experts, bits = pl.pallas_call(
        functools.partial(_kernel, k, scale),
        grid=(pl.cdiv(rows.shape[0], own),),
        in_specs=[
            pl.BlockSpec((own, width), lambda i: (i, 0)),
            pl.BlockSpec((1, width), lambda i: (0, 0)),
        ],
        out_specs=[pl.BlockSpec((own, k), lambda i: (i, 0))] * 2,
        out_shape=[jax.ShapeDtypeStruct((rows.shape[0], k), jnp.int32)] * 2,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=8 * k * rows.size, transcendentals=3 * rows.size, bytes_accessed=4 * rows.size
        ),
        interpret=interpret,
        name="top_experts",
    )(rows, bias.astype(jnp.float32).reshape(1, width))
    weights = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return experts.reshape(*batch, k), weights.reshape(*batch, k)


def _kernel(k: int, scale: float, logits_ref, bias_ref, experts_ref, bits_ref) -> None:
    """Writes weights as bits, which is how devices tell them each other (`all_gather_together`)."""
    score = scores(logits_ref[...])
    left = score + bias_ref[...]
    expert = jax.lax.broadcasted_iota(jnp.int32, score.shape, 1)
    chosen, weights = [], []
    for _ in range(k):
        largest = jnp.max(left, axis=1, keepdims=True)
        first = jnp.min(jnp.where(left == largest, expert, score.shape[1]), axis=1, keepdims=True)
        first = jnp.minimum(first, score.shape[1] - 1)  # of NaN, none is largest
        mine = expert == first
        chosen.append(first)
        weights.append(jnp.sum(jnp.where(mine, score, 0.0), axis=1, keepdims=True))
        left = jnp.where(mine, -jnp.inf, left)
    total = functools.reduce(jnp.add, weights)
    column = jax.lax.broadcasted_iota(jnp.int32, experts_ref.shape, 1)
    experts, shares = jnp.zeros(column.shape, jnp.int32), jnp.zeros(column.shape, jnp.float32)
    for i in range(k):
        experts = jnp.where(column == i, chosen[i], experts)
        shares = jnp.where(column == i, weights[i] / total * scale, shares)
    experts_ref[...] = experts
    bits_ref[...] = jax.lax.bitcast_convert_type(shares, jnp.int32)
