"""Experts of tokens whose rows are not in order, and sums over a token's experts, against float64 loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.quantize import QuantizedArray, quantize_weight
from pallas_kernels.formats.quantize_rows import round_rows
from pallas_kernels.formats.records import ACTIVATIONS
from pallas_kernels.grouped_matmul import (
    grouped_matmul,
    grouped_swiglu,
    of_pairs,
    pairs_by_expert,
    summed,
)
from tests.tolerances import BFLOAT16, FLOAT32, GRADIENT_FLOAT32, assert_close

EXPERTS, DIM, HIDDEN, LIMIT = 4, 256, 128, 2.0


def case(kind: str, dtype, tokens: int, choices: int):
    """x, weights of the three matrices, and of [T, K] pairs, and their experts: some are of none here."""
    rng = np.random.default_rng(tokens)

    def matrix(num_inputs, num_outputs):
        w = jnp.asarray(rng.standard_normal((EXPERTS, num_inputs, num_outputs)), jnp.float32) / 8
        return jax.jit(quantize_weight, static_argnums=1)(w, kind) if kind == "fp4" else w

    ws = matrix(DIM, HIDDEN), matrix(DIM, HIDDEN), matrix(HIDDEN, DIM)
    x = jnp.asarray(rng.standard_normal((tokens, DIM)), dtype)
    weights = jnp.asarray(rng.random((tokens, choices)) + 0.2, jnp.float32)
    expert = rng.integers(0, EXPERTS + 1, tokens * choices)
    expert[: 2 * choices] = 2  # more rows than a visit has
    return x, ws, weights, jnp.asarray(expert.reshape(tokens, choices), jnp.int32)


@functools.partial(jax.jit, static_argnames=("implementation", "in_steps", "rounding"))
def run(x, ws, weights, expert, *, implementation, in_steps=False, rounding=None):
    """float32 [T, D]; `in_steps` puts rows in order, rounds and adds outside of the operations."""
    gate, up, down = ws
    order, weights = pairs_by_expert(
        expert, weights, jnp.int32(0), EXPERTS, implementation=implementation
    )
    position = order.position.reshape(len(x), -1)
    options = dict(limit=LIMIT, implementation=implementation)

    def rounded(x):
        return round_rows(x, "fp8", 128, implementation="xla") if rounding else x

    if in_steps:
        rows = of_pairs(rounded(x), order.row)
        hidden = rounded(grouped_swiglu(rows, gate, up, order.sizes, weights, **options))
        out = grouped_matmul(hidden, down, order.sizes, implementation=implementation)
        return summed(out, position)
    options["rounding"] = rounding
    hidden = grouped_swiglu(x, gate, up, order.sizes, weights, pair=order.row, **options)
    del options["limit"]
    return grouped_matmul(hidden, down, order.sizes, position=position, **options)


def loop(x, ws, weights, expert) -> np.ndarray:
    gate, up, down = (np.asarray(dense(w), np.float64) for w in ws)
    x = np.asarray(x, np.float64)
    weights, expert = np.asarray(weights), np.asarray(expert)
    out = np.zeros(x.shape)
    for t, j in np.ndindex(*expert.shape):
        e = expert[t, j]
        if e < EXPERTS:
            a, b = np.minimum(x[t] @ gate[e], LIMIT), np.clip(x[t] @ up[e], -LIMIT, LIMIT)
            out[t] += weights[t, j] * (a / (1 + np.exp(-a)) * b) @ down[e]
    return out


def dense(w) -> jax.Array:
    return w.dequantize() if isinstance(w, QuantizedArray) else w


@pytest.mark.parametrize(
    "kind, dtype, tokens, choices",
    [
        ("fp4", jnp.bfloat16, 8, 6),  # the kernel puts rows in order
        ("f32", jnp.float32, 5, 3),
        ("f32", jnp.float32, 7, 2),  # too many tokens for it
        ("f32", jnp.float32, 129, 3),  # too many rows
    ],
)
@pytest.mark.parametrize("implementation", ["interpret", "xla", "reference"])
def test_sums_over_the_experts_of_tokens(kind, dtype, tokens, choices, implementation):
    args = case(kind, dtype, tokens, choices)

    out = run(*args, implementation=implementation)

    assert (out.shape, out.dtype) == ((tokens, DIM), jnp.float32)
    assert_close(out, loop(*args), FLOAT32 if dtype == jnp.float32 else BFLOAT16)
    if implementation == "interpret":
        steps = run(*args, implementation=implementation, in_steps=True)
        np.testing.assert_array_equal(out, steps)  # rounded and added alike


@pytest.mark.parametrize("tokens, choices", [(8, 6), (7, 2)])
def test_rows_are_rounded_as_before_the_products(tokens, choices):
    """By the kernel for few rows, and before the others."""
    args = case("fp4", jnp.bfloat16, tokens, choices)
    form = dict(rounding=ACTIVATIONS, implementation="interpret")

    out = run(*args, **form)

    np.testing.assert_array_equal(out, run(*args, **form, in_steps=True))
    assert jnp.any(out != run(*args, implementation="interpret"))


@pytest.mark.parametrize("rounding", [None, ACTIVATIONS], ids=["as they are", "rounded"])
def test_gradients_are_those_of_rows_in_order(rounding):
    x, ws, weights, expert = case("f32", jnp.float32, 5, 3)
    d_out = jnp.asarray(np.random.default_rng(0).standard_normal(x.shape), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(implementation, x, ws, weights):
        def loss(x, ws, weights):
            form = dict(implementation=implementation, rounding=rounding)
            return jnp.sum(run(x, ws, weights, expert, **form) * d_out)

        return jax.grad(loss, (0, 1, 2))(x, ws, weights)

    found, expected = gradients("interpret", x, ws, weights), gradients("xla", x, ws, weights)

    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(one, other, GRADIENT_FLOAT32)


def test_packed_experts_get_no_gradient_and_their_rows_do():
    x, ws, weights, expert = case("fp4", jnp.float32, 5, 3)

    def loss(x, weights, implementation):
        return jnp.sum(run(x, ws, weights, expert, implementation=implementation) ** 2)

    grad = jax.grad(loss, (0, 1))

    for one, other in zip(grad(x, weights, "interpret"), grad(x, weights, "xla"), strict=True):
        assert_close(one, other, GRADIENT_FLOAT32)


def test_numbers_that_are_not_finite_stay_with_their_token():
    x, ws, weights, expert = case("fp4", jnp.bfloat16, 8, 6)
    clean = run(x, ws, weights, expert, implementation="interpret")

    found = run(x.at[1, 3].set(jnp.nan), ws, weights, expert, implementation="interpret")

    assert np.isnan(found[1]).all()
    others = np.arange(8) != 1
    np.testing.assert_array_equal(found[others], clean[others])


def test_tokens_whose_experts_are_all_elsewhere_get_zeros():
    x, ws, weights, expert = case("fp4", jnp.bfloat16, 8, 6)

    out = run(x, ws, weights, jnp.full_like(expert, EXPERTS), implementation="interpret")

    np.testing.assert_array_equal(out, 0)


def test_pairs_and_places_that_do_not_agree_are_refused():
    x, (gate, up, down), weights, expert = case("f32", jnp.float32, 5, 3)
    order, weights = pairs_by_expert(expert, weights, jnp.int32(0), EXPERTS)
    with pytest.raises(ValueError, match="15 pairs must be a multiple of the 4 rows of x"):
        grouped_swiglu(x[:4], gate, up, order.sizes, weights, limit=LIMIT, pair=order.row)
    rows = jnp.zeros((15, HIDDEN))
    with pytest.raises(ValueError, match=r"position \(4, 3\) must be \[T, K\] with T \* K = 15"):
        grouped_matmul(rows, down, order.sizes, position=order.position.reshape(5, 3)[:4])
