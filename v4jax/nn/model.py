"""The decoder: blocks, the stages they are stacked in, and the whole model.

    streams = embedding of each token, four times
    for each layer:
        streams = mix(streams, attention(norm(collapse(streams))))
        streams = mix(streams, moe(norm(collapse(streams))))
    logits  = norm(head_collapse(streams)) @ head

Layers of one kind are stacked and scanned (`plan_stages`), which keeps programs small; with
`scan_layers=False` every layer has arrays of its own, which suits decoding.

Source: report section 2; released `inference/model.py` (Block, MTPBlock, Transformer).
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32, Int, Int32

from pallas_kernels import signatures
from sharding import DECODE, AxisRules, collectives
from v4jax.config import LayerSpec, V4Config, sources
from v4jax.nn.attention import Attention
from v4jax.nn.cache import Cache, CacheFormat, Chunk, LayerCache, init_cache
from v4jax.nn.choices import Choices, LayerChoices
from v4jax.nn.compilation import jitted
from v4jax.nn.documents import Documents
from v4jax.nn.hyper_connections import HyperConnection, HyperHead
from v4jax.nn.inspection import LayerView, view
from v4jax.nn.layers import KeyStream, Linear, ModelContext, RMSNorm
from v4jax.nn.moe import MoE, RouterStats
from v4jax.nn.numerics import Numerics, plain
from v4jax.nn.placement import (
    check_mesh,
    gathered,
    joined,
    mesh_of,
    num_batch_parts,
    on_mesh,
    specs,
)
from v4jax.nn.remat import ATTENTION, EXPERTS, STREAMS, named, recomputed
from v4jax.nn.rounding import rounded
from v4jax.nn.shared import Shared
from v4jax.nn.stages import StagePlan, plan_stages


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["indexer_loss", "router"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class BlockStats:
    """What training needs to know of a block. Unused parts are not computed under jit."""

    indexer_loss: jax.Array  # scalar
    router: RouterStats


class Block(nnx.Module):
    """One decoder layer on the residual streams [B, T, M * D]."""

    def __init__(self, context: ModelContext, spec: LayerSpec):
        dim = context.cfg.embed_dim
        self.attn_hc = HyperConnection(context)
        self.attn_norm = RMSNorm(context, dim)
        self.attention = Attention(context, spec)
        self.ffn_hc = HyperConnection(context)
        self.ffn_norm = RMSNorm(context, dim)
        self.moe = MoE(context, spec)

    def __call__(
        self,
        streams: jax.Array,
        tokens: jax.Array,
        documents: Documents | None = None,
        choices: LayerChoices = LayerChoices(),
        shared: Shared = Shared(),
    ) -> tuple[jax.Array, BlockStats, Shared]:
        """Whole sequences from position 0, or rows of documents; tokens [B, T]."""
        x, *mix = self.attn_hc.pre(streams)
        out, indexer_loss, made = self.attention(
            self.attn_norm(x), documents, choices.selection, shared
        )
        out = named(out, ATTENTION)
        streams, router = self._feed_forward(out, streams, mix, tokens, documents, choices.experts)
        return streams, BlockStats(jnp.asarray(indexer_loss, jnp.float32), router), made

    def extend(
        self,
        streams: jax.Array,
        tokens: jax.Array,
        chunk: Chunk,
        cache: LayerCache,
        shared: Shared = Shared(),
    ) -> tuple[jax.Array, LayerCache, Shared]:
        """A chunk of tokens after what the cache holds."""
        x, *mix = self.attn_hc.pre(streams)
        out, cache, made = self.attention.extend(self.attn_norm(x), chunk, cache, shared)
        return self._feed_forward(out, streams, mix, tokens)[0], cache, made

    def _feed_forward(self, out, streams, mix, tokens, documents=None, experts=None):
        """From the output of attention on: the streams are passed over once between the two."""
        streams, x, *mix = self.ffn_hc.post_pre(out, streams, *mix)
        out, stats = self.moe(self.ffn_norm(x), tokens, documents, experts)
        out = named(out, EXPERTS)
        return self.ffn_hc.post(out, streams, *mix), stats


class Vocabulary(nnx.Module):
    """A row of D channels for each token id: the embedding, or the output head."""

    def __init__(self, context: ModelContext):
        shape = (context.cfg.vocab_size, context.cfg.embed_dim)
        init = nnx.initializers.normal(context.cfg.embed_dim**-0.5)
        self.table = context.param(shape, ("vocab", "embed"), stored="bf16", init=init)
        self.numerics = context.numerics

    def rows(self, tokens: jax.Array) -> jax.Array:
        """Rows of ids [B, T]: [B, T, D]."""
        table = self.table[...]
        index = (
            tokens - collectives.axis_index("vocab") * table.shape[0]
        )  # this device's part of the table
        rows = collectives.take_rows(table, jnp.clip(index, 0, table.shape[0] - 1), "embed")
        mine = (index >= 0) & (index < table.shape[0])
        return collectives.reduce_from(jnp.where(mine[..., None], rows, 0), "vocab")

    def products(self, x: jax.Array, *, as_released: bool = False) -> jax.Array:
        """x [B, T, D] with every row of this device's part: [B, T, V] float32."""
        table = joined(self.table, self.numerics.dtype, as_released=as_released)
        return self.numerics.row_products(collectives.copy_to(x, "vocab"), table)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _extend(rules, as_released, is_source, block, streams, tokens, chunk, cache, shared):
    """`Block.extend`, traced once for all layers of a kind. `rules` only tells traces apart.

    What the layer made comes back if it `is_source` of others: it would be results of the program else.
    """
    del rules
    block = gathered(block, streams.dtype, as_released=as_released)
    streams, cache, made = block.extend(streams, tokens, chunk, cache, shared)
    return streams, cache, made if is_source else Shared()


