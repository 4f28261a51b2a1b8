"""AdamW with the report's hyper-parameters, and the routing bias's own rule.

An optimizer is any optax transformation. The parameters that it gets are variables, which say of
themselves what they are (`axes`, `matrix`, `stored`): see docs/extending.md.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from v4jax.nn.model import Transformer


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-15,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW with the report's hyper-parameters, after clipping by the global norm.

    Weight decay applies to matrices, not to norms, sinks, biases and other vectors. A variable says
    what it is: arrays of stacked layers have one axis more.

    The report uses eps 1e-20; squares below the smallest float32 vanish then and gradients under
    1e-19 take steps of the wrong size, hence 1e-15.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(
            learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=is_matrix
        ),
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
    return jax.tree.map(
        lambda variable: variable.replace(
            jax.tree.map(lambda _: variable.matrix, variable.get_value())
        ),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
