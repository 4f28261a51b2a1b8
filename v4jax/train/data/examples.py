"""Examples of a file in rows of fixed length, for a model that trains.

Nothing is kept but where lines begin and how long examples are: a row is read, rendered and encoded when a
step needs it. Which examples a row has follows from the file, the seed and the row's number: a run that
goes on from step s needs no more than s, on any mesh and any number of processes, and a process reads the
rows that its devices hold.
"""

import array
import concurrent.futures
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from v4jax.config import V4Config
from v4jax.nn.documents import Documents, alignment
from v4jax.train.data.formats import Example, LineError, Pair, parse_line, text_example
from v4jax.train.data.lines import Lines
from v4jax.train.data.packing import Rows, pack
from v4jax.train.data.placing import placed
from v4jax.train.losses import Batch

if TYPE_CHECKING:
    from v4jax.text.tokenizer import Tokenizer

TOO_LONG = ("cut", "refuse")
_SHOWN = 5  # malformed lines that an error quotes
_TOGETHER = 4096  # lines that threads read before the next ones are taken
_MAX_THREADS = 32


@dataclasses.dataclass(frozen=True)
class Found:
    """What a line has: its examples, or why it has none."""

    line: int  # from 1 on
    examples: Sequence[Example | Pair]
    error: str | None = None


class Reader:
    """The examples of a file's lines.

    Args:
      path: .jsonl, in any of the forms of `formats.py`, or .txt.
      tokenizer: whose prompts and ids they become.
      mode: of conversations that name none.
    """

    def __init__(self, path: str | os.PathLike, tokenizer: "Tokenizer", *, mode: str | None = None):
        self.lines, self._tokenizer, self._mode = Lines(path), tokenizer, mode

    def read(self, index: int) -> Found:
        """Line `index` (from 0 on); an empty one has no examples."""
        data = self.lines[index]
        examples: Sequence[Example | Pair]
        try:
            if self.lines.is_text:
                is_end = index == len(self.lines) - 1
                text = _decoded(data)
                examples = [text_example(text, self._tokenizer, is_end=is_end)]
            else:
                examples = parse_line(data, self._tokenizer, self._mode) if data.strip() else []
        except (LineError, ValueError) as error:
            return Found(index + 1, [], str(error))
        return Found(index + 1, examples)

    def all(self) -> Iterator[Found]:
        """Every line, in order."""
        threads = min(os.cpu_count() or 1, _MAX_THREADS)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(self.lines), _TOGETHER):
                yield from pool.map(
                    self.read, range(start, min(start + _TOGETHER, len(self.lines)))
                )


def has_loss(example: Example, seq_len: int) -> bool:
    """Whether a token counts once an example is cut to a row; a text goes on in further rows."""
    size = len(example.ids) if example.is_text else seq_len + 1
    return bool(example.weights[1:size].any())


