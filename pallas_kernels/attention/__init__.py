"""Window, dense compressed and selected attention."""

from pallas_kernels.attention.ops import (
    decode_attention,
    selected_attention,
    selected_mass,
    window_attention,
)

__all__ = ["decode_attention", "selected_attention", "selected_mass", "window_attention"]