@jitted(static_argnums=(0, 1))
def _whole(graphdef, rules, params, tokens):
    """`Transformer.__call__` of whole sequences on every device of the ambient mesh."""

    def on_device(params, tokens):
        return nnx.merge(graphdef, params)(tokens)

    placed = (specs(params, rules), rules.tokens)
    return collectives.per_device(on_device, rules, placed, rules.tokens)(params, tokens)


@jitted()
def _compiled(model, tokens):
    """`Transformer.__call__` on one device, one program for all layers."""
    return model._logits_of(tokens)


class Stage(nnx.Module):
    """Blocks of one repeating pattern. With repeats > 1 their arrays have a leading layer axis."""

    def __init__(self, context: ModelContext, plan: StagePlan):
        def make(spec: LayerSpec) -> Block:
            if plan.repeats == 1:
                return Block(context, spec)

            def one(key: jax.Array) -> Block:
                return Block(dataclasses.replace(context, rngs=KeyStream(key)), spec)

            return jax.vmap(one)(jax.random.split(context.rngs(), plan.repeats))

        self.blocks = nnx.List([make(spec) for spec in plan.pattern])
        self.repeats = plan.repeats

    def __call__(
        self,
        streams: jax.Array,
        tokens: jax.Array,
        documents: Documents | None,
        choices: Sequence[LayerChoices],
        shared: Shared = Shared(),
        *,
        is_source: bool = False,
        remat: str,
        as_released: bool,
    ) -> tuple[jax.Array, tuple[BlockStats, ...], Shared]:
        """Runs all blocks; the stats have one entry per block of the pattern, [repeats, ...].

        Args:
          choices: one for each of the stage's layers.
          shared: what earlier layers made for the stage's only layer.
          is_source: others use what the stage's only layer makes. It is returned then, and kept for the
            backward pass whatever `remat` says: made once, its gradient is the sum of all users'.
          remat: what layers keep for the backward pass (`v4jax.nn.remat`).
        """

        def layer(block, streams, chosen, shared):
            block = gathered(block, streams.dtype, as_released=as_released)
            streams = named(streams, STREAMS)
            streams, stats, made = block(streams, tokens, documents, chosen, shared)
            return streams, stats, made if is_source else Shared()

        # Layer by layer: the backward pass then holds the gathered, or rounded, weights of one at a time.
        layer = recomputed(layer, remat)

        def body(streams, layers):
            stats = []
            for block, chosen in layers:
                streams, one, _ = layer(block, streams, chosen, Shared())
                stats.append(one)
            return streams, tuple(stats)

        blocks = tuple(self.blocks)
        if self.repeats > 1:
            of_block = [choices[index :: len(blocks)] for index in range(len(blocks))]
            stacked = [jax.tree.map(lambda *x: jnp.stack(x), *chosen) for chosen in of_block]
            return *jax.lax.scan(body, streams, tuple(zip(blocks, stacked))), Shared()
        ((block, chosen),) = zip(blocks, choices, strict=True)
        streams, stats, made = layer(block, streams, chosen, shared)
        return streams, (jax.tree.map(lambda x: x[None], stats),), made

    def layers(self) -> Iterator[Block]:
        """The blocks one by one, in the order of the layers."""
        for repeat in range(self.repeats):
            for block in self.blocks:
                yield block if self.repeats == 1 else jax.tree.map(lambda a, r=repeat: a[r], block)


