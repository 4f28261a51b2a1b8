"""Training states on disk, with Orbax: what a step changes, and not the weights that stay."""

import os

import jax
import optax
import orbax.checkpoint as ocp
from flax import nnx

from v4jax.nn.layers import RoutingBias
from v4jax.train.step import TrainState


class Saver:
    """Saves training states and finds the newest one again.

    A state on disk has the parameters that train, the routing bias and the optimizer's state. Weights
    that do not change are those of the model that the run started from.

    Args:
      folder: where checkpoints go; made if missing.
      keep: how many to keep.

    Attributes:
      folder: as given.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2):
        self.folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(os.path.abspath(folder), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest saved state; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Starts to save; the state may be used meanwhile, but not donated before `wait`."""
        self._manager.save(step, args=ocp.args.StandardSave(_leaves(_changing(state)[0])))

    def restore(self, state: TrainState) -> tuple[TrainState, int] | None:
        """The newest saved state, placed like `state`, and its step; None if there is none.

        Weights that do not change are taken from `state`.
        """
        step = self.latest
        if step is None:
            return None
        changing, rest = _changing(state)
        abstract = {
            path: ocp.utils.to_shape_dtype_struct(leaf) for path, leaf in _leaves(changing).items()
        }
        leaves = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        ordered = [leaves[path] for path in abstract]  # Orbax returns them sorted by name
        found = jax.tree.unflatten(jax.tree.structure(changing), ordered)
        fixed = nnx.merge_state(found["bias"], rest)
        return TrainState(found["params"], fixed, found["opt_state"]), step

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self._manager.close()


def _changing(state: TrainState) -> tuple[dict[str, nnx.State | optax.OptState], nnx.State]:
    """What steps change of a state, and the variables that they do not."""
    bias, rest = nnx.split_state(state.fixed, RoutingBias, ...)
    return {"params": state.params, "bias": bias, "opt_state": state.opt_state}, rest


def _leaves(changing) -> dict[str, jax.Array]:
    """Arrays by path, which stays readable whatever containers they came from."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(changing)
    }
