# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: a whole DeepSeek-V4 on a laptop
#
# `nano` is the small model that ships with this repository: 7.9 million parameters, trained on Jane
# Austen's novels, with every part of DeepSeek-V4 in it. This notebook loads it, lets it write in the
# three modes, looks at its parameters and its cache, and draws what a query sees.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import v4jax
from v4jax.planning.describe import count_parameters, describe
from v4jax.text.format import BOS

NANO = v4jax.nano_path()

# %% [markdown]
# ## Load and write
#
# The weights stay in the formats of the released files: FP4 experts, FP8 linears. `released` computes
# with the same roundings as DeepSeek's inference code.

# %%
model = v4jax.load("nano", v4jax.released(jnp.float32))
tokenizer = v4jax.Tokenizer(NANO)
engine = v4jax.Engine(model, tokenizer)

prompt = "Elizabeth was surprised to see him, but"
completion = engine.generate(prompt, v4jax.Sampling(temperature=0.5, max_new_tokens=80))
print(prompt + completion.text)

# %% [markdown]
# ## Three modes
#
# A chat prompt is text with special tokens (`v4jax.text.prompt`). The modes differ in how it ends, and
# in a paragraph at the start for *think-max*. nano learned the format on dialogues made from the
# novels: the user gives the beginning of a paragraph, and when it thinks, it names words it will use.

# %%
messages = [{"role": "user", "content": "Mr. Darcy looked at her with great earnestness."}]
sampling = v4jax.Sampling(temperature=0.5, max_new_tokens=100, seed=3)
for mode in tokenizer.modes:
    reply = engine.chat(messages, mode, sampling)
    print(f"--- {mode}: the prompt ends in {tokenizer.render(messages, mode).text[-28:]!r}")
    print("reasoning:", reply.reasoning)
    print("answer:   ", reply.content)

# %% [markdown]
# ## Parameters
#
# A model is a Flax module, which is a tree of arrays. A weight in FP4 or FP8 is a `QuantizedArray`.

# %%
count = count_parameters(model.cfg)
print(
    f"{count.total:,} parameters, {count.active:,} active per token, {count.mtp:,} in the MTP block"
)
print("\nbytes:")
print(describe(model))
print("\nlayers (tokens per compressed entry):", [s.ratio for s in model.cfg.layers])
print(
    "experts of layer 1:", model.stages[1].blocks[0].moe.w1.kernel[...].values.dtype, "packed FP4"
)

# %% [markdown]
# ## The cache
#
# Each layer keeps a ring of the last 64 tokens. CSA layers add one entry per 4 tokens and a key for
# their indexer, HCA layers one entry per 128. That is why long contexts are cheap.

# %%
cache = model.init_cache(batch=1, capacity=4096)
for spec, layer in zip(model.cfg.layers, cache.layers):
    shapes = {
        name: getattr(layer, name).shape
        for name in ("window", "entries", "index_keys")
        if getattr(layer, name) is not None
    }
    print(f"ratio {spec.ratio:3d}:", shapes)
growth = (model.init_cache(1, 8192).nbytes - cache.nbytes) / 4096
dense = len(model.cfg.layers) * 2 * model.cfg.num_heads * model.cfg.head_dim * 4
print(f"{growth:.0f} bytes per token of context; keys and values of every head: {dense}")

# %% [markdown]
# ## What a query sees
#
# The last token of a long passage, in the first CSA layer and the first HCA layer. Every bar is one key:
# tokens of the window, then compressed entries as wide as the tokens they stand for. Heights are
# attention weights (mean over heads). CSA attends to the 32 entries that the indexer picked.

# %%
text = (
    "It was a sweet view, sweet to the eye and the mind. English verdure, English culture, English "
    "comfort, seen under a sun bright, without being oppressive. In this walk Emma and Mr. Weston found "
    "all the others assembled; and towards this view she immediately perceived Mr. Knightley and Harriet "
    "distinct from the rest, quietly leading the way. "
) * 5
tokens = jnp.asarray([tokenizer.encode(BOS + text)[:601]])
positions = jnp.arange(tokens.shape[1])[None]


def attention_input(layer: int):
    """The block of a layer, and what its attention reads."""
    blocks = [block for stage in model.stages for block in stage.layers()]
    streams = model.streams(model.embedding(tokens))
    for block in blocks[:layer]:
        streams, _ = jax.jit(lambda s, b=block: b(s, tokens))(streams)
    return blocks[layer], blocks[layer].attn_norm(blocks[layer].attn_hc.pre(streams)[0])


def last_query(layer: int) -> list[tuple[int, int, float]]:
    """(first token, number of tokens, weight) of every key that the last query attends to."""
    block, x = attention_input(layer)
    attention, spec = block.attention, model.cfg.layers[layer]
    latent, q, kv = attention.project(x, positions)
    entries = model.numerics.round_kv(attention.compressor(x), model.cfg.nope_head_dim)
    chosen = range(entries.shape[1])
    if spec.indexer:
        keys = model.numerics.round_indexer(attention.indexer.compressor(x))
        queries, weights = attention.indexer.queries(x, latent, positions)
        selection = attention.indexer.select(queries, weights, keys, positions)
        chosen = sorted(int(i) for i in selection.to_indices()[0, -1])
    window = model.cfg.window
    rows = np.concatenate([kv[0, -window:], entries[0, jnp.asarray(list(chosen))]])
    scores = np.asarray(q[0, -1]) @ rows.T / np.sqrt(model.cfg.head_dim)
    scores = np.concatenate([scores, np.asarray(attention.sink[...])[:, None]], axis=1)
    weights = np.asarray(jax.nn.softmax(scores, axis=-1))[:, :-1].mean(axis=0)
    last, ratio = tokens.shape[1] - 1, spec.ratio
    spans = [(last - window + 1 + i, 1) for i in range(window)] + [
        (ratio * i, ratio) for i in chosen
    ]
    return [(start, width, float(w)) for (start, width), w in zip(spans, weights)]


figure, axes = plt.subplots(2, 1, figsize=(10, 5), sharex=True)
for axis, (layer, name) in zip(axes, [(1, "CSA"), (2, "HCA")]):
    for start, width, weight in last_query(layer):
        color = "tab:blue" if width == 1 else "tab:orange"
        axis.bar(start, weight, width=width, align="edge", color=color, alpha=0.7)
    axis.set_title(f"layer {layer}, {name}: window (blue) and entries of {width} tokens (orange)")
    axis.set_ylabel("weight")
    axis.set_yscale("log")
axes[-1].set_xlabel("token")
figure.tight_layout()