class ExampleFile:
    """A file of examples of which all was read once: what `Examples` and `PreferencePairs` share.

    Attributes:
      left_out: examples without a token that has loss, after the cut.
      cut: those that are longer than a row.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        tokenizer: "Tokenizer",
        seq_len: int,
        *,
        seed: int,
        too_long: str,
        mode: str | None,
    ):
        if too_long not in TOO_LONG:
            raise ValueError(f"too_long={too_long!r}: expected one of {TOO_LONG}.")
        self._reader, self._too_long = Reader(path, tokenizer, mode=mode), too_long
        self.path, self.seq_len, self.seed = self._reader.lines.path, seq_len, seed
        self.left_out = self.cut = 0
        self._largest = (-1, 0)  # id, and a line that has it
        self._read = functools.lru_cache(maxsize=256)(self._reader.read)

    def _longest(self, line: int, sides: Sequence[Example]) -> int:
        """Inputs of the longest side of an example, whose ids are looked at.

        Raises:
          ValueError: it is longer than a row, and that is refused.
        """
        largest = max(int(side.ids.max()) for side in sides)
        self._largest = max(self._largest, (largest, -line))
        length = max(len(side.ids) - 1 for side in sides)
        if length > self.seq_len:
            self.cut += 1
            if self._too_long == "refuse":
                raise ValueError(
                    f"{self.path}, line {line} has {length + 1} tokens, and a row {self.seq_len}: "
                    'expected at most one more than that, or too_long="cut".'
                )
        return length

    def _require_none(self, bad: Sequence[str], what: str, hint: str) -> None:
        """Refuses a file with lines that are no `what`."""
        if bad:
            more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
            raise ValueError(
                f"{self.path} has lines that are no {what}: {'; '.join(bad[:_SHOWN])}{more}. {hint}"
            )

    def require_ids(self, vocab_size: int) -> None:
        """Looks at all tokens, which were read once.

        Raises:
          ValueError: one is no id of a vocabulary of this size.
        """
        largest, line = self._largest
        if largest >= vocab_size:
            raise ValueError(
                f"token {largest} ({self.path}, line {-line}) is outside the vocabulary: expected "
                f"ids 0..{vocab_size - 1}. Is the tokenizer this model's?"
            )


class Examples(ExampleFile):
    """Rows of `seq_len` tokens with the examples of a file, shuffled anew for every epoch.

    All of the file is read once, for the lengths, before the first step.

    Args:
      path: .jsonl or .txt; see `formats.py`.
      tokenizer: that of the model.
      seq_len: tokens of a row.
      seed: of the order.
      packing: several documents a row, which do not see each other; else one, and padding.
      too_long: what becomes of an example that is longer than a row. "cut": a text goes on in further
        rows, of a conversation what is behind the row's end is left out. "refuse": an error.
      mode: of conversations that name none, as "think-high".
      align: documents begin at multiples of so many tokens of a row: `nn.documents.alignment` of the
        model, or a multiple of that.

    Attributes:
      count: examples there are.
      left_out, cut: see `ExampleFile`.

    Raises:
      ValueError: lines that are no examples, or pairs; an example that is too long, if that is refused; or
        nothing to learn.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        tokenizer: "Tokenizer",
        seq_len: int,
        *,
        seed: int = 0,
        packing: bool = True,
        too_long: str = "cut",
        mode: str | None = None,
        align: int = 128,
    ):
        super().__init__(path, tokenizer, seq_len, seed=seed, too_long=too_long, mode=mode)
        self.packing, self.align = packing, align
        self._index()
        self._first_rows = [0]  # of epochs, as far as they are known
        self._rows_of = functools.lru_cache(maxsize=2)(self._pack)

    def _index(self) -> None:
        bad = []
        lines, parts, lengths, is_text = (array.array(code) for code in "qiib")
        self.count = 0
        for found in self._reader.all():
            if found.error is not None:
                bad.append(f"line {found.line}: {found.error}")
            for part, example in enumerate(found.examples):
                if isinstance(example, Pair):
                    raise ValueError(  # noqa: TRY004 - as other wrong files
                        f"{self.path}, line {found.line} is a preference pair: expected "
                        "conversations, texts or prompts with completions. "
                        "v4jax.train.PreferencePairs reads pairs, and v4jax.train.DPO trains on them."
                    )
                self.count += 1
                length = self._longest(found.line, [example])
                if length > self.seq_len:
                    length = length if example.is_text else self.seq_len
                if not has_loss(example, self.seq_len):
                    self.left_out += 1
                    continue
                lines.append(found.line - 1)
                parts.append(part)
                lengths.append(length)
                is_text.append(example.is_text)
        self._require_none(bad, "examples", "`v4jax data check` lists all of them.")
        if not lines:
            raise ValueError(
                f"{self.path} has nothing to learn: {self.count} examples, "
                f"{self.left_out} without a token that has loss in its first {self.seq_len}."
            )
        self._lines, self._parts = np.array(lines), np.array(parts)
        self._lengths, self._is_text = np.array(lengths), np.array(is_text, bool)

    def __repr__(self) -> str:
        rows = self._rows_of(0)
        held = int(self._lengths.sum())
        share = held / (len(rows) * self.seq_len)
        extra = f", {self.cut} longer than a row" if self.cut else ""
        extra += f", {self.left_out} without loss left out" if self.left_out else ""
        return (
            f"{self.path.name}: {self.count} examples, {held} tokens in {len(rows)} rows of "
            f"{self.seq_len}, {share:.0%} filled{extra}"
        )

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row `number` of all epochs, one behind the other.

        Returns:
          inputs, the tokens after them and those after these, [3, T] int32; weights of the latter two,
          [2, T] float32; and [2, T] int32: where each token's document begins, and 1 for what is no
          padding.
        """
        epoch, row = self._place(number)
        tokens, weights = (
            np.zeros((3, self.seq_len), np.int32),
            np.zeros((2, self.seq_len), np.float32),
        )
        layout = np.zeros((2, self.seq_len), np.int32)
        for document, offset, place in self._rows_of(epoch).parts(row):
            example = self._example(document)
            size = min(int(self._lengths[document]) - offset, self.seq_len)
            for shift in range(3):
                ids = example.ids[offset + shift : offset + shift + size]
                tokens[shift, place : place + len(ids)] = ids
            for shift in (1, 2):
                counts = example.weights[offset + shift : offset + shift + size]
                weights[shift - 1, place : place + len(counts)] = counts
            layout[0, place:], layout[1, place : place + size] = place, 1
        return tokens, weights, layout

    def targets(
        self, step: int, batch_size: int, cfg: V4Config, sharding: jax.NamedSharding | None
    ) -> Batch:
        """The batch of a step; see `TokenStream.targets`.

        Raises:
          ValueError: an id outside the vocabulary, or documents that do not begin where the model's
            compressed rows do.
        """
        self.require_ids(cfg.vocab_size)
        if self.packing and self.align % alignment(cfg):
            raise ValueError(
                f"align={self.align}: expected a multiple of {alignment(cfg)}, at which documents of "
                f"{cfg.name} begin."
            )
        row = functools.cache(lambda r: self.row(step * batch_size + r))

        shape = (batch_size, self.seq_len)

        def column(part: int, at: int, dtype: type | None = None) -> jax.Array:
            def read(index: tuple[slice, ...]) -> np.ndarray:
                rows = range(*index[0].indices(batch_size))
                found = np.stack([row(r)[part][at][index[1]] for r in rows])
                return found if dtype is None else found.astype(dtype)

            return placed(read, shape, sharding)

        starts = column(2, 0) if self.packing else None
        return Batch(
            inputs=column(0, 0),
            following=column(0, 1),
            after=column(0, 2),
            loss_weights=column(1, 0),
            after_weights=column(1, 1),
            documents=Documents(column(2, 1, bool), starts),
        )

    def _place(self, number: int) -> tuple[int, int]:
        """The epoch of a row, and its number there."""
        for epoch in itertools.count():
            if epoch + 1 == len(self._first_rows):
                self._first_rows.append(self._first_rows[-1] + len(self._rows_of(epoch)))
            if number < self._first_rows[epoch + 1]:
                return epoch, number - self._first_rows[epoch]
        raise AssertionError  # count does not end

    def _pack(self, epoch: int) -> Rows:
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self._lengths))
        return pack(
            self._lengths,
            order,
            self.seq_len,
            self.align,
            shares_rows=self.packing,
            is_cut=self._is_text,
        )

    def _example(self, document: int) -> Example:
        found = self._read(int(self._lines[document])).examples[int(self._parts[document])]
        assert isinstance(found, Example)  # pairs were refused
        return found


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineError(f"no UTF-8: byte {error.start} of the piece") from None
