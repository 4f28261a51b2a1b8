"""An adapter merged into a checkpoint's files: what is written, in each format."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

from tests.conftest import GOLDEN
from v4jax import checkpoint
from v4jax.checkpoint.adapters import CONFIG, WEIGHTS
from v4jax.checkpoint.codecs import Matrix
from v4jax.checkpoint.convert import Conversion
from v4jax.checkpoint.safetensors import NewTensor, write_safetensors
from v4jax.nn.lora import merge_lora

BASE = GOLDEN / "official_small"
MODULES = ("layers.1.attn.wq_a", "layers.2.ffn.shared_experts.w2", "layers.3.ffn.experts.5.w1")
RANK, ALPHA = 3, 4.0


@pytest.fixture(scope="module")
def base() -> checkpoint.Checkpoint:
    return checkpoint.Checkpoint(BASE)


def _values(opened: checkpoint.Checkpoint, module: str) -> np.ndarray:
    """[out, in]"""
    tensor, scale = (opened.tensors.get(f"{module}.{part}") for part in ("weight", "scale"))
    return Matrix(tensor.view(), scale and scale.view()).decode()


@pytest.fixture(scope="module")
def products(base) -> dict[str, np.ndarray]:
    """scale * B @ A of each module, in float64, and the factors."""
    rng = np.random.default_rng(0)
    found = {}
    for module in MODULES:
        out, width = _values(base, module).shape
        size = np.abs(_values(base, module)).max()
        a = rng.normal(size=(RANK, width)).astype(np.float32)
        b = (0.05 * size * rng.normal(size=(out, RANK))).astype(np.float32)
        found[module] = a, b, ALPHA / RANK * b.astype(np.float64) @ a.astype(np.float64)
    return found


def _write(folder: pathlib.Path, products) -> pathlib.Path:
    folder.mkdir()
    tensors = []
    for module, (a, b, _) in products.items():
        for factor, data in (("lora_A", a), ("lora_B", b)):
            name = f"base_model.model.{module}.{factor}.weight"
            tensors.append(NewTensor(name, "F32", data.shape, lambda data=data: data))
    write_safetensors(str(folder / WEIGHTS), tensors, {})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def adapter(products, tmp_path_factory) -> pathlib.Path:
    return _write(tmp_path_factory.mktemp("lora") / "adapter", products)


@pytest.mark.parametrize("to", ["fp4-bf16", "fp8-bf16", "bf16"])
def test_merged_matrices_are_the_sum_in_the_format(base, products, adapter, tmp_path, to):
    Conversion(BASE, tmp_path / "plain", to=to).run()
    report = Conversion(BASE, tmp_path / "merged", to=to, adapter=adapter).run()

    plain, merged = (checkpoint.Checkpoint(tmp_path / name) for name in ("plain", "merged"))
    assert plain.tensors.keys() == merged.tensors.keys()
    for name, tensor in plain.tensors.items():
        if name.rpartition(".")[0] not in products:
            assert merged.tensors[name].view().tobytes() == tensor.view().tobytes(), name
    for module, (_, _, product) in products.items():
        exact = _values(base, module).astype(np.float64) + product
        tag = merged.tensors[f"{module}.weight"].tag
        is_expert = ".experts." in module
        assert tag == (
            {"fp4-bf16": "I8", "fp8-bf16": "F8_E4M3"}.get(to, "BF16") if is_expert else "BF16"
        )
        found = _values(merged, module)
        if tag == "BF16":
            bound = 2.0**-8 * np.abs(exact) + 1e-7 * np.abs(exact).max()  # and the sum's in float32
            assert (np.abs(found - exact) <= bound).all()
            np.testing.assert_array_equal(found, found.astype(ml_dtypes.bfloat16))
        else:  # half a step of the format, of the largest in a block
            step = {"I8": 1 / 4, "F8_E4M3": 1 / 16}[tag]
            assert 0 < np.abs(found - exact).max() <= step * np.abs(exact).max()
    adapted = [kind for kind in report["kinds"] if kind["source"].endswith(" + adapter")]
    assert sum(kind["tensors"] for kind in adapted) == len(MODULES)
    checkpoint.load(tmp_path / "merged", scan_layers=False)


def test_merging_files_is_merging_the_model(adapter, tmp_path):
    """Into FP4 and FP8, to the bit."""
    Conversion(BASE, tmp_path / "files", adapter=adapter).run()
    model = checkpoint.load_adapter(checkpoint.load(BASE, scan_layers=False), adapter)
    checkpoint.save(merge_lora(model), tmp_path / "model")

    files, saved = (checkpoint.Checkpoint(tmp_path / name) for name in ("files", "model"))
    assert files.tensors.keys() == saved.tensors.keys()
    for name, tensor in files.tensors.items():
        module, _, part = name.rpartition(".")
        if ".experts." in module and module not in MODULES:  # the same values, maybe in other codes
            if part == "weight":
                np.testing.assert_array_equal(_values(files, module), _values(saved, module))
            continue
        np.testing.assert_array_equal(tensor.view(), saved.tensors[name].view(), err_msg=name)


def test_a_conversion_goes_on_with_its_adapter_alone(base, products, adapter, tmp_path):
    Conversion(BASE, tmp_path / "new", adapter=adapter).run()
    Conversion(BASE, tmp_path / "new", adapter=adapter)
    other = _write(tmp_path / "other", {name: products[name] for name in MODULES[:1]})
    for another in (None, other):
        with pytest.raises(ValueError, match="holds a conversion with adapter="):
            Conversion(BASE, tmp_path / "new", adapter=another)
    a, b, product = products[MODULES[0]]
    grouped = _write(tmp_path / "grouped", {"layers.1.attn.wo_a": (a, b, product)})
    with pytest.raises(checkpoint.CheckpointError, match=r"wo_a\.lora_A\.weight belongs to no"):
        Conversion(BASE, tmp_path / "unknown", adapter=grouped)
