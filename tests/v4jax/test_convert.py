"""Conversions between formats and names, bit for bit, and what happens when one is interrupted."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.formats.quantize import (
    QuantizedArray,
    expand_to_fp8,
    pack_planes,
    quantize_weight,
)
from sharding import make_mesh
from tests.conftest import NANO, ROOT
from tests.reference.checkpoints import (
    HF,
    OFFICIAL,
    Tensors,
    assert_same_parameters,
    assert_same_tensors,
    cut_config,
    cut_tensors,
    hf_tensors,
    official_tensors,
    parameters,
    read_config,
    write_folder,
)
from tests.reference.official import Official, read_tensors
from tests.v4jax.test_load import in_transformers_memory, to_fp8_experts
from v4jax.checkpoint import Checkpoint, CheckpointError, codecs, convert, load, names, save
from v4jax.checkpoint.codecs import Matrix
from v4jax.checkpoint.convert import Conversion
from v4jax.checkpoint.hf_config import from_hf
from v4jax.inference.score import Scorer
from v4jax.nn.quantization import to_float, to_released

WIDTH = ("fsdp", "context")  # where the model width of parameters is cut

E8M0, E4M3, BF16 = ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def run(source: pathlib.Path, target: pathlib.Path, **options) -> dict:
    return Conversion(source, target, **options).run()


def read(folder: pathlib.Path) -> Tensors:
    files = sorted(folder.glob("*.safetensors"))
    return {name: data for file in files for name, data in read_tensors(file).items()}


def by_name(tensors: Tensors) -> Tensors:
    return dict(sorted(tensors.items()))


def released() -> Tensors:
    """The tensors of `official_small`, which has some in BF16 that the releases have in F32."""
    return {
        name: data.astype(np.float32) if re.search(r"hc_\w+_scale", name) else data
        for name, data in official_tensors().items()
    }


def cut(path: pathlib.Path, changes: Tensors | None = None) -> pathlib.Path:
    return write_folder(path, cut_tensors() | (changes or {}), cut_config())


# Codecs -------------------------------------------------------------------------------------------


def awkward(shape: tuple[int, int]) -> np.ndarray:
    """Rows of very different size, zeros, ties, and maxima just above a block's largest value."""
    rng = np.random.default_rng(shape[1])
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-20, 20, (shape[0], 1)))
    x = x.astype(np.float32)
    x[0] = 0
    x[1] = rng.choice([0.25, 0.75, -1.25, 1.75, 2.5, -3.5, 5, 6, -0.0], shape[1])
    x[2] = np.nextafter(np.float32(6), np.float32(7))
    x[3] = np.nextafter(np.float32(448), np.float32(500))
    return x


@pytest.mark.parametrize("fmt", ["fp4", "fp8"])
@pytest.mark.parametrize("shape", [(256, 512), (64, 96), (130, 64)])
def test_rounding_for_files_is_rounding_in_memory_bit_for_bit(fmt, shape):
    x = awkward(shape)
    stored, _ = codecs.quantize(x, fmt)
    in_memory = quantize_weight(jnp.asarray(x.T), fmt)
    values = pack_planes(stored.data.T) if fmt == "fp4" else stored.data.T
    assert np.asarray(in_memory.values).tobytes() == values.tobytes()
    assert np.asarray(in_memory.scale).T.tobytes() == stored.scale.tobytes()
    np.testing.assert_array_equal(stored.decode(), np.asarray(in_memory.dequantize()).T)


def test_every_byte_of_fp4_decodes_to_two_values_low_nibble_first():
    data = np.arange(256, dtype=np.uint8).reshape(16, 16)
    scale = np.full((16, 1), 0.25, E8M0)
    expected = E2M1[np.stack([data & 15, data >> 4], axis=-1)].reshape(16, 32) * 0.25
    decoded = Matrix(data, scale).decode()
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(expected))
    again, saturated = codecs.quantize(decoded, "fp4")
    same = again.decode() == expected
    assert same.all() and saturated == 0
    # Rows with a 4 or 6 keep their scale, and with it every code but minus zero.
    keeps = np.abs(expected).max(axis=1) >= 1
    codes = np.stack([data & 15, data >> 4], axis=-1)
    codes = np.where(codes == 8, 0, codes)
    np.testing.assert_array_equal(
        np.stack([again.data & 15, again.data >> 4], axis=-1)[keeps], codes[keeps]
    )


