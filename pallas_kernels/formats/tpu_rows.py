"""Pages of a cache on a TPU as floats side by side, for kernels that go over them many times.

A chunk of a prompt multiplies every row of its history with hundreds of queries, 2,048 rows of query and
head at a time. Unpacking a row for each of these blocks of queries costs more than reading it as floats
(`docs/measurements/pages.md`), so it is unpacked once, by this kernel, into an array that lives for one
operation of one layer.

Pages come through `tpu_pages.PageStream`, are unpacked in VMEM, and leave in blocks by copies that run
beside the next block. Only blocks with wanted rows are read and written: time follows what is filled.

What XLA does instead: it gathers all pages that the table has room for, and unpacks them in several
passes over HBM.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int32

from pallas_kernels import signatures
from pallas_kernels.formats import tpu_pages
from pallas_kernels.formats.pages import PAGE, Pages, table_too_large

LANES = 128
BLOCK = 1024  # rows: whole blocks of entries of the attention kernel
IN_FLIGHT = 2  # blocks of floats

Unpack = Callable[[jax.Array, jax.Array], jax.Array]  # (lines of a block, page of it) -> [128, W]


@signatures.shaped
def float_rows(
    pages: Pages,  # [B, S, W]
    wanted: Int32[jax.Array, " B"],  # rows of each sequence, at most S
    unpack: Unpack | None,
    dtype: jax.typing.DTypeLike,
    *,
    interpret: bool,
) -> Float[jax.Array, "B S W"]:
    """Rows as floats. Behind those wanted, zeros to the end of a block of `BLOCK`, then anything.

    Of a sequence without wanted rows the first block is zeros. XLA puts side by side what the kernel does
    not take: a table too large for the memory of scalars, packed rows without `unpack`, widths that are
    no multiple of 128.

    Args:
      unpack: rows of a page, from a ref to the lines of a block. Not needed where pages hold floats.
    """
    batch, num_rows, width = pages.shape
    is_packed = not isinstance(pages.pool, jax.Array)
    if table_too_large(pages.table) or width % LANES or (is_packed and unpack is None):
        is_wanted = jnp.arange(num_rows) < wanted[:, None]
        return jnp.where(is_wanted[..., None], pages.floats(dtype), 0)
    pool, lines = tpu_pages.pages_of(pages.pool, interpret)
    block_pages = min(BLOCK // PAGE, pages.table.shape[1])
    block = block_pages * PAGE
    grid = tpu_pages.grid_of(batch)
    out = pl.pallas_call(
        functools.partial(_kernel, grid=grid, lines=lines, unpack=unpack),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid.shape,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((IN_FLIGHT, block, width), jnp.dtype(dtype)),
                pltpu.SemaphoreType.DMA((IN_FLIGHT,)),
                *tpu_pages.scratch(block_pages, lines, pool, interpret),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, -(-num_rows // block) * block, width), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=True,  # half of the cost of issuing a copy
        ),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=batch
            * num_rows
            * (width * jnp.dtype(dtype).itemsize + lines * pool.shape[2] * pool.itemsize // PAGE),
        ),
        interpret=interpret,
        name="float_rows",
    )(wanted, pages.table.reshape(-1), pool)
    return out[:, :num_rows]


def _kernel(
    wanted,  # [B] int32 in SMEM
    table,  # [B * n] int32 in SMEM
    pool_ref,  # [1, P * lines, W] in HBM, or float pages [P, 16, 8, W]
    out_ref,  # [B, S, W] in HBM
    rows_ref,  # [2, block, W]
    written,  # a semaphore for each of the two
    *stream,  # see `tpu_pages.scratch`
    grid: tpu_pages.Grid,
    lines: int,
    unpack: Unpack | None,
):
    b = grid.sequence(pl.program_id(0), pl.program_id(1))
    block = rows_ref.shape[1]

    def leaving(k):
        """The copy of block k."""
        at = pl.ds(pl.multiple_of(k * block, block), block)
        slot = k % IN_FLIGHT
        return pltpu.make_async_copy(rows_ref.at[slot], out_ref.at[b, at], written.at[slot])

    def visit(lines_ref, k, start):
        pl.when(k >= IN_FLIGHT)(lambda: leaving(k - IN_FLIGHT).wait())
        limit = wanted[b] - k * block

        @pl.loop(0, block // PAGE)
        def _(page):
            start(page, 1)
            at = pl.ds(pl.multiple_of(page * PAGE, PAGE), PAGE)
            rows = lines_ref[page].reshape(PAGE, -1) if unpack is None else unpack(lines_ref, page)
            rows_ref[k % IN_FLIGHT, at] = rows.astype(rows_ref.dtype)

        @pl.when(limit < block)
        def _():  # what is there may be no number
            @pl.loop(jnp.maximum(limit, 0) // PAGE, block // PAGE)
            def _(page):
                at = pl.ds(pl.multiple_of(page * PAGE, PAGE), PAGE)
                old = rows_ref[k % IN_FLIGHT, at]
                row = page * PAGE + jax.lax.broadcasted_iota(jnp.int32, old.shape, 0)
                rows_ref[k % IN_FLIGHT, at] = jnp.where(row < limit, old, jnp.zeros_like(old))

        leaving(k).start()
        return block // PAGE

    tpu_pages.PageStream(grid, lines, wanted, table, pool_ref, stream).visit(visit)
    last = jnp.maximum(pl.cdiv(wanted[b], block), 1) - 1

    @pl.loop(jnp.maximum(last - IN_FLIGHT + 1, 0), last + 1)
    def _(k):
        leaving(k).wait()
