"""The training state, its step, and how it is saved and resumed."""

import dataclasses
import functools
import os

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from v4jax.model import Transformer
from v4jax.quantization import round_to_released
from v4jax.train.loss import LossWeights, Metrics, training_loss
from v4jax.train.optimizer import OptimizerConfig, adamw, update_routing_bias


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params", "fixed", "opt_state"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters that gradients change, variables they do not, and the optimizer's state."""

    params: nnx.State
    fixed: nnx.State
    opt_state: optax.OptState


class Trainer:
    """A model's training step. Holds no arrays; the state goes in and comes out.

    Args:
      qat: take loss and gradients at the parameters as the released format would hold them, and
        apply the gradients to the float ones (docs/low_precision.md). Give the model `released`
        numerics then, so that activations are rounded too.
      remat: recompute the layers in the backward pass.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: OptimizerConfig,
        weights: LossWeights = LossWeights(),
        *,
        qat: bool = False,
        remat: bool = True,
    ):
        if qat and not model.numerics.is_released:
            raise ValueError(
                f"qat=True with {model.numerics.name} numerics: expected released(...), whose "
                "rounding of activations belongs to the model that is trained for."
            )
        self.graphdef, self._params, self._fixed = nnx.split(model, nnx.Param, ...)
        self.optimizer = adamw(optimizer)
        self.computed = round_to_released if qat else lambda params: params
        self._step = jax.jit(
            functools.partial(
                _train_step,
                self.graphdef,
                self.optimizer,
                weights,
                optimizer.bias_speed,
                self.computed,
                remat,
            ),
            donate_argnums=(0,),
        )

    def init(self) -> TrainState:
        """The state before the first step. The model's arrays are moved into it."""
        params, fixed = self._params, self._fixed
        self._params = self._fixed = None
        return TrainState(params, fixed, self.optimizer.init(params))

    def step(self, state: TrainState, tokens: np.ndarray) -> tuple[TrainState, Metrics]:
        """One step on tokens [B, T + 2]. The old state is donated."""
        return self._step(state, tokens)

    def model(self, state: TrainState) -> Transformer:
        """The model with the state's arrays."""
        return nnx.merge(self.graphdef, state.params, state.fixed)


def _train_step(graphdef, optimizer, weights, bias_speed, computed, remat, state, tokens):
    def loss_fn(params):
        model = nnx.merge(graphdef, params, state.fixed)
        return training_loss(model, tokens, weights, remat=remat)

    grads, metrics = jax.grad(loss_fn, has_aux=True)(computed(state.params))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    model = nnx.merge(graphdef, params, state.fixed)
    update_routing_bias(model, metrics.expert_counts, bias_speed)
    _, params, fixed = nnx.split(model, nnx.Param, ...)
    return TrainState(params, fixed, opt_state), metrics


class Saver:
    """Saves training states with Orbax and finds the newest one again.

    Args:
      folder: where checkpoints go; made if missing.
      keep: how many to keep.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(os.path.abspath(folder), options=options)

    def save(self, step: int, state: TrainState) -> None:
        """Starts to save; the state may be used meanwhile, but not donated before `wait`."""
        self._manager.save(step, args=ocp.args.StandardSave(_leaves(state)))

    def restore(self, state: TrainState) -> tuple[TrainState, int] | None:
        """The newest saved state, placed like `state`, and its step; None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = {
            path: ocp.utils.to_shape_dtype_struct(leaf) for path, leaf in _leaves(state).items()
        }
        leaves = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        ordered = [leaves[path] for path in abstract]  # Orbax returns them sorted by name
        return jax.tree.unflatten(jax.tree.structure(state), ordered), step

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self._manager.close()


def _leaves(state: TrainState) -> dict[str, jax.Array]:
    """Arrays by path, which stays readable whatever containers they came from."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
