"""Makes the tokenizer and the token streams that nano is trained and evaluated on.

    python -m scripts.prepare_nano --output runs/nano/data

The text is scripts/data/austen/train.txt (one paragraph per line, an empty line between chapters).
Every chapter becomes a document. Every longer paragraph also becomes a dialogue in the prompt
format, in one of the three modes: the user gives its beginning, the assistant continues, and in
the thinking modes first names words that the continuation will use. heldout.txt becomes
heldout.npy, chapters only.
"""

import argparse
import json
import pathlib
import random
import re
from collections.abc import Iterable

import numpy as np

from v4jax.cli.errors import one_message
from v4jax.text.format import BOS, EOS, MODES
from v4jax.text.prompt import encode_messages
from v4jax.text.tokenizer import Tokenizer, train_tokenizer

FOLDER = pathlib.Path(__file__).parent / "data" / "austen"
MODE_SHARES = {"non-think": 0.5, "think-high": 0.35, "think-max": 0.15}
PLANNED_WORDS = {"think-high": 4, "think-max": 8}


def dialogue(paragraph: str, rng: random.Random) -> str | None:
    """A paragraph as a user turn (its beginning) and a reply (the rest)."""
    sentences = re.findall(r".+?(?:[.!?]+[\"')]*(?=\s|$)|$)", paragraph)
    start, rest = sentences[0].strip(), " ".join(s.strip() for s in sentences[1:])
    if not 20 <= len(start) <= 240 or not 40 <= len(rest) <= 900:
        return None
    mode = rng.choices(list(MODE_SHARES), MODE_SHARES.values())[0]
    thinking_mode, effort = MODES[mode]
    reply = {"role": "assistant", "content": rest}
    if mode in PLANNED_WORDS:
        words = list(dict.fromkeys(re.findall(r"[A-Za-z]{6,}", rest)))[: PLANNED_WORDS[mode]]
        reply["reasoning_content"] = f"The story goes on with {', '.join(words)}." if words else ""
    messages = [{"role": "user", "content": start}, reply]
    return encode_messages(messages, thinking_mode, reasoning_effort=effort)


def as_document(chapter: str) -> str:
    """A chapter between the tokens that begin and end a text."""
    return BOS + chapter + EOS


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """All texts as one stream, uint16 [N]."""
    return np.array([t for text in texts for t in tokenizer.encode(text)], np.uint16)


def main() -> None:
    """Writes tokenizer.json, tokens.npy and heldout.npy, and prints a summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--text", type=pathlib.Path, default=FOLDER / "train.txt")
    parser.add_argument("--heldout", type=pathlib.Path, default=FOLDER / "heldout.txt")
    parser.add_argument("--vocab-size", type=int, default=1280)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = random.Random(args.seed)
    chapters, held_out = (
        path.read_text(encoding="utf-8-sig").strip().split("\n\n")
        for path in (args.text, args.heldout)
    )
    paragraphs = [line for chapter in chapters for line in chapter.split("\n")]
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(chapters, args.vocab_size, args.output / "tokenizer.json")

    dialogues = [text for text in (dialogue(p, rng) for p in paragraphs) if text]
    documents = [as_document(chapter) for chapter in chapters]
    # Dialogues go in packs between the chapters, so that windows see both.
    size = -(-len(dialogues) // len(documents))
    rng.shuffle(dialogues)
    rng.shuffle(documents)
    stream = []
    for i, document in enumerate(documents):
        stream += [document, *dialogues[i * size : (i + 1) * size]]
    tokens = encode(tokenizer, stream)
    np.save(args.output / "tokens.npy", tokens)
    np.save(args.output / "heldout.npy", encode(tokenizer, map(as_document, held_out)))
    summary = {
        "chapters": len(documents),
        "dialogues": len(dialogues),
        "characters": sum(map(len, stream)),
        "tokens": len(tokens),
        "vocab_size": tokenizer.vocab_size,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    with one_message():
        main()