class MTP(nnx.Module):
    """Multi-token prediction: one more block that predicts the token after the next.

    It reads the residual streams of the last layer (before the final collapse) and the embedding of
    the next token. Embedding and head are those of the model.
    """

    def __init__(self, context: ModelContext, spec: LayerSpec):
        dim = context.cfg.embed_dim
        self.e_proj = Linear(context, dim, dim, ("embed", None))
        self.h_proj = Linear(context, dim, dim, ("embed", None))
        self.enorm, self.hnorm, self.norm = (RMSNorm(context, dim) for _ in range(3))
        self.block = Block(context, spec)
        self.hc_head = HyperHead(context)
        self.num_streams = context.cfg.num_streams

    def __call__(
        self,
        streams: jax.Array,
        embedded: jax.Array,
        tokens: jax.Array,
        documents: Documents | None = None,
    ) -> tuple[jax.Array, BlockStats]:
        """Streams [B, T, M * D] and the embeddings and ids of the next tokens.

        Returns:
          hidden states [B, T, D] for the model's head, and the block's statistics.
        """
        batch, length, _ = streams.shape
        apart = streams.reshape(batch, length, self.num_streams, -1)
        x = self.e_proj(self.enorm(embedded))[:, :, None] + self.h_proj(self.hnorm(apart))
        streams, stats, _ = self.block(x.reshape(streams.shape), tokens, documents)
        return self.norm(self.hc_head(streams)), stats


