"""Token streams for training: one long array of ids, cut into random windows.

A batch depends on the seed and the step alone, so a run that is resumed sees what it would have
seen.
"""

import os

import numpy as np


class TokenStream:
    """Windows of a token array.

    Args:
      tokens: [N] integers, or a `.npy` file of them (mapped, not read).
      seq_len: tokens the model reads; a window has two more, for the targets.

    Raises:
      ValueError: the stream is shorter than a window.
    """

    def __init__(self, tokens: np.ndarray | str | os.PathLike, seq_len: int, *, seed: int = 0):
        if not isinstance(tokens, np.ndarray):
            tokens = np.load(tokens, mmap_mode="r")
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens are {tokens.dtype}{tokens.shape}: expected integers [N].")
        if len(tokens) < seq_len + 2:
            raise ValueError(
                f"{len(tokens)} tokens are fewer than a window of {seq_len + 2}: use a longer text "
                "or a smaller seq_len."
            )
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed

    def batch(self, step: int, batch_size: int) -> np.ndarray:
        """[batch_size, seq_len + 2] int32 windows of one step."""
        rng = np.random.default_rng((self.seed, step))
        width = self.seq_len + 2
        starts = rng.integers(0, len(self.tokens) - width + 1, batch_size)
        return np.stack([self.tokens[s : s + width] for s in starts]).astype(np.int32)
