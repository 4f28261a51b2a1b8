"""Attention of one layer: sliding window, alone or with compressed entries (CSA, HCA).

    latent = norm(x @ wq_a);  q = rope(normalize(latent @ wq_b))       N heads
    kv     = rope(norm(x @ wkv))                                       one head, key and value
    out    = softmax over [window, entries, sink] of q . keys, times keys
    return   (rope^-1(out), in groups of heads) @ wo_a @ wo_b

Because values are rotated keys, the output is rotated back at the query's position. Entries, or which of
them a query attends to, may be those of an earlier layer (`shared`).

Source: report section 2.3; released `inference/model.py` (Attention).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.attention import (
    decode_attention,
    selected_attention,
    selected_mass,
    window_attention,
)
from pallas_kernels.formats.pages import Pages
from pallas_kernels.selection import Selection
from sharding import collectives
from v4jax.config import LayerSpec
from v4jax.nn.cache import Chunk, LayerCache, append_entries, window_rows, write_window
from v4jax.nn.compressor import Compressor
from v4jax.nn.documents import Documents, first_rows, positions_of
from v4jax.nn.indexer import Indexer, dense_indexer_loss, indexer_loss
from v4jax.nn.layers import (
    GroupedLinear,
    Linear,
    ModelContext,
    RMSNorm,
    Rope,
    rope_frequencies,
    rotate,
)
from v4jax.nn.remat import PICKED, named
from v4jax.nn.shared import Shared


class Attention(nnx.Module):
    """[B, T, D] -> [B, T, D]

    Attributes:
      sees_all: whole sequences attend to all visible entries, not to the indexer's picks, and the
        indexer's loss is over all of them. What training sets to warm indexers up.
    """

    def __init__(self, context: ModelContext, spec: LayerSpec):
        cfg = context.cfg
        heads_dim, latent_dim = cfg.num_heads * cfg.head_dim, cfg.o_groups * cfg.o_lora_rank
        self.wq_a = Linear(context, cfg.embed_dim, cfg.q_lora_rank, ("embed", None))
        self.q_norm = RMSNorm(context, cfg.q_lora_rank)
        self.wq_b = Linear(
            context, cfg.q_lora_rank, heads_dim, ("embed", "heads"), out_width=cfg.head_dim
        )
        self.wkv = Linear(context, cfg.embed_dim, cfg.head_dim, ("embed", None))
        self.kv_norm = RMSNorm(context, cfg.head_dim)
        in_dim, groups = heads_dim // cfg.o_groups, cfg.o_groups
        self.wo_a = GroupedLinear(
            context, in_dim, cfg.o_lora_rank, groups=groups, in_width=cfg.head_dim
        )
        self.wo_b = Linear(context, latent_dim, cfg.embed_dim, ("heads", "embed"))
        self.sink = context.param(
            (cfg.num_heads,), ("heads",), stored="f32", init=nnx.initializers.zeros
        )
        own, indexer, width = spec.own_compressor, spec.own_indexer, cfg.head_dim
        self.compressor = Compressor(context, own, width) if own else None
        self.indexer = (
            Indexer(context, indexer, spec.compressor) if indexer and spec.compressor else None
        )
        self.cfg, self.spec, self.numerics = cfg, spec, context.numerics
        self.sees_all = False

    def __call__(
        self,
        x: jax.Array,
        documents: Documents | None = None,
        selection: jax.Array | None = None,
        shared: Shared = Shared(),
    ) -> tuple[jax.Array, jax.Array | float, Shared]:
        """Whole sequences x [B, T, D] from position 0, or this device's part of them.

        Args:
          documents: what the rows hold, if not one sequence each.
          selection: [B, T, K] entries to attend to, in place of the indexer's picks (`Choices`).
          shared: what other layers made for this one.

        Returns:
          out [B, T, D]; the loss of its indexer (a scalar, 0 for layers without one); and the entries
          and picks that it attended to.

        Raises:
          ValueError: it uses another layer's entries, and none are given.
        """
        batch, length, _ = x.shape
        positions = positions_of(documents, batch, length)
        first = first_rows(documents, self.spec.ratio)
        latent, q, kv = self.project(x, positions)
        window = jnp.concatenate([collectives.halo(kv, self.cfg.window, "seq"), kv], axis=1)
        entries, picked = self._taken(shared)
        if self.compressor:
            entries = self.compressor(x, documents)
            entries = self.compressor.gather(entries, length)
        if self.indexer is None:
            out, _ = self._attend(q, window, entries, picked, positions, first)
            return self._output(out, positions), 0.0, Shared(entries, picked)
        assert isinstance(entries, jax.Array)  # of whole sequences
        valid = None if documents is None else documents.valid
        x, latent = jax.lax.stop_gradient((x, latent))
        queries, weights = self.indexer.queries(x, latent, positions)
        keys = self.indexer.compressor(x, documents)
        keys = self.indexer.compressor.gather(keys, length)
        if self.sees_all:
            out, log_denominator = self._attend_dense(q, window, entries, positions, first)
            with jax.named_scope("indexer/loss"):
                loss = dense_indexer_loss(
                    queries,
                    weights,
                    keys,
                    q,
                    entries,
                    log_denominator,
                    positions,
                    first,
                    valid,
                    ratio=self.spec.ratio,
                    scale=self._scale,
                )
            return self._output(out, positions), loss, Shared(entries)
        if selection is None:
            picked = self.indexer.select(queries, weights, keys, positions, first)
            picked = named(picked, PICKED)
        else:
            picked = Selection.of_indices(selection, keys.shape[1])
        out, log_denominator = self._attend(q, window, entries, picked, positions, first)
        with jax.named_scope("indexer/loss"):
            indices = picked.to_indices()
            mass = selected_mass(q, entries, indices, log_denominator, scale=self._scale)
            mass = collectives.psum(mass, "heads")
            loss = indexer_loss(queries, weights, keys, indices, mass, valid)
        return self._output(out, positions), loss, Shared(entries, picked)

    def extend(
        self, x: jax.Array, chunk: Chunk, cache: LayerCache, shared: Shared = Shared()
    ) -> tuple[jax.Array, LayerCache, Shared]:
        """A chunk x [B, T, D] after what the cache holds.

        Args:
          shared: what other layers made for this one, of the chunk too.

        Returns:
          out [B, T, D], the new cache, and the entries and picks that it attended to.
        """
        latent, q, kv = self.project(x, chunk.positions)
        new = dataclasses.replace(cache, window=write_window(cache.window, kv, chunk))
        entries, selection = self._taken(shared)
        first = chunk.start // self.spec.ratio if self.spec.compressor else chunk.start
        if self.compressor:
            assert cache.entries is not None and cache.pool is not None  # of such a layer
            rows, counts, pool = self.compressor.extend(x, chunk, cache.pool)
            entries = append_entries(cache.entries, rows, first, counts)
            new = dataclasses.replace(new, entries=entries, pool=pool)
        if self.indexer:
            assert cache.index_keys is not None and cache.index_pool is not None
            rows, counts, pool = self.indexer.compressor.extend(x, chunk, cache.index_pool)
            keys = append_entries(cache.index_keys, rows, first, counts)
            new = dataclasses.replace(new, index_keys=keys, index_pool=pool)
            queries, weights = self.indexer.queries(x, latent, chunk.positions)
            selection = self.indexer.select(queries, weights, keys, chunk.positions)

        if x.shape[1] == 1:
            out = self._attend_decode(q, new.window, entries, selection, chunk.positions)
        else:
            window = window_rows(cache.window, kv, chunk)
            written = None
            if entries is not None:
                written = (chunk.whole_start + chunk.whole_counts) // self.spec.ratio
            out, _ = self._attend(q, window, entries, selection, chunk.positions, written=written)
        return self._output(out, chunk.positions), new, Shared(entries, selection)

    @property
    def _scale(self) -> float:
        return self.cfg.head_dim**-0.5

    @property
    def _rope(self) -> Rope:
        is_compressed = self.spec.compressor is not None
        frequencies = rope_frequencies(self.cfg, compressed=is_compressed)
        return Rope(frequencies, self.numerics.implementation)

    def _taken(self, shared: Shared) -> tuple[jax.Array | Pages | None, Selection | None]:
        """Entries and picks that other layers made for this one; None where it has its own, or none."""
        if self.spec.entries_from is not None and shared.entries is None:
            raise ValueError(
                f"{self.spec.kind} layer without the rows of layer {self.spec.entries_from}, which it "
                "attends to: expected them in `shared`."
            )
        return shared.entries, shared.selection

    def project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """latent [B, T, q_lora_rank], q [B, T, N, H] and kv [B, T, H]."""
        with jax.named_scope("attention/project"):
            latent = self.q_norm(self.wq_a(x))
            q = self.wq_b(collectives.copy_to(latent, "heads"))
            q = q.reshape(*x.shape[:2], -1, self.cfg.head_dim)  # this device's heads
            turn = self._rope.turn(positions)
            q = self.numerics.finish_query(q, turn, self.cfg.norm_eps)
            return latent, q, self.kv_norm(self.wkv(x), turn, rounding="rows")

    def _attend(self, q, window, entries, selection, positions, first=None, written=None):
        if selection is None:
            return self._attend_dense(q, window, entries, positions, first, written)
        return self._attend_selected(q, window, entries, selection, positions, first, written)

    def _attend_dense(self, q, window, entries, positions, first=None, written=None):
        if entries is None:
            entries = jnp.zeros((q.shape[0], 0, q.shape[-1]), q.dtype)
        with jax.named_scope("hca" if self.spec.compressor else "swa"):
            return window_attention(
                q,
                *collectives.copy_to((window, entries), "heads"),
                self.sink[...],
                positions,
                first,
                written,
                ratio=max(self.spec.ratio, 1),
                scale=self._scale,
                implementation=self.numerics.implementation,
            )

    def _attend_selected(self, q, window, entries, selection, positions, first=None, written=None):
        with jax.named_scope("csa"):
            return selected_attention(
                q,
                *collectives.copy_to((window, entries), "heads"),
                selection,
                self.sink[...],
                positions,
                first,
                written,
                scale=self._scale,
                implementation=self.numerics.implementation,
            )

    def _attend_decode(self, q, window, entries, selection, positions):
        with jax.named_scope("decode"):
            out = decode_attention(
                q[:, 0],
                window,
                entries,
                None if selection is None else selection.to_indices()[:, 0],
                self.sink[...],
                positions[:, 0],
                ratio=max(self.spec.ratio, 1),
                scale=self._scale,
                implementation=self.numerics.implementation,
            )
        return out[:, None]

    def _output(self, out: jax.Array, positions: jax.Array) -> jax.Array:
        """[B, T, N, H] -> [B, T, D]"""
        with jax.named_scope("attention/output"):
            out = rotate(out, positions, self._rope, inverse=True)
            out = out.reshape(*out.shape[:2], -1)  # the heads of a group side by side
            return self.wo_b(self.wo_a(out))
