"""Logits of given tokens, and perplexity of a text."""

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sharding import DECODE, PREFILL, collectives
from v4jax.nn.cache import CacheFormat
from v4jax.nn.compilation import jit, keep_programs
from v4jax.nn.cross_entropy import cross_entropy
from v4jax.nn.model import Transformer
from v4jax.nn.placement import check_mesh, mesh_of, on_mesh, require_placed, specs

LEAST_CAPACITY = 256  # tokens of a cache: few programs for short texts


def _on_its_mesh(method):
    """Runs a method on the mesh that the scorer's model lies on."""

    @functools.wraps(method)
    def call(self, *args, **options):
        with on_mesh(self._mesh):
            return method(self, *args, **options)

    return call


class Scorer:
    """A model's arrays and its compiled scoring steps.

    Args:
      cache: how rows are held, see `v4jax.nn.cache.CacheFormat`.

    If the model lies on a mesh, the steps run there.

    Raises:
      ValueError: its weights do not lie as the steps read them.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        cache: CacheFormat = None,
    ):
        keep_programs()
        self.model, self._mesh = model, mesh_of(model)
        self._init_cache = functools.partial(model.init_cache, format=cache)
        graphdef, self._params = nnx.split(model)

        def whole(params, tokens):
            return nnx.merge(graphdef, params)(tokens)

        def extend(params, tokens, cache):
            model = nnx.merge(graphdef, params)
            counts = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
            streams, cache = model.extend(tokens, counts, cache)
            return model.logits(model.hidden(streams)), cache

        def losses(params, tokens, following):
            model = nnx.merge(graphdef, params)
            return cross_entropy(model, model.hidden(model.trunk(tokens)[0]), following)

        with on_mesh(self._mesh):
            self._make_steps(whole, extend, losses)

    def _make_steps(self, whole, extend, losses) -> None:
        at_once, stepwise = PREFILL, DECODE
        require_placed(self._params, at_once)
        placed, tokens = specs(self._params, at_once), at_once.tokens
        rows = stepwise.spec("batch")
        per_device = functools.partial(collectives.per_device, followed=at_once)
        self._whole = jit(per_device(whole, in_specs=(placed, tokens), out_specs=tokens))
        self._losses = jit(per_device(losses, in_specs=(placed, tokens, tokens), out_specs=tokens))
        placed = specs(self._params, stepwise)
        step = collectives.per_device(extend, stepwise, (placed, rows, rows), (rows, rows))
        self._extend = jit(step, donate_argnums=(2,))

    @_on_its_mesh
    def logits(self, tokens: np.ndarray, *, decode_from: int | None = None) -> np.ndarray:
        """Logits [B, T, V] (float32) of token ids [B, T].

        Args:
          tokens: integers, all sequences of one length.
          decode_from: feed this many tokens at once and the rest one by one through the cache.

        Raises:
          ValueError: not a [B, T] array of ids of the vocabulary, or `decode_from` is not in 1..T.
        """
        tokens = self._checked(tokens)
        if decode_from is None:
            batch, length = tokens.shape
            check_mesh(self.model.cfg, PREFILL, batch=batch, length=length)
            return np.asarray(self._whole(self._params, tokens))
        batch, length = tokens.shape
        check_mesh(self.model.cfg, DECODE, batch=batch)
        if not 1 <= decode_from <= length:
            raise ValueError(f"decode_from={decode_from}: expected 1..{length} (the length).")
        cache = self._init_cache(batch, max(length, LEAST_CAPACITY))
        parts = []
        for start, stop in [(0, decode_from)] + [(t, t + 1) for t in range(decode_from, length)]:
            logits, cache = self._extend(self._params, tokens[:, start:stop], cache)
            parts.append(np.asarray(logits))
        return np.concatenate(parts, axis=1)

    @_on_its_mesh
    def perplexity(
        self, tokens: Sequence[int], *, context: int = 512, batch_size: int = 8
    ) -> tuple[float, int]:
        """exp of the mean loss per token, with at least `context / 2` tokens before each.

        Windows of `context` tokens overlap by half; only the second half of a window counts, and
        all of the first window.

        Returns:
          the perplexity, and the number of tokens it is the mean over.

        Raises:
          ValueError: fewer than two tokens, or a context that is too short or too long.
        """
        if not 4 <= context <= self.model.cfg.max_length:
            raise ValueError(f"context={context}: expected 4..{self.model.cfg.max_length}.")
        tokens = self._checked(np.asarray(tokens)[None])[0]
        if len(tokens) < 2:
            raise ValueError(f"{len(tokens)} tokens: perplexity needs at least 2.")
        context = min(context, len(tokens) - 1)
        check_mesh(self.model.cfg, PREFILL, batch=batch_size, length=context)
        stride = max(context // 2, 1)
        last = len(tokens) - 1 - context
        starts = [*range(0, last, stride), last]
        total, count, reached = 0.0, 0, 0
        for i in range(0, len(starts), batch_size):
            batch = starts[i : i + batch_size]
            padded = batch + [batch[-1]] * (batch_size - len(batch))  # one compiled shape
            windows = np.stack([tokens[s : s + context + 1] for s in padded])
            losses = self._losses(self._params, windows[:, :-1], windows[:, 1:])
            losses = np.asarray(losses, np.float64)
            for start, row in zip(batch, losses):
                new = row[max(reached - start, 0) :]
                total, count, reached = total + new.sum(), count + len(new), start + context
        return math.exp(total / count), count

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        tokens, vocab = np.asarray(tokens), self.model.cfg.vocab_size
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0:
            raise ValueError(f"tokens are {tokens.dtype}{tokens.shape}: expected integers [B, T].")
        if tokens.min() < 0 or tokens.max() >= vocab:
            raise ValueError(
                f"token ids are in {tokens.min()}..{tokens.max()}: expected 0..{vocab - 1}."
            )
        if tokens.shape[1] > self.model.cfg.max_length:
            raise ValueError(
                f"{tokens.shape[1]} tokens are more than max_length={self.model.cfg.max_length}."
            )
        return tokens.astype(np.int32)
