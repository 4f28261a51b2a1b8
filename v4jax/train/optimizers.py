"""AdamW and Muon with the report's hyper-parameters, and the routing bias's own rule.

An optimizer is any optax transformation. The parameters that it gets are variables, which say of
themselves what they are (`axes`, `matrix`, `parts`, `stored`): see docs/extending.md.
"""

import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from v4jax.nn.model import Transformer
from v4jax.train.eight_bits import in_eight_bits
from v4jax.train.muon import is_orthogonalized, orthogonalize

STATE_DTYPES = ("float32", "bfloat16", "int8")


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-15,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    state_dtype: jax.typing.DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """AdamW with the report's hyper-parameters, after clipping by the global norm.

    Weight decay applies to matrices, not to norms, sinks, biases and other vectors. A variable says
    what it is: arrays of stacked layers have one axis more.

    The report uses eps 1e-20; squares below the smallest float32 vanish then and gradients under
    1e-19 take steps of the wrong size, hence 1e-15.

    Args:
      state_dtype: in which moments are kept between steps (`keep_state_in`): float32, bfloat16, int8.

    Raises:
      ValueError: a number that no training has.
    """
    _require(learning_rate, weight_decay, clip_norm, eps, b1=b1, b2=b2)
    rule = _adamw(learning_rate, b1, b2, eps, weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), keep_state_in(state_dtype, rule))


def muon(
    learning_rate: float | optax.Schedule,
    *,
    momentum: float = 0.95,
    update_rms: float = 0.18,
    weight_decay: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-15,
    clip_norm: float = 1.0,
    state_dtype: jax.typing.DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """Muon as the report trains, after clipping by the global norm.

        M <- momentum * M + gradient
        U  = update_rms * sqrt(max(in, out)) * orthogonal(momentum * M + gradient)
        W <- W - rate * (weight_decay * W + U)

    for every matrix by itself: of each layer, expert and group of the output projection. Embedding,
    head, norms, sinks, biases, positions of compressors and factors of a LoRA take `adamw`, by the same
    rate.

    The ten steps to an orthogonal matrix cost as much as 360,000 tokens do in Flash, whatever the batch: for
    small batches AdamW is faster.

    Args:
      update_rms: root mean square of a matrix's update, relative to the rate.
      b1, b2, eps: of AdamW.
      weight_decay: of matrices, the embedding and head included; vectors do not decay.
      state_dtype: in which momentum and moments are kept between steps (`keep_state_in`).

    Raises:
      ValueError: a number that no training has.

    Source: report section 2.4, algorithm 1; values: section 4.2.2.
    """
    _require(learning_rate, weight_decay, clip_norm, eps, b1=b1, b2=b2, momentum=momentum)
    rules = {
        "muon": optax.chain(
            keep_state_in(state_dtype, optax.trace(momentum, nesterov=True)),
            orthogonalize(update_rms),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        ),
        "adamw": keep_state_in(state_dtype, _adamw(learning_rate, b1, b2, eps, weight_decay)),
    }
    rule = optax.partition(rules, lambda params: _labels(params, _rule_of))
    return optax.chain(optax.clip_by_global_norm(clip_norm), rule)


def _require(learning_rate, weight_decay: float, clip_norm: float, eps: float, **shares) -> None:
    """Raises a ValueError for rates that are not finite, or below zero, and shares beyond 0 to 1."""
    rates = {"weight_decay": weight_decay, "clip_norm": clip_norm, "eps": eps}
    if not callable(learning_rate):
        rates["learning_rate"] = learning_rate
    for name, value in rates.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value}: expected a number from 0 on.")
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value}: expected a share from 0 to below 1.")


def keep_state_in(
    dtype: jax.typing.DTypeLike, rule: optax.GradientTransformation
) -> optax.GradientTransformation:
    """A rule whose float arrays are narrower between steps, and float32 within one.

    bfloat16, rounded to nearest, needs half the memory, and a change of less than 1/512 of a value is lost.
    A mean that takes in a tenth of what is new then stops within 2 % of it, AdamW's second moment within
    4 % and so its steps within 2 %. int8 needs a quarter: levels with a scale for every 256 values,
    rounded stochastically (`eight_bits`); vectors, small arrays and tables of the vocabulary stay float32.
    The parameters themselves are as they were.

    Args:
      rule: for int8 one that treats every number by itself, as `optax.adam`.

    Raises:
      ValueError: another dtype.
    """
    if jnp.dtype(dtype) not in map(jnp.dtype, STATE_DTYPES):
        raise ValueError(f"state_dtype={dtype!r}: expected one of {', '.join(STATE_DTYPES)}.")
    if jnp.dtype(dtype) == jnp.float32:
        return rule
    narrow = in_eight_bits(rule) if jnp.dtype(dtype) == jnp.int8 else _in_bfloat16(rule)
    # As one program: the wide state is never there as a whole.
    return optax.GradientTransformation(jax.jit(narrow.init), narrow.update)


def _in_bfloat16(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    def cast(state, dtype):
        def one(x):
            return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) and x.ndim else x

        return jax.tree.map(one, state)

    def update(updates, state, params=None, **extra):
        updates, state = rule.update(updates, cast(state, jnp.float32), params, **extra)
        return updates, cast(state, jnp.bfloat16)

    return optax.GradientTransformation(
        lambda params: cast(rule.init(params), jnp.bfloat16), update
    )


def update_routing_bias(model: Transformer, counts, speed: float) -> None:
    """Raises the bias of experts with too few tokens and lowers that of the others.

    Args:
      model: its `RoutingBias` variables are replaced.
      counts: `Metrics.expert_counts` of the batch.
      speed: step of the bias (report: 0.001; arXiv 2408.15664, algorithm 1).
    """
    blocks = [block for stage in model.stages for block in stage.blocks]
    blocks += [mtp.block for mtp in model.mtp]
    flat = [count for stage in counts for count in stage]  # [repeats, E] each
    for block, count in zip(blocks, flat, strict=True):
        bias = block.moe.router.bias
        if bias is None:
            continue
        count = count.astype(jnp.float32)
        step = speed * jnp.sign(jnp.mean(count, axis=-1, keepdims=True) - count)
        bias.set_value(bias[...] + step.reshape(bias[...].shape))


def is_matrix(params: nnx.State) -> nnx.State:
    """Which variables multiply activations: a tree like `params`, of booleans."""
    return _labels(params, lambda variable: variable.matrix)


def _adamw(learning_rate, b1, b2, eps, weight_decay) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=is_matrix
    )


def _rule_of(variable: nnx.Variable) -> str:
    return "muon" if is_orthogonalized(variable) else "adamw"


def _labels(params: nnx.State, of) -> nnx.State:
    """`of` each variable, in the place of its arrays."""

    def label(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(jax.tree.map(lambda _: of(variable), variable.get_value()))

    return jax.tree.map(label, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
