"""Grouped matmuls against a float64 loop over experts."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.formats.quantize import QuantizedArray, quantize_weight
from pallas_kernels.grouped_matmul import (
    block_sizes,
    grouped_matmul,
    grouped_swiglu,
    swiglu,
    visits,
)
from tests.reference.fp4 import two_codes
from tests.tolerances import BFLOAT16, FLOAT32, GRADIENT_FLOAT32, assert_close

P, IN, HIDDEN, LIMIT = 43, 64, 10, 2.0
IMPLEMENTATIONS = ["xla", "reference"]
# The xla implementation has tiles of 16 rows here: the power of two not below P / E.
GROUP_SIZES = [
    (11, 9, 13, 10),
    (17, 0, 1, 25),  # groups of more than one tile, an empty one, a single row
    (0, 0, 43, 0),  # all rows with one expert: three tiles, the last one short
    (43, 0, 0, 0),
    (0, 0, 0, 43),
    (16, 0, 16, 11),  # groups that end where a tile ends
]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

quantize = jax.jit(quantize_weight, static_argnums=1)
matmul = jax.jit(grouped_matmul, static_argnames="implementation")
activate = jax.jit(grouped_swiglu, static_argnames=("limit", "implementation"))


@functools.partial(jax.jit, static_argnums=0)
def matmul_gradients(implementation, x, w, group_sizes, d_out):
    """Of x and, if it is float, w."""
    floats = (0, 1) if isinstance(w, jax.Array) else 0

    def loss(x, w):
        return jnp.sum(grouped_matmul(x, w, group_sizes, implementation=implementation) * d_out)

    return jax.tree.leaves(jax.grad(loss, floats)(x, w))


@functools.partial(jax.jit, static_argnums=0)
def activate_gradients(implementation, x, w_gate, w_up, group_sizes, row_weights, d_out):
    """Of x, row_weights and, if they are float, w_gate and w_up."""
    floats = (0, 1, 2, 3) if isinstance(w_gate, jax.Array) else (0, 1)

    def loss(x, row_weights, w_gate, w_up):
        out = grouped_swiglu(
            x, w_gate, w_up, group_sizes, row_weights, limit=LIMIT, implementation=implementation
        )
        return jnp.sum(out.astype(jnp.float32) * d_out)

    return jax.grad(loss, floats)(x, row_weights, w_gate, w_up)


def groups(group_sizes):
    """(expert, its rows) in turn."""
    bounds = np.concatenate([[0], np.cumsum(group_sizes)])
    return [(e, slice(bounds[e], bounds[e + 1])) for e in range(len(group_sizes))]


def matmul_loop(x, w, group_sizes) -> np.ndarray:
    out = np.zeros((x.shape[0], w.shape[2]))
    for e, rows in groups(group_sizes):
        out[rows] = x[rows].astype(np.float64) @ w[e].astype(np.float64)
    return out


def swiglu_loop(x, w_gate, w_up, group_sizes, row_weights) -> np.ndarray:
    gate = np.minimum(matmul_loop(x, w_gate, group_sizes), LIMIT)
    up = np.clip(matmul_loop(x, w_up, group_sizes), -LIMIT, LIMIT)
    return row_weights.astype(np.float64)[:, None] * gate / (1 + np.exp(-gate)) * up


def dense(packed) -> np.ndarray:
    """float64 weights of a quantised array, unpacked byte by byte and block by block."""
    values, scale = np.asarray(packed.values), np.asarray(packed.scale).astype(np.float64)
    if values.dtype == np.uint8:
        half = min(values.shape[1], 128)
        blocks = [values[:, i : i + half] for i in range(0, values.shape[1], half)]
        out = np.concatenate([E2M1[b] for v in blocks for b in two_codes(v)], axis=1)
    else:
        out = values.astype(np.float64)
    rows, cols = packed.block
    for e, i, j in np.ndindex(*scale.shape):
        out[e, i * rows : (i + 1) * rows, j * cols : (j + 1) * cols] *= scale[e, i, j]
    return out


def weight_pair(kind: str):
    """Two weights as the ops take them, and both as float64."""
    rng = np.random.default_rng(1)
    # Scales differ between experts and inputs; products exceed the clamp about half of the time.
    size = np.exp2(rng.integers(-3, 3, (4, IN // 32, 1, 1)))
    pair = [rng.standard_normal((4, IN // 32, 32, HIDDEN)) * size / 6 for _ in range(2)]
    pair = [w.reshape(4, IN, HIDDEN) for w in pair]
    match kind:
        case "f32" | "bf16":
            dtype = np.float32 if kind == "f32" else ml_dtypes.bfloat16
            pair = [jnp.asarray(w.astype(dtype)) for w in pair]
            return pair, [np.asarray(w).astype(np.float64) for w in pair]
        case _:
            pair = [quantize(jnp.asarray(w, jnp.float32), kind) for w in pair]
            return pair, [dense(w) for w in pair]


def rows_of(dtype=np.float32):
    """x, row weights and a cotangent for both ops."""
    rng = np.random.default_rng(2)
    x, d_out = rng.standard_normal((P, IN)), rng.standard_normal((P, HIDDEN))
    return x.astype(dtype), rng.random(P).astype(np.float32) + 0.2, d_out.astype(np.float32)


def sizes_array(group_sizes) -> np.ndarray:
    assert sum(group_sizes) == P
    return np.asarray(group_sizes, np.int32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["f32", "fp8", "fp4"])
@pytest.mark.parametrize("group_sizes", GROUP_SIZES, ids=str)
def test_matmul_equals_float64_loop_over_experts(group_sizes, kind, implementation):
    (w, _), (w_dense, _) = weight_pair(kind)
    x = rows_of()[0]
    out = matmul(x, w, sizes_array(group_sizes), implementation=implementation)
    assert_close(out, matmul_loop(x, w_dense, group_sizes), FLOAT32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["f32", "fp8", "fp4"])
@pytest.mark.parametrize("group_sizes", GROUP_SIZES, ids=str)
def test_swiglu_equals_float64_loop_over_experts(group_sizes, kind, implementation):
    pair, pair_dense = weight_pair(kind)
    x, row_weights, _ = rows_of()
    sizes = sizes_array(group_sizes)
    out = activate(x, *pair, sizes, row_weights, limit=LIMIT, implementation=implementation)
    expected = swiglu_loop(x, *pair_dense, group_sizes, row_weights)
    assert_close(out, expected, FLOAT32)


def test_clamps_are_reached_in_these_tests():
    # On both sides for `up`; a gate far below -LIMIT is left alone, and must not be clamped there.
    _, pair = weight_pair("f32")
    gate, up = (matmul_loop(rows_of()[0], w, GROUP_SIZES[0]) for w in pair)
    for share in (gate > LIMIT, gate < -LIMIT, up > LIMIT, up < -LIMIT, np.abs(up) < LIMIT):
        assert share.mean() > 0.1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp4"])
def test_bfloat16_rows(kind, implementation):
    pair, pair_dense = weight_pair(kind)
    x, row_weights, _ = rows_of(ml_dtypes.bfloat16)
    sizes = sizes_array(GROUP_SIZES[1])
    out = matmul(x, pair[0], sizes, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    assert_close(out, matmul_loop(x, pair_dense[0], GROUP_SIZES[1]), BFLOAT16)
    out = activate(x, *pair, sizes, row_weights, limit=LIMIT, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    assert_close(out, swiglu_loop(x, *pair_dense, GROUP_SIZES[1], row_weights), BFLOAT16)


@pytest.mark.parametrize("num_rows", [8, 128])  # the kernel for few rows, and that for many
@pytest.mark.parametrize("chip", ["v6e", "v7x"])  # they make bfloat16 of e4m3 in different ways
@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_kernels_read_every_code(kind, chip, num_rows, monkeypatch):
    monkeypatch.setattr(dispatch, "target_chip", lambda: chip)
    codes = np.arange(128 * 128).reshape(1, 128, 128) % 256
    if kind == "fp8":
        codes[codes % 128 == 127] = 0  # NaN
        values = codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
        w = QuantizedArray(jnp.asarray(values), jnp.ones((1, 1, 1), jnp.float8_e8m0fnu), (128, 128))
    else:
        scale = jnp.ones((1, 4, 128), jnp.float8_e8m0fnu)
        w = QuantizedArray(jnp.asarray(codes[:, :64].astype(np.uint8)), scale, (32, 1))
    x = np.roll(np.eye(128, dtype=ml_dtypes.bfloat16), 3, axis=1)[:num_rows]
    sizes = np.array([num_rows], np.int32)
    out = grouped_matmul(x, w, sizes, implementation="interpret")
    np.testing.assert_array_equal(np.float64(out), np.float64(x) @ dense(w)[0])


@pytest.mark.parametrize("num_rows, group_sizes", [(0, (0, 0)), (1, (0, 1)), (5, (3, 2))])
def test_fewer_rows_than_a_tile(num_rows, group_sizes):
    rng = np.random.default_rng(num_rows)
    x = rng.standard_normal((num_rows, 6)).astype(np.float32)
    w = rng.standard_normal((2, 6, 3)).astype(np.float32)
    for implementation in IMPLEMENTATIONS:
        out = matmul(x, w, np.asarray(group_sizes, np.int32), implementation=implementation)
        assert_close(out, matmul_loop(x, w, group_sizes), FLOAT32)


def test_more_rows_than_the_largest_tile():
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (700, 4)).astype(np.float32)  # products exact
    w = rng.integers(-3, 4, (2, 4, 3)).astype(np.float32)
    for group_sizes in ((599, 101), (0, 700)):
        out = matmul(x, w, np.asarray(group_sizes, np.int32), implementation="xla")
        np.testing.assert_array_equal(out, matmul_loop(x, w, group_sizes))


def test_weights_of_experts_without_rows_are_not_touched():
    pair, _ = weight_pair("f32")
    pair = [w.at[1].set(jnp.nan) for w in pair]
    x, row_weights, d_out = rows_of()
    sizes = sizes_array(GROUP_SIZES[1])  # expert 1 has no rows
    assert np.isfinite(matmul(x, pair[0], sizes, implementation="xla")).all()
    grads = activate_gradients("xla", x, *pair, sizes, row_weights, d_out)
    for grad in grads:
        assert np.isfinite(grad).all()
    for d_w in grads[2:]:
        np.testing.assert_array_equal(d_w[1], 0)
        assert all(np.abs(d_w[e]).max() > 0 for e in (0, 2, 3))


def assert_gradients_equal_differences(grads, truth, args, h=1e-6):
    """A few entries of each gradient, with central differences of a float64 function."""
    rng = np.random.default_rng(3)
    for which, grad in enumerate(grads):
        entries = [tuple(rng.integers(grad.shape)) for _ in range(8)]
        entries.append(np.unravel_index(np.argmax(np.abs(grad)), grad.shape))  # sets the measure
        expected = []
        for entry in entries:
            moved = [[a.astype(np.float64) for a in args] for _ in range(2)]
            moved[0][which][entry] += h
            moved[1][which][entry] -= h
            expected.append((truth(*moved[0]) - truth(*moved[1])) / (2 * h))
        assert_close([float(grad[entry]) for entry in entries], expected, GRADIENT_FLOAT32)


@pytest.mark.parametrize("kind", ["f32", "fp8", "fp4"])
@pytest.mark.parametrize("group_sizes", [GROUP_SIZES[1], GROUP_SIZES[2]], ids=str)
def test_matmul_gradients(group_sizes, kind):
    (w, _), (w_dense, _) = weight_pair(kind)
    x, _, d_out = rows_of()
    sizes = sizes_array(group_sizes)
    grads = matmul_gradients("xla", x, w, sizes, d_out)
    assert len(grads) == (2 if kind == "f32" else 1)
    for grad, expected in zip(grads, matmul_gradients("reference", x, w, sizes, d_out)):
        assert_close(grad, expected, GRADIENT_FLOAT32)

    def truth(x, w):
        return np.sum(matmul_loop(x, w, group_sizes) * d_out)

    assert_gradients_equal_differences(grads, truth, [x, w_dense])


@pytest.mark.parametrize("kind", ["f32", "fp8", "fp4"])
@pytest.mark.parametrize("group_sizes", [GROUP_SIZES[1], GROUP_SIZES[2]], ids=str)
def test_swiglu_gradients(group_sizes, kind):
    pair, pair_dense = weight_pair(kind)
    x, row_weights, d_out = rows_of()
    sizes = sizes_array(group_sizes)
    grads = activate_gradients("xla", x, *pair, sizes, row_weights, d_out)
    expected = activate_gradients("reference", x, *pair, sizes, row_weights, d_out)
    assert len(grads) == (4 if kind == "f32" else 2)
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert_close(grad, expected_grad, GRADIENT_FLOAT32)

    def truth(x, row_weights, w_gate, w_up):
        return np.sum(swiglu_loop(x, w_gate, w_up, group_sizes, row_weights) * d_out)

    assert_gradients_equal_differences(grads, truth, [x, row_weights, *pair_dense])


@pytest.mark.parametrize("kind", ["bf16", "fp4"])
def test_swiglu_gradients_of_bfloat16_rows(kind):
    pair, pair_dense = weight_pair(kind)
    x, row_weights, d_out = rows_of(ml_dtypes.bfloat16)
    sizes = sizes_array(GROUP_SIZES[1])
    # Hidden values this close to a clamp may round to its other side: their gradient is left out.
    for w in pair_dense:
        distance = np.abs(np.abs(matmul_loop(x, w, GROUP_SIZES[1])) - LIMIT)
        d_out = np.where(distance < BFLOAT16 * LIMIT, np.float32(0), d_out)
    grads = activate_gradients("xla", x, *pair, sizes, row_weights, d_out)
    wide = [jnp.asarray(w, jnp.float32) for w in pair_dense]
    expected = activate_gradients(
        "reference", x.astype(np.float32), *wide, sizes, row_weights, d_out
    )
    for grad, expected_grad in zip(grads, expected):
        assert_close(grad, expected_grad, BFLOAT16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "gate, up, d_gate_is_zero, d_up_is_zero",
    [
        (1.0, 1.0, False, False),
        (2.5, 1.0, True, False),  # gate clipped from above
        (-2.5, 1.0, False, False),  # but not from below
        (1.0, 2.5, False, True),
        (1.0, -2.5, False, True),
        (2.5, -2.5, True, True),
    ],
)
def test_gradient_is_zero_outside_the_clamp(gate, up, d_gate_is_zero, d_up_is_zero, implementation):
    x = np.array([[1.0]], np.float32)
    w_gate, w_up = (jnp.full((1, 1, 1), v, jnp.float32) for v in (gate, up))
    one = np.ones((1, 1), np.float32)
    sizes, row_weights = np.array([1], np.int32), np.array([0.5], np.float32)
    d_x, _, d_gate, d_up = activate_gradients(
        implementation, x, w_gate, w_up, sizes, row_weights, one
    )

    clipped_gate, clipped_up = min(gate, LIMIT), float(np.clip(up, -LIMIT, LIMIT))
    sigmoid = 1 / (1 + np.exp(-clipped_gate))
    slope = sigmoid * (1 + clipped_gate * (1 - sigmoid))
    expected_gate = 0.0 if d_gate_is_zero else 0.5 * slope * clipped_up
    expected_up = 0.0 if d_up_is_zero else 0.5 * clipped_gate * sigmoid
    np.testing.assert_allclose(d_gate, [[[expected_gate]]], rtol=FLOAT32)
    np.testing.assert_allclose(d_up, [[[expected_up]]], rtol=FLOAT32)
    np.testing.assert_allclose(d_x, [[expected_gate * gate + expected_up * up]], rtol=FLOAT32)


def test_swiglu_is_computed_in_float32_and_clips_the_gate_from_above_only():
    gate = np.array([-30.0, -3.0, 0.0, 1.5, 2.5, 1e4], ml_dtypes.bfloat16)
    up = np.array([1.0, -7.0, 1.0, 0.3, 7.0, -1.0], ml_dtypes.bfloat16)
    wide_gate = np.minimum(gate.astype(np.float64), LIMIT)
    expected = wide_gate / (1 + np.exp(-wide_gate)) * np.clip(up.astype(np.float64), -LIMIT, LIMIT)
    out = swiglu(jnp.asarray(gate), jnp.asarray(up), LIMIT)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=FLOAT32)


@pytest.mark.parametrize(
    "x, w, sizes",
    [
        ((5, 4), (2, 3, 6), (2,)),
        ((5, 4), (2, 4, 6), (3,)),
        ((5, 4), (4, 6), (4,)),
        ((1, 5, 4), (2, 4, 6), (2,)),
    ],
)
def test_shapes_that_do_not_agree_are_refused(x, w, sizes):
    x, w, sizes = jnp.zeros(x), jnp.zeros(w), jnp.zeros(sizes, jnp.int32)
    with pytest.raises(ValueError, match=r"must be \[P, in\]"):
        grouped_matmul(x, w, sizes)
    with pytest.raises(ValueError, match=r"must be \[P, in\]"):
        grouped_swiglu(x, w, w, sizes, jnp.zeros(x.shape[:1]), limit=LIMIT)


def test_packed_weights_are_checked_by_their_logical_shape():
    packed = quantize(jnp.zeros((2, 64, 10)), "fp4")
    with pytest.raises(ValueError, match=r"weights \(2, 64, 10\)"):
        grouped_matmul(jnp.zeros((5, 32)), packed, jnp.zeros((2,), jnp.int32))


def test_row_weights_must_be_one_per_row():
    x, w, sizes = jnp.zeros((5, 4)), jnp.zeros((2, 4, 6)), jnp.zeros((2,), jnp.int32)
    with pytest.raises(ValueError, match=r"row_weights \(4,\) must be \[P\] with P=5"):
        grouped_swiglu(x, w, w, sizes, jnp.zeros((4,)), limit=LIMIT)


def test_unknown_implementation_is_refused():
    x, w, sizes = jnp.zeros((5, 4)), jnp.zeros((2, 4, 6)), jnp.zeros((2,), jnp.int32)
    with pytest.raises(ValueError, match=r"implementation='cuda': expected one of"):
        grouped_matmul(x, w, sizes, implementation="cuda")
    with pytest.raises(ValueError, match=r"implementation='cuda': expected one of"):
        grouped_swiglu(x, w, w, sizes, jnp.zeros(5), limit=LIMIT, implementation="cuda")


# The kernel, interpreted -----------------------------------------------------------------------
#
# Weights are [3, 256, 128]: one block of packed inputs, or [3, 512, 256] where a kernel loops.

KERNEL_GROUPS = [
    (1, 0, 8),  # few rows an expert: tiles of 8 rows from any row
    (17, 0, 23),  # tiles of 16 rows from any row
    (90, 0, 61),  # tiles of 64 rows, one of them shared, a ragged end
    (0, 0, 110),  # one expert, more than a tile
    (64, 64, 0),  # groups that are tiles
]


@functools.cache
def kernel_case(kind: str, dtype, group_sizes, shape=(3, 256, 128)):
    """Arguments of both ops, a cotangent; weights with scales that differ."""
    rng = np.random.default_rng(sum(group_sizes))
    num_experts, num_inputs, num_outputs = shape
    size = np.exp2(rng.integers(-2, 2, (num_experts, num_inputs // 32, 1, num_outputs)))
    pair = [
        (rng.standard_normal((num_experts, num_inputs // 32, 32, num_outputs)) * size / 10).reshape(
            shape
        )
        for _ in range(2)
    ]
    pair = [jnp.asarray(w, jnp.float32) for w in pair]
    if kind in ("fp8", "fp4"):
        pair = [quantize(w, kind) for w in pair]
    elif kind == "bf16":
        pair = [w.astype(jnp.bfloat16) for w in pair]
    num_rows = sum(group_sizes)
    x = jnp.asarray(rng.standard_normal((num_rows, num_inputs)), dtype)
    row_weights = jnp.asarray(rng.random(num_rows) + 0.2, jnp.float32)
    d_out = jnp.asarray(rng.standard_normal((num_rows, num_outputs)), jnp.float32)
    return x, *pair, jnp.asarray(group_sizes, jnp.int32), row_weights, d_out


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("f32", jnp.float32),
        ("fp8", jnp.float32),
        ("fp4", jnp.float32),
        ("bf16", jnp.bfloat16),
        ("fp4", jnp.bfloat16),
    ],
)
@pytest.mark.parametrize("group_sizes", KERNEL_GROUPS, ids=str)
def test_kernel_equals_reference(group_sizes, kind, dtype):
    x, gate, up, sizes, row_weights, _ = kernel_case(kind, dtype, group_sizes)
    tolerance = FLOAT32 if dtype == jnp.float32 else BFLOAT16
    if kind in ("f32", "fp4"):
        out = matmul(x, gate, sizes, implementation="interpret")
        assert out.dtype == dtype
        assert_close(out, matmul(x, gate, sizes, implementation="reference"), tolerance)
    args = (x, gate, up, sizes, row_weights)
    out = activate(*args, limit=LIMIT, implementation="interpret")
    assert out.dtype == dtype
    assert_close(out, activate(*args, limit=LIMIT, implementation="reference"), tolerance)


@pytest.mark.parametrize("kind, dtype", [("fp4", jnp.bfloat16), ("fp8", jnp.float32)])
@pytest.mark.parametrize("group_sizes", [(2, 0, 5), (40, 0, 57)], ids=str)
def test_kernel_with_several_blocks_of_inputs(group_sizes, kind, dtype):
    x, gate, _, sizes, _, d_out = kernel_case(kind, dtype, group_sizes, (3, 512, 256))
    tolerance = FLOAT32 if dtype == jnp.float32 else BFLOAT16
    out, expected = (matmul(x, gate, sizes, implementation=i) for i in ("interpret", "reference"))
    assert_close(out, expected, tolerance)
    (d_x,), (expected,) = (
        matmul_gradients(i, x, gate, sizes, d_out) for i in ("interpret", "reference")
    )
    assert_close(d_x, expected, tolerance)


@pytest.mark.parametrize("kind", ["f32", "fp8", "fp4"])
@pytest.mark.parametrize("group_sizes", [(3, 0, 6), (90, 0, 61)], ids=str)
def test_kernel_gradients(group_sizes, kind):
    x, gate, up, sizes, row_weights, d_out = kernel_case(kind, jnp.float32, group_sizes)
    grads, expected = (
        activate_gradients(i, x, gate, up, sizes, row_weights, d_out)
        for i in ("interpret", "reference")
    )
    assert len(grads) == (4 if kind == "f32" else 2)
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert_close(grad, expected_grad, GRADIENT_FLOAT32)
    if kind != "f32":
        return
    for grad in grads[2:]:
        np.testing.assert_array_equal(grad[1], 0)  # an expert without rows
    grads, expected = (
        matmul_gradients(i, x, gate, sizes, d_out) for i in ("interpret", "reference")
    )
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert_close(grad, expected_grad, GRADIENT_FLOAT32)


def test_kernel_gradients_equal_differences():
    x, gate, up, sizes, row_weights, d_out = kernel_case("fp4", jnp.float32, (3, 0, 6))
    grads = activate_gradients("interpret", x, gate, up, sizes, row_weights, d_out)
    pair = [dense(w) for w in (gate, up)]

    def truth(x, row_weights):
        return np.sum(swiglu_loop(x, *pair, (3, 0, 6), row_weights) * np.asarray(d_out))

    assert_gradients_equal_differences(grads, truth, [np.asarray(x), np.asarray(row_weights)])


@pytest.mark.parametrize("kind", ["fp4", "f32"])
def test_groups_may_begin_and_end_anywhere(kind):
    x, gate, *_ = kernel_case(kind, jnp.float32, (33, 5, 60))
    x = jnp.round(4 * x)
    gate = gate if kind == "fp4" else jnp.round(16 * gate)  # products and sums are exact
    w = dense(gate) if kind == "fp4" else np.asarray(gate)
    run = jax.jit(functools.partial(grouped_matmul, implementation="interpret"))
    assert block_sizes.group_tile(98, 3) == 64
    for group_sizes in (
        (33, 5, 60),  # one lies within 16 rows that have rows of the others
        (48, 16, 34),  # at multiples of 16
        (47, 1, 1),  # rows of no expert after them
        (0, 98, 0),  # all rows, in two tiles
        (1, 96, 1),
        (63, 34, 1),  # ends with a tile
        (0, 0, 17),
    ):
        out = run(x, gate, jnp.asarray(group_sizes, jnp.int32))
        np.testing.assert_array_equal(
            out, matmul_loop(np.asarray(x), w, group_sizes), str(group_sizes)
        )


def test_kernel_touches_no_weights_of_experts_without_rows():
    x, gate, up, sizes, row_weights, _ = kernel_case("f32", jnp.float32, (90, 0, 61))
    gate, up = (w.at[1].set(jnp.nan) for w in (gate, up))
    out = activate(x, gate, up, sizes, row_weights, limit=LIMIT, implementation="interpret")
    assert np.isfinite(out).all()


@pytest.mark.parametrize("num_rows", [20, 200])
def test_kernel_zeroes_rows_of_no_expert(num_rows):
    x, gate, *_ = kernel_case("f32", jnp.float32, (3, 0, 6))
    x = jnp.tile(x, (num_rows // 9 + 1, 1))[:num_rows]
    sizes = jnp.array([3, 0, 6], jnp.int32)
    out = matmul(x, gate, sizes, implementation="interpret")
    expected = matmul(x[:9], gate, sizes, implementation="reference")
    assert_close(out[:9], expected, FLOAT32)
    np.testing.assert_array_equal(out[9:], 0)
    out = matmul(x, gate, jnp.zeros(3, jnp.int32), implementation="interpret")
    np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize(
    "x, w, message",
    [
        ((5, 64), (2, 64, 128), r"multiples of 128"),
        ((5, 128), (2, 128, 10), r"multiples of 128"),
        ((0, 128), (2, 128, 128), r"no rows"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(x, w, message):
    x, w, sizes = jnp.zeros(x), jnp.zeros(w), jnp.zeros((2,), jnp.int32)
    with pytest.raises(ValueError, match=message):
        grouped_matmul(x, w, sizes, implementation="interpret")
    assert grouped_matmul(x, w, sizes).shape == (x.shape[0], w.shape[2])


def test_visits_from_first_rows_cover_each_row_once():
    rng = np.random.default_rng(0)
    make = jax.jit(functools.partial(visits.from_first_rows, interpret=True), static_argnums=(1, 2))
    for _ in range(20):
        sizes = rng.integers(0, 90, 6) * rng.integers(0, 2, 6)
        num_rows, rows = 600, 8
        found = jax.tree.map(np.asarray, make(sizes, num_rows, rows))
        assert found.count <= len(found.tile)
        owner = np.full(num_rows, -1)
        for first, expert, end in list(zip(found.tile, found.expert, found.end))[: found.count]:
            taken = range(first, min(first + rows, end))
            assert (owner[taken] == -1).all()
            owner[taken] = expert
        np.testing.assert_array_equal(owner[: sizes.sum()], np.repeat(np.arange(6), sizes))
        assert (owner[sizes.sum() :] == -1).all()


@pytest.mark.parametrize("rows", [16, 112])
def test_visits_of_tiles_follow_each_other(rows):
    """As the kernel needs it: rows that two visits share a group of are kept from one to the next."""
    rng = np.random.default_rng(0)
    num_rows = 608
    make = jax.jit(visits.tiled, static_argnums=(1, 2), static_argnames="visit_empty")
    for draw in range(20):
        sizes = rng.integers(0, 101, 6) * rng.integers(0, 2, 6) if draw else np.zeros(6, int)
        sizes = np.append(sizes, num_rows - sizes.sum())  # the last are of no expert
        found = jax.tree.map(np.asarray, make(sizes[:6], num_rows, rows))
        assert found.count <= len(found.tile)
        expert, tile, start, end = (x[: found.count] for x in found[1:])
        np.testing.assert_array_equal(start, [0, *end[:-1]])
        assert end[-1] == num_rows
        np.testing.assert_array_equal(
            np.repeat(expert, end - start), np.repeat(np.arange(7), sizes)
        )
        first = tile * block_sizes.PACKED_ROWS
        assert (first <= start).all() and (end <= first + rows).all()
        assert (first >= 0).all() and (first + rows <= num_rows).all()
        fewest = -(-sizes // rows)
        spare = -(-(sizes + block_sizes.PACKED_ROWS - 1) // rows)
        visited = np.bincount(expert, minlength=7)
        assert (fewest <= visited).all() and (visited <= spare * (sizes > 0)).all()

        found = make(sizes[:6], num_rows, rows, visit_empty=True)
        visited = np.bincount(found.expert[: found.count], minlength=6)
        assert (visited[sizes[:6] == 0] == 1).all() and len(visited) == 6
        assert (np.repeat(np.arange(6), visited) == found.expert[: found.count]).all()
