"""What holds a training run: what trains, what stays, going on after a stop, and what is written."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from pallas_kernels.formats.quantize import QuantizedArray
from sharding import PREFILL, make_mesh
from tests.models import random_model
from v4jax import LoRA, checkpoint, tiny
from v4jax.nn.lora import matrices
from v4jax.nn.quantization import to_released
from v4jax.train import Spikes, TokenStream, Trainer, adamw, muon

SMALL = dataclasses.replace(tiny(), layers=tiny().layers[:1], mtp_layers=())
LORA = LoRA(rank=2, targets=("attention.wq_b", "moe.w2"), dropout=0.1)
SPIKES = Spikes(50.0, steps=3)
DATA = TokenStream(np.arange(5000) % 251 + 2, 30)


def _packed():
    return to_released(random_model(SMALL))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A LoRA run of four steps with its folder, its trainer and its records."""
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(_packed(), adamw(1e-2), trainable=LORA, skip_above=SPIKES)
    options = dict(batch_size=2, output=folder, save_every=2, log_every=1, evaluation=DATA)
    return folder, trainer, trainer.fit(DATA, 4, progress=False, **options)


def test_a_lora_learns_beside_packed_weights_that_stay(trained):
    _, trainer, records = trained
    assert [record["step"] for record in records] == [1, 2, 3, 4] and trainer.steps == 4
    assert records[-1]["ce"] < records[0]["ce"] and "heldout_ce" in records[-1]
    before = {path: matrix.kernel for path, matrix in matrices(_packed())}
    for path, matrix in matrices(trainer.model):
        value, old = matrix.kernel.get_value(), before[path].get_value()
        assert isinstance(value, QuantizedArray) or matrix.kernel.stored == "bf16", path
        for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(old), strict=True):
            np.testing.assert_array_equal(a, b)
        assert (matrix.adapter is not None) == path.endswith(LORA.targets)
        assert matrix.adapter is None or np.abs(matrix.adapter.b[...]).max() > 0
    # Two moments of what trains and a step, and nothing of what stays.
    size = sum(leaf.size for leaf in jax.tree.leaves(trainer.state.params))
    assert sum(leaf.size for leaf in jax.tree.leaves(trainer.state.opt_state)) < 2 * size + 10


def test_a_state_on_disk_has_only_what_trains(trained):
    folder, trainer, _ = trained
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.state.fixed))
    written = sum(f.stat().st_size for f in (folder / "state" / "4").rglob("*") if f.is_file())
    assert written < held / 4


