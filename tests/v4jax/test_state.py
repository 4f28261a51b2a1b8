"""States on disk: which stay, what a damaged one becomes, and what is said where nothing can be written.

Of a few small arrays: no model is compiled.
"""

import contextlib
import gc
import json
import resource
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sharding import make_mesh
from tests.models import random_model
from tests.v4jax.test_trainer import SMALL
from v4jax.checkpoint import CheckpointError
from v4jax.train import Trainer, adamw
from v4jax.train.state import Saver
from v4jax.train.step import TrainState

# Orbax leaves tasks of a read or write that failed to a loop that has ended, and Python says so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
OPTIMIZER = optax.adam(1e-3)


def _state(seed: float, width: int = 3000) -> TrainState:
    values = np.random.default_rng(int(seed)).normal(size=(7, width)).astype(np.float32)
    params = nnx.State({"w": nnx.Param(jnp.asarray(values)), "b": nnx.Param(jnp.full(3, seed))})
    return TrainState(params, nnx.State({}), OPTIMIZER.init(params))


def _saved(folder, *steps, **losses) -> None:
    saver = Saver(folder)
    for step in steps:
        saver.save(step, _state(step), losses.get(f"at{step}"))
    saver.wait()
    saver.close()


@pytest.fixture(autouse=True)
def _no_leftovers():
    yield
    gc.collect()


@contextlib.contextmanager
def _opened(folder):
    saver = Saver(folder)
    yield saver
    saver.close()


def _names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _same(found: TrainState, wanted: TrainState) -> bool:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_the_newest_and_the_best_stay(tmp_path):
    _saved(tmp_path, 1, 2, 3, 4, 5, at1=3.0, at2=1.0, at3=2.0, at5=float("nan"))
    assert _names(tmp_path) == ["2", "4", "5"]
    with _opened(tmp_path) as saver:
        assert saver.latest == 5 and saver.best == (2, 1.0)
        saver.save(6, _state(6), 0.5)
        saver.wait()
        assert saver.best == (6, 0.5)
        found, step = saver.restore(_state(0))
        assert step == 6 and _same(found, _state(6))
    assert _names(tmp_path) == ["5", "6"]
    said = json.loads((tmp_path / "6" / "_CHECKPOINT_METADATA").read_text())
    assert said["custom_metadata"] == {"heldout_ce": 0.5}


def _largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _flip(folder):
    """One bit in the middle of an array's data, which zstd and TensorStore let pass."""
    path = _largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def _cut(folder):
    path = _largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def _lose(folder):
    for path in list(folder.rglob("manifest.ocdbt")):
        path.unlink()


@pytest.mark.parametrize("damage", [_flip, _cut, _empty, _lose])
def test_a_damaged_newest_state_is_left_aside_for_the_one_before(tmp_path, damage):
    _saved(tmp_path, 1, 2)
    damage(tmp_path / "2")

    with _opened(tmp_path) as saver:
        saver.require_like(_state(0))
        found, step = saver.restore(_state(0))
        assert step == 1 and _same(found, _state(1))
        assert list(saver.damaged) == [2] and saver.damaged[2]
        saver.save(2, _state(2))  # the run comes there again
        saver.wait()
    assert _names(tmp_path) == ["1", "2", "2.damaged"]
    with _opened(tmp_path) as saver:
        assert _same(saver.restore(_state(0))[0], _state(2)) and not saver.damaged


def test_states_that_are_all_damaged_are_named_and_stay(tmp_path):
    _saved(tmp_path, 1, 2)
    _cut(tmp_path / "1")
    _flip(tmp_path / "2")

    with (
        _opened(tmp_path) as saver,
        pytest.raises(
            CheckpointError, match=r"no state that can be read \(step 2: .*; step 1: .*another"
        ),
    ):
        saver.restore(_state(0))
    assert _names(tmp_path) == ["1", "2"]


def test_a_state_of_something_else_is_no_damaged_one(tmp_path):
    _saved(tmp_path, 1)
    with _opened(tmp_path) as saver:
        for call in (saver.require_like, saver.restore):
            with pytest.raises(
                CheckpointError, match=r"params\.w\.value \(float32\[7, 3000\], expected "
            ):
                call(_state(0, width=40))
    assert _names(tmp_path) == ["1"]


def test_a_full_disk_is_said_and_the_last_state_stays(tmp_path):
    """Files that may not grow stand for a disk that is full: writes fail in the middle."""
    _saved(tmp_path, 1)
    before, second = resource.getrlimit(resource.RLIMIT_FSIZE), _state(2)
    with _opened(tmp_path) as saver:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
            with pytest.raises(
                CheckpointError, match=r"writing a state failed: .*room on the disk"
            ):
                saver.save(2, second)
                saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert _names(tmp_path) == ["1"]  # the half has gone
    with _opened(tmp_path) as saver:
        found, step = saver.restore(_state(0))
        assert step == 1 and _same(found, _state(1))
    assert _names(tmp_path) == ["1"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"opening it failed: .*Not a directory"):
        Saver(tmp_path / "file" / "state")


def _live() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def _settled() -> int:
    """`_live`, once threads that have written a state have let go of it."""
    seen, last = _live(), None
    while seen != last:
        gc.collect()
        time.sleep(0.2)
        seen, last = _live(), seen
    return seen


class _Watch(threading.Thread):
    """The most bytes of arrays that were alive at a time."""

    def __init__(self):
        super().__init__()
        self.most, self._ends = 0, threading.Event()

    def run(self):
        while not self._ends.is_set():
            self.most = max(self.most, _live())

    def __exit__(self, *_):
        self._ends.set()
        self.join()

    def __enter__(self):
        self.start()
        return self


def test_restoring_holds_one_state(tmp_path):
    """Three arrays a parameter at the end, and never more: the optimizer's state is not made first."""
    trainer = Trainer(random_model(SMALL), adamw(1e-3))
    saver = Saver(tmp_path / "state")
    saver.save(3, trainer.state)
    saver.wait()
    saver.close()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.state.params))
    del trainer
    before = _settled()

    trainer = Trainer(random_model(SMALL), adamw(1e-3))
    assert weights <= _live() - before < 1.1 * weights
    with _Watch() as watch:
        saver = trainer.resume(tmp_path)
    saver.close()

    assert trainer.steps == 3
    assert 2.9 * weights < watch.most - before < 3.1 * weights


def test_shapes_are_those_of_the_state_that_would_be_made():
    with jax.set_mesh(make_mesh(fsdp=2, expert=2)):
        step = Trainer(random_model(SMALL), adamw(1e-3))._step
        shapes = step.shapes()
        state = step.init()
        for shape, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
            assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
            if array.ndim:  # scalars lie on one device until the first step
                assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)
