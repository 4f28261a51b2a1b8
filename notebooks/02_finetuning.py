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
# # Fine-tuning: a LoRA on conversations, and many adapters in one engine
#
# `nano` learns who is who in Jane Austen's *Emma*, from a file of conversations. Its weights stay packed in
# FP4 and FP8; only low-rank adapters train. A minute or two on two CPU cores. The guide is `docs/training.md`;
# `v4jax finetune` does the same from the command line, for any checkpoint.

# %%
import itertools
import json
import pathlib
import random
import tempfile

import matplotlib.pyplot as plt

import v4jax
from v4jax.train import events

temporary = tempfile.TemporaryDirectory()  # removed when the kernel ends
folder = pathlib.Path(temporary.name)
tokenizer = v4jax.Tokenizer(v4jax.nano_path())

# %% [markdown]
# ## Data
#
# A conversation a line, as OpenAI's format has it. The persons and ways of asking of the held-out ones occur
# in training, but not together.

# %%
PEOPLE = {
    "Mr. Woodhouse": "the father of Emma",
    "Mr. Knightley": "the owner of Donwell Abbey",
    "Harriet Smith": "the pupil of Mrs. Goddard",
    "Mr. Weston": "the master of Randalls",
    "Miss Bates": "the talker of Highbury",
    "Jane Fairfax": "the niece of Miss Bates",
    "Mr. Elton": "the vicar of Highbury",
    "Mr. Perry": "the apothecary of Highbury",
}
ASK = ["Who is {}?", "Tell me who {} is.", "Do you know {}?", "What is said of {}?", "{}?"]
ASK += ["Who was {}, pray?", "Say who {} is.", "In short, who is {}?"]
lines = [
    {
        "messages": [
            {"role": "user", "content": ask.format(name)},
            {"role": "assistant", "content": f"{name} is {what}."},
        ]
    }
    for (name, what), ask in itertools.product(PEOPLE.items(), ASK)
]
random.Random(0).shuffle(lines)
for name, part in (("chat", lines[:52]), ("held", lines[52:])):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))

data = v4jax.train.Examples(folder / "chat.jsonl", tokenizer, seq_len=128)
held = v4jax.train.Examples(folder / "held.jsonl", tokenizer, seq_len=128)
print(data, held, sep="\n")

# %% [markdown]
# The released prompt format renders a conversation, and the loss is on what the assistant writes: here in
# brackets, the last of which is the end of the turn.

# %%
tokens, following, _, weights, *_ = data.targets(0, 1, v4jax.nano(), None)
text = "".join(
    f"[{tokenizer.decode([int(token)])}]" if weight else tokenizer.decode([int(token)])
    for token, weight in zip(following[0, :36], weights[0])
)
print(text)

# %% [markdown]
# ## Training
#
# `events` tells what happens, one event after the other. With `output=` states are saved as well, and the same
# call goes on after an interruption.

# %%
model = v4jax.load("nano", use="train")
trainer = v4jax.Trainer(
    model,
    v4jax.train.adamw(v4jax.train.schedule("cosine", 5e-3, 60, warmup_steps=6)),
    trainable=v4jax.LoRA(rank=16, targets="attention+shared"),
)
print("held-out loss before:", round(trainer.evaluate(held, batch_size=4, batches=3), 3))

done, measured = [], []
for event in trainer.events(data, 60, batch_size=4, evaluation=held, eval_every=15, log_every=3):
    match event:
        case events.StepDone():
            done.append(event)
        case events.Evaluated():
            measured.append(event)
            print(f"step {event.step}: held-out loss {event.heldout_ce:.3f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
left.plot([e.step for e in done], [float(e.metrics.ce) for e in done], label="training")
left.plot([e.step for e in measured], [e.heldout_ce for e in measured], "o-", label="held out")
left.set(xlabel="step", ylabel="nats a token", yscale="log", title="Loss of the assistant's tokens")
left.legend()
right.plot([e.step for e in done], [e.expert_load for e in done])
right.set(xlabel="step", title="Tokens of the fullest expert / mean")
figure.tight_layout()

# %% [markdown]
# ## The adapter
#
# `save` writes the files of PEFT. An engine takes any number of adapters beside one model: each request of a
# batch names its own, or none.

# %%
trainer.save(folder / "who")
engine = v4jax.Engine(v4jax.load("nano"), tokenizer, adapters={"who": folder / "who"})
greedy = v4jax.Sampling(temperature=0, max_new_tokens=24)
for name in ("Mr. Elton", "Jane Fairfax", "Mr. Knightley"):
    question = f"Tell me who {name} is."
    print(f"{question}\n   nano: {engine.chat(question, sampling=greedy).content.strip()!r}")
    print(f"   with the adapter: {engine.chat(question, sampling=greedy, adapter='who').content!r}")
