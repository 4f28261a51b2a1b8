"""Products with what the files hold in bfloat16: head, router, compressors, the weights of index heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sharding import AxisRules
from tests.tolerances import FLOAT32, assert_close
from v4jax import plain, tiny
from v4jax.nn.layers import KeyStream, ModelContext, WideLinear
from v4jax.nn.model import Vocabulary


def _products(kind: str, dtype):
    """A function of rows [2, 5, D], and the float32 matrix [D, N] that it multiplies with."""
    context = ModelContext(tiny(), plain(dtype), AxisRules(), KeyStream(jax.random.key(0)))
    if kind == "head":
        head = Vocabulary(context)
        return head.products, head.table[...].T
    linear = WideLinear(context, tiny().embed_dim, 8)
    return linear, linear.kernel[...]


@pytest.mark.parametrize("kind", ["head", "router"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_factors_are_as_wide_as_activations_and_sums_are_float32(kind, dtype):
    """With factors of bfloat16 a TPU makes one pass, and with those of float32 six."""
    product, matrix = _products(kind, dtype)
    x = jax.random.normal(jax.random.key(1), (2, 5, tiny().embed_dim), dtype)

    out = product(x)

    assert matrix.dtype == jnp.float32 and out.dtype == jnp.float32
    wide_x, wide_matrix = (np.asarray(y.astype(dtype), np.float64) for y in (x, matrix))
    assert_close(out, wide_x @ wide_matrix, FLOAT32)
    (dot,) = (e for e in jax.make_jaxpr(product)(x).eqns if e.primitive.name == "dot_general")
    assert all(factor.aval.dtype == dtype for factor in dot.invars)
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert dot.params["precision"] == (highest if dtype == jnp.float32 else None)


def test_gradients_of_a_float32_matrix_are_float32():
    """Beside activations in bfloat16, against the sum over tokens in float64."""
    product, _ = _products("router", jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (2, 200, tiny().embed_dim), jnp.bfloat16)
    d_out = jax.random.normal(jax.random.key(2), (2, 200, 8))
    graphdef, params = nnx.split(product)

    gradient = jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(x) * d_out))(params)

    gradient = gradient["kernel"].get_value()
    assert gradient.dtype == jnp.float32
    expected = np.einsum("btd,btn->dn", *(np.asarray(y, np.float64) for y in (x, d_out)))
    assert_close(gradient, expected, 2**-8)
