"""Models are written back as they were read, from one device or from a mesh."""

import collections
import json
import pathlib
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.quantize import QuantizedArray
from sharding import make_mesh
from tests.reference.checkpoints import (
    HF,
    OFFICIAL,
    SCANNED,
    assert_same_parameters,
    assert_same_tensors,
    cut_config,
    cut_tensors,
    expected_parameters,
    fp4_codes,
    hf_tensors,
    official_tensors,
    parameters,
    read_config,
    released_table,
    values_of,
    write_file,
    write_folder,
)
from tests.reference.official import Official, power_of_two_above, read_tensors
from v4jax.checkpoint import Checkpoint, CheckpointError, load, save, saving
from v4jax.checkpoint.hf_config import from_hf
from v4jax.nn.model import Transformer
from v4jax.nn.quantization import to_float, to_released
from v4jax.text.release import release_of

WIDTH = ("fsdp", "expert", "context")  # where the model width of parameters is cut
EXPERT_WIDTH = ("fsdp", "context")  # that of experts


@pytest.fixture(scope="module")
def official_model() -> Transformer:
    return load(OFFICIAL)


# Under a mesh -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_weights_loaded_under_a_mesh_are_the_same_and_spread_over_it(scan_layers):
    with jax.set_mesh(make_mesh(fsdp=2, expert=2, tensor=2)):
        model = load(OFFICIAL, use="train", scan_layers=scan_layers)
    blocks = SCANNED if scan_layers else None
    assert_same_parameters(parameters(model), expected_parameters(official_tensors(), blocks))

    block = model.stages[1 if scan_layers else 2].blocks[0]
    layer_axis = (None,) if scan_layers else ()

    def placed(array: jax.Array) -> tuple:
        axes = tuple(array.sharding.spec) + (None,) * (array.ndim - len(array.sharding.spec))
        assert axes[: len(layer_axis)] == layer_axis
        shard = array.addressable_shards[0].data.shape
        return axes[len(layer_axis) :], shard[len(layer_axis) :]

    w1 = block.moe.w1.kernel.get_value()
    assert placed(w1.values) == (("expert", EXPERT_WIDTH, "tensor"), (4, 64, 64))
    assert placed(w1.scale) == (("expert", EXPERT_WIDTH, "tensor"), (4, 4, 64))
    w2 = block.moe.w2.kernel.get_value()
    assert placed(w2.values) == (("expert", "tensor", EXPERT_WIDTH), (4, 32, 128))
    # Block scales: 2 blocks of inputs or outputs are not split in four, 3 blocks and 1 not in two.
    wq_a, wq_b = (getattr(block.attention, name).kernel.get_value() for name in ("wq_a", "wq_b"))
    assert placed(wq_a.scale) == ((None, None), (2, 1))
    assert placed(wq_b.values) == ((WIDTH, "tensor"), (32, 192))
    assert placed(wq_b.scale) == ((None, None), (1, 3))
    wo_b = block.attention.wo_b.kernel.get_value()
    assert placed(wo_b.values) == (("tensor", WIDTH), (64, 64))
    assert placed(wo_b.scale) == ((None, None), (1, 2))
    assert model.embed.table.get_value().addressable_shards[0].data.shape == (128, 64)


def test_a_model_spread_over_a_mesh_is_written_byte_for_byte(tmp_path):
    with jax.set_mesh(make_mesh(fsdp=2, expert=2, tensor=2)):
        model = load(OFFICIAL, use="train")
    save(model, tmp_path / "new", like=Checkpoint(OFFICIAL))
    written = read_tensors(tmp_path / "new" / "model.safetensors")
    assert_same_tensors(written, official_tensors())


# Saving -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_a_loaded_model_is_written_back_byte_for_byte(tmp_path, scan_layers):
    model = load(OFFICIAL, scan_layers=scan_layers)
    save(model, tmp_path / "new")
    expected = {
        name: data.astype(np.int64) if name.endswith("tid2eid") else data  # as in the releases
        for name, data in official_tensors().items()
    }
    written = read_tensors(tmp_path / "new" / "model.safetensors")
    assert_same_tensors(
        {name: written[name] for name in sorted(written)}, dict(sorted(expected.items()))
    )
    assert from_hf(tmp_path / "new") == from_hf(OFFICIAL)


def test_a_model_is_written_like_its_checkpoint(tmp_path, official_model):
    save(official_model, tmp_path / "new", like=Checkpoint(OFFICIAL))
    written = tmp_path / "new" / "model.safetensors"
    assert_same_tensors(read_tensors(written), official_tensors())


