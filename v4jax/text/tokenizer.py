"""Tokenizers: the released `tokenizer.json`, or a small one trained here in the same form."""

import os
from collections.abc import Iterable, Iterator, Sequence

try:
    import tokenizers
except ImportError as error:  # pragma: no cover - depends on the installation
    raise ImportError(
        "v4jax.text.tokenizer needs the package tokenizers: pip install 'v4jax[text]'. Models, "
        "checkpoints and v4jax.text.prompt work without it, on token ids and strings."
    ) from error

from v4jax.text.format import ASSISTANT, BOS, EOS, PAD, SPECIAL_TOKENS, USER

# What the released tokenizer splits text at before byte-level BPE, in this order.
_SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)


class Tokenizer:
    """Text to token ids and back. Nothing is added: BOS is part of a rendered prompt.

    Args:
      source: a `tokenizer.json`, or a folder that holds one.

    Raises:
      FileNotFoundError: there is no such file.
    """

    def __init__(self, source: str | os.PathLike):
        path = os.fspath(source)
        path = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} does not exist: expected a tokenizer.json.")
        self._tokenizer = tokenizers.Tokenizer.from_file(path)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._tokenizer.get_vocab_size()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a turn: the end of the text, and the beginning of somebody's next turn."""
        return tuple(self.id(token) for token in (EOS, USER, ASSISTANT))

    def id(self, token: str) -> int:
        """Id of one token, say a special one.

        Raises:
          KeyError: the vocabulary does not have it.
        """
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise KeyError(f"{token!r} is not a token of this vocabulary.")
        return index

    def encode(self, text: str) -> list[int]:
        """Token ids. Special tokens spelled out in the text become those tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of token ids. BOS, EOS and padding are left out unless `keep_special`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=not keep_special)

    def decode_stream(self, ids: Iterable[int], *, keep_special: bool = False) -> Iterator[str]:
        """Pieces of text as ids arrive, each ending at a character border."""
        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=not keep_special)
        for index in ids:
            piece = stream.step(self._tokenizer, int(index))
            if piece:
                yield piece


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | os.PathLike) -> Tokenizer:
    """Trains a byte-level BPE with the released pre-tokenizer and all special tokens.

    BOS, EOS and padding get ids 0, 1 and 2; the other special tokens the last ids.
    """
    first, rest = SPECIAL_TOKENS[:3], SPECIAL_TOKENS[3:]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    splits = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for pattern in _SPLITS
    ]
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(rest),
        special_tokens=list(first),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # As in the released file, only BOS, EOS and padding count as special; the others survive
    # decoding, which is what the completion parser needs.
    tokenizer.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in rest])
    tokenizer.save(os.fspath(path))
    assert [tokenizer.token_to_id(t) for t in (BOS, EOS, PAD)] == [0, 1, 2]
    return Tokenizer(path)
