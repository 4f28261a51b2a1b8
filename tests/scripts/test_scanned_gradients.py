"""Gradients of scanned layers at full width through the real TPU compiler; needs libtpu, no TPU.

XLA writes the gradient of one layer's weight into the stacked gradient. Where it fuses that write into
a kernel, the kernel runs under the default VMEM limit, and at full width does not fit.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import window_attention
from pallas_kernels.hyper_connections import hc_post, hc_post_pre, hc_pre
from v4jax import flash
from v4jax.planning.topologies import compile_on

pytest.importorskip("libtpu")
pytestmark = pytest.mark.usefixtures("not_kept")


@pytest.mark.parametrize("chip", ["v5p", "v6e", "v7x"])
def test_hyper_connections_of_scanned_layers_compile(chip):
    cfg, layers, tokens = flash(), 2, 4096
    m, wide = cfg.num_streams, cfg.num_streams * cfg.embed_dim
    options = dict(num_streams=m, sinkhorn_iters=cfg.sinkhorn_iters, eps=1e-6, norm_eps=1e-6)
    site = {"fn": (wide, (2 + m) * m), "base": ((2 + m) * m,), "scale": (3,)}
    site = {name: jax.ShapeDtypeStruct((layers, *s), jnp.float32) for name, s in site.items()}
    streams = jax.ShapeDtypeStruct((1, tokens, wide), jnp.bfloat16)

    def loss(weights, streams):
        def layer(streams, sites):
            first, second = sites
            u, *mix = hc_pre(streams, **first, implementation="tpu", **options)
            streams, u, *mix = hc_post_pre(
                jnp.tanh(u), streams, *mix, **second, implementation="tpu", **options
            )
            return hc_post(jnp.tanh(u), streams, *mix, implementation="tpu"), None

        streams, _ = jax.lax.scan(jax.checkpoint(layer), streams, weights)
        return jnp.sum(streams.astype(jnp.float32))

    text = compile_on(chip, jax.grad(loss), (site, site), streams).as_text()

    assert text.count("hc_grad_pre") >= 2


def test_the_gradient_of_a_million_tokens_fits_into_scalar_memory():
    """Which blocks of queries see a block of rows is two numbers a block, in the kernel's scalars."""
    tokens, heads, width, window = 2**20, 8, 128, 128
    shape = jax.ShapeDtypeStruct
    arguments = (
        shape((1, tokens, heads, width), jnp.bfloat16),
        shape((1, window + tokens, width), jnp.bfloat16),
        shape((1, tokens // 128, width), jnp.bfloat16),
        shape((heads,), jnp.float32),
        shape((1, tokens), jnp.int32),
    )

    def loss(q, rows, entries, sink, positions):
        out, _ = window_attention(
            q, rows, entries, sink, positions, ratio=128, scale=1.0, implementation="tpu"
        )
        return jnp.sum(out.astype(jnp.float32))

    text = compile_on("v6e", jax.grad(loss, argnums=(0, 1, 2)), *arguments).as_text()

    assert "attention_window_gradient" in text and "attention_entry_gradient" in text
