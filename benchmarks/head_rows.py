"""Norm, rotation and rounding of rows at the sizes of V4-Flash: one token, eight, and 4,096.

python -m benchmarks.head_rows --only "1 token"
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.case import Case, Trips, main
from pallas_kernels.head_rows import Steps, Turn, blocks, finish_rows

EPS, ROPE = 1e-6, 64
KINDS = {  # rows of a token, channels, whether a norm has weights, whether rows are rotated, steps
    "queries": (64, 512, False, True, Steps("steps", EPS)),
    "rows": (1, 512, True, True, Steps("rms", EPS, "rows")),
    "index queries": (64, 128, False, True, Steps(rounding="keys")),
    "index keys": (1, 128, True, True, Steps("rms", EPS, "keys")),
    "output": (64, 512, False, True, Steps()),
    "norm": (1, 4096, True, False, Steps("rms", EPS)),
}


def _make(kind: str, tokens: int) -> tuple:
    heads, width, is_weighted, is_rotated, _ = KINDS[kind]
    shape = (1, tokens, heads, width) if heads > 1 else (1, tokens, width)
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    positions = 100_000 + jnp.arange(tokens)[None]
    weight = jnp.ones(width, jnp.bfloat16) if is_weighted else None
    return x, weight, Turn(positions, (1.0,) * (ROPE // 2)) if is_rotated else None


def _trips(kind: str, tokens: int, chip: str) -> Trips:
    heads, width = KINDS[kind][:2]
    tokens, rows = (1, tokens) if heads == 1 else (tokens, heads)
    own_tokens, own_rows, group = blocks(tokens, rows, width)
    grid = -(-tokens // own_tokens) * -(-rows // own_rows)
    turns = (grid, own_tokens * own_rows // group)
    return {"finish_rows": tuple(n for n in turns if n > 1)}  # one turn is no loop


def _case(kind: str, tokens: int) -> Case:
    heads, width, *_, steps = KINDS[kind]
    return Case(
        op="finish_rows",
        shape=f"{kind} {tokens} token" + "s" * (tokens > 1),
        run=functools.partial(finish_rows, steps=steps),
        make=functools.partial(_make, kind, tokens),
        flops=0.0,
        bytes=4.0 * tokens * heads * width,
        trips=functools.partial(_trips, kind, tokens),
    )


def cases() -> list[Case]:
    """Of decoding with one and eight sequences, and of a chunk of a prompt."""
    return [_case(kind, tokens) for kind in KINDS for tokens in (1, 8, 4096)]


if __name__ == "__main__":
    main(cases(), __doc__)
