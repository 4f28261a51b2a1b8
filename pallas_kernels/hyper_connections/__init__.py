"""Hyper-connections: collapsing residual streams to a sub-layer's input, and mixing them."""

from pallas_kernels.hyper_connections.ops import hc_head, hc_post, hc_post_pre, hc_pre
from pallas_kernels.hyper_connections.xla import sinkhorn

__all__ = ["hc_head", "hc_post", "hc_post_pre", "hc_pre", "sinkhorn"]
