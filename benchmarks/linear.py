"""Dense linears: those of a layer of V4-Flash and V4-Pro in FP8, decoding and in prefill, and in bfloat16.

    python -m benchmarks.linear --list
    python -m benchmarks.linear --only "Flash output, 8 rows"

Rows are those of all sequences on a device.
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.case import Case, Trips, main
from benchmarks.grouped_matmul import BYTES, weight
from pallas_kernels.linear import linear, linear_swiglu, row_products, tpu, tpu_float, tpu_gradient

SHAPES = {  # inputs and outputs of a group, groups
    "Flash query": (1024, 32768, 1),
    "Flash output groups": (4096, 1024, 8),
    "Flash output": (8192, 4096, 1),
    "Flash shared expert": (4096, 2048, 1),
    "Pro query": (1536, 65536, 1),
    "Pro output": (16384, 7168, 1),
}
LIMIT = 7.0  # of gate and up
FLOATS = {  # inputs and outputs of bfloat16 weights, which decoding reads by a kernel
    "Flash head": (4096, 129_280),
    "Flash compressor": (4096, 1024),
    "Flash index heads": (4096, 64),
}


def cases() -> list[Case]:
    forward = [_case(name, rows) for rows in (8, 4096) for name in SHAPES]
    return [
        *forward,
        *[_gradient_case(name, 4096) for name in SHAPES],
        _swiglu_case("Flash shared expert", 8),
        *[_float_case(name, 8) for name in FLOATS],
    ]


def _float_case(name: str, rows: int) -> Case:
    num_inputs, num_outputs = FLOATS[name]
    is_table = name.endswith("head")
    shape = (num_outputs, num_inputs) if is_table else (num_inputs, num_outputs)
    own = min(tpu_float.block(num_inputs, num_outputs), num_outputs)
    grid = -(-num_outputs // own)
    return Case(
        op="linear",
        shape=f"{name} bf16, {rows} rows",
        run=row_products if is_table else linear,
        make=lambda: (jnp.ones((rows, num_inputs), jnp.bfloat16), jnp.ones(shape, jnp.bfloat16)),
        flops=2 * rows * num_inputs * num_outputs,
        bytes=2 * num_inputs * num_outputs + rows * (2 * num_inputs + 4 * num_outputs),
        trips=lambda chip: {"linear_floats": (grid,) if grid > 1 else ()},
    )


def _swiglu_case(name: str, rows: int) -> Case:
    num_inputs, num_outputs, _ = SHAPES[name]

    def make():
        w = weight("FP8", num_inputs, num_outputs)
        return jnp.ones((rows, num_inputs), jnp.bfloat16), w, w

    def trips(chip: str) -> Trips:
        x, w, _ = jax.eval_shape(make)
        form = tpu.Form(1, x.dtype, limit=LIMIT)
        sizes, _ = tpu.sizes_for(rows, w, form, x.dtype, chip)
        blocks, steps = num_outputs // sizes.columns, sizes.columns // sizes.step
        return {"linear_few_rows": (blocks, steps) if steps > 1 else (blocks,)}

    return Case(
        op="linear_swiglu",
        shape=f"{name}, {rows} rows",
        run=functools.partial(linear_swiglu, limit=LIMIT),
        make=make,
        flops=4 * rows * num_inputs * num_outputs,
        bytes=2 * num_inputs * num_outputs + rows * (2 * num_inputs + 2 * num_outputs),
        trips=trips,
    )


def _gradient_case(name: str, rows: int) -> Case:
    """Of the rows alone, as where packed weights are frozen."""
    num_inputs, num_outputs, groups = SHAPES[name]
    count = groups * num_inputs * num_outputs

    def make():
        x = jnp.ones((rows, groups * num_inputs), jnp.bfloat16)
        d_out = jnp.ones((rows, groups * num_outputs), jnp.bfloat16)
        return x, weight("FP8", num_inputs, groups * num_outputs), d_out

    def run(x, w, d_out, implementation=None):
        product = functools.partial(
            linear, w=w, groups=groups, out_dtype=x.dtype, implementation=implementation
        )
        return jax.vjp(product, x)[1](d_out)[0]

    def trips(chip: str) -> Trips:
        blocks = [
            width // tpu_gradient.largest_block(width, 128) for width in (num_inputs, num_outputs)
        ]
        turns = groups * blocks[0] * -(-rows // tpu_gradient.ROWS) * blocks[1]
        return {"transpose_jvp_linear_row_gradient": (turns,)}  # as jax names it

    return Case(
        op="linear",
        shape=f"{name}, {rows} rows, gradient",
        run=run,
        make=make,
        flops=2 * rows * count,
        bytes=count * BYTES["FP8"] + rows * groups * (2 * num_inputs + 2 * num_outputs),
        trips=trips,
    )


def _case(name: str, rows: int) -> Case:
    num_inputs, num_outputs, groups = SHAPES[name]
    count = groups * num_inputs * num_outputs

    def make():
        x = jnp.ones((rows, groups * num_inputs), jnp.bfloat16)
        return x, weight("FP8", num_inputs, groups * num_outputs)

    def trips(chip: str) -> Trips:
        x, w = jax.eval_shape(make)
        form = tpu.Form(groups, jnp.dtype(jnp.float32))
        sizes, is_few = tpu.sizes_for(rows, w, form, x.dtype, chip)
        blocks, steps = groups * num_outputs // sizes.columns, sizes.columns // sizes.step
        tiles = -(-rows // sizes.rows)
        if tiles == 1:
            loops = (blocks, steps) if steps > 1 else (blocks,)
            return {"linear_few_rows" if is_few else "linear": loops}
        first = 1 / tiles
        return {"linear": (blocks * tiles, first, steps * first, steps * (1 - first))}

    return Case(
        op="linear",
        shape=f"{name}, {rows} rows",
        run=functools.partial(linear, groups=groups),
        make=make,
        flops=2 * rows * count,
        bytes=count * BYTES["FP8"] + rows * groups * (2 * num_inputs + 4 * num_outputs),
        trips=trips,
    )


if __name__ == "__main__":
    main(cases(), __doc__)
