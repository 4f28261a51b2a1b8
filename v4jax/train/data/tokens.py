"""Token streams for training: one long array of ids, cut into random windows.

A batch depends on the seed and the step alone, so a run that is resumed sees what it would have
seen.
"""

import os

import jax
import numpy as np

from v4jax.config import V4Config
from v4jax.train.data.placing import placed

_BLOCK = 1 << 24  # tokens looked at together


def _load(path: str | os.PathLike) -> np.ndarray:
    try:
        found = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{os.fspath(path)} is not a .npy file: expected an array of token ids [N], as "
            "numpy.save writes it (a text has to be tokenized first)."
        ) from error
    if not isinstance(found, np.ndarray):
        raise ValueError(  # noqa: TRY004 - as other wrong files
            f"{os.fspath(path)} holds several arrays: expected a .npy file of token ids [N]."
        )
    return found


def _require_ids(tokens: np.ndarray, vocab_size: int, start: int = 0) -> None:
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(
            f"token {int(tokens[at])} (number {start + at}) is outside the vocabulary: expected ids "
            f"0..{vocab_size - 1}. Were the tokens made with this model's tokenizer?"
        )


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
            tokens = _load(tokens)
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens are {tokens.dtype}{tokens.shape}: expected integers [N].")
        if len(tokens) < seq_len + 2:
            raise ValueError(
                f"{len(tokens)} tokens are fewer than a window of {seq_len + 2}: use a longer text "
                "or a smaller seq_len."
            )
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed

    def require_ids(self, vocab_size: int) -> None:
        """Reads all tokens once.

        Raises:
          ValueError: one is no id of a vocabulary of this size; names the first and where it is.
        """
        for start in range(0, len(self.tokens), _BLOCK):
            _require_ids(self.tokens[start : start + _BLOCK], vocab_size, start)

    def batch(self, step: int, batch_size: int) -> np.ndarray:
        """[batch_size, seq_len + 2] int32 windows of one step."""
        return self.rows(step, batch_size, slice(None)).astype(np.int32)

    def rows(self, step: int, batch_size: int, rows: slice) -> np.ndarray:
        """Some rows of `batch`, in the dtype of the file; no other rows are read."""
        rng = np.random.default_rng((self.seed, step))
        width = self.seq_len + 2
        starts = rng.integers(0, len(self.tokens) - width + 1, batch_size)[rows]
        return np.stack([self.tokens[s : s + width] for s in starts])

    def targets(
        self, step: int, batch_size: int, cfg: V4Config, sharding: jax.NamedSharding | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A step's inputs, the tokens after them, and those after these, [batch_size, seq_len] each.

        Args:
          cfg: of the model, for the ids that it knows.
          sharding: where they go; every process reads the rows that its devices hold. None: to the
            default device.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        shape = (batch_size, self.seq_len)

        def shifted_by(offset: int) -> jax.Array:
            def read(index: tuple[slice, ...]) -> np.ndarray:
                rows, columns = index
                start, stop, _ = columns.indices(self.seq_len)
                found = self.rows(step, batch_size, rows)[:, start + offset : stop + offset]
                _require_ids(found.reshape(-1), cfg.vocab_size)
                return found.astype(np.int32)

            return placed(read, shape, sharding)

        return shifted_by(0), shifted_by(1), shifted_by(2)
