"""Training states on disk, with Orbax: what a step changes, and not the weights that stay."""

import contextlib
import glob
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN, PreservationPolicy

from v4jax.checkpoint.errors import CheckpointError
from v4jax.nn.layers import RoutingBias
from v4jax.train.anticipation import Ahead, Routing
from v4jax.train.step import TrainState

# Orbax logs pages of what `Saver` says in a sentence; those who listen to its logger get them.
logging.getLogger("absl").addHandler(logging.NullHandler())
_CHECKSUMS, _HELDOUT = "checksums", "heldout_ce"
_AHEAD = "routing.ahead"
_HALF = ".orbax-checkpoint-tmp"  # Orbax's ending of what is being written
_SHOWN = 300  # characters of a message


class Saver:
    """Saves training states and finds them again.

    A state on disk has the parameters that train, the routing bias and the optimizer's state. Weights
    that do not change are those of the model that the run started from. Kept are the newest states and
    the one whose held-out loss is the lowest. A state is written beside training: its arrays are
    copied from the devices first, and it has its name when all of it is there.

    Args:
      folder: where states go, one folder a step; made if missing. `STEP/_CHECKPOINT_METADATA` has
        the held-out loss of a state that was saved with one.
      keep: how many of the newest to keep. The one before the newest is there in case that is damaged.

    Attributes:
      folder: as given.
      losses: step -> held-out loss, of states that were saved with one.
      damaged: step -> what is wrong with it, of states that `restore` could not read. They are left as
        `STEP.damaged`.

    Raises:
      CheckpointError: the folder cannot be made or read.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2):
        self.folder = folder
        self.damaged: dict[int, str] = {}
        self.losses: dict[int, float] = {}
        options = ocp.CheckpointManagerOptions(
            create=True,
            cleanup_tmp_directories=True,  # halves of states, from processes that were killed
            preservation_policy=AnyPreservationPolicy([LatestN(keep), _Best(self)]),
        )
        with self._said("opening it"):
            self._manager = ocp.CheckpointManager(
                os.path.abspath(folder),
                options=options,
                item_handlers=ocp.StandardCheckpointHandler(),
            )
            self.losses = self._losses_on_disk()

    @property
    def latest(self) -> int | None:
        """The step of the newest saved state; None if there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and held-out loss of the best state on disk; None if none was saved with a loss."""
        found = [(loss, step) for step, loss in self.losses.items() if step in self._steps()]
        return min(found)[::-1] if found else None

    @property
    def is_saving(self) -> bool:
        """Whether a state is being written."""
        return self._manager.is_saving_in_progress()

    def save(self, step: int, state: TrainState, heldout_ce: float | None = None) -> None:
        """Starts to save, after the save before; the state may be used and donated meanwhile.

        Args:
          heldout_ce: of this state, if it was measured.

        Raises:
          CheckpointError: this save, or the one before, cannot be written.
        """
        leaves = _leaves(_changing(state)[0])
        leaves[_CHECKSUMS] = _checksums(list(leaves.values()))
        with self._said("writing a state"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            said = {}
            if heldout_ce is not None and math.isfinite(heldout_ce):
                self.losses[step] = said[_HELDOUT] = float(heldout_ce)
            arrays = ocp.args.StandardSave(leaves)
            if not self._manager.save(step, args=arrays, custom_metadata=said):
                raise CheckpointError(f"{self.folder} already has step {step}, or a later one.")

    def require_like(self, state: TrainState) -> None:
        """Refuses states of something else, as far as they can be read.

        Args:
          state: arrays, or their shapes.

        Raises:
          CheckpointError: the newest state that can be read has other arrays than `state`.
        """
        wanted = _leaves(_changing(state.without_ahead())[0])
        for step in self._steps():
            announced = None
            with contextlib.suppress(Exception):  # damaged: `restore` says so
                announced = self._announced(step)
            if announced is not None:
                return self._compare(step, announced, wanted)

    def restore(
        self,
        state: TrainState,
        step: int | None = None,
        tokens: jax.sharding.Sharding | None = None,
    ) -> tuple[TrainState, int] | None:
        """The newest saved state, placed like `state`, and its step; None if there is none.

        A state that cannot be read, or whose numbers are not those that were written, is left aside for
        the one before it, and named in `damaged`.

        Args:
          state: arrays, or their shapes and shardings (`TrainStep.shapes`), so that no second state
            is held. Weights that do not change are taken from it.
          step: of that step, and no other.
          tokens: where experts go that were chosen ahead for tokens [B, T]. As many come back as were
            saved, whatever `state` has. Default: where other arrays are.

        Raises:
          CheckpointError: no state can be read, or they are of something else.
        """
        candidates = self._steps() if step is None else [step]
        if not candidates:
            return None
        changing, rest = _changing(state.without_ahead())
        wanted = _leaves(changing)
        wanted = {path: ocp.utils.to_shape_dtype_struct(leaf) for path, leaf in wanted.items()}
        for number in candidates:
            try:
                leaves = self._read(number, wanted, tokens)
            except (_OtherStateError, MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # noqa: BLE001 - what TensorStore raises has no other class
                self.damaged[number] = _first_line(error)
                continue
            self._leave_aside()
            ordered = [leaves[path] for path in wanted]  # Orbax returns them sorted by name
            found = jax.tree.unflatten(jax.tree.structure(changing), ordered)
            fixed, routing = nnx.merge_state(found["bias"], rest), found["routing"]
            if routing is not None:
                ahead = [leaves[path] for path in _paths_ahead(leaves)]
                routing = Routing(routing.left, tuple(map(Ahead, ahead[::2], ahead[1::2])))
            state = TrainState(found["params"], fixed, found["opt_state"], found["norms"], routing)
            return state, number
        whys = "; ".join(f"step {number}: {why}" for number, why in self.damaged.items())
        raise CheckpointError(
            f"{self.folder} has no state that can be read ({whys}). Nothing was changed: give another "
            "--output to begin anew, or bring the files back."
        )

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          CheckpointError: it could not be written.
        """
        with self._said("writing a state"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits and lets go of the folder. What went wrong with a save, `wait` says."""
        with contextlib.suppress(Exception):
            self._manager.close()

    def _steps(self) -> list[int]:
        """Of the states on disk, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def _losses_on_disk(self) -> dict[int, float]:
        found = {}
        for step in self._steps():
            with contextlib.suppress(Exception):  # damaged: `restore` says so
                said = self._manager.metadata(step).custom_metadata
                found[step] = float(said[_HELDOUT])
        return found

    def _announced(self, step: int) -> dict:
        """What a state says that it has."""
        return dict(self._manager.item_metadata(step).tree)

    def _read(
        self, step: int, wanted: dict, tokens: jax.sharding.Sharding | None
    ) -> dict[str, jax.Array]:
        announced = self._announced(step)
        self._compare(step, announced, wanted)
        place = jax.tree.leaves(wanted)[0].sharding
        if isinstance(place, jax.NamedSharding):
            place = jax.NamedSharding(place.mesh, jax.P())
        for path in _paths_ahead(announced):
            shape, dtype = announced[path].shape, announced[path].dtype
            ahead = jax.ShapeDtypeStruct(shape, dtype, sharding=tokens or place)
            wanted = {**wanted, path: ahead}
        if _CHECKSUMS in announced:
            sums = jax.ShapeDtypeStruct(announced[_CHECKSUMS].shape, jnp.uint32, sharding=place)
            wanted = {**wanted, _CHECKSUMS: sums}
        leaves = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        if _CHECKSUMS in leaves:
            written = np.asarray(leaves.pop(_CHECKSUMS))
            paths = [path for path in wanted if path != _CHECKSUMS]
            found = np.asarray(_checksums([leaves[path] for path in paths]))
            if (wrong := found != written).any():
                name = paths[int(np.argmax(wrong))]
                raise CheckpointError(f"{name} has other numbers than were written")
        return leaves

    def _compare(self, step: int, announced: dict, wanted: dict) -> None:
        """Refuses a state of something else."""
        other = sorted(({*announced} ^ {*wanted}) - {_CHECKSUMS, *_paths_ahead(announced)})
        other += [
            f"{path} ({found.dtype}{list(found.shape)}, expected {leaf.dtype}{list(leaf.shape)})"
            for path, leaf in wanted.items()
            if (found := announced.get(path)) is not None
            and (tuple(found.shape), found.dtype) != (leaf.shape, leaf.dtype)
        ]
        if other:
            more = f" and {len(other) - 3} more" if len(other) > 3 else ""
            raise _OtherStateError(
                f"the state of step {step} in {self.folder} is of another model, optimizer or choice of "
                f"what trains: {', '.join(other[:3])}{more} differ. Give the settings that it was made "
                "with, or another output folder."
            )

    def _leave_aside(self) -> None:
        """Renames what could not be read, so that its step can be saved again."""
        if not self.damaged:
            return
        if jax.process_index() == 0:
            for step in self.damaged:
                source = os.path.join(os.path.abspath(self.folder), str(step))
                if os.path.isdir(source):
                    os.rename(source, _free(f"{source}.damaged"))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged states are left aside")
        self._manager.reload()

    @contextlib.contextmanager
    def _said(self, what: str) -> Iterator[None]:
        """What Orbax and TensorStore raise, as one message."""
        try:
            yield
        except CheckpointError:
            raise
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            self._remove_halves()
            raise CheckpointError(
                f"{self.folder}: {what} failed: {_first_line(error)}. Nothing half-written counts as a "
                "state, and those saved before are kept: see to room on the disk and to permissions, "
                "and give the same command again to go on from the last one, or another --output."
            ) from error

    def _remove_halves(self) -> None:
        """Of a state that could not be written, so that a disk that is full has its room back."""
        if jax.process_index() == 0:
            for half in glob.glob(os.path.join(glob.escape(os.fspath(self.folder)), f"*{_HALF}")):
                shutil.rmtree(half, ignore_errors=True)


class _OtherStateError(CheckpointError):
    """A state that is whole, and of something else."""


class _Best(PreservationPolicy):
    """Keeps the state with the lowest held-out loss."""

    def __init__(self, saver: Saver):
        self._saver = saver

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Which states stay, of all that are there."""
        del context
        losses = self._saver.losses
        known = [(losses[each.step], each.step) for each in checkpoints if each.step in losses]
        return [bool(known) and each.step == min(known)[1] for each in checkpoints]


def _first_line(error: BaseException) -> str:
    """The first words of what a library says, which may be pages."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    text = str(error).split("\n")[0].strip() or type(error).__name__
    if (
        len(text) > _SHOWN
    ):  # TensorStore tells what it was doing, file by file, before what went wrong
        text = text.split('": ')[-1]
    return text if len(text) < _SHOWN else f"{text[:_SHOWN]} ..."


def _free(path: str) -> str:
    """The path, or one with a number behind it that is not taken."""
    number, free = 1, path
    while os.path.exists(free):
        number, free = number + 1, f"{path}-{number + 1}"
    return free


def _changing(
    state: TrainState,
) -> tuple[dict[str, nnx.State | optax.OptState | jax.Array | Routing | None], nnx.State]:
    """What steps change of a state, and the variables that they do not."""
    bias, rest = nnx.split_state(state.fixed, RoutingBias, ...)
    changing = {"params": state.params, "bias": bias, "opt_state": state.opt_state}
    return {**changing, "norms": state.norms, "routing": state.routing}, rest


def freed(state: TrainState) -> TrainState:
    """Shapes of a state in place of the arrays that steps change, whose memory is given back."""
    changing, rest = _changing(state)

    def free(array: jax.Array) -> jax.ShapeDtypeStruct:
        shape = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
        array.delete()
        return shape

    shapes = jax.tree.map(free, changing)
    fixed = nnx.merge_state(shapes["bias"], rest)
    return TrainState(
        shapes["params"], fixed, shapes["opt_state"], shapes["norms"], shapes["routing"]
    )


def _leaves(changing) -> dict[str, jax.Array]:
    """Arrays by path, which stays readable whatever containers they came from."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(changing)
    }


def _paths_ahead(paths: Iterable[str]) -> list[str]:
    """Those of experts that were chosen ahead, by step; inputs and experts of each."""
    steps = sum(path.startswith(f"{_AHEAD}.") for path in paths) // 2
    return [f"{_AHEAD}.{step}.{part}" for step in range(steps) for part in ("inputs", "experts")]


@jax.jit
def _checksums(leaves: list[jax.Array]) -> jax.Array:
    """[n] uint32, the sum of each array's words modulo 2**32: the same on every mesh.

    TensorStore's files say nothing of a bit that flipped in an array's data.
    """

    def one(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.bool_ or x.dtype.itemsize not in (1, 2, 4, 8):
            x = x.astype(jnp.float32)
        words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        return jnp.sum(jax.lax.bitcast_convert_type(x, words), dtype=jnp.uint32)

    return jnp.stack([one(leaf) for leaf in leaves])
