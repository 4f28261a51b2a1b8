"""How often the loops of Pallas kernels turn, where that depends on data: for their schedules.

The order of a kernel's loops was found by reading the compiler's dumps (`schedules`). Kernels that are
not here have loops of fixed trips alone, or their schedule counts such loops once.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import tpu_decode
from pallas_kernels.chips import CHIPS
from pallas_kernels.formats import tpu_rows
from pallas_kernels.formats.pages import PAGE
from pallas_kernels.formats.tpu_pages import HELD, UNROLL
from pallas_kernels.grouped_matmul import block_sizes as product_sizes
from pallas_kernels.grouped_matmul import few_rows, tpu
from pallas_kernels.grouped_matmul.weights import Format
from pallas_kernels.indexer import block_sizes as index_sizes
from v4jax.planning.launches import Array, Kernel
from v4jax.planning.schedules import Schedule

Trips = tuple[float, ...]
# Halvings of the indexer's search for its threshold that random queries and keys need in decoding: normal
# numbers rounded to FP4, as the model rounds them.
DECODE_PASSES = 14
_BYTES = {"u8": ("fp4", 0.5), "f8e4m3fn": ("fp8", 1.0), "bf16": ("float", 2.0)}


FEW_ROWS_SCALARS = 5  # arrays of scalars of the kernel for few rows: visits


def trips(
    kernel: Kernel, schedule: Schedule, chip: str, experts: float | None = None
) -> Trips | None:
    """Trips of all loops of a kernel; None if some are not known.

    Args:
      experts: of how many a step reads the weights, for the kernels of routed experts.
    """
    if not schedule.depends_on_data:
        return schedule.least_trips
    found: Trips | None = None
    if kernel.name.endswith("_few_rows"):
        found = _few_rows(kernel, chip, experts)
    elif "grouped_weight_gradient" in kernel.name:
        found = _weight_gradient(kernel)
    elif "grouped_" in kernel.name:
        found = _grouped(kernel, chip)
    elif kernel.name == "index_list":
        table, queries = kernel.operands[1][1], kernel.operands[2][1]
        pages = table[0] // queries[0]
        found = index_list_trips(chip, queries[0], pages * PAGE, kernel.results[0][1][-1])
    elif kernel.name == "decode_stream":
        table, queries = kernel.operands[2][1], kernel.operands[3][1]
        found = decode_stream_trips(chip, queries[0], table[0] // queries[0])
    elif kernel.name == "float_rows":
        table, rows = kernel.operands[1][1], kernel.results[0][1]
        found = float_rows_trips(chip, rows[0], table[0] // rows[0])
    return found if found is not None and len(found) == schedule.num_loops else None


def _few_rows(kernel: Kernel, chip: str, experts: float | None) -> Trips | None:
    formats, groups = _formats(kernel)
    if not formats:
        return None
    given = math.prod(_rows_of(kernel)[1][:-1])
    result = kernel.results[0][1][0]
    num_rows = max(given, result)  # one of them may be tokens
    rows = product_sizes.few_rows(num_rows, groups, formats[0].num_inputs)
    if rows is None:
        return None
    visits = groups * -(-num_rows // groups // rows) if experts is None else max(experts, 1.0)
    ordered = summed = None
    if sum(len(shape) == 1 for _, shape in kernel.operands) > FEW_ROWS_SCALARS:
        own = num_rows if experts is None else visits  # hardly more than one of an expert
        is_first = "swiglu" in kernel.name
        ordered, summed = (own, None) if is_first else (None, result)
    return few_rows_trips(chip, formats, num_rows, rows, visits, ordered=ordered, summed=summed)


def _rows_of(kernel: Kernel) -> Array:
    """The rows of a grouped product, which come behind scalars; an axis of devices may be before them."""
    return next((d, s) for d, s in kernel.operands if len(s) > 1 and d in ("bf16", "f32"))


def _formats(kernel: Kernel) -> tuple[list[Format], int]:
    """Of the weights of a grouped product with bfloat16 rows, and how many groups they have."""
    others = kernel.operands[kernel.operands.index(_rows_of(kernel)) + 1 :]
    weights = [(d, shape) for d, shape in others if len(shape) == 3 and d in _BYTES]
    formats = []
    for dtype, (_, height, columns) in weights:
        kind, size = _BYTES[dtype]
        num_inputs = height * 2 if kind == "fp4" else height
        formats.append(Format(kind, num_inputs, columns, jnp.dtype(jnp.bfloat16), size))
    return formats, weights[0][1][0] if weights else 0


def _grouped(kernel: Kernel, chip: str) -> Trips | None:
    formats, groups = _formats(kernel)
    if not formats:
        return None
    num_rows = kernel.results[0][1][0]
    has_row_sums = "grouped_swiglu_gradient" in kernel.name
    num_results = len(kernel.results) - has_row_sums
    product = tpu.Product(
        kernel.name,
        lambda products, _: products,
        (jnp.bfloat16,) * num_results,
        transposed="transposed" in kernel.name,
        has_row_sums=has_row_sums,
    )
    return grouped_trips(chip, product, formats, num_rows, groups, num_extras=has_row_sums)


def _weight_gradient(kernel: Kernel) -> Trips:
    (num_rows, num_inputs), (_, num_outputs) = (s for _, s in kernel.operands if len(s) == 2)
    return weight_gradient_trips(num_rows, kernel.results[0][1][0], num_inputs, num_outputs)


def grouped_trips(
    chip: str,
    product: tpu.Product,
    formats: Sequence[Format],
    num_rows: int,
    groups: int,
    num_extras: int = 0,
) -> Trips:
    """Of products of many rows with an expert each, which balanced random routing gave them.

    Args:
      num_extras: operands that have a value for each row and column.
    """
    rows = product_sizes.group_tile(num_rows, groups)
    sizes = tpu.sizes_for(product, chip, rows, formats, num_extras)
    assert sizes is not None  # it was compiled
    visits, visited = balanced_visits(num_rows, groups, rows)
    num_steps = sizes.columns // sizes.step
    steps = (num_steps,) if num_steps > 1 else ()  # a loop of one turn is none
    columns = formats[0].num_inputs if product.transposed else formats[0].num_outputs
    grid = columns // sizes.columns * visits
    last_waits = 2 / visits
    if not formats[0].is_packed:
        return grid, 1, *steps, 0, last_waits
    unpacking = visited / visits
    return grid, unpacking, *steps, 1 - unpacking, *steps, 0, last_waits


def weight_gradient_trips(num_rows: int, groups: int, num_inputs: int, num_outputs: int) -> Trips:
    """Of `grouped_weight_gradient`, with balanced random routing."""
    rows = product_sizes.group_tile(num_rows, groups)
    visits, visited = balanced_visits(num_rows, groups, rows)
    visits += groups - visited  # the others are zeroed
    for width in (num_inputs, num_outputs):
        visits *= width // product_sizes.gradient_block(width)
    return (visits,)


def balanced_visits(num_rows: int, groups: int, rows: int) -> tuple[float, float]:
    """Visits of tiles of `rows` rows, and groups that have any, if each row's group is drawn evenly.

    Means of draws. Tiles begin as those of `pallas_kernels.grouped_matmul.visits.tiled`.
    """
    even = np.full(groups, 1 / groups)
    sizes = np.random.default_rng(0).multinomial(num_rows, even, size=256)
    ends = np.cumsum(sizes, axis=1)
    before = (ends - sizes) % product_sizes.PACKED_ROWS  # rows of the first tile that are others'
    visits = np.where(sizes > 0, -(-(before + sizes) // rows), 0)
    return float(visits.sum(axis=1).mean()), float((sizes > 0).sum(axis=1).mean())


def few_rows_trips(
    chip: str,
    formats: Sequence[Format],
    num_rows: int,
    rows: int,
    visits: float,
    *,
    ordered: float | None = None,
    summed: int | None = None,
) -> Trips:
    """Of products of few rows with each expert or group of a weight.

    Args:
      rows: of a visit, at most.
      visits: experts or groups that are read.
      ordered: rows that the kernel puts in order; None: they are.
      summed: tokens whose results it adds; None: none.
    """
    sizes = few_rows.sizes_for(chip, rows, formats, num_rows)
    assert sizes is not None  # it was compiled
    steps = sizes.columns // sizes.step
    grid = formats[0].num_outputs // sizes.columns * visits
    begin = (1 / visits,) if ordered is None else (1 / visits, ordered)
    finish = (1 / visits,) if summed is None else (1 / visits, summed)
    return (grid, *begin, *((steps,) if steps > 1 else ()), *finish)


def index_list_trips(chip: str, batch: int, num_entries: int, topk: int) -> Trips:
    """Of `index_list`: the indexer's scores and picks in decoding."""
    block, keys = index_sizes.decode_block(num_entries), index_sizes.decode_keys(num_entries)
    pair = 2 * index_sizes.decode_chunk(num_entries)
    pairs = -(-num_entries // (pair * 128))
    tiles = -(-num_entries // (128 * 128))
    search = (DECODE_PASSES, pairs, 0, 0, 0, 0)
    visits = (tiles,) * (-(-topk // 128))
    stream = stream_trips(
        *(chip, batch, num_entries // PAGE, block // PAGE, (block // keys,)),
        held=index_sizes.decode_held(num_entries),
        has_loops_behind=True,
    )
    return (*stream, 0, pair // 128 * pairs, *search, tiles, *visits)


def decode_stream_trips(chip: str, batch: int, pages: int) -> Trips:
    """Of `decode_stream`: attention to all pages of a sequence in decoding."""
    block = min(tpu_decode.BLOCK_ENTRIES[chip] // PAGE, pages)
    first = stream_trips(chip, batch, min(pages, block), block, (0,))
    others = -(-pages // block) - 1
    if not others:
        return first
    # The first block of a sequence has code of its own, the others a loop.
    num_warm = len(first) - 3 * HELD
    warm = stream_trips(chip, batch, pages, block, (0,))[:num_warm]
    used = 1 / HELD, pages % block / others, -pages % block / others
    return (*warm, *first[num_warm:], others, *used * HELD)


def float_rows_trips(chip: str, batch: int, pages: int) -> Trips:
    """Of `float_rows`: all pages of a sequence put side by side as floats."""
    block = min(tpu_rows.BLOCK // PAGE, pages)
    blocks = -(-pages // block)
    loops: Trips = (block,) if block > 1 else ()  # a loop of one turn is none
    stream = stream_trips(chip, batch, pages, block, (*loops, -pages % block / blocks))
    return (*stream, min(blocks, tpu_rows.IN_FLIGHT))


def stream_trips(
    chip: str,
    batch: int,
    pages: int,
    block: int,
    used: tuple[float, ...],
    *,
    held: int = HELD,
    has_loops_behind: bool = False,
) -> Trips:
    """Of a kernel's grid and of its `pallas_kernels.formats.tpu_pages.PageStream`, which come first.

    Args:
      pages: of each sequence.
      block: pages of a block.
      used: trips of the loops of the code that uses a block.
      held: blocks that are held.
      has_loops_behind: for copies that the code which uses a block has not issued; they do not turn.
    """
    cores = min(batch, CHIPS[chip].cores)
    blocks = -(-pages // block)
    first = min(pages, block)
    second = min(pages - block, block) if blocks > 1 else first if batch > cores else 0
    ahead = (first, second)[: held - 1]

    def turns(pages: int) -> list[int]:
        several, single = divmod(pages, UNROLL)
        return [single] if block < UNROLL else [several, single]  # few pages: no loop over several

    warm = [n * cores / batch for size in ahead for n in turns(size)]
    waits = pages % block / blocks
    behind = (0,) * len(turns(0)) if has_loops_behind else ()
    grid = (batch,) if batch > 1 else ()  # a grid of one step is no loop
    loop = (blocks,) if blocks > 1 else ()  # a table of one block has none
    return (*grid, *warm, *loop, *(1 / held, waits, *used, *behind) * held)