class Transformer(nnx.Module):
    """DeepSeek-V4.

    Args of the constructor:
      cfg: the architecture.
      numerics: how numbers are rounded, and the dtype of activations.
      rules: placement of parameters, used when there is an ambient mesh.
      scan_layers: stack repeating layers and scan over them.
      rngs: source of the random initial values. Parameters start as float32.

    Attributes:
      as_released: compute with float weights as the released format would hold them, layer by layer;
        gradients go to the weights as they are (`quantization.with_rounding`).
    """

    def __init__(
        self,
        cfg: V4Config,
        numerics: Numerics = plain(),
        rules: AxisRules = AxisRules(),
        *,
        scan_layers: bool = True,
        rngs: nnx.Rngs,
    ):
        context = ModelContext(cfg, numerics, rules, KeyStream(rngs()))
        self.embed = Vocabulary(context)
        plans = (
            plan_stages(cfg.layers)
            if scan_layers
            else tuple(StagePlan((spec,), 1) for spec in cfg.layers)
        )
        self.stages = nnx.List([Stage(context, plan) for plan in plans])
        self.hc_head = HyperHead(context)
        self.norm = RMSNorm(context, cfg.embed_dim)
        self.head = Vocabulary(context)
        self.mtp = nnx.List([MTP(context, spec) for spec in cfg.mtp_layers])
        self._cfg, self.numerics, self.rules = cfg, numerics, rules
        self.as_released = False

    @property
    def cfg(self) -> V4Config:
        """The architecture. Fixed: `variant` gives a model with another."""
        return self._cfg

    @cfg.setter
    def cfg(self, value: V4Config) -> None:
        raise AttributeError(
            "the architecture of a model is fixed, its layers are built from it: "
            "model.variant(cfg) gives one with the same weights."
        )

    @signatures.shaped
    def __call__(self, tokens: Int[jax.Array | np.ndarray, "B T"]) -> Float32[jax.Array, "B T V"]:
        """Token ids [B, T] -> logits [B, T, V] in float32, whole sequences from position 0.

        A model that lies on a mesh computes there. Its axes have to divide B and T.

        Raises:
          ValueError: they do not.
        """
        mesh = mesh_of(self)
        if collectives.rules() is None and (
            mesh is not None or not jax.sharding.get_abstract_mesh().empty
        ):
            with on_mesh(mesh):
                return self._over_mesh(jnp.asarray(tokens))
        arrays = (tokens, self.embed.table[...])
        if any(isinstance(array, jax.core.Tracer) for array in arrays):
            return self._logits_of(jnp.asarray(tokens))
        return _compiled(self, jnp.asarray(tokens))

    def _logits_of(self, tokens: jax.Array) -> jax.Array:
        streams, _ = self.trunk(tokens)
        return self.logits(self.hidden(streams))

    def _over_mesh(self, tokens: jax.Array) -> jax.Array:
        """`__call__` on the ambient mesh: every device its part of tokens and weights."""
        batch, length = tokens.shape
        check_mesh(self.cfg, self.rules, batch=batch, length=length)
        graphdef, params = nnx.split(self)
        return _whole(graphdef, self.rules, params, tokens)

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(nnx.state(self))
        held = sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)
        return (
            f"Transformer({self.cfg.name}: {len(self.cfg.layers)} layers, {held / 1e9:.3g} GB, "
            f"{self.numerics.name} {self.numerics.dtype}; v4jax.describe(model) has its parts)"
        )

    __str__ = __repr__

    def __treescope_repr__(self, path, subtree_renderer):
        """What notebooks show (`nnx.display`); treescope asks for it."""
        del path, subtree_renderer
        from treescope import rendering_parts

        return rendering_parts.text(repr(self))

    @signatures.shaped
    def trunk(
        self,
        tokens: Int[jax.Array, "B T"],
        documents: Documents | None = None,
        choices: Choices = Choices(),
        *,
        remat: str = "none",
    ) -> tuple[Float[jax.Array, "B T MD"], tuple[tuple[BlockStats, ...], ...]]:
        """All layers: streams [B, T, M * D] and per stage and block the stats [repeats, ...].

        Args:
          documents: what the rows of `tokens` hold, if not one sequence each.
          choices: experts and entries to take in place of the layers' own.
          remat: what layers keep for a backward pass (`v4jax.nn.remat`).

        Raises:
          ValueError: `choices` have other shapes than model and tokens; an unknown `remat`.
        """
        streams = self.streams(self.embedding(tokens))
        stats, chosen = [], choices.by_layer(self.cfg, tokens.shape)
        used, first = sources(self.cfg.layers), 0
        made: dict[int, Shared] = {}
        for stage in self.stages:
            after = first + len(stage.blocks) * stage.repeats
            streams, one, made[first] = stage(
                streams,
                tokens,
                documents,
                chosen[first:after],
                Shared.of(self.cfg.layers[first], made),
                is_source=first in used,
                remat=remat,
                as_released=self.as_released,
            )
            stats.append(one)
            first = after
        return streams, tuple(stats)

    @signatures.shaped
    def extend(
        self, tokens: Int[jax.Array, "B T"], counts: Int32[jax.Array, " B"], cache: Cache
    ) -> tuple[Float[jax.Array, "B T MD"], Cache]:
        """Feeds a chunk of tokens after what the cache holds.

        Args:
          tokens: [B, T] ids; only the first `counts[b]` of row b are real.
          counts: [B] int32.
          cache: from `init_cache`, or the one an earlier call returned.

        Returns:
          streams [B, T, M * D] (meaningless in padding) and the new cache.

        Raises:
          CacheFullError: the cache has no room. Inside jit, where lengths are not known, the caller
            has to call `cache.require_room` first; entries past the end are dropped then.
        """
        if not isinstance(jnp.asarray(counts) + cache.lengths, jax.core.Tracer):
            cache.require_room(counts)
        chunk = Chunk.make(cache.lengths, counts, tokens.shape[1])
        streams = self.streams(self.embedding(tokens))
        caches, used = [], sources(self.cfg.layers)
        made: dict[int, Shared] = {}
        for index, (block, layer_cache) in enumerate(zip(self.layers(), cache.layers, strict=True)):
            streams, layer_cache, made[index] = _extend(
                collectives.rules(),
                self.as_released,
                index in used,
                block,
                streams,
                tokens,
                chunk,
                layer_cache,
                Shared.of(self.cfg.layers[index], made),
            )
            caches.append(layer_cache)
        lengths = cache.lengths + counts
        return streams, cache.of_layers(caches, lengths)

    def layers(self) -> Iterator[Block]:
        """The blocks one by one, in the order of the layers."""
        for stage in self.stages:
            yield from stage.layers()

    def inspect(
        self, tokens: jax.Array, *, queries: Sequence[int] | None = None
    ) -> list[LayerView]:
        """What every layer does with whole sequences: attention weights, picks, experts ...

        For texts of some thousand tokens, on one device: weights are held for every key.

        Args:
          tokens: [B, T] ids.
          queries: positions whose attention is wanted, negative ones from the end; default all.

        Raises:
          ValueError: the model lies on several devices, or a query is not in the text.
        """
        mesh = mesh_of(self)
        if mesh is not None and mesh.size > 1:
            raise ValueError(
                f"inspect works on one device, and the model lies on {mesh.size}: load it without a mesh."
            )
        tokens = jnp.asarray(tokens)
        length = tokens.shape[1]
        at = np.arange(length) if queries is None else np.asarray(queries, np.int32)
        if ((at < -length) | (at >= length)).any():
            raise ValueError(
                f"queries={at.tolist()}: expected positions in {-length}..{length - 1}."
            )
        streams, views = self.streams(self.embedding(tokens)), []
        made: dict[int, Shared] = {}
        for index, block in enumerate(self.layers()):
            shared = Shared.of(self.cfg.layers[index], made)
            one, streams, made[index] = view(
                block, streams, tokens, jnp.asarray(at % length), shared
            )
            views.append(one)
        return views

    def variant(self, cfg: V4Config) -> "Transformer":
        """This model's weights in another architecture, as `model.cfg.with_indexer(topk=64)`.

        What the other does not need is left out: `cfg.map_layers` can take indexers away, which makes
        attention to compressed rows dense. Arrays are shared.

        Raises:
          ValueError: the other needs a parameter that this model does not have in that shape.
        """
        scanned = any(stage.repeats > 1 for stage in self.stages)
        new = nnx.eval_shape(
            lambda: Transformer(
                cfg, self.numerics, self.rules, scan_layers=scanned, rngs=nnx.Rngs(0)
            )
        )
        have = dict(nnx.to_flat_state(nnx.state(self)))
        for path, variable in nnx.to_flat_state(nnx.state(new)):
            name, wanted = ".".join(map(str, path)), variable.get_value().shape
            value = have[path].get_value() if path in have else None
            if value is None or value.shape != wanted:
                found = "nothing by that name" if value is None else f"one of {tuple(value.shape)}"
                hint = " (layers are stacked: load with scan_layers=False)" if scanned else ""
                raise ValueError(
                    f"the variant needs {name} of {tuple(wanted)}, and the model has {found}{hint}."
                )
            variable.set_value(value)
        return new

    def init_cache(self, batch: int, capacity: int, format: CacheFormat = None) -> Cache:
        """An empty cache for `batch` sequences of up to `capacity` tokens (see `CacheFormat`).

        Under a mesh, for steps there: sequences are cut as `sharding.DECODE` says.
        """
        parts = num_batch_parts(DECODE)
        return init_cache(self.cfg, self.numerics, batch, capacity, format, parts=parts)

    @signatures.shaped
    def embedding(self, tokens: Int[jax.Array, "B T"]) -> Float[jax.Array, "B T D"]:
        """The rows of token ids."""
        rows = self.embed.rows(tokens)
        if self.as_released:
            rows = rounded(rows, self.embed.table.stored)
        return rows.astype(self.numerics.dtype)

    @signatures.shaped
    def streams(self, x: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B T MD"]:
        """[B, T, D] -> [B, T, M * D]: every stream starts as the embedding."""
        return jnp.tile(x, (1, 1, self.cfg.num_streams))

    @signatures.shaped
    def hidden(self, streams: Float[jax.Array, "B T MD"]) -> Float[jax.Array, "B T D"]:
        """Streams [B, T, M * D] of the last layer -> normalised hidden states [B, T, D]."""
        norm = gathered(self.norm, streams.dtype, as_released=self.as_released)
        return norm(self.hc_head(streams))

    @signatures.shaped
    def logits(self, hidden: Float[jax.Array, "*rows D"]) -> Float32[jax.Array, "*rows V"]:
        """Hidden states -> logits."""
        return collectives.all_gather(self.local_logits(hidden), "vocab", axis=-1)

    @signatures.shaped
    def local_logits(self, hidden: Float[jax.Array, "*rows D"]) -> Float32[jax.Array, "*rows V"]:
        """`logits` of this device's part of the vocabulary."""
        with jax.named_scope("head"):
            return self.head.products(hidden, as_released=self.as_released)

    @signatures.shaped
    def mtp_hidden(
        self,
        streams: Float[jax.Array, "B T MD"],
        next_tokens: Int[jax.Array, "B T"],
        depth: int = 0,
        documents: Documents | None = None,
    ) -> tuple[Float[jax.Array, "B T D"], BlockStats]:
        """Hidden states [B, T, D] that predict the token after `next_tokens` [B, T]."""
        if not 0 <= depth < len(self.mtp):
            raise ValueError(f"depth={depth}: this model has {len(self.mtp)} MTP blocks.")
        mtp = gathered(self.mtp[depth], streams.dtype, as_released=self.as_released)
        return mtp(streams, self.embedding(next_tokens), next_tokens, documents)
