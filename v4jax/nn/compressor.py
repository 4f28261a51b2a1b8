"""Compressor: turns every `ratio` tokens into one key-value entry.

    value, gate = x @ wkv, x @ wgate            float32
    entry w     = round(rope(norm(sum_p softmax_p(gate[p] + ape[p]) * value[p]), position ratio * w))

HCA (ratio 128) pools the tokens of window w. CSA (ratio 4) overlaps: it projects to twice the width
and pools eight rows, the first half of the channels of window w - 1 and the second half of those of
window w. A window that is not complete has no entry.

Source: report section 2.3, eqs. 9-14; released `inference/model.py` (Compressor).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.formats.quantize import cast
from pallas_kernels.gated_pool import Pool, pool_windows
from pallas_kernels.pool_token import pool_token
from sharding import collectives
from v4jax.config import CompressorSpec
from v4jax.nn.cache import Chunk, OpenPool, init_pool
from v4jax.nn.documents import Documents
from v4jax.nn.layers import ModelContext, RMSNorm, Rope, WideLinear, rope_frequencies


class Compressor(nnx.Module):
    """[B, T, D] -> [B, T / ratio, width]"""

    def __init__(
        self, context: ModelContext, spec: CompressorSpec, width: int, *, rounding: str = "rows"
    ):
        self.ratio, self.overlap, self.width = spec.ratio, spec.overlap, width
        parts = (width,) * (2 if self.overlap else 1)  # of the window before, and of its own
        channels = sum(parts)
        self.wkv = WideLinear(context, context.cfg.embed_dim, channels, parts=parts)
        self.wgate = WideLinear(context, context.cfg.embed_dim, channels, parts=parts)
        self.ape = context.param(
            (self.ratio, channels),
            (None, None),
            stored="f32",
            init=nnx.initializers.zeros,
            matrix=False,
        )
        self.norm = RMSNorm(context, width)
        self.cfg, self.numerics, self.rounding = context.cfg, context.numerics, rounding

    @jax.named_scope("compressor")
    def __call__(self, x: jax.Array, documents: Documents | None = None) -> jax.Array:
        """Entries of whole sequences x [B, T, D] that start at position 0, or of rows of documents.

        Of this device's part of them, if they are cut over devices: the entries whose last token it
        has come first (`gather` joins them).

        Raises:
          ValueError: a device's part of rows with several documents is not whole windows.
        """
        batch, length, _ = x.shape
        if documents is not None and documents.starts is not None:
            return self._of_documents(x, documents.starts)
        if collectives.axis_size("seq") > 1:
            zero = jnp.zeros(batch, jnp.int32)
            chunk = Chunk.make(zero, zero + length * collectives.axis_size("seq"), length)
            return self.extend(x, chunk, init_pool(batch, self.width, overlap=self.overlap))[0]
        pooled = self._pool_whole(x)
        if self.overlap:
            pooled = self._overlap(pooled, Pool.empty((batch, self.width)))
        position = self._positions(jnp.zeros(batch, jnp.int32), pooled)
        return self._finish(self._means(pooled), position)

    def _of_documents(self, x: jax.Array, starts: jax.Array) -> jax.Array:
        """Entries of rows with several documents, which begin at whole windows."""
        length = x.shape[1]
        if collectives.axis_size("seq") > 1 and length % self.ratio:
            raise ValueError(
                f"rows of several documents are cut into parts of {length} tokens, and a compressed "
                f"row pools {self.ratio}: expected parts that are multiples of it. Take a seq_len that "
                "is a multiple of that times the devices of a sequence, or rows of one document."
            )
        pooled = self._pool_whole(x)
        count = length // self.ratio
        at = collectives.axis_index("seq") * length + self.ratio * jnp.arange(count)
        position = at - starts[:, : count * self.ratio : self.ratio]  # of a window's first token
        if self.overlap:
            before = jax.tree.map(
                lambda p: collectives.halo(p[..., : self.width], 1, "seq")[:, 0], pooled
            )
            is_first = (position == 0)[..., None]
            pooled = self._overlap(pooled, before, is_first)
        return self._finish(self._means(pooled), position)

    def _pool_whole(self, x: jax.Array) -> Pool:
        """Partial sums of the whole windows of x [B, T, D]: [B, T / ratio, F]."""
        batch, length, _ = x.shape
        count = length // self.ratio
        value, gate = self._project(x)
        rows = (batch, count, self.ratio, value.shape[-1])
        value, gate = (y[:, : count * self.ratio].reshape(rows) for y in (value, gate))
        return pool_windows(value, gate, self.ape[...], implementation=self.numerics.implementation)

    @jax.named_scope("compressor")
    def extend(
        self, x: jax.Array, chunk: Chunk, state: OpenPool
    ) -> tuple[jax.Array, jax.Array, OpenPool]:
        """Entries that the chunk x [B, T, D] completes.

        Returns:
          entries [B, n, width], the number of them that are complete [B] (they come first; the
          first is entry `start // ratio` of its sequence), and the new state.
        """
        value, gate = self._project(x)
        counts = (chunk.start % self.ratio + chunk.counts) // self.ratio
        if x.shape[1] == 1 and collectives.axis_size("seq") == 1:  # a decoding step
            mean, current, previous = pool_token(
                state.current,
                state.previous,
                value[:, 0],
                gate[:, 0],
                self.ape[...],
                chunk.start % self.ratio,
                chunk.valid[:, 0],
                dtype=self.numerics.dtype,
                implementation=self.numerics.implementation,
            )
            position = chunk.start[:, None] // self.ratio * self.ratio
            rows = self._finish(mean[:, None], position)
            return rows, counts, OpenPool(current, previous)
        pools = self._pool_chunk(value, gate, chunk)  # [B, n, F]
        end = None
        if collectives.axis_size("seq") > 1:
            state, end = self._across_devices(pools, counts, state)
        first = state.current.join(jax.tree.map(lambda p: p[:, 0], pools))
        pools = jax.tree.map(lambda p, f: p.at[:, 0].set(f), pools, first)
        joined = pools if state.previous is None else self._overlap(pools, state.previous)
        end = self._end(state, pools, counts) if end is None else end
        position = self._positions(chunk.start, joined)
        return self._finish(self._means(joined), position), counts, end

    def gather(self, entries: jax.Array, length: int) -> jax.Array:
        """Entries [B, S, width] of whole sequences, from what each device made of its `length` tokens."""
        devices = collectives.axis_size("seq")
        if devices == 1:
            return entries
        batch, most, width = entries.shape
        parts = collectives.all_gather(entries, "seq", axis=1)  # [B, devices * most, width]
        if length % self.ratio == 0:
            parts = parts.reshape(batch, devices, most, width)[:, :, : length // self.ratio]
            return parts.reshape(batch, -1, width)
        window = np.arange(devices * length // self.ratio)
        owner = ((window + 1) * self.ratio - 1) // length  # of its last token
        return parts[:, owner * most + window - owner * length // self.ratio]

    def _end(self, state: OpenPool, pools: Pool, counts: jax.Array) -> OpenPool:
        """The state after a chunk with these pools, the first joined, `counts` of them complete."""
        # There is none yet of the window being filled if the chunk ended exactly where its last
        # window did.
        padded = jax.tree.map(
            lambda p, e: jnp.concatenate([p, e], axis=1),
            pools,
            Pool.empty((counts.shape[0], 1, pools.peak.shape[-1])),
        )
        current = _at(padded, counts)
        if not self.overlap:
            return OpenPool(current, None)
        history = jax.tree.map(
            lambda s, p: jnp.concatenate([s[:, None], p[..., : self.width]], axis=1),
            state.previous,
            pools,
        )
        return OpenPool(current, _at(history, counts))

    def _across_devices(
        self, pools: Pool, counts: jax.Array, state: OpenPool
    ) -> tuple[OpenPool, OpenPool]:
        """States before this device's part of a chunk and after the last one's.

        A device tells the others what its part does to a state: partial sums of the first window,
        of the last complete one and of the one it leaves open, a few rows whatever its length.
        """
        tail = jax.tree.map(
            lambda p, e: jnp.concatenate([p, e], axis=1),
            pools,
            Pool.empty((counts.shape[0], 1, pools.peak.shape[-1])),
        )
        parts = (
            jax.tree.map(lambda p: p[:, 0], pools),
            _at(pools, jnp.maximum(counts - 1, 0)),
            _at(tail, counts),
            counts,
        )
        parts = jax.tree.map(lambda p: collectives.all_gather(p[None], "seq", axis=0), parts)

        def follow(state: OpenPool, part) -> tuple[OpenPool, OpenPool]:
            first, last, open_, count = part
            joined = state.current.join(first)

            def pick(none, one, more):
                many = jax.tree.map(lambda a, b: jnp.where(count[:, None] == 1, a, b), one, more)
                return jax.tree.map(lambda a, b: jnp.where(count[:, None] == 0, a, b), none, many)

            current = pick(joined, open_, open_)
            if not self.overlap:
                return OpenPool(current, None), state
            half = jax.tree.map(lambda p: p[:, : self.width], (joined, last))
            return OpenPool(current, pick(state.previous, *half)), state

        end, before = jax.lax.scan(follow, state, parts)
        return jax.tree.map(lambda s: s[collectives.axis_index("seq")], before), end

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.wkv(x), self.wgate(x)

    def _pool_chunk(self, value: jax.Array, gate: jax.Array, chunk: Chunk) -> Pool:
        """Partial sums of the chunk's tokens by window: [B, n, F], window 0 being the open one."""
        batch, columns, channels = value.shape
        slot = chunk.start % self.ratio
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

    def _overlap(self, pools: Pool, previous: Pool, is_first: jax.Array | None = None) -> Pool:
        """Joins the second half of each window with the first half of the one before it.

        Where `is_first` [B, n, 1] there is none before it.
        """
        shifted = jax.tree.map(
            lambda p, s: jnp.concatenate([s[:, None], p[:, :-1, : self.width]], axis=1),
            pools,
            previous,
        )
        if is_first is not None:
            nothing = Pool.empty((1, 1, 1))
            shifted = jax.tree.map(lambda s, e: jnp.where(is_first, e, s), shifted, nothing)
        return shifted.join(jax.tree.map(lambda p: p[..., self.width :], pools))

    def _positions(self, start: jax.Array, pools: Pool) -> jax.Array:
        """[B, n] of the first tokens of windows that follow one another from `start` [B] on."""
        index = start[:, None] // self.ratio + jnp.arange(pools.total.shape[1])
        return index * self.ratio

    def _finish(self, means: jax.Array, position: jax.Array) -> jax.Array:
        """Entries of windows with these means, whose first tokens have these positions [B, n]."""
        turn = Rope(rope_frequencies(self.cfg, compressed=True)).turn(position)
        return self.norm(means, turn, self.rounding)

    def _means(self, pools: Pool) -> jax.Array:
        return cast(pools.mean(), self.numerics.dtype)


def _at(pools: Pool, index: jax.Array) -> Pool:
    """[B, n, F] -> [B, F]"""
    return jax.tree.map(
        lambda p: jnp.take_along_axis(p, index[:, None, None], axis=1, mode="clip")[:, 0], pools
    )
