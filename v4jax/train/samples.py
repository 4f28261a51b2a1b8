"""How a model in training goes on with a prompt: greedily, by the forward pass that the loss takes."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from v4jax.nn.placement import num_batch_parts
from v4jax.text.prompt import with_bos
from v4jax.text.tokenizer import Tokenizer
from v4jax.train.step import TrainState, TrainStep

_MULTIPLE = 128  # of a device's part of a row: the compression ratios divide it


class Prompts:
    """Texts that a run is to go on with, each time it measures the held-out loss.

    No KV cache: every token costs a forward pass over all rows, which is what keeps this to one program
    that runs on any mesh. On one host.

    Args:
      texts: what is asked, or continued.
      tokenizer: that of the model.
      mode: how a text is rendered as a user's message ("non-think", ...); "raw" continues it.
      max_new_tokens: of each continuation.

    Raises:
      ValueError: an unknown mode, or no text.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: Tokenizer,
        *,
        mode: str = "raw",
        max_new_tokens: int = 48,
    ):
        if not texts:
            raise ValueError("prompts: expected at least one text.")
        self.texts, self.max_new_tokens = tuple(texts), max_new_tokens
        self._tokenizer = tokenizer
        self._ids = [tokenizer.encode(self._rendered(text, mode)) for text in texts]

    def _rendered(self, text: str, mode: str) -> str:
        if mode == "raw":
            return with_bos(text)
        return self._tokenizer.render([{"role": "user", "content": text}], mode).text

    def continued(self, step: TrainStep, state: TrainState) -> tuple[tuple[str, str], ...]:
        """Pairs of a text and what the model says next. Call under the model's mesh."""
        sizes = dict(jax.sharding.get_abstract_mesh().shape)
        parts = math.prod(sizes.get(axis, 1) for axis in step.rules.mesh_axes("seq"))
        rows = _up_to(len(self._ids), num_batch_parts(step.rules))
        longest = max(map(len, self._ids)) + self.max_new_tokens
        tokens = np.zeros((rows, _up_to(longest, _MULTIPLE * parts)), np.int32)
        for row, ids in zip(tokens, self._ids, strict=False):
            row[: len(ids)] = ids
        ends = np.array([len(ids) for ids in self._ids])
        first, stopped = ends.copy(), np.zeros(len(ends), bool)
        each = np.arange(len(ends))
        for _ in range(self.max_new_tokens):
            likeliest = np.asarray(step.likeliest(state, tokens))
            chosen = likeliest[each, ends - 1]
            stopped |= np.isin(chosen, self._tokenizer.stop_ids)
            if stopped.all():
                break
            tokens[each[~stopped], ends[~stopped]] = chosen[~stopped]
            ends += ~stopped
        return tuple(
            (text, self._tokenizer.decode(tokens[i, first[i] : ends[i]].tolist()))
            for i, text in enumerate(self.texts)
        )


def _up_to(count: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-count // multiple) * multiple
