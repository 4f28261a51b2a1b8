"""Rounding and storing rows at the sizes of V4-Flash and V4-Pro, 8192 tokens.

python -m benchmarks.quantize --only "input"
python -m benchmarks.quantize --implementation xla
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.case import Case, Trips, main
from pallas_kernels.formats import quantize_rows

TOKENS = 8192
_OPS = {"round": quantize_rows.round_rows, "quantize": quantize_rows.quantize_rows}


def _make(rows: int, width: int) -> tuple[jax.Array]:
    return (jax.random.normal(jax.random.key(0), (rows, width), jnp.bfloat16),)


def _trips(op: str, fmt: str, block: int, rows: int, width: int, chip: str) -> Trips:
    transposed = quantize_rows.transposes(block, stored=op == "quantize")
    size, group = quantize_rows.blocks(rows, width, transposed=transposed)
    groups = [size // group] if size > group else []  # one turn is no loop
    return {f"{op}_{fmt}": (-(-rows // size), *groups)}


def _case(op: str, shape: str, fmt: str, block: int, rows: int, width: int) -> Case:
    written = 2 if op == "round" else 1 + 1 / block
    return Case(
        op=op,
        shape=shape,
        run=functools.partial(_OPS[op], fmt=fmt, block=block),
        make=functools.partial(_make, rows, width),
        flops=0.0,
        bytes=rows * width * (2 + written),
        trips=functools.partial(_trips, op, fmt, block, rows, width),
    )


def cases() -> list[Case]:
    """Inputs of linears, indexer queries, key-value rows."""
    return [
        _case("round", "Flash input 8k", "fp8", 128, TOKENS, 4096),
        _case("round", "Pro input 8k", "fp8", 128, TOKENS, 7168),
        _case("round", "index queries 8k", "fp4", 32, TOKENS * 64, 128),
        _case("quantize", "Flash input 8k", "fp8", 128, TOKENS, 4096),
        _case("quantize", "rows 8k", "fp8", 64, TOKENS, 512),
    ]


if __name__ == "__main__":
    main(cases(), __doc__)
