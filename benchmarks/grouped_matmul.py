"""Experts: grouped matmuls and SwiGLU at the sizes of V4-Flash and V4-Pro, 32 experts on a device.

    python -m benchmarks.grouped_matmul --list
    python -m benchmarks.grouped_matmul --only "Flash FP4, 256 rows"

"256 rows" is rows an expert on average: each row's expert is drawn evenly, so that experts have more
or fewer rows, and begin anywhere. With "1 rows" and "16 rows" all experts are alike.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.case import Case, Trips, main
from pallas_kernels.formats.quantize import FP4_WEIGHT_BLOCK, FP8_WEIGHT_BLOCK, QuantizedArray
from pallas_kernels.grouped_matmul import (
    block_sizes,
    grouped_matmul,
    grouped_swiglu,
    tpu,
    vjp,
    weights,
)
from v4jax.planning.kernel_trips import few_rows_trips, grouped_trips, weight_gradient_trips

NUM_EXPERTS, LIMIT = 32, 10.0
DIMS = {"Flash": (4096, 2048), "Pro": (7168, 3072)}  # model width, expert width
BYTES = {"FP4": 0.5 + 1 / 32, "FP8": 1 + 1 / 128**2, "bf16": 2}  # of a weight


def cases() -> list[Case]:
    found = []
    for rows in (1, 16, 256, 4096):
        for model, fmt in (("Flash", "FP4"), ("Flash", "FP8"), ("Flash", "bf16"), ("Pro", "FP4")):
            found += [_swiglu(model, fmt, rows), _down(model, fmt, rows)]
    found += [_of_tokens("grouped_swiglu", 8), _of_tokens("grouped_matmul", 8)]
    for fmt in ("FP4", "bf16"):
        found += [_swiglu_gradient("Flash", fmt, 256), _down_gradient("Flash", fmt, 256)]
    return found


def weight(fmt: str, *shape: int) -> jax.Array | QuantizedArray:
    """A weight [..., in, out]. Values do not matter for time; all are one half."""

    def full(divisors, value, dtype):
        *batch, num_inputs, num_outputs = shape
        divided = (num_inputs // divisors[0], num_outputs // divisors[1])
        return jnp.full((*batch, *divided), value, dtype)

    if fmt == "bf16":
        return full((1, 1), 0.5, jnp.bfloat16)
    if fmt == "FP4":
        scale = full(FP4_WEIGHT_BLOCK, 1, jnp.float8_e8m0fnu)
        return QuantizedArray(full((2, 1), 0x11, jnp.uint8), scale, FP4_WEIGHT_BLOCK)
    scale = full(FP8_WEIGHT_BLOCK, 1, jnp.float8_e8m0fnu)
    return QuantizedArray(full((1, 1), 0.5, jnp.float8_e4m3fn), scale, FP8_WEIGHT_BLOCK)


def _make(num_weights: int, fmt: str, rows: int, num_inputs: int, num_outputs: int) -> tuple:
    num_rows = rows * NUM_EXPERTS
    sizes = np.full(NUM_EXPERTS, rows)
    if rows > max(block_sizes.FEW_ROWS):
        sizes = np.random.default_rng(0).multinomial(num_rows, sizes / num_rows)
    x = jnp.ones((num_rows, num_inputs), jnp.bfloat16)
    ws = [weight(fmt, NUM_EXPERTS, num_inputs, num_outputs) for _ in range(num_weights)]
    row_weights = jnp.ones((num_rows,), jnp.float32)
    sizes = jnp.asarray(sizes, jnp.int32)
    return (x, *ws, sizes) if num_weights == 1 else (x, *ws, sizes, row_weights)


def _swiglu(model: str, fmt: str, rows: int) -> Case:
    embed, hidden = DIMS[model]
    return _case("grouped_swiglu", model, fmt, rows, 2, embed, hidden)


def _down(model: str, fmt: str, rows: int) -> Case:
    embed, hidden = DIMS[model]
    return _case("grouped_matmul", model, fmt, rows, 1, hidden, embed)


def _case(op, model, fmt, rows, num_weights, num_inputs, num_outputs) -> Case:
    count = num_weights * NUM_EXPERTS * num_inputs * num_outputs
    run = functools.partial(grouped_swiglu, limit=LIMIT) if num_weights == 2 else grouped_matmul
    make = functools.partial(_make, num_weights, fmt, rows, num_inputs, num_outputs)
    return Case(
        op=op,
        shape=f"{model} {fmt}, {rows} rows",
        run=run,
        make=make,
        flops=2 * rows * count,
        bytes=count * BYTES[fmt] + 2 * rows * NUM_EXPERTS * (num_inputs + num_outputs),
        trips=functools.partial(_trips, op, make),
    )


def _of_tokens(op: str, tokens: int) -> Case:
    """Flash decoding on 8 devices: each has 32 of 256 experts, and all pairs of a token and an expert.

    The kernel puts rows in order, or adds results to tokens.
    """
    choices, devices = 6, 8
    embed, hidden = DIMS["Flash"]
    num_pairs = tokens * choices
    own = num_pairs // devices
    is_first = op == "grouped_swiglu"
    num_inputs, num_outputs = (embed, hidden) if is_first else (hidden, embed)

    def make():
        sizes = jnp.arange(NUM_EXPERTS) < own
        places = jnp.arange(num_pairs, dtype=jnp.int32)
        ws = [weight("FP4", NUM_EXPERTS, num_inputs, num_outputs) for _ in range(1 + is_first)]
        x = jnp.ones((tokens if is_first else num_pairs, num_inputs), jnp.bfloat16)
        row_weights = [jnp.ones((num_pairs,), jnp.float32)] if is_first else []
        return x, *ws, sizes.astype(jnp.int32), *row_weights, places

    def run(*args, implementation):
        *args, places = args
        if is_first:
            return grouped_swiglu(*args, limit=LIMIT, pair=places, implementation=implementation)
        position = places.reshape(tokens, choices)
        return grouped_matmul(*args, position=position, implementation=implementation)

    def trips(chip: str) -> Trips:
        ws = jax.tree.leaves(jax.eval_shape(make)[1:], is_leaf=_is_weight)
        formats = [weights.format_of(w, jnp.bfloat16, chip) for w in ws if w.ndim == 3]
        rows = block_sizes.few_rows(num_pairs, NUM_EXPERTS, num_inputs)
        ordered, summed = (own, None) if is_first else (None, tokens)
        loops = few_rows_trips(chip, formats, num_pairs, rows, own, ordered=ordered, summed=summed)
        return {f"{op}_few_rows": loops}

    count = (1 + is_first) * own * num_inputs * num_outputs
    return Case(
        op=op,
        shape=f"Flash FP4, decode {tokens}",
        run=run,
        make=make,
        flops=2 * count,
        bytes=count * BYTES["FP4"],
        trips=trips,
    )


def _trips(op: str, make, chip: str) -> Trips:
    x, *ws = jax.tree.leaves(jax.eval_shape(make), is_leaf=_is_weight)
    formats = [weights.format_of(w, x.dtype, chip) for w in ws if w.ndim == 3]
    num_rows, num_inputs = x.shape
    rows = block_sizes.few_rows(num_rows, NUM_EXPERTS, num_inputs)
    if rows is not None:
        visits = NUM_EXPERTS * -(-num_rows // NUM_EXPERTS // rows)
        return {f"{op}_few_rows": few_rows_trips(chip, formats, num_rows, rows, visits)}
    product = tpu.Product(op, None, (x.dtype,))
    return {op: grouped_trips(chip, product, formats, num_rows, NUM_EXPERTS)}


def _is_weight(leaf) -> bool:
    return isinstance(leaf, QuantizedArray)


def _swiglu_gradient(model: str, fmt: str, rows: int) -> Case:
    embed, hidden = DIMS[model]
    return _gradient("grouped_swiglu", model, fmt, rows, 2, embed, hidden)


def _down_gradient(model: str, fmt: str, rows: int) -> Case:
    embed, hidden = DIMS[model]
    return _gradient("grouped_matmul", model, fmt, rows, 1, hidden, embed)


def _gradient(op, model, fmt, rows, num_weights, num_inputs, num_outputs) -> Case:
    """Of the rows and row weights, and of the weights if they are float."""
    forward = _case(op, model, fmt, rows, num_weights, num_inputs, num_outputs)
    is_float = fmt == "bf16"
    # Gate and up are computed again.
    products = 1 + is_float + (num_weights == 2)
    count = num_weights * NUM_EXPERTS * num_inputs * num_outputs

    def run(*args, implementation):
        *args, d_out = args
        if not is_float:
            chosen = (0,) if num_weights == 1 else (0, 4)
        else:
            chosen = (0, 1) if num_weights == 1 else (0, 1, 2, 4)

        def of_chosen(*values):
            full = list(args)
            for i, value in zip(chosen, values):
                full[i] = value
            return forward.run(*full, implementation=implementation)

        return jax.vjp(of_chosen, *(args[i] for i in chosen))[1](d_out)

    def make():
        args = forward.make()
        return (*args, jnp.ones((args[0].shape[0], num_outputs), jnp.bfloat16))

    def trips(chip: str) -> Trips:
        num_rows = rows * NUM_EXPERTS
        ws = [_weight_shape(fmt, num_inputs, num_outputs)] * num_weights
        formats = [weights.format_of(w, jnp.bfloat16, chip) for w in ws]
        back = vjp.transposed(jnp.bfloat16)
        of_product = functools.partial(
            grouped_trips, chip, formats=formats, num_rows=num_rows, groups=NUM_EXPERTS
        )
        found = {back.name: of_product(back)}
        if num_weights == 2:
            again = tpu.Product("", None, (jnp.bfloat16,) * 2, has_row_sums=True)
            found["grouped_swiglu_gradient"] = of_product(again, num_extras=1)
        if is_float:
            (grid,) = weight_gradient_trips(num_rows, NUM_EXPERTS, num_inputs, num_outputs)
            found["grouped_weight_gradient"] = (grid * num_weights,)
        # As jax names what a gradient rule calls.
        return {f"transpose_jvp_{name}": trips for name, trips in found.items()}

    return Case(
        op=f"{op} gradient",
        shape=forward.shape,
        run=run,
        make=make,
        flops=2 * rows * count * products,
        bytes=count * (BYTES[fmt] + 2 * is_float)
        + 2 * rows * NUM_EXPERTS * 2 * (num_inputs + num_outputs),
        trips=trips,
    )


def _weight_shape(fmt: str, num_inputs: int, num_outputs: int):
    return jax.eval_shape(functools.partial(weight, fmt, NUM_EXPERTS, num_inputs, num_outputs))


if __name__ == "__main__":
    main(cases(), __doc__)
