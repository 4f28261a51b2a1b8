"""Which mesh a command takes, and that a model fits before it is read."""

import pytest

from tests.conftest import NANO
from v4jax import flash, nano, pro
from v4jax.checkpoint import Checkpoint
from v4jax.cli.models import choose_mesh, require_memory
from v4jax.cli.pod import parse_mesh


@pytest.mark.parametrize(
    "cfg, count, platform, sizes",
    [
        (flash(), 1, "tpu", {}),
        (nano(), 8, "cpu", {}),
        (flash(), 4, "gpu", {"expert": 4}),
        (flash(), 8, "tpu", {"expert": 8}),
        (pro(), 64, "tpu", {"expert": 64}),
        (nano(), 16, "tpu", {"fsdp": 2, "expert": 8}),  # eight experts
        (pro(), 5, "gpu", {}),  # five divides nothing
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_experts_are_spread_over_the_devices(cfg, count, platform, sizes):
    found, why = choose_mesh(cfg, count, platform)

    assert found == sizes
    assert ("experts spread over" in why) == bool(sizes)


def test_a_mesh_of_one_device_can_be_asked_for():
    assert parse_mesh("none") == {} and parse_mesh("expert=2") == {"expert": 2}


def test_a_model_that_does_not_fit_is_not_read():
    opened = Checkpoint(NANO)
    whole = require_memory(opened, {}, None)
    assert 7.5e6 < whole < 8e6
    held = require_memory(opened, {"expert": 8}, None)

    assert require_memory(opened, {"expert": 8}, held + 1) == held
    with pytest.raises(ValueError, match=r"--mesh expert=\d+ would fit. Nothing was loaded"):
        require_memory(opened, {}, held + 1)
    with pytest.raises(ValueError, match="more memory a device is needed"):
        require_memory(opened, {}, 1000)
