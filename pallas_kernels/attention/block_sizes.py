"""Block sizes of the prefill and training kernels.

A block of queries is `rows` rows of query and head; a block of entries is streamed against it. Rows
are worked on in chunks, so that the matrix units run on one chunk's products while the vector unit
is at the other's softmax; a chunk must be long beside the loading of a weight tile.
"""

import dataclasses
import math

from pallas_kernels import chips, dispatch

VMEM_LIMIT = chips.table("attention_vmem")

# chip -> rows of a block, rows of a chunk, entries of a block.
FORWARD = chips.table("attention_blocks")
BACKWARD = FORWARD
WINDOW_ROWS = 128  # of a block of the window's gradient


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of one call."""

    queries: int  # of a block
    chunk: int  # queries of a chunk, a divisor of `queries`
    entries: int  # of a block, a divisor of 4096 and a multiple of 128
    vmem_limit: int


def forward(num_queries: int, num_heads: int, num_entries: int) -> Blocks:
    """For the forward kernel."""
    return _blocks(FORWARD, num_queries, num_heads, num_entries, most=256)


def backward(num_queries: int, num_heads: int, num_entries: int) -> Blocks:
    """For the gradient kernels, whose mask words hold 32 queries."""
    return _blocks(BACKWARD, num_queries, num_heads, num_entries, most=32)


def _blocks(table, num_queries, num_heads, num_entries, most):
    chip = dispatch.target_chip()
    rows, chunk_rows, entries = table[chip]
    # A power of two of at least 16 (a tile of bfloat16), no more than the queries there are.
    most = min(most, _power_of_two(rows // num_heads), 2 * _power_of_two(num_queries - 1))
    queries = max(16, most)
    chunk = min(queries, max(1, _power_of_two(chunk_rows // num_heads)))
    while entries > 128 and entries // 2 >= num_entries:
        entries //= 2
    return Blocks(queries, chunk, entries, VMEM_LIMIT[chip])


def _power_of_two(x: int) -> int:
    """The largest one up to x; 1 where there is none."""
    return 1 << int(math.log2(x)) if x > 1 else 1
