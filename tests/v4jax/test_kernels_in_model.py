"""The whole model on the Pallas kernels (interpreted) gives what it gives on XLA."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests.conftest import GOLDEN
from tests.models import one_of_each, random_model, small_nano
from v4jax import Numerics, Transformer, checkpoint, plain
from v4jax.inference.score import Scorer

LENGTH, DECODED = 160, 4  # past the window, and one HCA entry
INTERPRETED = ("interpret", "xla")  # where a kernel takes the model's widths, it runs


@pytest.fixture(scope="module")
def model() -> Transformer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("v4jax.checkpoint.loading._logger.warning", lambda *args: None)
        return checkpoint.load(GOLDEN / "hf_small", plain(implementation=INTERPRETED))


def test_the_kernels_run_in_the_model(model):
    jaxpr = str(jax.make_jaxpr(lambda t: model(t))(np.zeros((1, LENGTH), np.int32)))
    names = {line.split("name=")[1].split()[0] for line in jaxpr.splitlines() if "name=" in line}

    assert "pallas_call" in jaxpr
    for kernel in ("attention", "index_bits", "hc_pre", "grouped"):
        assert any(kernel in name for name in names), f"{kernel} is not among {sorted(names)}"


@pytest.mark.parametrize("decode_from", [None, LENGTH - DECODED], ids=["whole", "decode"])
def test_logits_through_the_kernels_equal_those_of_transformers(model, hf_small, decode_from):
    tokens = hf_small["tokens"][:1, :LENGTH]

    logits = Scorer(model).logits(tokens, decode_from=decode_from)

    expected = hf_small["logits"][:1, :LENGTH]
    assert np.abs(logits - expected).max() <= 2e-4
    assert (logits.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("fast", "expected one of"),
        ("tpu", "cannot run on cpu"),
        (("tpu", "fast"), "none can run"),
    ],
)
def test_an_implementation_that_cannot_run_is_refused_at_once(implementation, message):
    with pytest.raises(ValueError, match=message):
        Numerics("plain", implementation=implementation)


def test_packed_weights_go_through_the_kernels():
    """Weights are arguments: XLA on a CPU folds FP8 constants of an interpreted kernel wrongly.

    In `plain`: with rounded activations a sum that differs in its last bit may round to another value.
    """
    tokens = np.random.default_rng(0).integers(2, 1000, (1, 140))
    logits, calls = [], []
    for name in (INTERPRETED, "xla"):
        model = checkpoint.load(small_nano(), plain("float32", implementation=name))
        graphdef, params = nnx.split(model)
        run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))  # noqa: B023
        calls.append(str(run.trace(params, tokens).jaxpr).count("_packed"))
        logits.append(run(params, tokens))

    assert calls[0] > calls[1] == 0
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_reference_and_xla_agree_on_every_kind_of_layer():
    tokens = np.random.default_rng(0).integers(2, 256, (1, 139))
    logits = [
        Scorer(random_model(one_of_each(), plain(implementation=name), scan_layers=False)).logits(
            tokens
        )
        for name in ("reference", "xla")
    ]

    np.testing.assert_allclose(*logits, atol=2e-4)
