"""Axis rules, meshes, and training states that move from one mesh to another."""

import jax
import numpy as np
import pytest
from jax import P

from sharding import AXES, AxisRules, ambient, make_mesh
from tests.models import random_model
from v4jax import tiny
from v4jax.train.optimizers import adamw
from v4jax.train.state import Saver
from v4jax.train.step import TrainStep


def test_rules_give_specs():
    rules = AxisRules(heads=("expert", "tensor"), vocab=None)

    assert rules.spec("expert", "expert_embed", None) == P("expert", ("fsdp", "context"), None)
    assert rules.spec("heads", "vocab") == P(("expert", "tensor"), None)


def test_bad_specs_are_refused():
    with pytest.raises(ValueError, match=r"unknown logical axis 'width': expected one of"):
        AxisRules().spec("width")
    with pytest.raises(ValueError, match=r"a mesh axis may appear only once"):
        AxisRules().spec("vocab", "heads")


def test_there_is_a_spec_only_under_a_mesh():
    assert ambient(P("fsdp")) is None
    with jax.set_mesh(make_mesh(fsdp=2)):
        assert ambient(P("fsdp")) == P("fsdp")


def test_a_mesh_needs_its_devices():
    mesh = make_mesh(fsdp=2, tensor=4)
    assert dict(mesh.shape) == dict(zip(AXES, (2, 1, 4, 1)))
    with pytest.raises(
        ValueError, match=r"fsdp=3, expert=3, tensor=1, context=1 needs 9 devices.* are 8"
    ):
        make_mesh(fsdp=3, expert=3)


def _trainer(seed: int) -> TrainStep:
    return TrainStep(random_model(tiny(), seed=seed), adamw(1e-4))


@pytest.mark.parametrize("shape", [dict(fsdp=2, expert=2, tensor=2), dict(tensor=2), None], ids=str)
def test_training_states_are_restored_under_another_mesh(shape, tmp_path):
    with jax.set_mesh(make_mesh(fsdp=4, expert=2)):
        saved = _trainer(seed=0).init()
        saver = Saver(tmp_path / "state")
        saver.save(7, saved)
        saver.wait()

    if shape is None:
        target = _trainer(seed=1).init()
        restored, step = saver.restore(target)
    else:
        with jax.set_mesh(make_mesh(**shape)):
            target = _trainer(seed=1).init()
            restored, step = saver.restore(target)
    saver.close()

    assert step == 7
    spread = 0
    states = [(s.params, s.opt_state) for s in (saved, target, restored)]
    for old, like, new in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(old, new)
        assert new.sharding.is_equivalent_to(like.sharding, new.ndim)
        spread += not new.sharding.is_fully_replicated
    assert (spread > 50) == (shape is not None)
