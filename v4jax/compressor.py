"""Compressor: turns every `ratio` tokens into one key-value entry.

    value, gate = x @ wkv, x @ wgate            float32
    entry w     = rope(norm(sum_p softmax_p(gate[p] + ape[p]) * value[p]), position ratio * w)

HCA (ratio 128) pools the tokens of window w. CSA (ratio 4) projects to twice the width and pools
eight rows: the first half of the channels of window w - 1 and the second half of those of window w.
A window that is not complete has no entry.

Source: report section 2.3, eqs. 9-14; released `inference/model.py` (Compressor).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.gated_pool import Pool, pool_windows
from pallas_kernels.quantize import cast
from sharding import AxisRules
from v4jax.cache import Chunk, OpenPool, init_pool
from v4jax.config import LayerSpec, V4Config
from v4jax.layers import KeyStream, RMSNorm, param, rope_frequencies, rotate
from v4jax.numerics import Numerics, matmul


class Compressor(nnx.Module):
    """[B, T, D] -> [B, T / ratio, width]"""

    def __init__(
        self,
        cfg: V4Config,
        spec: LayerSpec,
        width: int,
        numerics: Numerics,
        rules: AxisRules,
        *,
        rngs: KeyStream,
    ):
        self.ratio, self.overlap, self.width = spec.compress_ratio, spec.is_csa, width
        channels = width * (2 if self.overlap else 1)
        shape, axes = (cfg.embed_dim, channels), ("embed", None)
        self.wkv = param(rngs, shape, axes, rules, stored="bf16")
        self.wgate = param(rngs, shape, axes, rules, stored="bf16")
        zeros = nnx.initializers.zeros
        ape_shape = (self.ratio, channels)
        self.ape = param(rngs, ape_shape, (None, None), rules, stored="f32", init=zeros)
        self.norm = RMSNorm(width, cfg.norm_eps, rules, rngs=rngs)
        self.cfg, self.numerics = cfg, numerics

    def __call__(self, x: jax.Array) -> jax.Array:
        """Entries of whole sequences x [B, T, D] that start at position 0."""
        batch, length, _ = x.shape
        count = length // self.ratio
        value, gate = self._project(x)
        rows = (batch, count, self.ratio, value.shape[-1])
        value, gate = (y[:, : count * self.ratio].reshape(rows) for y in (value, gate))
        pooled = pool_windows(
            value, gate, self.ape[...], implementation=self.numerics.implementation
        )
        if self.overlap:
            pooled = self._overlap(pooled, init_pool(batch, self.width, overlap=True).previous)
        return self._finish(pooled, jnp.zeros(batch, jnp.int32))

    def extend(
        self, x: jax.Array, chunk: Chunk, state: OpenPool
    ) -> tuple[jax.Array, jax.Array, OpenPool]:
        """Entries that the chunk x [B, T, D] completes.

        Returns:
          entries [B, n, width], the number of them that are complete [B] (they come first; the
          first is entry `start // ratio` of its sequence), and the new state.
        """
        value, gate = self._project(x)
        pools = self._pool_chunk(value, gate, chunk)  # [B, n, F]
        first = state.current.join(jax.tree.map(lambda p: p[:, 0], pools))
        pools = jax.tree.map(lambda p, f: p.at[:, 0].set(f), pools, first)
        counts = (chunk.start % self.ratio + chunk.counts) // self.ratio

        def at(pools: Pool, index: jax.Array) -> Pool:
            return jax.tree.map(
                lambda p: jnp.take_along_axis(p, index[:, None, None], axis=1)[:, 0], pools
            )

        # The window being filled after the chunk; there is none of it yet if the chunk ended
        # exactly where its last window did.
        padded = jax.tree.map(
            lambda p, e: jnp.concatenate([p, e], axis=1),
            pools,
            Pool.empty((x.shape[0], 1, value.shape[-1])),
        )
        current = at(padded, counts)
        if not self.overlap:
            return self._finish(pools, chunk.start), counts, OpenPool(current, None)
        history = jax.tree.map(
            lambda s, p: jnp.concatenate([s[:, None], p[..., : self.width]], axis=1),
            state.previous,
            pools,
        )
        entries = self._finish(self._overlap(pools, state.previous), chunk.start)
        return entries, counts, OpenPool(current, at(history, counts))

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return matmul(x, self.wkv[...]), matmul(x, self.wgate[...])

    def _pool_chunk(self, value: jax.Array, gate: jax.Array, chunk: Chunk) -> Pool:
        """Partial sums of the chunk's tokens by window: [B, n, F], window 0 being the open one."""
        batch, columns, channels = value.shape
        slot = chunk.start % self.ratio
        if columns == 1:  # a decoding step: one row is its own partial sum
            gate = gate + self.ape[...][slot][:, None]
            row = Pool(gate, jnp.ones_like(gate), value)
            valid = chunk.valid[..., None]
            return jax.tree.map(lambda p, e: jnp.where(valid, p, e), row, Pool.empty(value.shape))
        count = -(-(columns + self.ratio - 1) // self.ratio)
        space = jnp.zeros((batch, count * self.ratio, channels), value.dtype)
        place = jax.vmap(lambda s, y, at: jax.lax.dynamic_update_slice_in_dim(s, y, at, 0))
        rows = (batch, count, self.ratio, channels)
        index = jnp.arange(count * self.ratio) - slot[:, None]
        valid = (index >= 0) & (index < chunk.counts[:, None])
        return pool_windows(
            place(space, value, slot).reshape(rows),
            place(space, gate, slot).reshape(rows),
            self.ape[...],
            valid.reshape(rows[:3]),
            implementation=self.numerics.implementation,
        )

    def _overlap(self, pools: Pool, previous: Pool) -> Pool:
        """Joins the second half of each window with the first half of the one before it."""
        shifted = jax.tree.map(
            lambda p, s: jnp.concatenate([s[:, None], p[:, :-1, : self.width]], axis=1),
            pools,
            previous,
        )
        return shifted.join(jax.tree.map(lambda p: p[..., self.width :], pools))

    def _finish(self, pools: Pool, start: jax.Array) -> jax.Array:
        entries = self.norm(cast(pools.mean(), self.numerics.dtype))
        index = start[:, None] // self.ratio + jnp.arange(entries.shape[1])
        return rotate(entries, index * self.ratio, rope_frequencies(self.cfg, compressed=True))