def test_the_whole_file_comes_back_if_it_has_metadata(tmp_path, official_model):
    original = write_folder(tmp_path / "x", {}, read_config(OFFICIAL)) / "model.safetensors"
    write_file(original, official_tensors(), {"format": "pt", "release": "April"})
    save(official_model, tmp_path / "new", like=Checkpoint(tmp_path / "x"))
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == original.read_bytes()


def test_a_model_of_transformers_is_written_under_released_names(tmp_path):
    save(load(HF), tmp_path / "new")
    written = read_tensors(tmp_path / "new" / "model.safetensors")
    expected = {
        name: data.astype(np.int64) if name.endswith("tid2eid") else data
        for name, data in hf_tensors().items()
    }
    assert_same_tensors(dict(sorted(written.items())), dict(sorted(expected.items())))


def test_a_large_model_is_written_in_one_file_per_layer(tmp_path, official_model):
    save(official_model, tmp_path / "new", like=Checkpoint(OFFICIAL), single_file_limit=1_000_000)
    files = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00009.safetensors" for i in range(1, 10)]
    contents = {name: read_tensors(tmp_path / "new" / name) for name in files}
    starts = [
        "embed.",
        *(f"layers.{i}." for i in range(6)),
        ("head.", "norm.", "hc_head_"),
        "mtp.0.",
    ]
    for name, start in zip(files, starts, strict=True):
        assert contents[name].keys() == {n for n in official_tensors() if n.startswith(start)}

    raw = (tmp_path / "new" / "model.safetensors.index.json").read_text(encoding="utf-8")
    index = json.loads(raw)
    place = {tensor: name for name, tensors in contents.items() for tensor in tensors}
    assert index["weight_map"] == place
    total = sum(data.nbytes for data in official_tensors().values())
    assert index["metadata"]["total_size"] == total
    assert from_hf(tmp_path / "new") == from_hf(OFFICIAL)
    assert_same_parameters(parameters(load(tmp_path / "new")), parameters(official_model))


def test_the_limit_of_one_file_is_in_bytes_of_data(tmp_path):
    model = load(write_folder(tmp_path / "x", cut_tensors(), cut_config()))
    like = Checkpoint(tmp_path / "x")
    total = sum(data.nbytes for data in cut_tensors().values())
    save(model, tmp_path / "one", like=like, single_file_limit=total)
    save(model, tmp_path / "many", like=like, single_file_limit=total - 1)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 6


def test_the_other_files_of_a_checkpoint_are_copied(tmp_path):
    folder = write_folder(tmp_path / "x", cut_tensors(), cut_config())
    (folder / "tokenizer.json").write_text('{"model": "ä"}', encoding="utf-8")
    (folder / "LICENSE").write_text("MIT", encoding="utf-8")
    (folder / "model.safetensors.index.json.old").mkdir()
    (folder / "encoding").mkdir()
    for name in ("encoding_dsv4.py", "test_cases.json"):
        (folder / "encoding" / name).write_text("REASONING_EFFORT_PROMPTS = {}", encoding="utf-8")
    save(load(folder), tmp_path / "new", like=Checkpoint(folder))
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == ["LICENSE", "config.json", "encoding", "model.safetensors", "tokenizer.json"]
    assert release_of(tmp_path / "new") == "0731"  # the module that tells came along
    assert (tmp_path / "new" / "tokenizer.json").read_text(encoding="utf-8") == '{"model": "ä"}'


