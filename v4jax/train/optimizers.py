"""AdamW with the released hyper-parameters, and the routing bias's own rule."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from v4jax.nn.layers import RoutingBias
from v4jax.nn.model import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, linear warm-up, cosine decay to `final_fraction` of the peak.

    The report uses eps 1e-20; squares below the smallest float32 vanish then and gradients under
    1e-19 take steps of the wrong size, hence 1e-15.
    """

    peak_lr: float = 2e-4
    final_fraction: float = 0.1
    warmup_steps: int = 100
    total_steps: int = 1000
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    bias_speed: float = 1e-3  # of the routing bias, per step


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Weight decay applies to matrices, not to norms, sinks, biases and other vectors.

    A variable says what it is: arrays of stacked layers have one axis more.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_lr,
        warmup_steps=min(config.warmup_steps, config.total_steps - 1),
        decay_steps=config.total_steps,
        end_value=config.peak_lr * config.final_fraction,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=is_matrix,
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
        bias: RoutingBias | None = block.moe.router.bias
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
