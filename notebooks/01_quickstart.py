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
import dataclasses

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
print("\nlayers (tokens per row of compressed KV):", [s.ratio for s in model.cfg.layers])
print(
    "experts of layer 1:", model.stages[1].blocks[0].moe.w1.kernel[...].values.dtype, "packed FP4"
)

# %% [markdown]
# ## The cache
#
# Each layer keeps a ring of the last 64 tokens. CSA layers add one compressed row per 4 tokens and
# a key for their indexer, HCA layers one row per 128, in pages of 128 rows. That is why long contexts
# are cheap.

# %%
cache = model.init_cache(batch=1, capacity=16_384)
for spec, layer in zip(model.cfg.layers, cache.layers):
    shapes = {
        name: getattr(layer, name).shape
        for name in ("window", "entries", "index_keys")
        if getattr(layer, name) is not None
    }
    print(f"ratio {spec.ratio:3d}:", shapes)
growth = (model.init_cache(1, 32_768).nbytes - cache.nbytes) / 16_384
dense = len(model.cfg.layers) * 2 * model.cfg.num_heads * model.cfg.head_dim * 4
print(f"{growth:.0f} bytes per token of context; keys and values of every head: {dense}")

# %% [markdown]
# ## Many requests
#
# An engine has a few slots. Requests wait, enter one as soon as it is free, and leave it when they have
# ended. What a prompt shares with an earlier one is not computed again. Each gets the tokens that it would
# get alone.

# %%
story = "It was a truth universally acknowledged, " * 30
served = v4jax.Engine(model, tokenizer, slots=4, steps_per_call=4)
requests = [
    served.submit(story + ending, v4jax.Sampling(seed=n, max_new_tokens=20 + 13 * n % 50))
    for n, ending in enumerate(["Emma", "Harriet", "Mr. Knightley", "Jane"] * 3)
]
slots = []
while served.has_work:
    served.step()
    slots.append([slot.request.number if slot.request else -1 for slot in served.slots])
stats = served.stats()
print(f"{stats.cached_tokens} of {stats.prompt_tokens} tokens of prompts were there already")

shown = np.ma.masked_less(np.array(slots).T, 0)
figure, axis = plt.subplots(figsize=(10, 1.8))
axis.imshow(shown, aspect="auto", cmap="tab20", interpolation="nearest")
axis.set(xlabel="step", ylabel="slot", yticks=range(4), title="which request is in which slot")
figure.tight_layout()

# %% [markdown]
# ## What a query sees
#
# `model.inspect` returns what every layer did with a text. Below: the last token of a long passage, in
# the first CSA layer and the first HCA layer. Every bar is one key: tokens of the sliding window (blue),
# then rows of compressed KV (orange), as wide as the tokens they stand for. Heights are attention weights,
# the mean over heads. CSA attends to the 32 rows that the indexer picked; grey lines are its scores.

# %%
text = (
    "It was a sweet view, sweet to the eye and the mind. English verdure, English culture, English "
    "comfort, seen under a sun bright, without being oppressive. In this walk Emma and Mr. Weston found "
    "all the others assembled; and towards this view she immediately perceived Mr. Knightley and Harriet "
    "distinct from the rest, quietly leading the way. "
) * 5
tokens = jnp.asarray([tokenizer.encode(BOS + text)[:601]])
views = model.inspect(tokens, queries=[-1])

figure, axes = plt.subplots(2, 1, figsize=(10, 5), sharex=True)
for axis, view in zip(axes, views[1:3]):
    last = tokens.shape[1] - 1
    window = np.asarray(view.window_weights[0, 0]).mean(axis=0)
    rows = np.asarray(view.compressed_weights[0, 0]).mean(axis=0)
    axis.bar(last - len(window) + 1 + np.arange(len(window)), window, color="tab:blue", alpha=0.7)
    starts = view.ratio * np.flatnonzero(rows)
    axis.bar(starts, rows[rows > 0], width=view.ratio, align="edge", color="tab:orange", alpha=0.7)
    if view.indexer_scores is not None:
        scores, right = np.asarray(view.indexer_scores[0, 0]), axis.twinx()
        right.step(view.ratio * np.arange(len(scores)), scores, where="post", color="grey", lw=0.7)
        right.set_ylabel("indexer score")
    axis.set_title(f"{view.kind}: sliding window (blue), rows of {view.ratio} tokens (orange)")
    axis.set_ylabel("weight")
    axis.set_yscale("log")
axes[-1].set_xlabel("token")
figure.tight_layout()

# %% [markdown]
# The same model with another top-k, or with dense attention to all compressed rows, is a `variant` of its
# config with the same weights: here, how far the last token's prediction moves.

# %%
usual = jax.nn.log_softmax(model(tokens)[0, -1])
for name, cfg in {
    "top 8": model.cfg.with_indexer(topk=8),
    "all rows": model.cfg.map_layers(lambda layer: dataclasses.replace(layer, indexer=None)),
}.items():
    other = jax.nn.log_softmax(model.variant(cfg)(tokens)[0, -1])
    divergence = float(jnp.sum(jnp.exp(usual) * (usual - other)))
    print(f"{name:8s} KL divergence from top {model.cfg.indexer.topk}: {divergence:.4f} nats")
