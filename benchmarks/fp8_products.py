"""What scales of 128 x 128 cost where both factors of a product stay in FP8: schedules for a TPU.

    python -m benchmarks.fp8_products --chip v7x

Every 128 inputs have a scale of their own in each row and each tile of weights, so every 128 inputs' products
leave the matrix unit, are scaled and added by the vector unit. In bfloat16 scales are part of the factors,
and sums stay where they are made.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import CHIPS
from pallas_kernels.grouped_matmul.weights import dot
from v4jax.planning import schedules, topologies

ROWS, COLUMNS, INPUTS, BLOCK, TILES = 512, 512, 4096, 128, 4
NUM_BLOCKS = INPUTS // BLOCK


def _scaled(x_ref, x_scale_ref, w_ref, w_scale_ref, out_ref):
    total = jnp.zeros(out_ref.shape, jnp.float32)
    for i in range(NUM_BLOCKS):
        inputs = slice(i * BLOCK, (i + 1) * BLOCK)
        product = dot(x_ref[:, inputs], w_ref[inputs, :], (1, 0))
        total += product * (x_scale_ref[:, i : i + 1] * w_scale_ref[i : i + 1, :])
    out_ref[...] = total.astype(out_ref.dtype)


def _whole(x_ref, x_scale_ref, w_ref, w_scale_ref, out_ref):
    del x_scale_ref, w_scale_ref
    out_ref[...] = dot(x_ref[...], w_ref[...], (1, 0)).astype(out_ref.dtype)


def _run(kernel, name, x, x_scale, w, w_scale):
    return pl.pallas_call(
        kernel,
        grid=(TILES,),
        in_specs=[
            pl.BlockSpec((ROWS, INPUTS), lambda i: (i, 0)),
            pl.BlockSpec((ROWS, NUM_BLOCKS), lambda i: (i, 0)),
            pl.BlockSpec(w.shape, lambda i: (0, 0)),
            pl.BlockSpec(w_scale.shape, lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((ROWS, COLUMNS), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((TILES * ROWS, COLUMNS), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=56 << 20),
        name=name,
    )(x, x_scale, w, w_scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chip", default="v7x", choices=sorted(CHIPS))
    args = parser.parse_args()
    folder, chip = schedules.start_dump(), CHIPS[args.chip]
    print(f"{args.chip}: {ROWS} rows x {INPUTS} inputs x {COLUMNS} columns, cycles of a tile")
    print(f"{'product':24} {'schedule':>9} {'MXU':>7} {'VALU':>7} {'peak rate':>10}")
    for label, kernel, name, dtype, rate in (
        ("FP8, scales of blocks", _scaled, "scaled_fp8", jnp.float8_e4m3fn, chip.fp8_flops),
        ("FP8, no scales", _whole, "whole_fp8", jnp.float8_e4m3fn, chip.fp8_flops),
        ("bfloat16", _whole, "whole_bfloat16", jnp.bfloat16, chip.flops),
    ):
        shapes = [(TILES * ROWS, INPUTS), (TILES * ROWS, NUM_BLOCKS), (INPUTS, COLUMNS)]
        shapes.append((NUM_BLOCKS, COLUMNS))
        dtypes = [dtype, jnp.float32] * 2
        arrays = [jax.ShapeDtypeStruct(*both) for both in zip(shapes, dtypes, strict=True)]
        topologies.compile_on(args.chip, functools.partial(_run, kernel, name), *arrays)
        (schedule,) = schedules.read(folder, name)
        trips = (TILES, *schedule.least_trips[1:])
        units = [schedule.unit_cycles(unit, trips) / TILES for unit in ("MXU", "VALU")]
        least = 2 * ROWS * INPUTS * COLUMNS / rate * chip.clock
        cells = [schedule.cycles(trips) / TILES, *units]
        print(f"{label:24} {cells[0]:9,.0f} {cells[1]:7,.0f} {cells[2]:7,.0f} {least:10,.0f}")


if __name__ == "__main__":
    main()
