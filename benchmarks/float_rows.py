"""Packed pages of one layer put side by side as floats, as a chunk of a prompt needs them on a TPU.

    python -m benchmarks.float_rows --only "CSA 128k"

What XLA does instead is timed with `--implementation xla`. Sizes are those of Flash; Pro's are the same.
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.case import Case, Trips, main
from pallas_kernels import dispatch
from pallas_kernels.attention import tpu_packed
from pallas_kernels.formats import tpu_rows
from pallas_kernels.formats.packed_rows import PackedColumns, PackedKeys, PackedRows
from pallas_kernels.formats.pages import PAGE, Pages, num_pages
from pallas_kernels.indexer import tpu_decode
from v4jax import config
from v4jax.planning.kernel_trips import float_rows_trips

FLASH = config.flash()
KINDS = {  # ratio, channels, format, bytes of a packed row
    "CSA": (4, FLASH.head_dim, PackedRows, 584),
    "HCA": (128, FLASH.head_dim, PackedColumns, 584),
    "keys": (4, FLASH.indexer.head_dim, PackedKeys, 68),
}


def _make(kind: str, num_entries: int) -> tuple[Pages, jax.Array]:
    _, width, packing, _ = KINDS[kind]
    pages = num_pages(num_entries)
    rows = jax.random.normal(jax.random.key(0), (1, pages * PAGE, width), jnp.bfloat16)
    pool = packing.pack(rows) if packing is PackedKeys else packing.pack(rows, FLASH.rope_head_dim)
    table = jax.random.permutation(jax.random.key(1), pages).astype(jnp.int32)
    return Pages(pool, table[None]), jnp.full(1, num_entries, jnp.int32)


def _run(pages: Pages, wanted: jax.Array, *, implementation: dispatch.Implementation) -> jax.Array:
    if dispatch.choose(implementation) != "tpu":
        return pages.floats(jnp.bfloat16)
    is_keys = isinstance(pages.pool, PackedKeys)
    unpack = (tpu_decode if is_keys else tpu_packed).unpacker(pages.pool)
    return tpu_rows.float_rows(pages, wanted, unpack, jnp.bfloat16, interpret=False)


def _trips(num_entries: int, chip: str) -> Trips:
    return {"float_rows": float_rows_trips(chip, 1, num_pages(num_entries))}


def _case(kind: str, context: int) -> Case:
    ratio, width, _, row_bytes = KINDS[kind]
    num_entries = context // ratio
    return Case(
        op="float_rows",
        shape=f"{kind} {context >> 10}k",
        run=_run,
        make=functools.partial(_make, kind, num_entries),
        flops=0.0,
        bytes=float(num_entries * (row_bytes + 2 * width)),
        trips=functools.partial(_trips, num_entries),
    )


def cases() -> list[Case]:
    """Each kind of rows at two contexts."""
    return [_case(kind, context << 10) for kind in KINDS for context in (128, 1024)]


if __name__ == "__main__":
    main(cases(), __doc__)