def test_every_finite_e4m3_code_survives_decoding_and_rounding():
    codes = np.arange(256, dtype=np.uint8)
    codes[[0x7F, 0xFF]] = 0  # NaN
    matrix = Matrix(codes.reshape(16, 16).view(E4M3), np.full((1, 1), 0.5, E8M0))
    again, saturated = codecs.quantize(matrix.decode(), "fp8")
    assert again.data.tobytes() == codes.tobytes() and saturated == 0
    assert again.scale.tobytes() == matrix.scale.tobytes()


def test_values_just_above_the_largest_of_their_block_are_counted_as_saturated():
    x = np.zeros((128, 128), np.float32)
    x[0, :3] = np.nextafter(np.float32(448), np.float32(500)), -448, 447
    matrix, saturated = codecs.quantize(x, "fp8")
    scale = float(matrix.scale.astype(np.float32)[0, 0])
    assert saturated == np.count_nonzero(np.abs(x) > 448 * scale)
    x[0, 0] = 1.0  # no rounding of amax / 448 to bring it under a power of two
    assert codecs.quantize(x, "fp8")[1] == 0


def fp4_tile(spread: int, lowest: int = 100) -> Matrix:
    """A tile [128, 128] with all 16 codes under scales 2**lowest .. 2**(lowest + spread)."""
    rng = np.random.default_rng(spread)
    data = rng.integers(0, 256, (128, 64)).astype(np.uint8)
    exponents = rng.integers(lowest, lowest + spread + 1, (128, 4))
    exponents[0, 0], exponents[127, 3] = lowest, lowest + spread
    data[0, :8] = 0x10 * np.arange(1, 16, 2) + np.arange(0, 16, 2)
    return Matrix(data, exponents.astype(np.uint8).view(E8M0))


def in_memory(matrix: Matrix) -> QuantizedArray:
    planes = pack_planes(matrix.data.T)
    return QuantizedArray(jnp.asarray(planes), jnp.asarray(matrix.scale.T), (32, 1))


@pytest.mark.parametrize("lowest", [0, 3, 100, 230])
def test_fp4_is_fp8_exactly_up_to_a_spread_of_14(lowest):
    for spread in range(min(15, 255 - lowest)):
        tile = fp4_tile(spread, lowest)
        expanded, lossy_tiles = codecs.expand_fp4(tile)
        assert lossy_tiles == 0
        np.testing.assert_array_equal(expanded.decode(), tile.decode())
        (scale,) = expanded.scale.view(np.uint8).ravel()
        assert scale == max(lowest + spread - 6, 0)

        if lowest:  # 2**-127 is subnormal, which XLA takes for zero
            loaded = expand_to_fp8(in_memory(tile))
            assert np.asarray(loaded.values).T.tobytes() == expanded.data.tobytes()
            assert np.asarray(loaded.scale).T.tobytes() == expanded.scale.tobytes()


def test_a_wider_spread_is_refused_in_memory_and_counted_for_files():
    tiles = Matrix(
        *(
            np.concatenate([getattr(fp4_tile(spread), part) for spread in (14, 15)], axis=1)
            for part in ("data", "scale")
        )
    )
    expanded, lossy_tiles = codecs.expand_fp4(tiles)
    assert lossy_tiles == 1
    assert (expanded.decode() != tiles.decode())[:, 128:].any()
    np.testing.assert_array_equal(expanded.decode()[:, :128], tiles.decode()[:, :128])
    with pytest.raises(ValueError, match=r"1 of 2 tiles.*the first at \[1, 0\]"):
        expand_to_fp8(in_memory(tiles))


def test_expansion_wants_fp4_with_powers_of_two():
    with pytest.raises(ValueError, match="not FP4"):
        expand_to_fp8(quantize_weight(jnp.ones((32, 4)), "fp8"))