def test_a_run_goes_on_to_the_same_numbers(trained, tmp_path):
    """Two steps, and then four in all, by another trainer."""
    _, trainer, records = trained
    options = dict(batch_size=2, output=tmp_path, save_every=2, log_every=1)
    first = Trainer(_packed(), adamw(1e-2), trainable=LORA, skip_above=SPIKES)
    first.fit(DATA, 2, progress=False, **options)

    again = Trainer(_packed(), adamw(1e-2), trainable=LORA, skip_above=SPIKES)
    found = list(again.run(DATA, 4, **options))

    assert [record["step"] for record in found] == [3, 4]
    assert [record["ce"] for record in found] == [record["ce"] for record in records[2:]]

    def changing(one):
        return jax.tree.leaves((one.state.params, one.state.opt_state, one.state.norms))

    for a, b in zip(changing(again), changing(trainer), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_was_trained_is_written_in_each_form(trained, tmp_path):
    _, trainer, _ = trained
    trainer.save(tmp_path / "adapter")
    trainer.save(tmp_path / "float", "float")
    trainer.save(tmp_path / "released", "released")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    merged = checkpoint.load(tmp_path / "float")
    tokens = np.arange(40)[None] + 2
    np.testing.assert_allclose(merged(tokens), trainer.model(tokens), atol=1e-4)
    assert checkpoint.load(tmp_path / "released").cfg.expert_format == "fp4"
    with pytest.raises(ValueError, match=r"format='bf16': expected one of 'released'"):
        trainer.save(tmp_path / "other", "bf16")


def test_training_goes_on_from_an_adapter(trained, tmp_path):
    _, trainer, _ = trained
    trainer.save(tmp_path / "first")
    tokens = np.arange(40)[None] + 2

    model = checkpoint.load_adapter(_packed(), tmp_path / "first")
    again = Trainer(model, adamw(1e-2), trainable="adapter")
    assert again.lora.rank == LORA.rank and again.lora.dropout == LORA.dropout
    np.testing.assert_allclose(again.model(tokens), trainer.model(tokens), atol=1e-5)
    before = jax.tree.map(np.array, again.state.params)
    again.fit(DATA, 1, batch_size=2, progress=False)
    after = jax.tree.leaves(again.state.params)
    assert len(after) == 2 * len(LORA.targets)
    for old, new in zip(jax.tree.leaves(before), after, strict=True):
        assert np.any(old != new)
    again.save(tmp_path / "second")
    with pytest.raises(ValueError, match="the model has no adapter"):
        Trainer(_packed(), adamw(1e-2), trainable="adapter")
    (tmp_path / "run").mkdir()
    (tmp_path / "second").rename(tmp_path / "run" / "adapter")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json.*run/adapter has one"):
        checkpoint.load_adapter(_packed(), tmp_path / "run")


def test_any_optax_transformation_and_any_filter():
    trainer = Trainer(
        random_model(SMALL),
        optax.chain(optax.scale_by_sign(), optax.scale(-1e-3)),
        trainable=lambda path, variable: path.endswith("sink"),
    )
    assert len(jax.tree.leaves(trainer.state.params)) == 1
    (before,) = map(np.array, jax.tree.leaves(trainer.state.params))
    trainer.step(trainer.batch(DATA, 0, 2))
    (after,) = jax.tree.leaves(trainer.state.params)
    np.testing.assert_allclose(np.abs(after - before), 1e-3, rtol=1e-3)


def test_experts_can_stay_packed():
    trainer = Trainer(_packed(), adamw(1e-3), trainable="no-experts")
    packed = [
        variable
        for _, variable in nnx.to_flat_state(trainer.state.fixed)
        if isinstance(variable.get_value(), QuantizedArray)
    ]
    assert len(packed) == 3 and all("expert" in variable.axes for variable in packed)
    floats = jax.tree.leaves(trainer.state.params)
    assert all(leaf.dtype == np.float32 for leaf in floats)


def test_what_cannot_be_trained_is_said():
    with pytest.raises(ValueError, match=r"trainable='lora': expected one of 'all', 'no-experts'"):
        Trainer(_packed(), adamw(1e-3), trainable="lora")
    with jax.set_mesh(make_mesh(fsdp=2, expert=2)):
        served = random_model(SMALL, rules=PREFILL)
    with pytest.raises(ValueError, match='use="train"'):
        Trainer(served, adamw(1e-3), trainable=LORA)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((np.zeros(9), 1), {}, r"data is a ndarray: expected a TokenStream"),
        ((DATA, 1.5), {}, r"steps=1\.5: expected a whole number from 1 on"),
        ((DATA, 1), {"batch_size": 0}, r"batch_size=0: expected a whole number"),
        ((DATA, 1), {"log_every": 0}, r"log_every=0: expected a whole number"),
        ((DATA, 1), {"evaluation": [1]}, r"evaluation is a list: expected"),
    ],
)
def test_odd_arguments_are_named_before_anything_runs(arguments, options, message):
    trainer = Trainer(_packed(), adamw(1e-3), trainable=LORA)
    with pytest.raises((ValueError, TypeError), match=message):
        trainer.fit(*arguments, progress=False, **options)
    assert trainer.steps == 0


def test_numbers_that_no_training_has_are_refused():
    for options in ({"b1": 1.0}, {"b2": 2.0}, {"b2": -0.1}, {"clip_norm": np.nan}, {"eps": -1.0}):
        (name,) = options
        for optimizer in (adamw, muon):
            with pytest.raises(ValueError, match=f"{name}="):
                optimizer(1e-3, **options)
    with pytest.raises(ValueError, match="learning_rate=nan"):
        adamw(float("nan"))
    with pytest.raises(ValueError, match=r"rank=1\.5: expected a whole number"):
        LoRA(rank=1.5)
