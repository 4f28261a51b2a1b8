"""Matmuls of rows grouped by expert."""

from pallas_kernels.grouped_matmul.ops import grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul.order import by_expert, of_pairs, pairs_by_expert, summed
from pallas_kernels.grouped_matmul.reference import swiglu

__all__ = [
    "by_expert",
    "grouped_matmul",
    "grouped_swiglu",
    "of_pairs",
    "pairs_by_expert",
    "summed",
    "swiglu",
]
