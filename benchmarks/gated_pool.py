"""Pooling of token windows at the sizes of V4-Flash and V4-Pro (which share them).

python -m benchmarks.gated_pool --only "CSA entries"
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.case import Case, Trips, main
from pallas_kernels.gated_pool import GROUP_WINDOWS, blocks, pool_windows

TOKENS = 8192


def _make(ratio: int, channels: int, is_masked: bool) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    value, gate = (jax.random.normal(k, (1, TOKENS, channels)) for k in keys[:2])
    valid = jnp.arange(TOKENS).reshape(1, -1, ratio) < TOKENS - ratio // 2
    return value, gate, jax.random.normal(keys[2], (ratio, channels)), *[valid] * is_masked


def _run(value, gate, bias, *valid, implementation):
    """Windows cut from rows, as the compressors do: the reshapes cost nothing."""
    value, gate = (x.reshape(1, -1, *bias.shape) for x in (value, gate))
    return pool_windows(value, gate, bias, *valid, implementation=implementation)


def _trips(ratio: int, channels: int, chip: str) -> Trips:
    windows, width = blocks(TOKENS // ratio, ratio, channels)
    steps = TOKENS // ratio // windows * channels // width
    groups = [] if ratio % 8 == 0 else [windows // GROUP_WINDOWS]
    return {"pool_windows": (steps, *groups)}


def _case(name: str, ratio: int, channels: int, is_masked: bool = False) -> Case:
    rows, windows = TOKENS * channels, TOKENS // ratio * channels
    return Case(
        op="gated_pool",
        shape=f"{name} {TOKENS >> 10}k" + " masked" * is_masked,
        run=_run,
        make=functools.partial(_make, ratio, channels, is_masked),
        flops=6.0 * rows,
        bytes=4.0 * (2 * rows + 3 * windows),
        trips=functools.partial(_trips, ratio, channels),
    )


def cases() -> list[Case]:
    """The three compressors, and the two ratios with rows that do not count."""
    kinds = [("CSA entries", 4, 1024), ("CSA keys", 4, 256), ("HCA entries", 128, 512)]
    return [_case(*k) for k in kinds] + [_case(*k, is_masked=True) for k in kinds[::2]]


if __name__ == "__main__":
    main(cases(), __doc__)
