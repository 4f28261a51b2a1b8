"""What a step of decoding does around its products, at the sizes of V4-Flash: 1 and 8 tokens.

python -m benchmarks.decode_step --only "pool_token"
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.case import Case, main
from pallas_kernels.formats.packed_rows import PackedColumns, PackedKeys, PackedRows
from pallas_kernels.gated_pool import Pool
from pallas_kernels.grouped_matmul import by_expert, pairs_by_expert
from pallas_kernels.pool_token import pool_token
from pallas_kernels.router import top_experts

EXPERTS, K, ROPE = 256, 6, 64
PACKINGS = {"rows": (PackedRows, 512), "columns": (PackedColumns, 512), "keys": (PackedKeys, 128)}


def _pool_case(name: str, ratio: int, channels: int, overlaps: bool, tokens: int) -> Case:
    def make():
        values = jax.random.normal(jax.random.key(0), (2, tokens, channels))
        current = Pool.empty((tokens, channels))
        previous = Pool.empty((tokens, channels // 2)) if overlaps else None
        slot, valid = jnp.zeros(tokens, jnp.int32), jnp.ones(tokens, bool)
        return current, previous, *values, jnp.zeros((ratio, channels)), slot, valid

    moved = tokens * channels * (2 + 2 * (4.5 if overlaps else 3))
    return Case(
        op="pool_token",
        shape=f"{name} {tokens}",
        run=functools.partial(pool_token, dtype=jnp.bfloat16),
        make=make,
        flops=0.0,
        bytes=4.0 * moved,
        trips=lambda chip: {"pool_token": (tokens,) if tokens > 1 else ()},
    )


def _router_case(tokens: int) -> Case:
    def make():
        logits = jax.random.normal(jax.random.key(0), (1, tokens, EXPERTS))
        return logits, jnp.zeros(EXPERTS)

    grid = -(-tokens // 64)
    return Case(
        op="top_experts",
        shape=f"Flash {tokens}",
        run=functools.partial(top_experts, k=K, scale=1.5),
        make=make,
        flops=0.0,
        bytes=4.0 * tokens * EXPERTS,
        trips=lambda chip: {"top_experts": (grid,) if grid > 1 else ()},
    )


def _order_case(rows: int, experts: int) -> Case:
    return Case(
        op="by_expert",
        shape=f"{rows} rows, {experts} experts",
        run=functools.partial(by_expert, num_experts=experts),
        make=lambda: (jax.random.randint(jax.random.key(0), (rows,), 0, experts + 1),),
        flops=0.0,
        bytes=4.0 * (3 * rows + experts),
        trips=lambda chip: {"by_expert": ()},
    )


def _pairs_case(devices: int, tokens: int, experts: int) -> Case:
    """Of the tokens of so many devices, which told each other their experts; an expert device's order."""

    def make():
        shape = (devices, tokens, K)
        numbers = jax.random.randint(jax.random.key(0), shape, 0, EXPERTS)
        return numbers, jnp.ones(shape), jnp.int32(experts)

    pairs = devices * tokens * K
    return Case(
        op="pairs_by_expert",
        shape=f"{devices} x {tokens} tokens, {experts} experts",
        run=functools.partial(pairs_by_expert, num_experts=experts),
        make=make,
        flops=0.0,
        bytes=4.0 * (5 * pairs + experts),
        trips=lambda chip: {"pairs_by_expert": ()},
    )


def _words_case(layout: str, tokens: int) -> Case:
    kind, width = PACKINGS[layout]

    def run(x, *, implementation):
        shape = (1, 1, width)
        packed = kind.zeros(shape) if kind is PackedKeys else kind.zeros(shape, ROPE)
        return packed.words_of(x, implementation)

    return Case(
        op="words",
        shape=f"{layout} {tokens}",
        run=run,
        make=lambda: (jax.random.normal(jax.random.key(0), (tokens, 1, width), jnp.bfloat16),),
        flops=0.0,
        bytes=3.0 * tokens * width,
        trips=lambda chip: {f"words_of_{layout}": ()},
    )


def cases() -> list[Case]:
    """Compressors, router, order of rows, words of rows and keys."""
    pools = [("CSA entries", 4, 1024, True), ("CSA keys", 4, 256, True), ("HCA", 128, 512, False)]
    return [
        *[_pool_case(*pool, tokens) for pool in pools for tokens in (1, 8)],
        *[_router_case(tokens) for tokens in (1, 8, 4096)],
        *[_order_case(*sizes) for sizes in ((6, 256), (48, 32), (512, 384))],
        *[_pairs_case(*sizes) for sizes in ((8, 1, 32), (1, 8, 256))],
        *[_words_case(layout, tokens) for layout in PACKINGS for tokens in (1, 8)],
    ]


if __name__ == "__main__":
    main(cases(), __doc__)
