"""Adapters in PEFT's files: those that PEFT wrote, and what others read of ours."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from tests.conftest import GOLDEN
from tests.models import random_model
from v4jax import Transformer, checkpoint, plain, tiny
from v4jax.checkpoint import CheckpointError, load_adapter, save_adapter
from v4jax.checkpoint.adapters import CONFIG, WEIGHTS, Adapter
from v4jax.checkpoint.safetensors import NewTensor, SafetensorsFile, write_safetensors
from v4jax.nn.lora import LoRA, add_lora, matrices

PEFTS = GOLDEN / "hf_adapter"  # tests/reference/adapter_peft.py
HF_TOLERANCE = 2e-4  # absolute, logits of scale 1, as of the model without an adapter
CONFIG_OF_TWO = dataclasses.replace(tiny(), layers=tiny().layers[:2], mtp_layers=())


@pytest.fixture(scope="module")
def hf_model() -> Transformer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("v4jax.checkpoint.loading._logger.warning", lambda *args: None)
        return checkpoint.load(GOLDEN / "hf_small", plain(), scan_layers=True)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(CONFIG_OF_TWO)


def _stored(folder: pathlib.Path) -> dict[str, np.ndarray]:
    file = SafetensorsFile(folder / WEIGHTS)
    return {name: np.array(file.view(name)) for name in file.tensors}


def test_logits_with_an_adapter_of_peft_equal_those_of_transformers(hf_model, hf_small):
    expected = np.load(PEFTS / "reference.npz")
    at = expected["positions"]
    logits = jax.jit(lambda m, t: m(t)[:, at])(load_adapter(hf_model, PEFTS), hf_small["tokens"])

    assert np.abs(logits - expected["logits"]).max() <= HF_TOLERANCE
    assert (logits.argmax(-1) == expected["logits"].argmax(-1)).all()
    assert np.abs(hf_small["logits"][:, at] - logits).max() > 1


def test_an_adapter_of_peft_is_written_again_as_peft_wrote_it(hf_model, tmp_path):
    save_adapter(load_adapter(hf_model, PEFTS), tmp_path, names="transformers", base="hf_small")

    ours, theirs = _stored(tmp_path), _stored(PEFTS)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 56
    for name, data in theirs.items():
        np.testing.assert_array_equal(ours[name], data)
    said, meant = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path, PEFTS))
    modules = {name.split(".", 2)[2].rsplit(".", 2)[0] for name in theirs}
    assert set(said.pop("target_modules")) == modules
    assert {key: value for key, value in said.items() if value != meant[key]} == {}


@pytest.mark.parametrize(("scan_layers", "names"), [(True, "released"), (False, "transformers")])
def test_an_adapter_comes_back_from_its_files(tmp_path, scan_layers, names):
    """Into a model whose layers lie otherwise."""
    layers = (tiny().layers[0],) * 2 + tiny().layers[1:2]
    cfg = dataclasses.replace(tiny(), layers=layers, mtp_layers=())
    targets = ("attention.wq_a", "shared.w2", "indexer.wq_b")
    targets += ("moe.w3",) if names == "released" else ()
    base = random_model(cfg, scan_layers=scan_layers)
    adapted = _learnt(base, LoRA(rank=4, targets=targets, rslora=True))
    save_adapter(adapted, tmp_path, names=names)
    other = random_model(cfg, scan_layers=not scan_layers, seed=1)

    again = load_adapter(other, tmp_path)

    stored = _stored(tmp_path)
    if names == "released":
        assert stored["base_model.model.layers.2.ffn.experts.7.w3.lora_B.weight"].shape == (64, 4)
    expected = {
        "released": "base_model.model.layers.2.attn.indexer.wq_b.lora_A.weight",
        "transformers": "base_model.model.model.layers.2.self_attn.compressor.indexer.q_b_proj."
        "lora_A.weight",
    }
    assert stored[expected[names]].shape == (4, 64)
    save_adapter(again, tmp_path / "again", names=names)
    assert (tmp_path / "again" / CONFIG).read_bytes() == (tmp_path / CONFIG).read_bytes()
    written = _stored(tmp_path / "again")
    assert written.keys() == stored.keys()
    for name, data in stored.items():
        assert data.any()
        np.testing.assert_array_equal(written[name], data)


def _learnt(model: Transformer, lora: LoRA) -> Transformer:
    """With adapters whose B is not zero."""
    model = add_lora(model, lora)
    for i, (_, matrix) in enumerate(matrices(model)):
        if matrix.adapter is not None:
            b = matrix.adapter.b
            b.set_value(0.1 * jax.random.normal(jax.random.key(i), b.get_value().shape))
    return model


def test_equal_files_have_equal_digests(model, tmp_path):
    adapted = _learnt(model, LoRA(rank=2))
    for name in "ab":
        save_adapter(adapted, tmp_path / name)
    save_adapter(_learnt(model, LoRA(rank=2, alpha=5)), tmp_path / "c")
    a, b, c = (Adapter(tmp_path / name).digest for name in "abc")
    assert a == b != c


def test_files_that_are_not_understood_are_refused(model, tmp_path):
    save_adapter(_learnt(model, LoRA(rank=2, targets=("shared.w1",))), tmp_path / "good")
    config = json.loads((tmp_path / "good" / CONFIG).read_text())

    def refused(match: str, tensors=None, **changes) -> None:
        folder = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", folder, dirs_exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(config | changes))
        if tensors is not None:
            new = [NewTensor(n, "F32", d.shape, lambda d=d: d) for n, d in tensors.items()]
            write_safetensors(str(folder / WEIGHTS), new, {})
        with pytest.raises(CheckpointError, match=match):
            load_adapter(model, folder)

    refused("peft_type='IA3': expected 'LORA'", peft_type="IA3")
    refused("use_dora=True", use_dora=True)
    refused("alpha_pattern={'w1': 3}", alpha_pattern={"w1": 3})
    refused("does not say a LoRA: LoRA rank=0", r=0)
    refused(r"lora_A\.weight is \[2, 128\], expected \[3, 128\]", r=3)
    stored = _stored(tmp_path / "good")
    first = next(iter(stored))
    refused("is no factor of a LoRA", {**stored, "base_model.model.norm.weight": stored[first]})
    refused("has lora_B only", {n: d for n, d in stored.items() if n != first})
    refused("values that are not finite", {**stored, first: stored[first] * np.nan})
    elsewhere = {name.replace("layers.1.", "layers.7."): data for name, data in stored.items()}
    refused(r"layers\.7\.ffn\.shared_experts\.w1\.lora_A\.weight belongs to no matrix", elsewhere)


def test_what_has_no_form_in_files_is_said(model, tmp_path):
    with pytest.raises(ValueError, match="has no adapter"):
        save_adapter(model, tmp_path)
    adapted = add_lora(model, LoRA(targets=("wo_a",)))
    with pytest.raises(ValueError, match=r"attention\.wo_a has an adapter for each of its groups"):
        save_adapter(adapted, tmp_path)
    with pytest.raises(ValueError, match=r"moe\.w1 has an adapter for each expert"):
        save_adapter(add_lora(model, LoRA(targets="experts")), tmp_path, names="transformers")
    with pytest.raises(ValueError, match="names='vllm': expected one of released, transformers"):
        save_adapter(add_lora(model, LoRA()), tmp_path, names="vllm")
    with pytest.raises(ValueError, match=r"attention\.wo_a has an adapter, .*merge"):
        checkpoint.save(adapted, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
