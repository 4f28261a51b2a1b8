"""Sizes of the blocks the kernels work on, by chip, shape and format."""

import dataclasses
import math

from pallas_kernels import chips

MIB = 1 << 20
# What a kernel may hold in VMEM; the rest is left to XLA and to registers that spill.
VMEM_BUDGET = chips.table("grouped_budget")
VMEM_LIMIT = chips.table("grouped_vmem")
# Rows of a right operand that the matrix unit holds.
MXU_DEPTH = chips.table("mxu_depth")
CORES = chips.table("cores")  # that share a grid by its column blocks
MAX_ROW_TILE = 256
MAX_GROUP_TILE = 304
PACKED_ROWS = 16  # of bfloat16 in a register: tiles begin at multiples
FEW_ROWS = (8, 16)  # row tiles of the kernel for few rows an expert
FEW_ROWS_X_BYTES = 16 * MIB  # its rows lie in VMEM as float32
COLUMNS = (2048, 1536, 1024, 768, 512, 384, 256, 128)
GRADIENT_BLOCKS = (1024, 768, 512, 384, 256, 128)  # of both axes of a gradient
# A step of the loop within a block takes about so many weights: the more, the more of the unpacking
# is hidden under products, and the rarer the matrix unit runs dry between steps; the code grows.
STEP_WEIGHTS = chips.table("grouped_step_weights")
STEPS = (2048, 1024, 512, 256, 128)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How a product is cut."""

    rows: int  # of x in a tile
    columns: int  # of the result in a grid step
    step: int  # of these, computed together
    vmem_limit: int


def few_rows(num_rows: int, num_groups: int, num_inputs: int) -> int | None:
    """Row tile of the kernel for few rows an expert; None where the other kernel is for."""
    mean = -(-num_rows // num_groups)
    fits = (num_rows + max(FEW_ROWS)) * num_inputs * 4 <= FEW_ROWS_X_BYTES
    return next((size for size in FEW_ROWS if fits and mean <= size), None)


def row_tile(num_rows: int) -> int:
    """Rows of a tile of all rows."""
    return min(MAX_ROW_TILE, 1 << (max(num_rows, 32) - 1).bit_length())


def group_tile(num_rows: int, num_groups: int) -> int:
    """Rows of a tile that begins at an expert's first row, rounded down to `PACKED_ROWS`.

    With balanced random routing an expert's rows are binomial, and 99 of 100 experts have no more than
    2.5 standard deviations above the mean: they fit one tile, or as few as such a number needs.
    """
    mean = num_rows / num_groups
    most = mean + 2.5 * math.sqrt(mean) + PACKED_ROWS / 2
    tiles = math.ceil(most / MAX_GROUP_TILE)
    return min(whole(math.ceil(most / tiles)), whole(num_rows))


def gradient_block(width: int) -> int:
    """Of an axis of the gradient of weights."""
    return next(size for size in GRADIENT_BLOCKS if width % size == 0)


def whole(num_rows: int) -> int:
    """So many rows, and up to the next multiple of `PACKED_ROWS`."""
    return -(-num_rows // PACKED_ROWS) * PACKED_ROWS


def choose(
    chip: str,
    rows: int,
    num_columns: int,
    fixed: int,
    per_column: int,
    multiple: int,
    max_step: int,
    widest: int | None = None,
) -> BlockSizes | None:
    """The widest block that fits VMEM, None if there is none.

    Args:
      fixed: bytes of VMEM whatever the number of columns.
      per_column: bytes of VMEM for a column.
      multiple: columns that cannot be parted.
      max_step: columns to compute together at most.
      widest: columns of a block at most; default: each core has a block.
    """
    widest = max(num_columns // CORES[chip] if widest is None else widest, multiple)
    for columns in (*COLUMNS, multiple):
        fits = columns <= widest and fixed + columns * per_column <= VMEM_BUDGET[chip]
        if fits and num_columns % columns == 0 and columns % multiple == 0:
            most = max(max_step, MXU_DEPTH[chip])  # which is also its width
            steps = (s for s in STEPS if s <= most and columns % s == 0 and s % multiple == 0)
            return BlockSizes(rows, columns, next(steps, multiple), VMEM_LIMIT[chip])
    return None
