"""Choices that a model is made to take in place of its own: experts, and entries of the indexer.

A text that one program sampled and another one trains on is sent to other experts in some tokens, since the
two round differently. Taking the choices of the first ("routing replay") keeps the function the same:
DeepSeek-V3.2 report (arXiv 2512.02556) section 3.1, arXiv 2510.11370.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from v4jax.config import V4Config


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["experts", "selection"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class LayerChoices:
    """Of one layer; None is the layer's own choice."""

    experts: jax.Array | None = None  # [B, T, K] int32; -1 in a token's first place: its own choice
    selection: jax.Array | None = None  # [B, T, S] int32 compressed entries; -1 is none


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["experts", "selections"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Choices:
    """For all layers of `cfg.layers`; MTP blocks choose for themselves.

    Only what is chosen is given: weights of experts are taken from the router's scores, and weights of
    entries from attention, so that gradients reach what the choices came from as they would. The indexer's
    loss is then over the given entries.

    Attributes:
      experts: ids for the L layers, K = `moe.experts_per_token` distinct ones. A token whose first id is
        -1 goes where the layer sends it, as do padding and what was not recorded. In hash-routed layers
        the given ids count too; those of the layer's table are `-1`.
      selections: entries for the C layers with an indexer of their own, distinct, counted from the first
        of their row of tokens; -1 stands for none. S is the most that any layer picks. Layers that use
        the picks of one of these use what it is given.
    """

    experts: jax.Array | None = None  # [B, T, L, K], any integers
    selections: jax.Array | None = None  # [B, T, C, S] int32

    def by_layer(self, cfg: V4Config, shape: tuple[int, ...]) -> list[LayerChoices]:
        """What each layer is given, for tokens of a shape [B, T].

        Raises:
          ValueError: a shape that is not that of the model and the tokens.
        """
        indexed = [index for index, spec in enumerate(cfg.layers) if spec.own_indexer]
        expected = (*shape, len(cfg.layers), cfg.moe.experts_per_token)
        if self.experts is not None and self.experts.shape != expected:
            raise ValueError(
                f"choices.experts {self.experts.shape}: expected [B, T, layers, experts per token], "
                f"{expected} for {cfg.name} and these tokens."
            )
        places = (*shape, len(indexed))
        if self.selections is not None and (
            self.selections.ndim != 4 or self.selections.shape[:3] != places
        ):
            raise ValueError(
                f"choices.selections {self.selections.shape}: expected [B, T, layers with an own indexer, "
                f"entries], {(*places, 'S')} for {cfg.name} and these tokens."
            )

        def of(layer: int) -> LayerChoices:
            experts = selection = None
            if self.experts is not None:
                experts = self.experts[:, :, layer].astype(jnp.int32)
            if self.selections is not None and layer in indexed:
                selection = self.selections[:, :, indexed.index(layer)]
            return LayerChoices(experts, selection)

        return [of(layer) for layer in range(len(cfg.layers))]
