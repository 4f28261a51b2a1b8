"""Recipes of linears stored in FP8 or FP4, against float64 and against the official code's layers.

`released` itself is tested in `test_parity.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.formats.quantize import QuantizedArray, quantize_weight, round_fp8
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from tests.conftest import GOLDEN
from tests.tolerances import FLOAT32, assert_close
from tests.v4jax.test_parity import BIT_IDENTICAL, PROMPT, _cached, _inputs, _tokens
from v4jax import Numerics, Transformer, checkpoint, released

E4M3_STEP = 2.0**-4  # largest relative error of rounding to e4m3


def _inputs_and_weight(rows, num_inputs, num_outputs, dtype=jnp.float32):
    """Blocks of very different size, so that every scale counts."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (*rows, num_inputs))
    x *= jnp.exp2(jax.random.randint(keys[1], (*rows, 1), -8, 8)).astype(jnp.float32)
    w = jax.random.normal(keys[2], (num_inputs, num_outputs))
    w *= jnp.exp2((jnp.arange(num_inputs) // 128 * 3.0)[:, None] - 6)
    w *= jnp.exp2(jnp.arange(num_outputs) // 128 * 2.0)
    return x.astype(dtype), quantize_weight(w, "fp8")


def _exact(x, w) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("sizes", [(128, 128), (384, 256), (320, 200), (64, 40)], ids=str)
def test_fp8_products_are_those_of_rounded_inputs(sizes, dtype):
    x, w = _inputs_and_weight((2, 7), *sizes, dtype)

    out = jax.jit(fp8_matmul)(x, w)

    assert out.shape == (2, 7, sizes[1]) and out.dtype == jnp.float32
    expected = _exact(round_fp8(x), w)
    for row in range(7):  # each row at its own scale
        assert_close(out[0, row], expected[0, row], FLOAT32)
    assert np.abs(expected - _exact(x, w)).max() > 0


def test_fp8_scales_may_be_any_float():
    x, w = _inputs_and_weight((5,), 256, 256)
    w = QuantizedArray(w.values, w.scale.astype(jnp.float32) * 1.37, w.block)
    assert_close(fp8_matmul(x, w), _exact(round_fp8(x), w), FLOAT32)


def test_gradient_of_fp8_inputs_is_straight_through():
    x, w = _inputs_and_weight((5,), 256, 128)
    d_out = jax.random.normal(jax.random.key(1), (5, 128))
    _, vjp = jax.vjp(lambda x: fp8_matmul(x, w), x)
    expected = np.asarray(d_out, np.float64) @ np.asarray(w.dequantize(), np.float64).T
    assert_close(vjp(d_out)[0], expected, FLOAT32)


@pytest.mark.parametrize("fmt", ["fp4", None])
def test_fp8_products_refuse_other_weights(fmt):
    w = jnp.ones((64, 8))
    w = quantize_weight(w, fmt) if fmt else w
    with pytest.raises(ValueError, match=r"need weights in e4m3 .*\. Expand FP4 with"):
        released(recipe="fp8").linear(jnp.ones((2, 64)), w)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_experts_in_fp8(implementation):
    """Groups of every size, none among them, against rounded rows times unpacked weights."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (37, 256))
    w1, w3 = (quantize_weight(jax.random.normal(k, (4, 256, 128)), "fp8") for k in keys[1:])
    sizes, weights = jnp.array([5, 0, 31, 1]), jnp.linspace(0.5, 1.5, 37)
    options = dict(in_fp8=True, implementation=implementation)

    out = grouped_matmul(x, w1, sizes, **options)
    hidden = grouped_swiglu(x, w1, w3, sizes, weights, limit=7.0, **options)

    plain = dict(implementation="reference")
    assert_close(out, grouped_matmul(round_fp8(x), w1, sizes, **plain), FLOAT32)
    expected = grouped_swiglu(round_fp8(x), w1, w3, sizes, weights, limit=7.0, **plain)
    assert_close(hidden, expected, FLOAT32)
    with pytest.raises(ValueError, match="FP8 products have no kernel"):
        grouped_matmul(x, w1, sizes, in_fp8=True, implementation="interpret")


@pytest.mark.parametrize("fmt", ["fp4", "fp8"])
def test_experts_are_unpacked_one_at_a_time(fmt):
    """Where no kernel runs: temporaries are those of two experts' matrices, not of 32."""
    x = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16)
    w = jax.eval_shape(lambda: quantize_weight(jnp.zeros((32, 512, 256)), fmt))
    sizes = jax.ShapeDtypeStruct((32,), jnp.int32)

    def run(implementation):
        def hidden(x, w1, w3, sizes):
            ones = jnp.ones(64)
            options = dict(limit=7.0, implementation=implementation)
            return grouped_swiglu(x, w1, w3, sizes, ones, **options)

        compiled = jax.jit(hidden).lower(x, w, w, sizes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one = 512 * 256 * 4
    assert run("xla") < 4 * one
    assert run("reference") > 32 * one  # which unpacks all: the numbers are not idle


def test_linears_differ_by_the_rounding_of_inputs_alone():
    x, w = _inputs_and_weight((9,), 384, 256, jnp.bfloat16)
    outs = {r: released(recipe=r).linear(x, w) for r in ("released", "bf16", "fp8")}

    assert_close(outs["bf16"], _exact(x, w), 2.0**-8)
    assert_close(outs["fp8"], outs["released"], 2.0**-7)  # one step of bfloat16
    exact, released_ = _exact(x, w), np.asarray(outs["released"], np.float64)
    bound = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w.dequantize(), np.float64))
    assert (np.abs(released_ - exact) <= (E4M3_STEP + 2.0**-8) * bound).all()
    assert (np.asarray(outs["bf16"]) != np.asarray(outs["released"])).any()


@functools.cache
def _official_small(recipe: str) -> Transformer:
    """With recipe "fp8" its FP4 experts are widened to FP8, which loses nothing."""
    model = checkpoint.load(GOLDEN / "official_small", released(recipe=recipe))
    if recipe != "fp8":
        return model

    def widen(variable: nnx.Variable) -> nnx.Variable:
        if variable.stored != "fp4":
            return variable
        value = variable.get_value()
        wide = jax.jit(lambda v: quantize_weight(v.dequantize(), "fp8"))(value)
        np.testing.assert_array_equal(wide.dequantize(), value.dequantize())
        return variable.replace(wide)

    graphdef, state = nnx.split(model)
    is_variable = lambda x: isinstance(x, nnx.Variable)
    return nnx.merge(graphdef, jax.tree.map(widen, state, is_leaf=is_variable))


@pytest.mark.parametrize("index", [0, 2, 3])  # a window layer, a CSA and an HCA layer
def test_fp8_layers_are_those_of_the_official_code(index, official_small):
    """To the bounds of the released recipe: only sums are in another order."""
    tokens, streams = _tokens(official_small), _inputs(official_small, index)

    out = _cached(_official_small("fp8"), index, streams, tokens)[:PROMPT]

    same = out == official_small["layer_outputs"][index][0]
    assert same.mean() >= BIT_IDENTICAL[index]


@pytest.mark.parametrize("index", [0, 2, 3])
def test_bf16_layers_are_near_the_official_code(index, official_small):
    """Inputs of linears keep their digits: another function, within the error of e4m3."""
    tokens, streams = _tokens(official_small), _inputs(official_small, index)
    expected = official_small["layer_outputs"][index][0]

    out = _cached(_official_small("bf16"), index, streams, tokens)[:PROMPT]

    assert np.median(np.abs(out - expected)) < E4M3_STEP * expected.std()
    assert (out == expected).mean() < BIT_IDENTICAL[index]  # not the released recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(recipe="int8"), r"recipe='int8': expected one of \('released', 'bf16', 'fp8'\)"),
        (dict(recipe="bf16", dtype="float32"), 'recipe="bf16" with dtype=float32'),
        (dict(recipe="fp8", name="plain"), "recipe='fp8' with plain numerics"),
    ],
)
def test_recipes_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Numerics(**{"name": "released", "dtype": "bfloat16"} | options)
