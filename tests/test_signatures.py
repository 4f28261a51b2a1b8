"""Shapes in signatures: every test checks them (conftest), this one that the check can fail."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Float, Int32

from pallas_kernels import dispatch, signatures
from pallas_kernels.linear.ops import linear


@signatures.shaped
def scores(
    q: Float[jax.Array, "B T H"], keys: Float[jax.Array, "B S H"], at: Int32[jax.Array, " B"] | None
) -> tuple[Float[jax.Array, "B T S"], int]:
    del at
    return jnp.einsum("bth,bsh->bts", q, keys), 0


Q, KEYS, AT = jnp.zeros((2, 3, 4)), jnp.zeros((2, 5, 4)), jnp.zeros(2, jnp.int32)


@pytest.mark.parametrize("at", [AT, None])
def test_what_the_signature_says_passes(at):
    assert scores(Q, KEYS, at)[0].shape == (2, 3, 5)
    assert jax.eval_shape(scores, Q, KEYS, at)[0].shape == (2, 3, 5)


@pytest.mark.parametrize(
    "keys, at, message",
    [
        (KEYS, AT.astype(jnp.float32), r"at of scores: expected Int32.*'B'.* found float32 \(2,\)"),
        (KEYS, jnp.zeros(3, jnp.int32), r"at of scores: expected Int32.*'B'.* found int32 \(3,\)"),
        (KEYS.astype(jnp.int32), AT, r"keys of scores: expected Float.* found int32 \(2, 5, 4\)"),
    ],
)
def test_another_dtype_or_length_is_found(keys, at, message):
    with pytest.raises(signatures.SignatureError, match=message):
        scores(Q, keys, at)


def test_a_result_of_another_shape_is_found():
    """What somebody registers as an implementation is held to the operation's signature."""
    dispatch.register("narrow", linear)(lambda x, w, groups=1: (x @ w)[..., 1:])

    with pytest.raises(signatures.SignatureError, match="result of linear: expected Float"):
        linear(jnp.zeros((3, 4)), jnp.zeros((4, 5)), implementation="narrow")
