"""Gated pooling against a float64 loop over windows."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.gated_pool import Pool, pool_windows
from tests.tolerances import FLOAT32, GRADIENT_FLOAT32, assert_close

mean_of_windows = jax.jit(lambda *inputs: pool_windows(*inputs).mean())


def pooled(value, gate, bias, valid) -> np.ndarray:
    """[B, S, R, F] -> [B, S, F] in float64; zero where no row counts."""
    out = np.zeros((*value.shape[:2], value.shape[3]))
    for b, s in np.ndindex(*valid.shape[:2]):
        rows = np.flatnonzero(valid[b, s])
        if rows.size:
            logits = gate[b, s, rows].astype(np.float64) + bias[rows]
            weights = np.exp(logits - logits.max(axis=0))
            weights /= weights.sum(axis=0)
            out[b, s] = (weights * value[b, s, rows].astype(np.float64)).sum(axis=0)
    return out


def inputs(batch: int, windows: int, ratio: int, width: int, dtype=np.float32):
    rng = np.random.default_rng(ratio)
    shape = (batch, windows, ratio, width)
    value = rng.standard_normal(shape).astype(dtype)
    gate = (3 * rng.standard_normal(shape)).astype(dtype)
    return value, gate, rng.standard_normal((ratio, width)).astype(np.float32)


def valid_rows(kind: str, shape: tuple[int, int, int]) -> np.ndarray:
    valid = np.random.default_rng(0).random(shape) < 0.5
    match kind:
        case "all":
            valid[:] = True
        case "none":
            valid[:] = False
        case "tail missing":
            valid[:] = np.arange(shape[2]) < shape[2] // 2 + 1
        case "scattered":
            valid[0, 0] = False  # one empty window among others
    return valid


def derivative(f, args: list[np.ndarray], which: int, index: tuple[int, ...]) -> float:
    """Central difference of the scalar `f(*args)` in one entry of one argument, in float64."""
    step = 1e-5
    up, down = ([a.astype(np.float64) for a in args] for _ in range(2))
    up[which][index] += step
    down[which][index] -= step
    return (f(*up) - f(*down)) / (2 * step)


@pytest.mark.parametrize("kind", ["all", "none", "tail missing", "scattered"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("batch, windows, ratio, width", [(2, 3, 4, 8), (1, 2, 128, 3)])
def test_pooled_value_equals_float64_loop(batch, windows, ratio, width, dtype, kind):
    value, gate, bias = inputs(batch, windows, ratio, width, dtype)
    valid = valid_rows(kind, value.shape[:3])
    out = mean_of_windows(value, gate, bias, valid)
    assert out.dtype == jnp.float32  # whatever the inputs
    assert_close(out, pooled(value, gate, bias, valid), FLOAT32)


def test_no_mask_means_that_all_rows_count():
    value, gate, bias = inputs(2, 3, 4, 8)
    expected = pooled(value, gate, bias, valid_rows("all", value.shape[:3]))
    assert_close(mean_of_windows(value, gate, bias), expected, FLOAT32)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_gates_of_any_size_neither_overflow_nor_vanish(offset):
    value, gate, _ = inputs(2, 3, 4, 8)
    gate, bias = np.round(gate * 8) / 8, np.zeros((4, 8), np.float32)  # exact beside the offset
    valid = valid_rows("scattered", value.shape[:3])
    expected = pooled(value, gate, bias, valid)
    assert_close(mean_of_windows(value, gate + np.float32(offset), bias, valid), expected, FLOAT32)


def test_rows_that_do_not_count_change_nothing():
    value, gate, bias = inputs(2, 3, 4, 8)
    valid = valid_rows("scattered", value.shape[:3])
    expected = mean_of_windows(value, gate, bias, valid)
    value[~valid], gate[~valid] = 1e9, 1e9
    np.testing.assert_array_equal(mean_of_windows(value, gate, bias, valid), expected)


def parts_of(value, gate, bias, valid, cuts: list[int]) -> list[Pool]:
    """The partial sums of the rows between consecutive cuts."""
    bounds = [0, *cuts, value.shape[2]]
    pool = jax.jit(pool_windows)
    return [
        pool(value[:, :, a:b], gate[:, :, a:b], bias[a:b], valid[:, :, a:b])
        for a, b in itertools.pairwise(bounds)
    ]


@pytest.mark.parametrize("kind", ["all", "scattered"])
def test_joined_parts_equal_pooling_everything_at_once(kind):
    value, gate, bias = inputs(2, 3, 8, 5)
    valid = valid_rows(kind, value.shape[:3])
    valid[:, :, :2] &= kind == "all"  # else the first part is empty everywhere
    a, b, c = parts_of(value, gate, bias, valid, [2, 5])
    expected = pooled(value, gate, bias, valid)
    for joined in (a.join(b).join(c), a.join(b.join(c)), c.join(a).join(b)):
        assert_close(joined.mean(), expected, FLOAT32)


def test_rows_joined_one_at_a_time_equal_the_window():
    value, gate, bias = inputs(1, 2, 4, 5)
    valid = valid_rows("all", value.shape[:3])
    pool = functools.reduce(
        Pool.join, parts_of(value, gate, bias, valid, [1, 2, 3]), Pool.empty((1, 2, 5))
    )
    assert_close(pool.mean(), pooled(value, gate, bias, valid), FLOAT32)


def test_empty_pool_joins_as_nothing_and_has_mean_zero():
    value, gate, bias = inputs(1, 2, 4, 5)
    (pool,) = parts_of(value, gate, bias, valid_rows("all", (1, 2, 4)), [])
    empty = Pool.empty((1, 2, 5))
    for joined in (pool.join(empty), empty.join(pool)):
        for actual, expected in zip(jax.tree.leaves(joined), jax.tree.leaves(pool), strict=True):
            np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(empty.join(empty).mean(), np.zeros((1, 2, 5)))


@pytest.mark.parametrize("kind", ["all", "none", "scattered"])
@pytest.mark.parametrize("ratio", [4, 128])
def test_gradients_equal_central_differences(ratio, kind):
    value, gate, bias = inputs(1, 2, ratio, 3)
    valid = valid_rows(kind, value.shape[:3])
    d_out = np.random.default_rng(1).standard_normal((1, 2, 3)).astype(np.float32)

    def loss(value, gate, bias):
        return jnp.sum(pool_windows(value, gate, bias, valid).mean() * d_out)

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(value, gate, bias)
    for grad in grads[:2]:
        np.testing.assert_array_equal(grad[~valid], 0)

    def truth(*args):
        return np.sum(pooled(*args, valid) * d_out)

    rng = np.random.default_rng(2)
    for which, grad in enumerate(grads):
        entries = [tuple(rng.integers(grad.shape)) for _ in range(12)]
        entries.append(np.unravel_index(np.argmax(np.abs(grad)), grad.shape))  # sets the measure
        expected = [derivative(truth, [value, gate, bias], which, i) for i in entries]
        assert_close([float(grad[i]) for i in entries], expected, GRADIENT_FLOAT32)


def test_gradients_pass_through_joined_pools():
    value, gate, bias = inputs(1, 2, 6, 3)
    valid = valid_rows("scattered", (1, 2, 6))
    d_out = np.random.default_rng(1).standard_normal((1, 2, 3)).astype(np.float32)

    def loss(value, gate, cut):
        parts = [
            pool_windows(value[:, :, s], gate[:, :, s], bias[s], valid[:, :, s])
            for s in (slice(None, cut), slice(cut, None))
            if cut or s.start is not None
        ]
        return jnp.sum(functools.reduce(Pool.join, parts).mean() * d_out)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    for joined, whole in zip(grad(value, gate, 2), grad(value, gate, 0), strict=True):
        assert_close(joined, whole, GRADIENT_FLOAT32)


@pytest.mark.parametrize(
    "value, gate, bias",
    [
        ((2, 3, 4, 8), (2, 3, 4, 7), (4, 8)),
        ((2, 3, 4, 8), (2, 3, 4, 8), (8,)),
        ((2, 3, 4, 8), (2, 3, 4, 8), (3, 8)),
        ((3, 4, 8), (3, 4, 8), (4, 8)),
    ],
)
def test_shapes_that_do_not_agree_are_refused(value, gate, bias):
    with pytest.raises(ValueError, match=r"must both be \[B, S, R, F\]"):
        pool_windows(jnp.zeros(value), jnp.zeros(gate), jnp.zeros(bias))


# The kernel, in the interpreter

KERNEL_SHAPES = [
    (2, 1, 4, 128),
    (1, 37, 4, 256),
    (2, 3, 128, 128),
    (1, 19, 8, 128),
    (1, 40, 3, 128),
]


@pytest.mark.parametrize("kind", [None, "scattered"])
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_kernel_gives_the_partial_sums_of_the_xla_form(shape, kind):
    args = inputs(*shape)
    if kind:
        args += (valid_rows(kind, shape[:3]),)
    actual, expected = (
        jax.jit(functools.partial(pool_windows, implementation=i))(*args)
        for i in ("interpret", "xla")
    )
    np.testing.assert_array_equal(actual.peak, expected.peak)
    assert_close(actual.weight, expected.weight, FLOAT32)
    assert_close(actual.total, expected.total, FLOAT32)


@pytest.mark.parametrize("ratio", [4, 8])
def test_gradients_through_the_kernel_equal_those_of_the_xla_form(ratio):
    value, gate, bias = inputs(1, 5, ratio, 128)
    valid = valid_rows("scattered", value.shape[:3])
    d_out = np.random.default_rng(1).standard_normal((1, 5, 128)).astype(np.float32)

    def grad(implementation):
        def loss(*args):
            pool = pool_windows(*args, valid, implementation=implementation)
            return jnp.sum(pool.join(pool).mean() * d_out)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(value, gate, bias)

    for actual, expected in zip(grad("interpret"), grad("xla"), strict=True):
        assert_close(actual, expected, GRADIENT_FLOAT32)


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((1, 2, 4, 96), np.float32, "whole blocks of 128 channels"),
        ((1, 2, 200, 128), np.float32, "up to 128 rows"),
        ((1, 2, 4, 128), ml_dtypes.bfloat16, "value is bfloat16"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_by_name_and_falls_back(shape, dtype, message):
    args = inputs(*shape, dtype)
    with pytest.raises(ValueError, match=message):
        pool_windows(*args, implementation="interpret")
    assert pool_windows(*args).peak.shape == (1, 2, shape[3])


def test_valid_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"valid \(2, 3\) must be"):
        pool_windows(*inputs(2, 3, 4, 8), np.ones((2, 3), bool))
