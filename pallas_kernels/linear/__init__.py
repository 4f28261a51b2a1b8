"""Rows times a dense weight, which may be packed."""

from pallas_kernels.linear.ops import linear

__all__ = ["linear"]
