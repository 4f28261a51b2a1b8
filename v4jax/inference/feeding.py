"""Prompts fed into a cache chunk by chunk, without an engine: for checks and measurements.

Rows of a batch may have different lengths; logits are those after each row's last token.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sharding import DECODE
from v4jax.inference.steps import chunk_step
from v4jax.nn.cache import Cache, CacheFormat
from v4jax.nn.model import Transformer
from v4jax.nn.placement import by_row, mesh_of, on_mesh


class Feeder:
    """A model's arrays and its compiled prefill.

    Args:
      model: as an `Engine` takes it; if it lies on a mesh, the steps run there.
      cache: how rows are held, see `v4jax.nn.cache.CacheFormat`.
    """

    def __init__(self, model: Transformer, *, cache: CacheFormat = None):
        self._model, self._mesh, self._format = model, mesh_of(model), cache
        self.leaves = jax.tree.leaves(nnx.split(model)[1])
        with on_mesh(self._mesh):
            self._chunk = chunk_step(model)

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache, see `v4jax.nn.cache.init_cache`."""
        with on_mesh(self._mesh):
            make = functools.partial(self._model.init_cache, batch, capacity, self._format)
            return jax.jit(make, out_shardings=by_row(self._mesh, DECODE))()

    def feed(
        self, prompts: Sequence[Sequence[int]], cache: Cache, *, chunk: int = 1024
    ) -> tuple[Cache, jax.Array]:
        """Token ids put behind what the cache holds, in chunks of so many tokens; gives up the cache.

        Returns:
          the new cache, and the logits [B, V] after each sequence's last token.

        Raises:
          CacheFullError: the cache has no room; nothing was written.
        """
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        cache.require_room(lengths)
        with on_mesh(self._mesh):
            shape = (len(prompts), self._model.cfg.vocab_size)
            logits = jnp.zeros(shape, jnp.float32, device=by_row(self._mesh, DECODE))
            for start in range(0, int(lengths.max()), chunk):
                tokens = np.zeros((len(prompts), chunk), np.int32)
                for row, prompt in zip(tokens, prompts):
                    piece = prompt[start : start + chunk]
                    row[: len(piece)] = piece
                counts = np.clip(lengths - start, 0, chunk).astype(np.int32)
                cache, logits = self._chunk(self.leaves, tokens, counts, cache, logits)
        return cache, logits
