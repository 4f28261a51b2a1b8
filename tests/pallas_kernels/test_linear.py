"""Dense linears: packed weights in the kernels, against unpacked ones in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats.quantize import (
    FP4_WEIGHT_BLOCK,
    FP8_WEIGHT_BLOCK,
    QuantizedArray,
)
from pallas_kernels.formats.quantize_rows import round_rows
from pallas_kernels.formats.records import ACTIVATIONS
from pallas_kernels.grouped_matmul import block_sizes
from pallas_kernels.grouped_matmul.reference import swiglu
from pallas_kernels.linear import linear, linear_swiglu, row_products
from tests.tolerances import BFLOAT16, FLOAT32, assert_close

SHAPES = [  # rows, inputs of a group, outputs of all, groups
    (1, 256, 128, 1),
    (8, 384, 512, 1),
    (5, 128, 1024, 2),
    (33, 256, 384, 3),
    (300, 128, 1024, 2),
]


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of columns in a group, and several steps in a block."""
    monkeypatch.setattr(block_sizes, "COLUMNS", (256, 128))
    monkeypatch.setattr(block_sizes, "STEPS", (128,))


def _make(rows: int, num_inputs: int, num_outputs: int, groups: int, dtype, kind: str = "fp8"):
    """Rows and a weight: "fp8", "fp4", or "float32" for FP8 with such scales."""
    keys = jax.random.split(jax.random.key(rows), 3)
    x = jax.random.normal(keys[0], (rows, groups * num_inputs), dtype)
    block = FP4_WEIGHT_BLOCK if kind == "fp4" else FP8_WEIGHT_BLOCK
    blocks = (num_inputs // block[0], num_outputs // block[1])
    if kind == "float32":
        scale = jax.random.uniform(keys[2], blocks, minval=2**-9, maxval=8.0)
    else:
        scale = jnp.exp2(jax.random.randint(keys[2], blocks, -9, 3)).astype(jnp.float8_e8m0fnu)
    if kind == "fp4":
        values = jax.random.bits(keys[1], (num_inputs // 2, num_outputs), jnp.uint8)
    else:
        values = jax.random.normal(keys[1], (num_inputs, num_outputs)).astype(jnp.float8_e4m3fn)
    return x, QuantizedArray(values, scale, block)


def _expected(x, w, groups: int) -> np.ndarray:
    x, w = np.asarray(x, np.float64), np.asarray(w.dequantize(), np.float64)
    parts = zip(np.split(x, groups, axis=-1), np.split(w, groups, axis=-1))
    return np.concatenate([a @ b for a, b in parts], axis=-1)


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_it_is_the_product_of_unpacked_weights(shape, dtype, implementation):
    """Products of bfloat16 are exact in float32, so both dtypes are held to float32's bound."""
    x, w = _make(*shape, dtype)
    groups = shape[-1]

    out = linear(x, w, groups=groups, implementation=implementation)

    assert out.dtype == jnp.float32
    assert_close(out, _expected(x, w, groups), FLOAT32)


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("kind", ["fp4", "float32"])
@pytest.mark.usefixtures("small_blocks")
def test_other_formats(kind, rows):
    x, w = _make(rows, 256, 1024, 2, jnp.float32, kind)

    out = linear(x, w, groups=2, implementation="interpret")

    assert_close(out, _expected(x, w, 2), FLOAT32)


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_sums_are_rounded_once_to_the_dtype_that_is_asked_for(shape, implementation):
    x, w = _make(*shape, jnp.bfloat16)
    run = functools.partial(linear, groups=shape[-1], implementation=implementation)

    out = run(x, w, out_dtype=jnp.bfloat16)

    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, run(x, w).astype(jnp.bfloat16))
    (d_x,) = jax.vjp(lambda x: run(x, w, out_dtype=jnp.bfloat16), x)[1](jnp.ones_like(out))
    assert_close(d_x, jax.vjp(lambda x: run(x, w), x)[1](jnp.ones(out.shape))[0], FLOAT32)


@pytest.mark.parametrize("rows", [1, 11, 40])
@pytest.mark.parametrize("kind", ["fp8", "fp4"])
@pytest.mark.usefixtures("small_blocks")
def test_rows_are_rounded_as_by_the_operation_before(kind, rows):
    """By the kernel for few rows, and apart for many; of an interpreted kernel XLA folds constants wrongly."""
    x, w = _make(rows, 512, 256, 1, jnp.bfloat16, kind)
    kernel = functools.partial(linear, implementation="interpret")
    rounded = round_rows(x, ACTIVATIONS.values, ACTIVATIONS.block, implementation="xla")

    out = jax.jit(functools.partial(kernel, rounding=ACTIVATIONS))(x, w)

    np.testing.assert_array_equal(out, jax.jit(kernel)(rounded, w))
    assert jnp.any(out != jax.jit(kernel)(x, w))
    xla = linear(x, w, rounding=ACTIVATIONS, implementation="xla")
    assert_close(out, xla, FLOAT32)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.usefixtures("small_blocks")
def test_heads_that_lie_apart_change_no_result(rows):
    """Eight heads of 128 in a block of outputs, and sixteen of two groups of inputs."""
    x, w = _make(rows, 1024, 2048, 2, jnp.bfloat16)
    run = functools.partial(linear, groups=2, implementation="interpret")

    out = jax.jit(functools.partial(run, in_width=128, out_width=128))(x, w)

    np.testing.assert_array_equal(out, jax.jit(run)(x, w))
    for width in (96, 256):  # no whole registers: as they lie
        found = jax.jit(functools.partial(run, in_width=width, out_width=width))(x, w)
        np.testing.assert_array_equal(found, out)


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.usefixtures("small_blocks")
def test_gate_and_up_in_one_kernel(rows):
    """Few rows; of many they are two."""
    x, gate = _make(rows, 512, 256, 1, jnp.bfloat16)
    _, up = _make(rows + 1, 512, 256, 1, jnp.bfloat16)
    options = dict(limit=7.0, rounding=ACTIVATIONS)
    run = jax.jit(functools.partial(linear_swiglu, implementation="interpret", **options))
    product = jax.jit(
        functools.partial(
            linear, rounding=ACTIVATIONS, out_dtype=x.dtype, implementation="interpret"
        )
    )

    out = run(x, gate, up)

    expected = swiglu(product(x, gate), product(x, up), 7.0).astype(x.dtype)
    assert out.dtype == x.dtype and out.shape == (rows, 256)
    np.testing.assert_array_equal(out, expected)
    assert str(jax.make_jaxpr(run)(x, gate, up)).count("pallas_call[") == (1 if rows == 5 else 3)
    d_out = jnp.ones_like(out)
    gradient = jax.vjp(lambda x: run(x, gate, up), x)[1](d_out)[0]
    xla = functools.partial(linear_swiglu, w_gate=gate, w_up=up, implementation="xla", **options)
    assert_close(gradient, jax.vjp(xla, x)[1](d_out)[0], BFLOAT16)
    with pytest.raises(ValueError, match=r"w_up \(512, 256\) must have one shape"):
        linear_swiglu(x, gate.dequantize()[:, :128], up, limit=7.0)


@pytest.mark.parametrize("rows", [(1, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("outputs", [64, 640])
@pytest.mark.parametrize("is_table", [False, True], ids=["matrix", "table"])
def test_few_rows_and_bfloat16_weights(rows, outputs, is_table):
    """The last block of columns is not whole."""
    x = jax.random.normal(jax.random.key(0), (*rows, 256), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (256, outputs), jnp.bfloat16)
    operation, factor = (row_products, w.T) if is_table else (linear, w)
    run = functools.partial(operation, implementation="interpret")

    out = run(x, factor)

    assert (out.shape, out.dtype) == ((*rows, outputs), jnp.float32)
    assert_close(out, np.asarray(x, np.float64) @ np.asarray(w, np.float64), FLOAT32)
    assert "linear_floats" in str(jax.make_jaxpr(run)(x, factor))
    d_out = jax.random.normal(jax.random.key(2), out.shape)
    found = jax.vjp(run, x, factor)[1](d_out)
    expected = jax.vjp(functools.partial(operation, implementation="xla"), x, factor)[1](d_out)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match=r"x \(2, 3\) must be"):
        operation(jnp.ones((2, 3)), factor)


@pytest.mark.parametrize("groups, kind, dtype", [(1, "fp8", jnp.bfloat16), (2, "fp4", jnp.float32)])
def test_gradient_of_the_rows(groups, kind, dtype):
    """The kernel reads packed weights on the way back, too; rows have leading axes."""
    x, w = _make(3 * 47, 256, 512, groups, dtype, kind)
    x, d_out = x.reshape(3, 47, -1), jax.random.normal(jax.random.key(1), (3, 47, 512))
    # As of a result that is rounded to the rows' dtype.
    d_out = d_out.astype(dtype).astype(jnp.float32)

    weights = np.asarray(w.dequantize(), np.float64)
    parts = zip(np.split(np.asarray(d_out), groups, -1), np.split(weights, groups, -1))
    expected = np.concatenate([d @ part.T for d, part in parts], axis=-1)
    for implementation in ("interpret", "xla"):
        run = functools.partial(linear, groups=groups, implementation=implementation)
        gradient = jax.jit(lambda x, w, d, run=run: jax.vjp(lambda x: run(x, w), x)[1](d)[0])
        found = gradient(x, w, d_out)
        assert found.dtype == dtype
        assert_close(found, expected, FLOAT32 if dtype == jnp.float32 else BFLOAT16)
    kernel = functools.partial(linear, w=w, groups=groups, implementation="interpret")
    jaxpr = str(jax.make_jaxpr(lambda x: jax.vjp(kernel, x)[1](d_out))(x))
    assert "linear_row_gradient" in jaxpr


def test_float_weights_and_leading_axes():
    x, w = _make(12, 128, 256, 2, jnp.bfloat16)
    x, floats = x.reshape(3, 4, -1), w.dequantize(jnp.bfloat16)

    out = linear(x, floats, groups=2)

    np.testing.assert_array_equal(out, linear(x, w, groups=2, implementation="xla"))
    assert_close(out, linear(x, w, groups=2, implementation="interpret"), BFLOAT16)
    d_w = jax.grad(lambda floats: linear(x, floats, groups=2).sum())(floats)
    assert d_w.shape == floats.shape and jnp.any(d_w != 0)


@pytest.mark.parametrize(
    ("shape", "groups", "message"),
    [
        ((3, 100), 1, r"x \(3, 100\) must be .*\[in, groups \* out\], for groups=1"),
        ((3, 3 * 128), 3, "groups=3"),
        ((3, 4 * 128), 4, r"4 groups of w \(128, 256\) have 64 outputs, not a multiple of 128"),
        ((0, 128), 1, "x has no rows"),
    ],
)
def test_bad_input(shape, groups, message):
    _, w = _make(1, 128, 256, 1, jnp.float32)
    with pytest.raises(ValueError, match=message):
        linear(jnp.zeros(shape), w, groups=groups, implementation="interpret")