# Round trips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder, to", [(OFFICIAL, "stored"), (NANO, "stored"), (NANO, "released")])
def test_a_released_folder_stays_as_it_is(tmp_path, folder, to):
    report = run(folder, tmp_path / "new", to=to)
    for name in ("model.safetensors", "tokenizer.json"):
        if (folder / name).exists():
            assert (tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes()
    assert from_hf(tmp_path / "new") == from_hf(folder)
    assert read_config(tmp_path / "new")["expert_dtype"] == "fp4"
    assert {(kind["max_error"], kind["saturated"]) for kind in report["kinds"]} == {(0, 0)}
    assert any(name.startswith("mtp.0.") for name in read(tmp_path / "new"))


@pytest.fixture(scope="module")
def as_fp8(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("convert") / "fp8"
    run(OFFICIAL, folder, to="fp8")
    return folder


@pytest.fixture(scope="module")
def as_bf16(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("convert") / "bf16"
    run(OFFICIAL, folder, to="bf16")
    return folder


def test_fp8_experts_have_the_values_of_the_fp4_ones(as_fp8):
    expected = to_fp8_experts(released(), E8M0)
    assert_same_tensors(by_name(read(as_fp8)), by_name(expected))
    assert read_config(as_fp8)["expert_dtype"] == "fp8"


def test_expanding_while_loading_is_loading_what_was_converted(tmp_path):
    run(NANO, tmp_path / "new", to="fp8")
    model = load(NANO, expert_format="fp8")
    assert_same_parameters(parameters(model), parameters(load(tmp_path / "new")))
    assert model.cfg.expert_format == from_hf(tmp_path / "new").expert_format == "fp8"


def test_expanding_under_a_mesh_gives_the_same_arrays_spread_over_it():
    expected = parameters(load(OFFICIAL, expert_format="fp8", use="train"))
    with jax.set_mesh(make_mesh(fsdp=2, expert=2, tensor=2)):
        model = load(OFFICIAL, expert_format="fp8", use="train")
    assert_same_parameters(parameters(model), expected)
    w1 = model.stages[1].blocks[0].moe.w1.kernel.get_value()
    assert w1.values.sharding.spec == jax.P(None, "expert", WIDTH, "tensor")
    assert w1.scale.sharding.spec == jax.P(None, "expert", WIDTH, None)  # 1 block of outputs


def test_fp8_experts_become_the_fp4_ones_they_were(tmp_path, as_fp8):
    report = run(as_fp8, tmp_path / "new", to="released")
    assert {kind["max_error"] for kind in report["kinds"]} == {0}
    assert_same_but_for_scales(read(tmp_path / "new"), released())


def assert_same_but_for_scales(actual: Tensors, expected: Tensors) -> None:
    """What requantising keeps.

    All values, exactly. All bytes of blocks whose largest code is in the upper half of the range (4
    or 6; above 224), but for minus zero in FP4. Other blocks are written with the smaller scale that
    the rule asks for, and blocks of zeros with the smallest.
    """
    assert sorted(actual) == sorted(expected)
    for name, data in expected.items():
        if data.dtype not in (np.uint8, E4M3):
            if not name.endswith(".scale"):
                assert actual[name].tobytes() == data.tobytes(), name
            continue
        scale_name = name.replace(".weight", ".scale")
        old, new = (Matrix(t[name], t[scale_name]) for t in (expected, actual))
        assert np.array_equal(new.decode(), old.decode()), name
        if old.is_fp4:
            largest = np.abs(old.decode().reshape(len(data), -1, 32)).max(axis=-1)
            keeps = largest >= 4 * old.scale.astype(np.float32)
            assert keeps.mean() > 0.5
            a, b = (np.stack([m.data & 15, m.data >> 4], axis=-1) for m in (old, new))
            a, b = (np.where(c == 8, 0, c).reshape(len(data), -1, 32) for c in (a, b))
            assert np.array_equal(a[keeps], b[keeps]), name
            assert np.array_equal(old.scale[keeps], new.scale[keeps]), name


def test_bfloat16_has_the_values_of_the_released_weights(as_bf16):
    model, official = load(as_bf16), Official(OFFICIAL)
    assert_same_parameters(parameters(model), parameters(to_float(load(OFFICIAL), jnp.bfloat16)))
    name = "layers.2.ffn.experts.3.w2"
    stored = read(as_bf16)[f"{name}.weight"]
    assert stored.dtype == BF16
    assert np.array_equal(stored.astype(np.float32), official.weight(name).astype(np.float32))
    config = read_config(as_bf16)
    assert "quantization_config" not in config and "expert_dtype" not in config


def test_bfloat16_becomes_the_released_weights_it_was(tmp_path, as_bf16):
    run(as_bf16, tmp_path / "new", to="released")
    assert_same_but_for_scales(read(tmp_path / "new"), released())
    # Once scales are those of the rule, a round trip changes no byte.
    run(tmp_path / "new", tmp_path / "bf16", to="bf16")
    run(tmp_path / "bf16", tmp_path / "again", to="released")
    assert_same_tensors(by_name(read(tmp_path / "again")), by_name(read(tmp_path / "new")))


def test_quantising_a_bfloat16_checkpoint_is_quantising_its_model(tmp_path, as_bf16):
    run(as_bf16, tmp_path / "new", to="released")
    model = to_released(to_float(load(OFFICIAL), jnp.bfloat16))
    save(model, tmp_path / "model", like=Checkpoint(OFFICIAL))
    expected = read_tensors(tmp_path / "model" / "model.safetensors")
    assert_same_tensors(by_name(read(tmp_path / "new")), by_name(expected))


def test_quantising_a_float32_checkpoint_rounds_as_its_model_would_be(tmp_path):
    run(HF, tmp_path / "new", to="released")
    new = read(tmp_path / "new")
    save(to_released(load(HF)), tmp_path / "model", like=Checkpoint(HF))
    model = read_tensors(tmp_path / "model" / "model.safetensors")
    rest = {name: data for name, data in model.items() if ".experts." not in name}
    assert_same_tensors({name: new[name] for name in sorted(rest)}, by_name(rest))
    for name, old in hf_tensors().items():  # experts that were floats stay so in a loaded model
        if re.search(r"\.experts\.[07]\.w\d\.weight", name):
            weight = quantize_weight(jnp.asarray(old.T), "fp4")
            values, scale = pack_planes(new[name].T), new[name.replace(".weight", ".scale")]
            assert np.asarray(weight.values).tobytes() == values.tobytes()
            assert np.asarray(weight.scale).T.tobytes() == scale.tobytes()


def test_the_report_has_the_largest_error_of_each_kind(tmp_path):
    report = run(HF, tmp_path / "new", to="released")
    (kind,) = [kind for kind in report["kinds"] if kind["kind"] == "ffn.experts.*.w2"]
    new, errors, relative = read(tmp_path / "new"), [], []
    for name, old in hf_tensors().items():
        if re.fullmatch(r"layers\.\d+\.ffn\.experts\.\d+\.w2\.weight", name):
            decoded = Matrix(new[name], new[name.replace(".weight", ".scale")]).decode()
            errors.append(np.abs(decoded - old).max())
            relative.append(errors[-1] / np.abs(old).max())
    assert (kind["source"], kind["target"], kind["tensors"]) == ("f32", "fp4", 48)
    assert kind["weights"] == 48 * 128 * 64
    assert kind["max_error"] == max(errors) > 0
    assert kind["relative_error"] == pytest.approx(max(relative), rel=1e-6)
    assert json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8")) == report


def test_base_has_float32_scales_and_comes_back(tmp_path, as_fp8):
    run(OFFICIAL, tmp_path / "base", to="base")
    expected = to_fp8_experts(released(), np.float32)
    assert_same_tensors(by_name(read(tmp_path / "base")), by_name(expected))
    run(tmp_path / "base", tmp_path / "fp8", to="fp8")
    assert_same_tensors(by_name(read(tmp_path / "fp8")), by_name(read(as_fp8)))


def test_converted_folders_give_the_logits_of_the_original(tmp_path):
    tokens = np.random.default_rng(0).integers(3, 1280, (1, 140)).astype(np.int32)
    expected = Scorer(load(NANO)).logits(tokens)
    for to in ("fp8", "bf16"):
        run(NANO, tmp_path / to, to=to)
        logits = Scorer(load(tmp_path / to)).logits(tokens)
        np.testing.assert_array_equal(logits, expected, err_msg=to)


# Names --------------------------------------------------------------------------------------------


def test_a_folder_of_transformers_comes_back_byte_for_byte(tmp_path):
    run(HF, tmp_path / "released")
    assert_same_tensors(by_name(read(tmp_path / "released")), by_name(hf_tensors()))
    run(tmp_path / "released", tmp_path / "hf", naming="transformers")
    written = (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert written == (HF / "model.safetensors").read_bytes()
    assert read_config(tmp_path / "hf")["torch_dtype"] == "float32"


def test_released_weights_come_back_from_names_of_transformers(tmp_path):
    run(OFFICIAL, tmp_path / "hf", naming="transformers")
    stored = read(tmp_path / "hf")
    assert "model.layers.3.attn.norm.weight" in stored and "mtp.0.e_proj.scale" in stored
    run(tmp_path / "hf", tmp_path / "released")
    assert_same_tensors(read(tmp_path / "released"), official_tensors())


def test_stacked_experts_of_transformers_are_taken_apart(tmp_path):
    folder = write_folder(tmp_path / "hf", in_transformers_memory(hf_tensors()), read_config(HF))
    run(folder, tmp_path / "new")
    assert_same_tensors(by_name(read(tmp_path / "new")), by_name(hf_tensors()))


def test_names_of_transformers_are_those_it_writes():
    stored = set(read_tensors(HF / "model.safetensors"))
    assert {names.to_transformers(name) for name in hf_tensors()} == stored
    for name in official_tensors():
        assert names.from_transformers(names.to_transformers(name)) == name


# What loses something, and what is refused -----------------------------------------------------


def far_apart(path: pathlib.Path) -> pathlib.Path:
    """Two groups of an expert's tile 2**15 apart, with every code."""
    name = "layers.1.ffn.experts.1.w1"
    data, scale = (cut_tensors()[f"{name}.{part}"].copy() for part in ("weight", "scale"))
    data[0, :16] = 0x11  # 0.5
    scale.view(np.uint8)[0, 0] = scale.view(np.uint8)[:128, :4].max() - 15
    return cut(path, {f"{name}.weight": data, f"{name}.scale": scale})


def test_fp4_that_fp8_cannot_hold_stops_the_conversion_unless_allowed(tmp_path):
    folder, name = far_apart(tmp_path / "x"), "layers.1.ffn.experts.1.w1.weight"
    message = rf"{re.escape(name)}: 32 values in 1 blocks .*--allow-lossy"
    with pytest.raises(CheckpointError, match=message):
        run(folder, tmp_path / "new", to="fp8")
    with pytest.raises(CheckpointError, match=r"experts.*1 of .* tiles"):
        load(folder, expert_format="fp8")
    report = run(folder, tmp_path / "new", to="fp8", allow_lossy=True)
    lossy = {n: what for kind in report["kinds"] for n, what in kind["lossy"].items()}
    assert lossy == {name: "32 values in 1 blocks of 128 x 128"}
    load(tmp_path / "new")


def test_scales_that_are_no_powers_of_two_do_not_become_e8m0_silently(tmp_path):
    tensors = to_fp8_experts(cut_tensors(), np.float32)
    tensors["layers.0.attn.wq_a.scale"] = tensors["layers.0.attn.wq_a.scale"] * np.float32(1.1)
    folder = write_folder(tmp_path / "x", tensors, cut_config())
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.wq_a\.weight: .* fp8, F32 scales"):
        run(folder, tmp_path / "new", to="fp8")
    report = run(folder, tmp_path / "new", to="fp8", allow_lossy=True)
    (row,) = [kind for kind in report["kinds"] if kind["lossy"]]
    assert row["kind"] == "attn.wq_a" and 0 < row["relative_error"] < 0.04


@pytest.mark.parametrize("to", ["stored", "bf16"])
@pytest.mark.parametrize(
    "name, code", [("layers.1.attn.wq_b.weight", 0x7F), ("layers.0.ffn.experts.1.w2.scale", 0xFF)]
)
def test_codes_for_nan_are_refused_with_the_name_of_the_tensor(tmp_path, name, code, to):
    data = cut_tensors()[name].copy()
    data.view(np.uint8)[0, 0] = code
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} has NaN codes"):
        run(cut(tmp_path / "x", {name: data}), tmp_path / "new", to=to)
    assert not (tmp_path / "new" / "config.json").exists()


def test_values_that_bfloat16_cannot_hold_are_refused(tmp_path):
    name = "embed.weight"
    data = cut_tensors()[name].astype(np.float32)
    data[0, 0] = 3.4e38
    with pytest.raises(CheckpointError, match=r"embed\.weight: .*BF16 cannot hold"):
        run(cut(tmp_path / "x", {name: data}), tmp_path / "new", to="bf16")


def test_unknown_options_and_foreign_targets_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"to='int4': expected one of released, fp8"):
        Conversion(OFFICIAL, tmp_path / "new", to="int4")
    with pytest.raises(ValueError, match=r"naming='hf': expected one of released, transformers"):
        Conversion(OFFICIAL, tmp_path / "new", naming="hf")
    with pytest.raises(ValueError, match=r"official_small is not empty"):
        Conversion(OFFICIAL, OFFICIAL, to="bf16")
    with pytest.raises(ValueError, match=r"expert_format='fp4': .* has experts in a float format"):
        load(HF, expert_format="fp4")


# Interruptions ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> pathlib.Path:
    """The cut checkpoint in six files, with a tokenizer."""
    folder = tmp_path_factory.mktemp("convert") / "sharded"
    model = load(cut(tmp_path_factory.mktemp("cut")))
    save(model, folder, single_file_limit=1)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def everything(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_conversion_goes_on_with_the_next_file(tmp_path, sharded, monkeypatch):
    run(sharded, tmp_path / "whole", to="bf16")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 6

    write, written = convert.write_safetensors, []

    def failing(path, *args):
        if len(written) == 2:
            pathlib.Path(f"{path}.4242.new").write_bytes(b"half a file")  # as after a kill
            raise KeyboardInterrupt
        write(path, *args)
        written.append(os.path.basename(path))

    target = tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_safetensors", failing)
        with pytest.raises(KeyboardInterrupt):
            run(sharded, target, to="bf16")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(target)
    with pytest.raises(ValueError, match=r"to='bf16', not 'fp8': continue with that"):
        Conversion(sharded, target, to="fp8")
    with pytest.raises(ValueError, match=r"conversion with source="):
        Conversion(OFFICIAL, target, to="bf16")

    (target / written[0]).write_bytes(b"damaged")  # what was finished is not trusted blindly
    rest = []
    record = lambda path, *args: (write(path, *args), rest.append(os.path.basename(path)))
    monkeypatch.setattr(convert, "write_safetensors", record)
    done = []
    conversion = Conversion(sharded, target, to="bf16")
    conversion.run(done.append)
    files = [name for name in os.listdir(target) if name.endswith(".safetensors")]
    assert sorted([*rest, written[1]]) == sorted(files)
    assert sum(done) == conversion.num_bytes
    assert everything(target) == everything(tmp_path / "whole")

    Conversion(sharded, target, to="bf16").run()  # nothing left to do
    assert len(rest) == 5


def test_the_script_goes_on_where_it_was_killed(tmp_path, sharded):
    run(sharded, tmp_path / "whole", to="fp8")
    command = [sys.executable, "-m", "v4jax.cli.convert", sharded, tmp_path / "new"]
    command = [*map(str, command), "--to", "fp8"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("new/*.safetensors*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "100%" in result.stderr
    assert re.search(r"ffn\.experts\.\*\.w1 +8 +fp4 +fp8 +0 +0\.00% +0", result.stdout)
    assert everything(tmp_path / "new") == everything(tmp_path / "whole")


def test_a_conversion_holds_little_more_than_one_tensor(tmp_path):
    run(OFFICIAL, tmp_path / "warm", to="bf16")
    conversion = Conversion(OFFICIAL, tmp_path / "new", to="bf16")
    tracemalloc.start()
    conversion.run()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = max(4 * data.size for data in official_tensors().values())  # as float32
    assert peak < 6 * largest + 2**21 < conversion.num_bytes / 2
