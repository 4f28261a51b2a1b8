"""Sizes of the indexer's kernels."""

from pallas_kernels.formats import tpu_pages
from pallas_kernels.selection import ENTRIES_PER_WORD_ROW

VMEM_LIMIT = 56 << 20  # bytes; v5p and v7x have 64 MiB

CHUNK = 256  # entries scored by one turn of the loop, whose sums fill half of the registers
MAX_SCORE_BYTES = 16 << 20  # scores of a block of queries in VMEM
MAX_LANE_GROUPS = 8

MAX_DECODE_KEYS = 4096  # scored by one turn of the loop; with 1024 it takes 1.25 times as long
MAX_DECODE_BLOCK = 8192  # fetched at once: longer than a grid step costs
MAX_DECODE_ENTRIES = 1 << 20


def lane_groups(num_entries: int) -> int:
    """F of `tpu_prefill.py`: the fewest groups of lanes for which scores fit in VMEM."""
    score_bytes = -(-num_entries // ENTRIES_PER_WORD_ROW) * ENTRIES_PER_WORD_ROW * 512
    groups = 1
    while score_bytes // groups > MAX_SCORE_BYTES:
        groups *= 2
    return groups


def decode_keys(num_entries: int) -> int:
    """Keys that are scored by one turn of the loop: 1024 (a register of scores), 2048 or 4096."""
    keys = 1024
    while keys < min(num_entries, MAX_DECODE_KEYS):
        keys *= 2
    return keys


def decode_block(num_entries: int) -> int:
    """Keys that are fetched at once."""
    keys = decode_keys(num_entries)
    return min(MAX_DECODE_BLOCK, -(-num_entries // keys) * keys)


def decode_held(num_entries: int) -> int:
    """Blocks of keys that are held: of a sequence's only one, the search gives the next one time to come."""
    return 2 if num_entries <= decode_block(num_entries) else tpu_pages.HELD


def decode_chunk(num_entries: int) -> int:
    """Rows of 128 scores that are half of what is counted by one turn of the loop."""
    return 64 if num_entries <= 1 << 16 else 256
