"""Hyper-connection sites: the parameters around `pallas_kernels.hyper_connections`."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Float32

from pallas_kernels import hyper_connections as ops
from pallas_kernels import signatures
from v4jax.nn.layers import ModelContext

# Initial values for training from scratch; the released ones are unpublished. `scale` as in the
# mHC paper (arXiv 2512.24880, table 5); `base` so that a site starts close to a plain residual:
# each stream enters with weight 1/4 and stays itself.
_INIT_SCALE = 0.01
_INIT_OFF_DIAGONAL = -4.0


class HyperConnection(nnx.Module):
    """One site: collapses the streams to a sub-layer's input and mixes its output back."""

    def __init__(self, context: ModelContext):
        cfg = context.cfg
        m = cfg.num_streams
        parts = (m, m, m * m)  # pre, post and comb
        width = sum(parts)

        def init_base(key, shape, dtype=jnp.float32, out_sharding=None):
            pre = jnp.full((m,), -jnp.log(m - 1.0))  # sigmoid gives 1 / m
            comb = jnp.where(jnp.eye(m) > 0, 0.0, _INIT_OFF_DIAGONAL).reshape(-1)
            return jnp.concatenate([pre, jnp.zeros(m), comb]).astype(dtype)

        init_scale = nnx.initializers.constant(_INIT_SCALE)
        self.fn = context.param((m * cfg.embed_dim, width), (None, None), stored="f32", parts=parts)
        self.base = context.param((width,), (None,), stored="f32", init=init_base)
        self.scale = context.param((3,), (None,), stored="f32", init=init_scale)
        self.cfg, self.numerics = cfg, context.numerics

    @signatures.shaped
    def pre(
        self, streams: Float[jax.Array, "B T MD"]
    ) -> tuple[
        Float[jax.Array, "B T D"], Float32[jax.Array, "B T M"], Float32[jax.Array, "B T M M"]
    ]:
        """[B, T, M * D] -> the sub-layer's input [B, T, D], and post and comb for `post`."""
        with jax.named_scope("hc/pre"):
            return ops.hc_pre(streams, *self._site(), **self._options())

    def post(self, f: jax.Array, streams: jax.Array, post: jax.Array, comb: jax.Array) -> jax.Array:
        """Output of the sub-layer [B, T, D] and streams [B, T, M * D] -> streams."""
        with jax.named_scope("hc/post"):
            implementation = self.numerics.implementation
            return ops.hc_post(f, streams, post, comb, implementation=implementation)

    def post_pre(
        self, f: jax.Array, streams: jax.Array, post: jax.Array, comb: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """`post` with the previous site's post and comb, then `pre` of this site: in one pass.

        Returns:
          the new streams, and this site's input [B, T, D], post and comb.
        """
        with jax.named_scope("hc/post_pre"):
            return ops.hc_post_pre(f, streams, post, comb, *self._site(), **self._options())

    def _site(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.fn[...], self.base[...], self.scale[...]

    def _options(self) -> dict:
        cfg = self.cfg
        return dict(
            num_streams=cfg.num_streams,
            sinkhorn_iters=cfg.sinkhorn_iters,
            eps=cfg.hc_eps,
            norm_eps=cfg.norm_eps,
            implementation=self.numerics.implementation,
        )


class HyperHead(nnx.Module):
    """The collapse before the final norm."""

    def __init__(self, context: ModelContext):
        cfg = context.cfg
        m = cfg.num_streams
        init_scale = nnx.initializers.constant(_INIT_SCALE)
        init_base = nnx.initializers.constant(-jnp.log(m - 1.0))
        self.fn = context.param((m * cfg.embed_dim, m), (None, None), stored="f32")
        self.base = context.param((m,), (None,), stored="f32", init=init_base)
        self.scale = context.param((1,), (None,), stored="f32", init=init_scale)
        self.cfg, self.numerics = cfg, context.numerics

    @signatures.shaped
    def __call__(self, streams: Float[jax.Array, "B T MD"]) -> Float[jax.Array, "B T D"]:
        """[B, T, M * D] -> [B, T, D]"""
        with jax.named_scope("hc/head"):
            return ops.hc_head(
                streams,
                self.fn[...],
                self.base[...],
                self.scale[...],
                eps=self.cfg.hc_eps,
                norm_eps=self.cfg.norm_eps,
                implementation=self.numerics.implementation,
            )
