"""How a model in training goes on with a prompt: greedily, by the forward pass that the loss takes."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sharding import collectives
from v4jax.nn.placement import num_batch_parts, specs
from v4jax.text.prompt import with_bos
from v4jax.text.tokenizer import Tokenizer
from v4jax.train.step import TrainState, TrainStep

_MULTIPLE = 128  # of a row's length: the compression ratios divide it, and the parts of a mesh


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
        longest = max(map(len, self._ids)) + self.max_new_tokens
        parts = num_batch_parts(step.rules)
        rows = -(-len(self._ids) // parts) * parts
        tokens = np.zeros((rows, -(-longest // _MULTIPLE) * _MULTIPLE), np.int32)
        for row, ids in zip(tokens, self._ids, strict=False):
            row[: len(ids)] = ids
        ends = np.array([len(ids) for ids in self._ids])
        first, stopped = ends.copy(), np.zeros(len(ends), bool)
        each = np.arange(len(ends))
        for _ in range(self.max_new_tokens):
            likeliest = np.asarray(
                _likeliest(step.graphdef, step.computed, step.rules, state, tokens)
            )
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


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _likeliest(graphdef, computed, rules, state: TrainState, tokens: jax.Array) -> jax.Array:
    """[B, T]: the likeliest token after each."""

    def on_device(params, fixed, tokens):
        model = nnx.merge(graphdef, params, fixed)
        hidden = model.hidden(model.trunk(tokens)[0])
        # Row by row: logits of a row are all that is held.
        return jax.lax.map(lambda row: jnp.argmax(model.logits(row[None])[0], axis=-1), hidden)

    params = computed(state.params)
    placed = (specs(params, rules), specs(state.fixed, rules), rules.tokens)
    run = collectives.per_device(on_device, rules, placed, rules.tokens)
    return run(params, state.fixed, tokens)
