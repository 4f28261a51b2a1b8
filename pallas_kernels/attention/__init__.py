"""Window, dense compressed and selected attention."""

from pallas_kernels.attention.ops import (
    decode_attention,
    selected_attention,
    selected_mass,
    visible_mass,
    window_attention,
)
from pallas_kernels.attention.reference import visible_entries

__all__ = [
    "decode_attention",
    "selected_attention",
    "selected_mass",
    "visible_entries",
    "visible_mass",
    "window_attention",
]
