"""Preference pairs of a file, two rows a pair, for a model that trains by `preferences.DPO`."""

import array
import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from v4jax.config import V4Config
from v4jax.nn.choices import Choices
from v4jax.nn.documents import Documents
from v4jax.train.data.examples import ExampleFile, has_loss
from v4jax.train.data.formats import Example, Pair
from v4jax.train.data.placing import placed

if TYPE_CHECKING:
    from v4jax.text.tokenizer import Tokenizer


class PairBatch(NamedTuple):
    """B pairs in 2 B rows: chosen and rejected completions of each, one behind the other."""

    inputs: jax.Array  # [2 B, T] int32
    following: jax.Array  # [2 B, T] the tokens after them
    reference: jax.Array  # [2 B] float32 log-probabilities of completions by the reference
    loss_weights: jax.Array  # [2 B, T] float32, of `following`: 1 in completions
    choices: Choices
    documents: Documents


class PreferencePairs(ExampleFile):
    """The preference pairs of a file, shuffled anew for every epoch.

    A line is `{"prompt" or "messages": ..., "chosen": ..., "rejected": ...}` (see `formats.py`). A side is a
    row of its own. All of the file is read once, for the lengths.

    Args:
      path: .jsonl.
      tokenizer: that of the model.
      seq_len: tokens of a row.
      seed: of the order.
      too_long: what becomes of a side that is longer than a row. "cut": what is behind the row's end is left
        out, and so is a pair that has no completion left on a side. "refuse": an error.
      mode: of conversations that name none, as "think-high".

    Attributes:
      left_out: pairs without a completion on a side, after the cut.
      cut: pairs with a side that is longer than a row.

    Raises:
      ValueError: lines that are no pairs; a side that is too long, if that is refused; no pair at all.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        tokenizer: "Tokenizer",
        seq_len: int,
        *,
        seed: int = 0,
        too_long: str = "cut",
        mode: str | None = None,
    ):
        super().__init__(path, tokenizer, seq_len, seed=seed, too_long=too_long, mode=mode)
        self._reference: np.ndarray | None = None
        self._index()
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def _index(self) -> None:
        lines, bad = array.array("q"), []
        for found in self._reader.all():
            if found.error is not None:
                bad.append(f"line {found.line}: {found.error}")
            for pair in found.examples:
                if not isinstance(pair, Pair):
                    bad.append(f"line {found.line}: no chosen and rejected completion")
                    continue
                sides = (pair.chosen, pair.rejected)
                self._longest(found.line, sides)
                if all(has_loss(side, self.seq_len) for side in sides):
                    lines.append(found.line - 1)
                else:
                    self.left_out += 1
        hint = 'Expected {"prompt": ..., "chosen": ..., "rejected": ...}.'
        self._require_none(bad, "preference pairs", hint)
        if not lines:
            raise ValueError(
                f"{self.path} has no pair with a completion on both sides in the first {self.seq_len} "
                "tokens: expected a longer seq_len, or pairs."
            )
        self._lines = np.array(lines)

    def __len__(self) -> int:
        return len(self._lines)

    def __repr__(self) -> str:
        extra = f", {self.cut} longer than a row" if self.cut else ""
        extra += f", {self.left_out} without a completion left out" if self.left_out else ""
        return f"{self.path.name}: {len(self)} preference pairs, rows of {self.seq_len}{extra}"

    @property
    def reference(self) -> np.ndarray | None:
        """[N, 2] float32: log-probabilities of chosen and rejected completions by the reference.

        In the order of the file; `preferences.log_probs` computes them. None until they are set.
        """
        return self._reference

    @reference.setter
    def reference(self, value: np.ndarray) -> None:
        value = np.asarray(value, np.float32)
        if value.shape != (len(self), 2) or not np.isfinite(value).all():
            raise ValueError(
                f"reference {value.shape}: expected finite log-probabilities {(len(self), 2)} of the "
                f"{len(self)} pairs of {self.path}, as v4jax.train.log_probs(model, pairs) gives them."
            )
        self._reference = value

    def row(self, pair: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The chosen (0) or rejected (1) side of a pair of the file.

        Returns:
          inputs and the tokens after them, [2, T] int32; weights of the latter, [T] float32; and what is
          no padding, [T] bool.
        """
        (found,) = self._read(int(self._lines[pair])).examples
        assert isinstance(found, Pair)  # others were refused
        example: Example = (found.chosen, found.rejected)[side]
        tokens, weights = np.zeros((2, self.seq_len), np.int32), np.zeros(self.seq_len, np.float32)
        size = min(len(example.ids) - 1, self.seq_len)
        for shift in range(2):
            tokens[shift, :size] = example.ids[shift : shift + size]
        weights[:size] = example.weights[1 : size + 1]
        return tokens, weights, np.arange(self.seq_len) < size

    def targets(
        self, step: int, batch_size: int, cfg: V4Config, sharding: jax.NamedSharding | None
    ) -> PairBatch:
        """The pairs of a step; see `TokenStream.targets`. `batch_size` counts pairs.

        Raises:
          ValueError: an id outside the vocabulary, or there is no reference yet.
        """
        self.require_ids(cfg.vocab_size)
        if self._reference is None:
            raise ValueError(
                "no reference of the pairs yet: expected pairs.reference = v4jax.train.log_probs(model, "
                "pairs), with the model that training starts from."
            )
        numbers = range(step * batch_size, (step + 1) * batch_size)
        pairs = [int(self._order(n // len(self))[n % len(self)]) for n in numbers]
        return self.batch(pairs, self._reference, sharding)

    def batch(
        self, pairs: list[int], reference: np.ndarray, sharding: jax.NamedSharding | None
    ) -> PairBatch:
        """Some pairs by their numbers in the file; a process reads the rows that its devices hold.

        Args:
          reference: [N, 2] float32.
        """
        row = functools.cache(lambda r: self.row(pairs[r // 2], r % 2))
        count = 2 * len(pairs)

        def column(get: Callable[[int], np.ndarray]) -> jax.Array:
            def read(index: tuple[slice, ...]) -> np.ndarray:
                rows = range(*index[0].indices(count))
                return np.stack([get(r)[index[1]] for r in rows])

            return placed(read, (count, self.seq_len), sharding)

        by_row = reference[pairs].reshape(-1)
        if sharding is None:
            placed_reference = jax.device_put(by_row)
        else:
            of_rows = jax.NamedSharding(sharding.mesh, jax.P(*sharding.spec[:1]))
            placed_reference = jax.make_array_from_callback((count,), of_rows, lambda i: by_row[i])
        return PairBatch(
            inputs=column(lambda r: row(r)[0][0]),
            following=column(lambda r: row(r)[0][1]),
            reference=placed_reference,
            loss_weights=column(lambda r: row(r)[1]),
            choices=Choices(),
            documents=Documents(column(lambda r: row(r)[2])),
        )

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self))
