"""How often the loops of `pallas_kernels.formats.tpu_pages.PageStream` turn, for schedules."""

from pallas_kernels.chips import CHIPS
from pallas_kernels.formats.tpu_pages import HELD, UNROLL


def stream_trips(
    chip: str,
    batch: int,
    pages: int,
    block: int,
    used: tuple[float, ...],
    copies_behind: bool | None,
) -> tuple[float, ...]:
    """Trips of a kernel's grid and of its stream, which come first.

    Args:
      pages: of each sequence.
      block: pages of a block.
      used: trips of the loops of the code that uses a block.
      copies_behind: whether copies are issued behind that code (False: there are loops for it that do
        not turn; None: there are none).
    """
    cores = min(batch, CHIPS[chip].cores)
    blocks = -(-pages // block)
    first = min(pages, block)
    second = min(pages - block, block) if blocks > 1 else first if batch > cores else 0
    start = slice(int(block < UNROLL), 2)  # of few pages, there is no loop over more at once
    warm = [n * cores / batch for size in (first, second) for n in divmod(size, UNROLL)[start]]
    waits = pages % block / blocks
    behind: tuple[float, ...] = ()
    if copies_behind is not None:
        turns = divmod(pages * copies_behind, UNROLL)[start]
        behind = tuple(n / blocks for n in turns)
    grid = (batch,) if batch > 1 else ()  # a grid of one step is no loop
    return (*grid, *warm, blocks, *(1 / HELD, waits, *used, *behind) * HELD)
