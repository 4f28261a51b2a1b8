"""Which mesh serves a checkpoint on the devices that are there."""

import dataclasses
import math
import re

import jax
import pytest
from flax import nnx

from v4jax.config import flash, nano, tiny
from v4jax.nn.model import Transformer
from v4jax.nn.quantization import everything
from v4jax.planning.devices import GiB, require_room_to_train, serving_mesh, training_mesh
from v4jax.planning.plan import HBM_SHARE

SMALL = dataclasses.replace(tiny(), layers=tiny().layers[:1], mtp_layers=())
FLASH_BYTES = 160e9  # of the released files


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    platform: str
    device_kind: str
    gib: float | None

    def memory_stats(self):
        return None if self.gib is None else {"bytes_limit": int(self.gib * GiB)}


H100 = FakeDevice("gpu", "NVIDIA H100 80GB HBM3", 72)
V6E = FakeDevice("tpu", "TPU v6 lite", 31.25)
CPU = FakeDevice("cpu", "cpu", None)


@pytest.mark.parametrize(
    ("device", "count", "sizes"), [(CPU, 1, None), (CPU, 8, {}), (H100, 1, None), (V6E, 4, {})]
)
def test_a_model_that_fits_on_one_device_takes_one(device, count, sizes):
    choice = serving_mesh(nano(), [device] * count, weight_bytes=7e6, context=512)

    assert choice.sizes == sizes
    assert re.match(rf"{count} x {device.device_kind}: weights 0.0 \+ cache", choice.reasons[0])


@pytest.mark.parametrize("batch", [1, 8])
def test_flash_is_spread_over_all_devices(batch):
    choice = serving_mesh(flash(), [H100] * 4, weight_bytes=FLASH_BYTES, batch=batch, context=8192)

    sizes = choice.sizes
    # Experts lie on all devices; a single sequence has none to spread, so that context takes them.
    assert sizes["context" if batch == 1 else "expert"] == 4
    assert sizes["fsdp"] * sizes["expert"] * sizes["tensor"] * sizes["context"] == 4
    assert any("64 of 256 experts on a device" in line for line in choice.reasons)
    assert choice.reasons[-1].endswith("it repeats least work")


@pytest.mark.parametrize(("batch", "tensor"), [(1, 8), (8, 8), (64, 4)])
def test_on_a_tpu_the_fastest_mesh_is_taken(batch, tensor):
    """Few sequences read weights, which `tensor` divides; of many each device takes some."""
    choice = serving_mesh(flash(), [V6E] * 8, weight_bytes=FLASH_BYTES, batch=batch, context=8192)

    assert choice.sizes["tensor"] == tensor
    assert math.prod(choice.sizes.values()) == 8
    assert "it is fastest by the roofline: " in choice.reasons[-1]


def test_devices_that_do_not_divide_the_model_are_left_out():
    choice = serving_mesh(flash(), [H100] * 7, weight_bytes=FLASH_BYTES, batch=4, context=8192)

    assert choice.sizes["expert"] == 4


def test_what_does_not_fit_is_refused_with_what_would_do():
    with pytest.raises(ValueError, match=r"do not fit into 4 x TPU v6 lite of 31\.2 GiB") as error:
        serving_mesh(flash(), [V6E] * 4, weight_bytes=FLASH_BYTES, batch=8, context=131_072)

    assert "8 x TPU v6 lite" in str(error.value)


def test_a_shorter_context_is_advised_where_it_is_the_cache_that_does_not_fit():
    options = dict(weight_bytes=FLASH_BYTES, batch=64)
    with pytest.raises(ValueError, match=r"or a context of [\d,]+ tokens") as error:
        serving_mesh(flash(), [V6E] * 8, context=1_048_576, **options)

    advised = int(re.search(r"context of ([\d,]+)", str(error.value))[1].replace(",", ""))
    sizes = serving_mesh(flash(), [V6E] * 8, context=advised, **options).sizes
    assert sizes == dict(fsdp=1, expert=4, tensor=2, context=1)


def test_a_host_without_the_memory_is_told(monkeypatch):
    monkeypatch.setattr("v4jax.planning.devices.device_memory", lambda device: 64 * GiB)
    with pytest.raises(ValueError, match="What would do: a machine with more memory"):
        serving_mesh(flash(), [CPU], weight_bytes=FLASH_BYTES, context=512)


def test_the_limit_counts_weights_and_cache():
    weights = 7e6
    held = int(weights / HBM_SHARE)
    tight = dataclasses.replace(H100, gib=held / GiB)  # room for the weights, none for a cache
    with pytest.raises(ValueError, match="do not fit"):
        serving_mesh(nano(), [tight], weight_bytes=weights, context=512)


def test_devices_of_unknown_memory_are_used_unchecked():
    unknown = dataclasses.replace(H100, gib=None)

    assert serving_mesh(flash(), [unknown], weight_bytes=FLASH_BYTES, context=512).sizes is None


@pytest.mark.parametrize(
    ("cfg", "count", "sizes"),
    [
        (flash(), 1, {}),
        (flash(), 64, {"expert": 64}),
        (nano(), 16, {"fsdp": 2, "expert": 8}),  # eight experts
        (nano(), 5, {}),  # divides nothing
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_training_spreads_experts_first(cfg, count, sizes):
    devices = [V6E] * count

    found, why = training_mesh(cfg, devices)

    assert found == sizes and why
    assert training_mesh(cfg, jax.devices("cpu"))[0] == {}


def test_a_narrower_state_of_the_optimizer_leaves_more_room():
    """12 bytes a parameter: enough for one with a state of 2 bytes, not for one with 8."""
    model = nnx.eval_shape(lambda: Transformer(SMALL, rngs=nnx.Rngs(0)))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    device = FakeDevice("tpu", "TPU", 12 * numbers / HBM_SHARE / GiB)

    require_room_to_train(model, everything, {}, device, state_bytes=2)
    with pytest.raises(ValueError, match="a narrower --optimizer-dtype"):
        require_room_to_train(model, everything, {}, device)
