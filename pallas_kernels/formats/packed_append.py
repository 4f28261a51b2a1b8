"""Writing items behind others in lines of 128 words, in place (layouts: `packed_rows.py`).

Items of W words lie one after another, or on lanes: item s is lane s % 128 of the W lines from
W * (s // 128) on.

One item per sequence, which is decoding, is a Pallas kernel on a TPU: it fetches the few lines an
item lies in, puts it there and writes them back, for eight sequences at once. Sequences whose item
is not complete cost nothing. As XLA has it, a loop over the sequences, it takes some seven operations
for each, which are longer to start than to run. (A scatter is one operation, but before it XLA
transposes all of `data`.)
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.formats.packed_words import Packing

LINE = 128  # words
TOGETHER = 8  # sequences


def append(
    data: jax.Array,  # [B, lines, 128] uint32, items on lanes; with a table [1, lines, 128]
    new: jax.Array,  # [B, n, W] uint32, or rows [B, n, H] with a packing
    start: jax.Array,  # [B] int32 place of the first new item
    counts: jax.Array,  # [B] int32: so many of the n are written, all of which have room
    *,
    on_lanes: bool,
    table: jax.Array | None = None,  # [B, pages] int32, see `pages.py`
    packing: Packing | None = None,  # makes words of rows; of one row a sequence in the kernel
    implementation: dispatch.Implementation = None,
) -> jax.Array:
    """`data` with the new items.

    Sequences that write have pages of their own: no two of them write to one.

    Raises:
      ValueError: an implementation that cannot run; items in order without a table.
    """
    if table is None and not on_lanes:
        raise ValueError("on_lanes=False without a table: expected pages, or items on lanes.")
    size = jax.ShapeDtypeStruct(new.shape, jnp.uint32)
    if packing is not None:
        size = jax.eval_shape(packing.otherwise, new)
    words = size.shape[2]
    num_lines = words if on_lanes else -(-words // LINE) + 1
    unsupported = None
    if new.shape[1] != 1:
        unsupported = f"{new.shape[1]} items: the kernel appends one"
    elif data.shape[1] < num_lines:
        unsupported = f"{data.shape[1]} lines: the kernel changes {num_lines}"
    chosen = dispatch.choose(implementation, unsupported=unsupported)
    encode = None if packing is None else packing.in_kernel(new)
    if packing is not None and (encode is None or chosen not in ("tpu", "interpret")):
        new, encode = packing.words(new), None
    if chosen in ("tpu", "interpret"):
        static = words, num_lines, on_lanes, encode, chosen == "interpret"
        return _call(data, new[:, 0], start, counts, table, *static)
    if table is not None:
        return _page_by_page(data, new, start, counts, table, on_lanes)
    return _one_by_one(data, new, start, counts)


def to_lanes(words: jax.Array) -> jax.Array:
    """[..., 128 n, W] -> [..., n * W, 128]"""
    *batch, length, size = words.shape
    groups = jnp.swapaxes(words.reshape(*batch, length // LINE, LINE, size), -1, -2)
    return groups.reshape(*batch, length // LINE * size, LINE)


def _one_by_one(data, items, start, counts):
    """Items on lanes, a slice of one sequence after another being read, changed and written."""
    batch, num_items, words = items.shape
    num_groups = data.shape[1] // words
    changed = min((num_items + LINE - 2) // LINE + 1, num_groups)
    first = jnp.clip(start // LINE, 0, num_groups - changed)
    offset = start - LINE * first
    shape = (changed * words, LINE)
    place = LINE * (jax.lax.broadcasted_iota(jnp.int32, shape, 0) // words)
    place += jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    def put(b, data):
        at = (b, first[b] * words, 0)
        old = jax.lax.dynamic_slice(data, at, (1, *shape))
        new = jnp.zeros((changed * LINE + num_items, words), data.dtype)
        new = jax.lax.dynamic_update_slice(new, items[b], (offset[b], 0))[: changed * LINE]
        written = (place >= offset[b]) & (place < offset[b] + counts[b])
        return jax.lax.dynamic_update_slice(data, jnp.where(written, to_lanes(new), old), at)

    return jax.lax.fori_loop(0, batch, put, data)


def _page_by_page(data, items, start, counts, table, on_lanes):
    """A page of one sequence after another being read, changed and written; one item by its words."""
    batch, num_items, words = items.shape
    if num_items == 1 and not on_lanes:
        return _row_by_row(data, items[:, 0], start, counts, table)
    touched = (num_items + LINE - 2) // LINE + 1  # pages of a sequence
    padded = jnp.pad(items, [(0, 0), (LINE, 2 * LINE), (0, 0)])

    def put(i, data):
        b, page = i // touched, start[i // touched] // LINE + i % touched
        first = page * LINE - start[b]  # item of the page's first row
        new = jax.lax.dynamic_slice(padded[b], (first + LINE, 0), (LINE, words))
        item = first + jnp.arange(LINE)
        written = (item >= 0) & (item < counts[b])
        if on_lanes:
            new = new.T
        else:
            new, written = new.reshape(words, LINE), jnp.repeat(written, words).reshape(words, LINE)
        at = (0, table[b, jnp.minimum(page, table.shape[1] - 1)] * words, 0)
        old = jax.lax.dynamic_slice(data, at, (1, words, LINE))
        return jax.lax.dynamic_update_slice(data, jnp.where(written, new, old[0])[None], at)

    return jax.lax.fori_loop(0, batch * touched, put, data)


def _row_by_row(data, items, start, counts, table):
    """One item [B, W] of each sequence, put among the words of its page."""
    batch, words = items.shape

    def put(b, flat):
        at = (table[b, start[b] // LINE] * LINE + start[b] % LINE) * words
        old = jax.lax.dynamic_slice(flat, (at,), (words,))
        return jax.lax.dynamic_update_slice(flat, jnp.where(counts[b] > 0, items[b], old), (at,))

    # Up to the last that writes, which XLA does not know: it would join a single turn with reads that
    # follow, which then need what was there before, and so copy all pages.
    end = jnp.max(jnp.where(counts > 0, jnp.arange(1, batch + 1), 0))
    return jax.lax.fori_loop(0, end, put, data.reshape(-1)).reshape(data.shape)


def _call(data, new, start, counts, table, words, num_lines, on_lanes, encode, interpret):
    batch, width = new.shape  # words, or channels that `encode` makes words of
    array = jnp.arange(batch, dtype=jnp.int32)  # of `data` that a sequence lies in
    page, place = start // LINE, start % LINE
    if table is not None:
        array = jnp.zeros_like(array)
        page = jnp.take_along_axis(table, page[:, None], axis=1, mode="clip")[:, 0]
    first, offset = page * words, place
    if not on_lanes:
        line = jnp.minimum(place * words // LINE, words - num_lines)  # the next page is another's
        first, offset = first + line, place * words - LINE * line
    first = jnp.where(counts > 0, first, 0)
    together = min(TOGETHER, batch)
    scalars = [jnp.pad(x, (0, -batch % together)) for x in (array, first, offset, counts)]
    return pl.pallas_call(
        functools.partial(
            _kernel, words=words, merge=_on_lanes if on_lanes else _in_order, encode=encode
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(batch, together),),
            in_specs=[
                pl.BlockSpec((together, width), lambda i, *_: (i, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((together, num_lines, LINE), jnp.uint32),
                pltpu.VMEM((together, -(-words // LINE) * LINE), jnp.uint32),
                pltpu.SemaphoreType.DMA((together,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(data.shape, data.dtype),
        input_output_aliases={5: 0},
        interpret=interpret,
        name="append",
    )(*scalars, new, data if interpret else pltpu.with_memory_space_constraint(data, pltpu.HBM))


def _kernel(
    array_ref,  # [B] in `data`
    first_ref,  # [B] line
    offset_ref,  # [B] lane, or word
    counts_ref,  # [B]
    new_ref,  # [8, W], or rows that are to be encoded
    _,
    data_ref,  # in HBM
    lines_ref,  # [8, lines, 128]
    whole_ref,  # [8, P]: words in whole lines; what is behind them is not looked at
    arrived,
    *,
    words: int,
    merge,
    encode,
):
    def each(do):
        for i in range(lines_ref.shape[0]):
            b = pl.program_id(0) * lines_ref.shape[0] + i
            pl.when(counts_ref[b] > 0)(functools.partial(do, i, b))

    def here(i, b):
        return data_ref.at[array_ref[b], pl.ds(first_ref[b], lines_ref.shape[1])]

    def fetch(i, b):
        pltpu.make_async_copy(here(i, b), lines_ref.at[i], arrived.at[i]).start()

    def change(i, b):
        pltpu.make_async_copy(here(i, b), lines_ref.at[i], arrived.at[i]).wait()
        lines_ref[i] = merge(lines_ref[i], whole_ref[i : i + 1], offset_ref[b], words)
        pltpu.make_async_copy(lines_ref.at[i], here(i, b), arrived.at[i]).start()

    def finish(i, b):
        pltpu.make_async_copy(lines_ref.at[i], here(i, b), arrived.at[i]).wait()

    each(fetch)
    if encode is None:
        whole_ref[:, :words] = new_ref[...]
    else:
        encode(new_ref, whole_ref)
    each(change)
    each(finish)


def _on_lanes(old, new, offset, words: int):
    """old [W, 128] with new [1, P] in lane `offset`."""
    parts = [
        jnp.transpose(jnp.broadcast_to(new[:, i : i + LINE], (LINE, LINE)))
        for i in range(0, new.shape[1], LINE)
    ]
    lane = jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
    return jnp.where(lane == offset, jnp.concatenate(parts, axis=0)[:words], old)


def _in_order(old, new, offset, words: int):
    """old [P / 128 + 1, 128] with new [1, P] from word `offset` on, which is less than 256."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LINE), 1)
    shift = offset & (LINE - 1)
    turned = [pltpu.roll(new[:, i : i + LINE], shift, 1) for i in range(0, new.shape[1], LINE)]
    lines = [turned[0]]
    lines += [jnp.where(lane < shift, *pair) for pair in itertools.pairwise(turned)]
    lines.append(turned[-1])
    later = [lines[0], *lines[:-1]]
    placed = jnp.where(offset >= LINE, jnp.concatenate(later), jnp.concatenate(lines))
    word = LINE * jax.lax.broadcasted_iota(jnp.int32, old.shape, 0) - offset
    word += jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
    return jnp.where((word >= 0) & (word < words), placed, old)
