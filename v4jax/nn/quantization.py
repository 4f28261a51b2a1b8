"""Models in the released storage formats: FP4 experts, FP8 linears, bfloat16 and float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.formats.quantize import QuantizedArray, quantize_weight
from v4jax.nn.layers import copied
from v4jax.nn.model import Transformer

_FLOAT_DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


Chosen = Callable[[str, nnx.Variable], bool]  # of a path, as "stages.0.blocks.0.moe.w1.kernel"


def is_expert(path: str, variable: nnx.Variable) -> bool:
    """Whether a variable belongs to the routed experts."""
    del path
    return "expert" in variable.axes


def not_expert(path: str, variable: nnx.Variable) -> bool:
    """Whether a variable does not belong to the routed experts."""
    return not is_expert(path, variable)


def is_indexer(path: str, variable: nnx.Variable) -> bool:
    """Whether a variable belongs to an indexer."""
    del variable
    return ".indexer." in path


def everything(path: str, variable: nnx.Variable) -> bool:
    """Any variable."""
    del path, variable
    return True


def to_released(model: Transformer, only: Chosen = everything) -> Transformer:
    """A copy of a float model with every parameter as the released checkpoints store it.

    Rounds to nearest, with the released power-of-two block scales. What is quantised already stays
    as it is.

    Args:
      only: which variables; the others stay as they are.
    """

    def convert(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        if isinstance(value, QuantizedArray) or variable.stored == "int":
            return variable
        if variable.stored in _FLOAT_DTYPES:
            return variable.replace(value.astype(_FLOAT_DTYPES[variable.stored]))
        return variable.replace(jax.jit(quantize_weight, static_argnums=1)(value, variable.stored))

    return _map_variables(convert, model, only)


def to_float(
    model: Transformer, dtype: jax.typing.DTypeLike = jnp.float32, only: Chosen = everything
) -> Transformer:
    """A copy with matrices and norms as float arrays of `dtype`, say for training.

    What the released checkpoints keep in float32 (hyper-connections, sinks ...) stays float32.

    Args:
      only: which variables; the others stay as they are.
    """

    def convert(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        if isinstance(value, QuantizedArray):
            return variable.replace(value.dequantize(dtype))
        if variable.stored == "int":
            return variable
        return variable.replace(value.astype(jnp.float32 if variable.stored == "f32" else dtype))

    return _map_variables(convert, model, only)


def with_rounding(model: Transformer) -> Transformer:
    """A copy, with the same arrays, that computes with weights as `to_released` would store them.

    For training with the rounding in the loop (docs/low_precision.md): a layer's weights are rounded when
    it runs, and gradients go through the rounding as they are.
    """
    model = copied(model)
    model.as_released = True
    return model


def _map_variables(function, model: Transformer, only: Chosen) -> Transformer:
    """A copy with `function` of every variable that `only` chooses.

    Waits for each, so that no more than one's temporaries are there, and few programs in flight: XLA
    ends a process of many fake CPU devices whose programs keep each other from running.
    """
    graphdef, state = nnx.split(model)
    changed = []
    for path, variable in nnx.to_flat_state(state):
        if only(".".join(map(str, path)), variable):
            variable = _waited_for(function(variable))
        changed.append((path, variable))
    return nnx.merge(graphdef, nnx.from_flat_state(changed))


def _waited_for(variable: nnx.Variable) -> nnx.Variable:
    """The variable, computed; as it is under a trace, where asking each takes jax longer than all else."""
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(variable)):
        jax.block_until_ready(variable)
    return variable
