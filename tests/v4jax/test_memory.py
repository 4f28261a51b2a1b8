"""What models take: by part, on each device, and while they are loaded."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from pallas_kernels.formats.quantize import QuantizedArray, quantize_weight
from sharding import make_mesh
from tests.conftest import NANO
from tests.reference.checkpoints import OFFICIAL, parameters
from v4jax import V4Config, flash, pro, tiny
from v4jax.checkpoint import load
from v4jax.nn.quantization import to_float, to_released
from v4jax.planning.describe import Part, abstract_model, describe, memory_by_part

WIDTH = ("fsdp", "context")  # where the model width of parameters is cut

# Reports ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg, in_files, experts",
    [
        (flash(), 159_609_485_896, 277_025_390_592),
        (pro(), 864_704_792_696, 1_547_396_186_112),
    ],
    ids=["flash", "pro"],
)
def test_the_report_of_a_released_model_agrees_with_its_files(cfg, in_files, experts):
    model = abstract_model(cfg)
    parts = memory_by_part(model)

    assert parts["routed experts"].parameters == experts
    assert parts["routed experts"].bits == 4.25
    assert parts["shared experts"].bits == 8 + 8 / 128**2
    assert parts["embedding"].bits == 16
    assert parts["hash tables"].bits is None
    *_, total, last = describe(model).splitlines()
    assert last.split() == ["total", "in", "files", f"{in_files:,}"]
    assert total.split()[1] == f"{sum(part.parameters for part in parts.values()):,}"


def test_experts_in_fp8_take_eight_bits():
    model = abstract_model(dataclasses.replace(flash(), expert_format="fp8"))
    assert memory_by_part(model)["routed experts"].bits == 8 + 8 / 128**2


def test_shapes_alone_are_not_waited_for(monkeypatch):
    """Asking a traced array whether it is there made `plan` and exports of Flash ten times slower."""

    def waited(x):
        raise AssertionError(f"waited for {x}")

    monkeypatch.setattr(jax, "block_until_ready", waited)

    assert describe(abstract_model(tiny()))


def test_the_report_of_a_loaded_model_counts_what_is_held():
    model = load(NANO)
    held = sum(array.nbytes for array in jax.tree.leaves(nnx.state(model)))

    total = sum(memory_by_part(model).values(), Part())

    assert total.nbytes == total.device_nbytes == held
    assert "device" not in describe(model)


@pytest.mark.parametrize("make", [abstract_model, lambda cfg: load(NANO, use="train")])
def test_under_a_mesh_the_report_has_bytes_per_device(make):
    cfg: V4Config = load(NANO).cfg
    with jax.set_mesh(make_mesh(fsdp=2, expert=2, tensor=2)):
        model = make(cfg)
        parts = memory_by_part(model)

    assert parts["routed experts"].device_nbytes * 8 == parts["routed experts"].nbytes
    assert parts["embedding"].device_nbytes * 8 == parts["embedding"].nbytes
    assert parts["hash tables"].device_nbytes == parts["hash tables"].nbytes
    assert describe(model).splitlines()[0].endswith("bytes per device")


def test_bytes_per_device_are_those_of_the_arrays_there():
    with jax.set_mesh(make_mesh(fsdp=2, expert=2, tensor=2)):
        model = load(OFFICIAL)
    first = jax.devices()[0]
    held = sum(
        shard.data.nbytes
        for array in jax.tree.leaves(nnx.state(model))
        for shard in array.addressable_shards
        if shard.device == first
    )
    assert sum(memory_by_part(model).values(), Part()).device_nbytes == held


# Loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert_format", [None, "fp8"])
def test_loading_nano_takes_less_than_its_weights_in_bfloat16(expert_format):
    """At the peak: arrays of the model, and what NumPy holds besides while reading."""
    bfloat16 = sum(
        value.size * value.dtype.itemsize
        for value in jax.tree.leaves(nnx.state(to_float(load(NANO), jnp.bfloat16)))
    )
    load(NANO, expert_format=expert_format)  # what is allocated once
    tracemalloc.start()
    model = load(NANO, expert_format=expert_format)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    total = sum(memory_by_part(model).values(), Part())
    assert total.nbytes + (peak - now) < bfloat16
    assert any(
        isinstance(v.get_value(), QuantizedArray) for _, v in nnx.to_flat_state(nnx.state(model))
    )


# Quantised arrays wherever a weight is ------------------------------------------------------------


def test_a_quantised_array_prints_its_format_shape_and_bits():
    fp4 = quantize_weight(jnp.ones((3, 64, 10)), "fp4")
    assert repr(fp4) == "QuantizedArray(fp4[3,64,10], 4.25 bits per weight)"
    fp8 = quantize_weight(jnp.ones((128, 256)), "fp8")
    assert repr(fp8) == "QuantizedArray(fp8[128,256], 8 bits per weight)"
    assert "fp4[3,64,10]" in repr(jax.eval_shape(lambda w: w, fp4))
    assert "None" in repr(jax.tree.map(lambda a: None, fp8))


def test_a_model_made_released_under_a_mesh_is_the_same_and_stays_spread():
    expected = parameters(to_released(to_float(load(OFFICIAL))))
    with jax.set_mesh(make_mesh(fsdp=2, expert=2, tensor=2)):
        model = to_released(to_float(load(OFFICIAL, use="train", scan_layers=False)))
    for path, parts in parameters(model).items():
        for a, b in zip(parts, expected[path], strict=True):
            assert a.tobytes() == b.tobytes(), path
    w1 = model.stages[3].blocks[0].moe.w1.kernel.get_value()
    assert w1.values.sharding.spec == jax.P("expert", WIDTH, "tensor")
    assert w1.scale.sharding.spec == jax.P("expert", WIDTH, "tensor")


def test_quantised_arrays_pass_through_orbax_to_another_mesh(tmp_path):
    with jax.set_mesh(make_mesh(fsdp=2, expert=2)):
        state = nnx.to_pure_dict(nnx.state(load(OFFICIAL)))
    with jax.set_mesh(make_mesh(tensor=2)):
        like = nnx.to_pure_dict(nnx.state(load(OFFICIAL)))
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", target)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert a.sharding == b.sharding
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    dtypes = {array.dtype for array in jax.tree.leaves(restored)}
    assert {np.dtype(np.uint8), np.dtype(ml_dtypes.float8_e8m0fnu)} <= dtypes


def test_a_loaded_model_prints_as_one_line(capsys):
    model = load(NANO)

    line = "Transformer(nano: 5 layers, 0.00781 GB, plain float32; v4jax.describe(model) has its parts)"
    assert repr(model) == str(model) == line
    nnx.display(model)
    assert line in capsys.readouterr().out
    assert "fp4[8,256,128]" in repr(model.stages[1].blocks[0].moe)  # its parts print too
