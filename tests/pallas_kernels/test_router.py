"""The choice of experts: kernel and XLA form against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.router import top_experts
from tests.tolerances import FLOAT32, assert_close

EXPERTS, K, SCALE = 256, 6, 1.5


@functools.cache
def _run(implementation: str):
    return jax.jit(functools.partial(top_experts, k=K, scale=SCALE, implementation=implementation))


def _inputs(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(shape))
    logits = np.round(3 * rng.standard_normal((*shape, EXPERTS)), 1).astype(np.float32)  # with ties
    return logits, np.round(rng.standard_normal(EXPERTS), 1).astype(np.float32)


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 37)], ids=str)
def test_experts_are_those_of_largest_biased_score(shape, implementation):
    logits, bias = _inputs(*shape)

    experts, weights = _run(implementation)(logits, bias)

    score = np.sqrt(np.logaddexp(logits.astype(np.float64), 0))
    biased = np.sqrt(np.asarray(jax.nn.softplus(logits))) + bias  # as rounded: ties are ties
    expected = np.argsort(-biased, axis=-1, kind="stable")[..., :K]
    np.testing.assert_array_equal(experts, expected)
    chosen = np.take_along_axis(score, expected, axis=-1)
    assert_close(weights, SCALE * chosen / chosen.sum(-1, keepdims=True), FLOAT32)


def test_the_kernel_gives_the_weights_of_the_xla_form():
    logits, bias = _inputs(3, 7)
    kernel, xla = (_run(i)(logits, bias) for i in ("interpret", "xla"))
    np.testing.assert_array_equal(kernel[0], xla[0])
    np.testing.assert_allclose(kernel[1], xla[1], rtol=2**-22)  # the sum of k in another order


def test_gradients_are_those_of_the_xla_form():
    logits, bias = _inputs(2, 5)
    direction = np.random.default_rng(1).standard_normal((2, 5, K))

    def loss(logits, implementation):
        return jnp.sum(_run(implementation)(logits, bias)[1] * direction)

    kernel, xla = (jax.grad(loss)(logits, i) for i in ("interpret", "xla"))
    assert np.abs(xla).max() > 0
    np.testing.assert_array_equal(kernel, xla)


def test_a_token_that_is_not_finite_goes_to_experts_there_are():
    logits, bias = _inputs(3, 1)
    sound = _run("interpret")(logits, bias)
    logits[1] = np.nan

    experts, weights = _run("interpret")(logits, bias)

    assert ((experts >= 0) & (experts < EXPERTS)).all()
    np.testing.assert_array_equal(experts[::2], sound[0][::2])
    np.testing.assert_array_equal(weights[::2], sound[1][::2])


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match=r"bias \(4,\) and k=2: expected \[256\]"):
        top_experts(jnp.zeros((1, 256)), jnp.zeros(4), k=2, scale=1.0)
    with pytest.raises(ValueError, match="k=300"):
        top_experts(jnp.zeros((1, 256)), jnp.zeros(256), k=300, scale=1.0)
    with pytest.raises(ValueError, match="whole 128 experts"):
        options = dict(k=2, scale=1.0, implementation="interpret")
        top_experts(jnp.zeros((1, 96)), jnp.zeros(96), **options)
