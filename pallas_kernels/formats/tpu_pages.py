"""Pages on a TPU: rows found through the table, and blocks of pages that come while others are used.

`pool_rows` turns indices of picked rows into rows of the pool. The table lies in vector registers
there, 128 pages to a row, and is looked up by permutations of lanes: 512 indices into a table of 2,048
pages take some 30 cycles a sequence. As scalars, each index takes three; XLA's gather longer.

`PageStream` reads all pages of one sequence after another. Pages of a block are scattered over the pool,
so each is a copy of its own, which takes some seven scalar instructions to issue. Three blocks are held:

    used:    block 0  block 1  block 2  next sequence's block 0  its block 1  ...
    copied:  block 2  next 0   next 1   ...

so that one is always under way while another is waited for, and copies are issued beside the vector
instructions of the block that is used. Two suffice where a sequence has one block and its work takes longer
than copying it. Only pages with wanted rows are copied: time and traffic follow
what is filled. What lies in the buffer where no page was copied, or in a page behind the last wanted row,
may be another sequence's, and no number.

Copies run on over the steps of the grid, so these have to follow one another on one core. On a chip whose
devices have two cores the grid has an axis for these before that of a core's sequences (`grid_of`): each
core begins with a block it has to wait for, and of an odd batch one sequence is computed twice.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, dispatch
from pallas_kernels.formats.pages import PAGE, Rows

UNROLL = 8  # pages whose copies are issued by one turn of the loop
HELD = 3  # blocks
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


def array_of(pool: Rows, interpret) -> jax.Array:
    """The array of a pool [1, L, W], to be read from HBM."""
    array = pool if isinstance(pool, jax.Array) else pool.data
    if not interpret:  # or XLA moves a short one to VMEM, and all of it back
        array = pltpu.with_memory_space_constraint(array, pltpu.HBM)
    return array


def pages_of(pool: Rows, interpret) -> tuple[jax.Array, int]:
    """The array of a pool as a `PageStream` takes it, and how many lines of it a page is.

    Float pages [P, 16, 8, W]: a page's place is one product, and tiles have 8 rows in VMEM as they have in
    HBM. On v7x bfloat16 would have 16 there, and each copy a descriptor of nine words. Packed pages
    [1, P * lines, 128]: their lines are no whole tiles.
    """
    array = array_of(pool, interpret)
    if isinstance(pool, jax.Array):
        return array.reshape(-1, PAGE // _SUBLANES, _SUBLANES, array.shape[2]), PAGE
    return array, pool.num_words


def scratch(pages: int, lines: int, pool: jax.Array, interpret, held: int = HELD) -> list[Any]:
    """What a `PageStream` of blocks of so many pages of `lines` lines keeps in a kernel.

    An array for each block that is held, not one of all: only so does the compiler know that what is
    copied to one is not read from another, and moves the copies' instructions between those of the
    vector unit. Not in the plain interpreter, where that would be three times the code to compile.
    """
    is_packed = pool.dtype == jnp.uint32
    shape = (pages * lines, pool.shape[2]) if is_packed else (pages, *pool.shape[1:])
    if interpret is True:
        blocks = [pltpu.VMEM((held, *shape), pool.dtype)]
    else:
        blocks = [pltpu.VMEM(shape, pool.dtype)] * held
    return [*blocks, pltpu.SemaphoreType.DMA((held,)), pltpu.SMEM((3,), jnp.int32)]


def pages_held(scratch_refs, lines: int) -> int:
    """Pages of a block, of what `scratch` made."""
    block = scratch_refs[0]
    return block.shape[-2] // lines if block.dtype == jnp.uint32 else block.shape[-4]


def row_of_page(page: jax.Array) -> jax.Array:
    """Which row of its page each number of a page is of, as a kernel has the page: see `pages_of`."""
    if page.dtype == jnp.uint32:
        return jax.lax.broadcasted_iota(jnp.int32, page.shape, 1)
    tile, row = (jax.lax.broadcasted_iota(jnp.int32, page.shape, axis) for axis in (0, 1))
    return tile * _SUBLANES + row


Body = Callable[[Any, jax.Array, Callable], Any]  # see `PageStream.visit`


class PageStream:
    """The pages of each sequence of a core, in blocks, in a kernel over `grid`."""

    def __init__(self, grid: Grid, lines: int, lengths_ref, table_ref, pool_ref, scratch_refs):
        """
        Args:
          lines: of a page.
          lengths_ref: [B] int32 in SMEM: rows wanted of each sequence, no more than its table has.
          table_ref: [B * n] int32 in SMEM.
          pool_ref: see `pages_of`, in HBM.
          scratch_refs: see `scratch`.
        """
        self.grid, self.lines = grid, lines
        self.core, self.step = pl.program_id(0), pl.program_id(1)
        self.lengths, self.table, self.pool = lengths_ref, table_ref, pool_ref
        *self.blocks, self.arrived, self.state = scratch_refs
        self.is_one_array = len(self.blocks) == 1
        self.held = self.arrived.shape[0]
        self.pages = pages_held(scratch_refs, lines)
        self.is_one_block = table_ref.shape[0] // grid.batch <= self.pages  # of each sequence

    def visit(self, body: Body, first: Body | None = None) -> None:
        """`body(rows_ref, k, start)` for each block k of this step's sequence, at least for one.

        `start(first, count)` issues the copies of `count` pages of a block that comes later, from its
        page `first` on; of pages that it does not have, none. It is for the middle of vector code, which
        the copies' scalar instructions then take no time beside. The body returns for how many pages it
        has called that, from page 0 on; the others follow it.

        Args:
          first: the body for block 0, if it is another.
        """
        num_pages = self._num_pages(self.grid.sequence(self.core, self.step))

        @pl.when(self.step == 0)
        def _():
            for i in range(3):
                self.state[i] = 0
            for slot in range(self.held - 1):
                page, count = self._next()
                self._start(slot, page, 0, count)

        if first is not None or self.is_one_block:
            self._visit(first or body, jnp.int32(0), num_pages)
        if not self.is_one_block:
            blocks = pl.cdiv(num_pages, self.pages)
            begin, end = (0, jnp.maximum(blocks, 1)) if first is None else (1, blocks)

            @pl.loop(begin, end)
            def _(k):
                self._visit(body, k, num_pages)

    def _visit(self, body: Body, k, num_pages):
        slot, (page, count) = self.state[0], self._next()
        self.state[0] = jnp.where(slot == self.held - 1, 0, slot + 1)

        def use(slot):
            other = (slot + self.held - 1) % self.held
            self._wait(slot, num_pages - k * self.pages)
            started = body(self._block(slot), k, self._starting(other, page, count))
            if not (isinstance(started, int) and started >= self.pages):
                self._start(other, page, started, count)

        if self.is_one_array:
            use(slot)
            return
        for i in range(self.held):
            # Not a branch: schedules count the turns of loops, but take every branch.
            @pl.loop(0, jnp.where(slot == i, 1, 0))
            def _(_, i=i):
                use(i)

    def _block(self, slot):
        """Where one of the blocks is held; `slot` is a number where each is an array of its own."""
        return self.blocks[0].at[slot] if self.is_one_array else self.blocks[slot]

    def _next(self):
        """The block to copy next: its first page among those of all tables, and how many it has.

        After a sequence's last block comes the next one's first.
        """
        step, k = self.state[1], 0 if self.is_one_block else self.state[2]
        b = self.grid.sequence(self.core, step)
        left = self._num_pages(b) - k * self.pages
        if self.is_one_block:
            self.state[1] = step + 1
        else:
            is_last = left <= self.pages
            self.state[1] = jnp.where(is_last, step + 1, step)
            self.state[2] = jnp.where(is_last, 0, k + 1)
        count = jnp.where(step < self.grid.per_core, jnp.minimum(left, self.pages), 0)
        return b * (self.table.shape[0] // self.grid.batch) + k * self.pages, count

    def _num_pages(self, b):
        return pl.cdiv(self.lengths[b], PAGE)

    def _copy(self, slot, page, at):
        """Of a page among those of all tables, to page `at` of a block."""
        source, block = self.table[page], self._block(slot)
        if self.pool.dtype == jnp.uint32:
            lines = [pl.ds(i * self.lines, self.lines) for i in (source, at)]
            copied = self.pool.at[0, lines[0]], block.at[lines[1]]
        else:
            copied = self.pool.at[source], block.at[at]
        return pltpu.make_async_copy(*copied, self.arrived.at[slot])

    def _starting(self, slot, page, num_pages):
        def start(first, count: int):
            if self.is_one_array:  # less code
                self._start(slot, page, first, jnp.minimum(first + count, num_pages))
                return
            left, page_first = num_pages - first, page + first
            for j in range(count):

                @pl.when(j < left)
                def _(j=j):
                    self._copy(slot, page_first + j, first + j).start()

        return start

    def _start(self, slot, page, first, count):
        """Copies of pages `first` .. `count` - 1 of a block, whose page 0 is `page` of the tables."""
        if not self.is_one_array:
            turns = jnp.maximum(count - first, 0) // UNROLL

            @pl.loop(0, turns)
            def _(i):
                for j in range(UNROLL):
                    at = first + i * UNROLL + j
                    self._copy(slot, page + at, at).start()

            first += turns * UNROLL

        @pl.loop(first, count)
        def _(at):
            self._copy(slot, page + at, at).start()

    def _wait(self, slot, count):
        """For a block of `count` pages, or of all it has room for."""

        @pl.when(count >= self.pages)
        def _():
            block = self._block(slot)
            pltpu.make_async_copy(block, block, self.arrived.at[slot]).wait()

        @pl.when(count < self.pages)
        def _():
            @pl.loop(0, count)
            def _(j):
                self._copy(slot, 0, j).wait()


def pool_rows(
    table: jax.Array,
    indices: jax.Array,
    place: Callable[[jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    *,
    interpret,
) -> list[jax.Array]:
    """As `Pages.rows_of`, for indices [B, 128 m] int32: rows of the pool, for -1 any.

    Args:
      place: makes line and word of rows; for -1 the word is -1. They are the results then.
    """
    batch = indices.shape[0]
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % PAGE)))
    rows = min(batch, _SUBLANES)

    def block(x):
        return pl.BlockSpec((rows, x.shape[1]), lambda i: (i, 0))

    count = 1 if place is None else 2
    return pl.pallas_call(
        functools.partial(_find, place),
        grid=(pl.cdiv(batch, rows),),
        in_specs=[block(table), block(indices)],
        out_specs=[block(indices)] * count,
        out_shape=[jax.ShapeDtypeStruct(indices.shape, jnp.int32)] * count,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="pool_rows",
    )(table, indices)


def _find(place, table_ref, indices_ref, rows_ref, *word_ref):
    for i in range(0, indices_ref.shape[1], PAGE):
        given = indices_ref[:, i : i + PAGE]
        index = jnp.maximum(given, 0)
        wanted = index >> 7
        page = jnp.zeros_like(index)
        for j in range(0, table_ref.shape[1], PAGE):
            found = lanes(table_ref[:, j : j + PAGE], wanted)
            page = jnp.where(wanted >> 7 == j // PAGE, found, page)
        rows = page * PAGE + (index & (PAGE - 1))
        if place is not None:
            rows, word = place(rows)
            word_ref[0][:, i : i + PAGE] = jnp.where(given < 0, -1, word)
        rows_ref[:, i : i + PAGE] = rows


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
