"""Models in the released storage formats: FP4 experts, FP8 linears, bfloat16 and float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.formats.quantize import QuantizedArray, cast, quantize_weight
from v4jax.nn.model import Transformer

_FLOAT_DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


class Frozen(nnx.Variable):
    """A weight that training reads and does not change: no gradient, no optimizer state."""


def to_released(model: Transformer) -> Transformer:
    """A copy of a float model with every parameter as the released checkpoints store it.

    Rounds to nearest, with the released power-of-two block scales. What is quantised already stays
    as it is.
    """

    def convert(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        if isinstance(value, QuantizedArray) or variable.stored == "int":
            return variable
        if variable.stored in _FLOAT_DTYPES:
            return variable.replace(value.astype(_FLOAT_DTYPES[variable.stored]))
        return variable.replace(jax.jit(quantize_weight, static_argnums=1)(value, variable.stored))

    return _map_variables(convert, model)


def to_float(model: Transformer, dtype: jax.typing.DTypeLike = jnp.float32) -> Transformer:
    """A copy with matrices and norms as float arrays of `dtype`, say for training.

    What the released checkpoints keep in float32 (hyper-connections, sinks ...) stays float32.
    """

    def convert(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        if isinstance(value, QuantizedArray):
            return variable.replace(value.dequantize(dtype))
        if variable.stored == "int":
            return variable
        return variable.replace(value.astype(jnp.float32 if variable.stored == "f32" else dtype))

    return _map_variables(convert, model)


def round_to_released(params: nnx.State) -> nnx.State:
    """Float parameters with the values that `to_released` would give them, in their own dtype.

    For training with the rounding in the loop (docs/low_precision.md): no gradient goes through
    this, loss and gradients are taken at its result. Traceable.
    """

    def convert(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        if isinstance(value, QuantizedArray) or variable.stored in ("f32", "int"):
            return variable
        return variable.replace(_round(value, variable.stored))

    return _map_state(convert, params)


def _round(value: jax.Array, stored: str) -> jax.Array:
    if stored == "bf16":
        return cast(value, jnp.bfloat16).astype(value.dtype)

    return quantize_weight(value, stored).dequantize(value.dtype)


def freeze_experts(model: Transformer) -> Transformer:
    """A copy whose routed experts are stored as released and are no parameters any more.

    What fine-tunes everything else: the experts are 97 % of a model, and take half a byte a weight
    where training them takes 16.

    Raises:
      ValueError: the model's experts have no quantised storage format.
    """
    if model.cfg.expert_format is None:
        raise ValueError(
            f"expert_format=None of {model.cfg.name}: freezing needs experts that are stored in "
            '"fp4" or "fp8".'
        )
    model = nnx.merge(*nnx.split(model))
    blocks = [block for stage in model.stages for block in stage.blocks]
    for block in [*blocks, *[mtp.block for mtp in model.mtp]]:
        for name in ("w1", "w2", "w3"):
            variable = getattr(block.moe, name)
            value = variable.get_value()
            if not isinstance(value, QuantizedArray):
                value = jax.jit(quantize_weight, static_argnums=1)(value, variable.stored)
            setattr(block.moe, name, Frozen(value, **variable.get_metadata()))
    return model


def _map_variables(function, model: Transformer) -> Transformer:
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, _map_state(function, state))


def _map_state(function, state: nnx.State) -> nnx.State:
    return jax.tree.map(function, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
