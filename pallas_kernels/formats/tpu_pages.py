"""Pages on a TPU: rows found through the table, and blocks of pages that come while others are used.

`pool_rows` turns indices of picked rows into rows of the pool. The table lies in vector registers
there, 128 pages to a row, and is looked up by permutations of lanes: 512 indices into a table of 2,048
pages take some 30 cycles a sequence. As scalars, each index takes three; XLA's gather longer.

`PageStream` reads all pages of one sequence after another. Pages of a block are scattered over the pool,
so each is a copy of its own, which takes some ten scalar instructions to issue:

    block 0, slot 0 | block 1, slot 1 | block 2, slot 0 | next sequence's block 0, slot 1 | ...
    copies of the block behind it are issued before a block is waited for

Only pages with wanted rows are copied: time and traffic follow what is filled. What lies in the buffer
where no page was copied, or in a page behind the last wanted row, may be another sequence's, and no number.

Copies run on over the steps of the grid, so these have to follow one another on one core. On a chip whose
devices have two cores the grid has an axis for these before that of a core's sequences (`grid_of`): each
core begins with a block it has to wait for, and of an odd batch one sequence is computed twice.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, dispatch
from pallas_kernels.formats.pages import PAGE, Rows

UNROLL = 8  # pages whose copies are issued by one turn of the loop
_SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Grid:
    """Steps of a kernel that goes over sequences: those of a core follow one another."""

    batch: int
    cores: int
    per_core: int

    @property
    def shape(self) -> tuple[int, int]:
        """(cores, sequences of a core)."""
        return self.cores, self.per_core

    def sequence(self, core, step):
        """Which of the batch a step is at; the last of it again where a core has none left."""
        return jnp.minimum(core * self.per_core + step, self.batch - 1)

    def block(self, *shape: int) -> pl.BlockSpec:
        """A sequence's part [*shape] of an array [B, *shape]."""

        def where(core, step, *_):
            return self.sequence(core, step), *[0] * len(shape)

        return pl.BlockSpec((None, *shape), where)