@pytest.mark.parametrize(
    "present", ["model.safetensors", "old.safetensors", "model.safetensors.index.json"]
)
def test_a_folder_with_a_checkpoint_is_not_written_to(tmp_path, official_model, present):
    (tmp_path / present).write_bytes(b"precious")
    with pytest.raises(ValueError, match=re.escape(present)):
        save(official_model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [present]
    assert (tmp_path / present).read_bytes() == b"precious"


@pytest.mark.parametrize("limit, num_written", [(10**9, 0), (1, 2)], ids=["one file", "shards"])
def test_config_comes_last_so_that_a_failed_save_is_no_checkpoint(
    tmp_path, monkeypatch, official_model, limit, num_written
):
    write, written = saving.write_safetensors, []

    def failing(path, *args):
        if len(written) == num_written:
            raise OSError("the disk is full")
        write(path, *args)
        written.append(pathlib.Path(path).name)

    monkeypatch.setattr(saving, "write_safetensors", failing)
    with pytest.raises(OSError, match="the disk is full"):
        save(official_model, tmp_path, single_file_limit=limit)
    assert len(written) == num_written
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(written)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(tmp_path)


# Released formats and back ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def float_model(official_model) -> Transformer:
    return to_float(official_model)


@pytest.fixture(scope="module")
def released_model(float_model) -> Transformer:
    return to_released(float_model)


def test_a_float_model_has_the_values_of_the_file(float_model):
    official = Official(OFFICIAL)
    tensors = {
        name: data if name.endswith("tid2eid") else official.tensor(name).astype(np.float32)
        for name, data in official_tensors().items()
        if not name.endswith(".scale")
    }
    for name in tensors:
        if name.endswith(".weight"):
            tensors[name] = official.weight(name.removesuffix(".weight")).astype(np.float32)
    assert_same_parameters(parameters(float_model), expected_parameters(tensors))


def test_bfloat16_holds_quantised_weights_exactly(official_model):
    one = official_model.stages[2].blocks[0].moe.w1.kernel.get_value()
    exact = np.asarray(one.dequantize(), np.float64)
    assert np.array_equal(np.asarray(one.dequantize(jnp.bfloat16), np.float64), exact)


def test_a_model_made_released_has_the_released_formats_and_shapes(tmp_path, released_model):
    save(released_model, tmp_path / "new")
    raw = (tmp_path / "new" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]
    written = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    assert written == released_table(read_config(OFFICIAL))


def quantised(model: Transformer) -> dict[str, QuantizedArray]:
    return {p: value for p, value in values_of(model).items() if isinstance(value, QuantizedArray)}


def scales_of_the_rule(weight: np.ndarray, is_fp4: bool) -> np.ndarray:
    """Smallest power of two that keeps every value of a block in range."""
    rows, cols = (32, 1) if is_fp4 else (128, 128)
    largest, floor = (6.0, 6 * 2.0**-126) if is_fp4 else (448.0, 1e-4)
    *batch, num_rows, num_cols = weight.shape
    padding = [(0, 0)] * len(batch) + [(0, -num_rows % rows), (0, -num_cols % cols)]
    padded = np.pad(np.abs(weight), padding)
    amax = padded.reshape(*batch, -1, rows, padded.shape[-1] // cols, cols).max(axis=(-3, -1))
    return power_of_two_above(np.maximum(amax, np.float32(floor)) * np.float32(1 / largest))


def test_requantised_weights_have_the_scale_of_the_rule_and_lose_nothing(
    official_model, float_model, released_model
):
    """Where the file's scale is that of the rule, the bytes are the file's.

    Elsewhere rounding has brought the largest value of a block down to a power of two, and the rule
    gives half the scale for the same numbers.
    """
    floats, original = parameters(float_model), quantised(official_model)
    again = quantised(released_model)
    assert sorted(original) == sorted(again)
    num_same, num_blocks = collections.Counter(), collections.Counter()
    for path, value in again.items():
        scale = np.asarray(value.scale).astype(np.float32)
        assert np.array_equal(scale, scales_of_the_rule(floats[path][0], value.is_fp4)), path
        assert np.array_equal(value.dequantize(), floats[path][0]), path

        same = scale == np.asarray(original[path].scale).astype(np.float32)
        num_same[value.is_fp4] += same.sum()
        num_blocks[value.is_fp4] += same.size
        old, new = (np.asarray(q.values).view(np.uint8) for q in (original[path], value))
        if value.is_fp4:
            old, new = fp4_codes(old), fp4_codes(new)
            old = np.where(old == 8, 0, old)  # minus zero
        rows, cols = value.block
        same = np.repeat(np.repeat(same, rows, axis=-2), cols, axis=-1)
        same = same[..., : old.shape[-2], : old.shape[-1]]
        assert np.array_equal(old[same], new[same]), path
    assert num_same[True] > num_blocks[True] / 2
    assert num_same[False] > num_blocks[False] * 0.9


def test_making_a_released_model_released_changes_nothing(released_model, official_model):
    assert_same_parameters(parameters(to_released(released_model)), parameters(released_model))
    before, after = parameters(official_model), parameters(to_released(official_model))
    for path in quantised(official_model):
        for a, b in zip(before[path], after[path], strict=True):
            assert a.tobytes() == b.tobytes(), path


def test_conversions_leave_the_given_model_alone(official_model, float_model, released_model):
    expected = expected_parameters(official_tensors())
    assert_same_parameters(parameters(official_model), expected)
    assert not quantised(float_model)
