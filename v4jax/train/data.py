"""Token streams for training: one long array of ids, cut into random windows.

A batch depends on the seed and the step alone, so a run that is resumed sees what it would have
seen.
"""

import os

import jax
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
        return self.rows(step, batch_size, slice(None))

    def rows(self, step: int, batch_size: int, rows: slice) -> np.ndarray:
        """Some rows of `batch`; no other rows are read."""
        rng = np.random.default_rng((self.seed, step))
        width = self.seq_len + 2
        starts = rng.integers(0, len(self.tokens) - width + 1, batch_size)[rows]
        return np.stack([self.tokens[s : s + width] for s in starts]).astype(np.int32)

    def targets(
        self, step: int, batch_size: int, sharding: jax.NamedSharding | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A step's inputs, the tokens after them, and those after these, [batch_size, seq_len] each.

        Args:
          sharding: where they go; every process reads the rows that its devices hold. None: to the
            default device.
        """
        shape = (batch_size, self.seq_len)

        def shifted_by(offset: int) -> jax.Array:
            def read(index: tuple[slice, ...]) -> np.ndarray:
                rows, columns = index
                start, stop, _ = columns.indices(self.seq_len)
                return self.rows(step, batch_size, rows)[:, start + offset : stop + offset]

            if sharding is None:
                return jax.device_put(read((slice(None), slice(None))))
            return jax.make_array_from_callback(shape, sharding, read)

        return shifted_by(0), shifted_by(1), shifted_by(2)
