"""Rows times a dense weight, which may be packed."""

from pallas_kernels.linear.ops import linear, linear_swiglu, row_products

__all__ = ["linear", "linear_swiglu", "row_products"]
