"""Lightning indexer: scores of compressed entries, and the best of them for each query."""

from pallas_kernels.indexer.ops import index_topk, selected_scores, visible_scores

__all__ = ["index_topk", "selected_scores", "visible_scores"]