def grid_of(batch: int) -> Grid:
    """For the target chip."""
    cores = min(batch, chips.CHIPS[dispatch.target_chip()].cores)
    return Grid(batch, cores, -(-batch // cores))


def array_of(pool: Rows, interpret) -> tuple[jax.Array, int]:
    """The array of a pool, to be read from HBM, and how many lines of it a page is."""
    array, lines = (pool, PAGE) if isinstance(pool, jax.Array) else (pool.data, pool.num_words)
    if not interpret:  # or XLA moves a short one to VMEM, and all of it back
        array = pltpu.with_memory_space_constraint(array, pltpu.HBM)
    return array, lines


def scratch(pages: int, lines: int, pool: jax.Array) -> list[Any]:
    """What a `PageStream` of blocks of so many pages of `lines` lines keeps in a kernel."""
    return [
        pltpu.VMEM((2, pages * lines, pool.shape[2]), pool.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SMEM((1,), jnp.int32),
    ]


class PageStream:
    """The pages of each sequence of a core, in blocks, in a kernel over `grid`."""

    def __init__(self, grid: Grid, lengths_ref, table_ref, pool_ref, buffer_ref, arrived, turn_ref):
        """
        Args:
          lengths_ref: [B] int32 in SMEM: rows wanted of each sequence, no more than its table has.
          table_ref: [B * n] int32 in SMEM.
          pool_ref: [1, P * lines, W] in HBM.
          buffer_ref, arrived, turn_ref: see `scratch`.
        """
        self.grid, self.lengths, self.table, self.pool = grid, lengths_ref, table_ref, pool_ref
        self.buffer, self.arrived, self.turn = buffer_ref, arrived, turn_ref

    def visit(self, lines: int, body: Callable[[Any, jax.Array], None]) -> None:
        """`body(rows_ref, k)` for each block k of this step's sequence, at least for one.

        Args:
          lines: of a page.
        """
        core, step = pl.program_id(0), pl.program_id(1)
        b, following = self.grid.sequence(core, step), self.grid.sequence(core, step + 1)
        pages = self.buffer.shape[1] // lines
        num_pages = self._num_pages(b)
        pages_following = jnp.where(step + 1 < self.grid.per_core, self._num_pages(following), 0)
        row, row_following = (x * (self.table.shape[0] // self.grid.batch) for x in (b, following))

        @pl.when(step == 0)
        def _():
            self.turn[0] = 0
            self._start(row, num_pages, 0, lines)

        count, first = jnp.maximum(pl.cdiv(num_pages, pages), 1), self.turn[0]

        @pl.loop(0, count)
        def _(k):
            slot = (first + k) & 1
            left = num_pages - (k + 1) * pages
            is_last = k == count - 1
            page = jnp.where(is_last, row_following, row + (k + 1) * pages)
            self._start(page, jnp.where(is_last, pages_following, left), 1 - slot, lines)
            self._wait(left + pages, slot, lines)
            body(self.buffer.at[slot], k)

        self.turn[0] = (first + count) & 1

    def _num_pages(self, b):
        return pl.cdiv(self.lengths[b], PAGE)

    def _copy(self, page, slot, j, lines: int):
        """Of page `page` of all tables, to be page j of a block."""
        line = self.table[page + j] * lines
        to = j * lines
        if lines % PAGE == 0:
            line, to = pl.multiple_of(line, PAGE), pl.multiple_of(to, PAGE)
        return pltpu.make_async_copy(
            self.pool.at[0, pl.ds(line, lines)],
            self.buffer.at[slot, pl.ds(to, lines)],
            self.arrived.at[slot],
        )

    def _start(self, page, count, slot, lines: int):
        """Copies of the first `count` pages of a block, the first of which is `page` of the tables."""
        count = jnp.minimum(count, self.buffer.shape[1] // lines)

        @pl.loop(0, count // UNROLL)
        def _(i):
            for j in range(UNROLL):
                self._copy(page, slot, i * UNROLL + j, lines).start()

        @pl.loop(count // UNROLL * UNROLL, count)
        def _(j):
            self._copy(page, slot, j, lines).start()

    def _wait(self, count, slot, lines: int):
        pages = self.buffer.shape[1] // lines

        @pl.when(count >= pages)
        def _():
            block = self.buffer.at[slot]
            pltpu.make_async_copy(block, block, self.arrived.at[slot]).wait()

        @pl.when(count < pages)
        def _():
            @pl.loop(0, count)
            def _(j):
                self._copy(0, slot, j, lines).wait()


def pool_rows(table: jax.Array, indices: jax.Array, *, interpret) -> jax.Array:
    """As `Pages.rows_of`, for indices [B, 128 m] int32: rows of the pool, for -1 any."""
    batch = indices.shape[0]
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % PAGE)))
    rows = min(batch, _SUBLANES)

    def block(x):
        return pl.BlockSpec((rows, x.shape[1]), lambda i: (i, 0))

    return pl.pallas_call(
        _find,
        grid=(pl.cdiv(batch, rows),),
        in_specs=[block(table), block(indices)],
        out_specs=block(indices),
        out_shape=jax.ShapeDtypeStruct(indices.shape, jnp.int32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="pool_rows",
    )(table, indices)


def _find(table_ref, indices_ref, rows_ref):
    for i in range(0, indices_ref.shape[1], PAGE):
        index = jnp.maximum(indices_ref[:, i : i + PAGE], 0)
        wanted = index >> 7
        page = jnp.zeros_like(index)
        for j in range(0, table_ref.shape[1], PAGE):
            found = lanes(table_ref[:, j : j + PAGE], wanted)
            page = jnp.where(wanted >> 7 == j // PAGE, found, page)
        rows_ref[:, i : i + PAGE] = page * PAGE + (index & (PAGE - 1))


def lanes(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [R, 128] at lanes index [R, 128], modulo 128."""
    rows = (0,)
    along_lanes = jax.lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(1,),
        start_index_map=(1,),
        operand_batching_dims=rows,
        start_indices_batching_dims=rows,
    )
    return jax.lax.gather(
        x,
        (index & (PAGE - 1))[..., None],
        along_lanes,
        slice_sizes=(1, 1),
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
