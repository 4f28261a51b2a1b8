"""Tokenizers: the released `tokenizer.json`, or a small one trained here in the same form."""

import codecs
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

try:
    import tokenizers
except ImportError as error:  # pragma: no cover - depends on the installation
    raise ImportError(
        "v4jax.text.tokenizer needs the package tokenizers: pip install tokenizers. Models, "
        "checkpoints and v4jax.text.prompt work without it, on token ids and strings."
    ) from error

from v4jax import stores
from v4jax.text.format import (
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    THINK_END,
    THINK_START,
    USER,
    effort_prompts,
    modes_of,
)
from v4jax.text.prompt import Prompt, render
from v4jax.text.release import ENCODER, PROFILE_KEY, PROFILES, release_of

# What the released tokenizer splits text at before byte-level BPE, in this order.
_SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)
# Tokens without which nothing in the format can be written or read.
_NEEDED = (BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END)
_MARK = b"\xef\xbb\xbf"  # UTF-8 byte-order mark, which some editors put before a text
_POINTER = b"version https://git-lfs.github.com/spec/"


class Tokenizer:
    """Text to token ids and back, and conversations to prompts.

    Nothing is added to a text: BOS is part of a rendered prompt.

    Args:
      source: a checkpoint folder, or a `tokenizer.json` in one; or the URL of either, such as
        "gs://bucket/folder".
      release: whose prompts to render, "april" or "0731"; default: what the folder's files say
        (`v4jax.text.release`).

    Attributes:
      release: the same.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no tokenizer, or one without the tokens of the DeepSeek-V4 format, or a
        store does not give it.
    """

    def __init__(self, source: str | os.PathLike, *, release: str | None = None):
        path = stores.in_folder(source, "tokenizer.json")
        if not stores.is_file(path):
            raise FileNotFoundError(f"{path} does not exist: expected a tokenizer.json.")
        self._path, self._tokenizer = path, _read(path)
        missing = [token for token in _NEEDED if self._tokenizer.token_to_id(token) is None]
        if missing:
            raise ValueError(
                f"{path} has no token {', '.join(missing)}: expected a tokenizer of DeepSeek-V4, "
                "or one that v4jax.text.tokenizer.train_tokenizer made."
            )
        self.release = release_of(os.path.dirname(path)) if release is None else release
        effort_prompts(self.release)  # refuses one that does not exist

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._tokenizer.get_vocab_size()

    @property
    def modes(self) -> tuple[str, ...]:
        """Names for the `mode` of `render`: how much the model thinks before it answers."""
        return modes_of(self.release)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a turn: the end of the text, and the beginning of somebody's next turn."""
        return tuple(self.id(token) for token in (EOS, USER, ASSISTANT))

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        mode: str = "non-think",
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        response_format: Mapping[str, object] | None = None,
    ) -> Prompt:
        """The prompt for a conversation, as this checkpoint's release writes it.

        Args and errors are those of `v4jax.text.prompt.render`.
        """
        return render(
            messages, mode, release=self.release, tools=tools, response_format=response_format
        )

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
        """Token ids. Special tokens spelled out in the text become those tokens.

        Raises:
          ValueError: a character has no UTF-8 form: half of a surrogate pair, or what stands for
            a byte that was not UTF-8 where the text was read.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            before = text[max(0, error.start - 20) : error.start]
            raise ValueError(
                f"{text[error.start]!r} after {before!r} has no UTF-8 form: expected text in UTF-8."
            ) from None
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of token ids. BOS, EOS and padding are left out unless `keep_special`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=not keep_special)

    def decode_stream(self, ids: Iterable[int], *, keep_special: bool = False) -> Iterator[str]:
        """Pieces of text as ids arrive, each ending at a character border.

        Joined they are `decode` of all ids: what is held back of a character that was not finished
        comes at the end.
        """
        decoder = StreamDecoder(self, keep_special=keep_special)
        for index in ids:
            if piece := decoder.push(int(index)):
                yield piece
        if rest := decoder.close():
            yield rest

    def token_bytes(self, index: int) -> bytes:
        """UTF-8 of one token, which may be a part of a character; nothing for an id without token."""
        token = self._tokenizer.id_to_token(index)
        if token is None:
            return b""
        try:
            return bytes(_BYTES[letter] for letter in token)
        except KeyError:  # a token of the format, which stands for itself
            return token.encode("utf-8")

    @functools.cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids of tokens that stand for themselves: those of the prompt format, and spare ones."""
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out: BOS, EOS and padding."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    def save(self, folder: str | os.PathLike) -> None:
        """Puts `tokenizer.json` into a checkpoint folder, and what tells its release.

        That is the released encoding module where this tokenizer came with one, and otherwise a key
        of the folder's `config.json`, if that is there already.
        """
        folder = os.fspath(stores.require_local(folder))
        _copy(self._path, os.path.join(folder, "tokenizer.json"))
        encoder = stores.join(os.path.dirname(self._path), ENCODER)
        if stores.is_file(encoder):
            os.makedirs(os.path.join(folder, os.path.dirname(ENCODER)), exist_ok=True)
            _copy(encoder, os.path.join(folder, ENCODER))
        path = os.path.join(folder, "config.json")
        if release_of(folder) != self.release and os.path.isfile(path):
            with open(path, encoding="utf-8-sig") as file:
                config = json.load(file)
            (config[PROFILE_KEY],) = [p for p, name in PROFILES.items() if name == self.release]
            with open(f"{path}.new", "w", encoding="utf-8") as file:
                file.write(json.dumps(config, indent=2) + "\n")
            os.replace(f"{path}.new", path)


class StreamDecoder:
    """Text of token ids that come one by one. A character is let go with its last byte.

    Args:
      tokenizer: whose ids they are.
      keep_special: as in `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, *, keep_special: bool = False):
        self._tokenizer = tokenizer
        self._left_out = frozenset() if keep_special else tokenizer.special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        """The text that this token completes; often that of the token, and "" within a character."""
        if index in self._left_out:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(index))

    def close(self) -> str:
        """What is left of a character that was not finished, as U+FFFD; "" if there is none."""
        return self._decoder.decode(b"", final=True)


def _byte_letters() -> dict[str, int]:
    """The letter that byte-level BPE writes for each byte: itself, if it is printable Latin-1."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()


def _read(path: str) -> tokenizers.Tokenizer:
    data = stores.read_start(path).removeprefix(_MARK)
    if data.startswith(_POINTER):
        raise ValueError(
            f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its "
            "folder, or download the checkpoint again."
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except ValueError as error:
        raise ValueError(f"{path} is no tokenizer.json: {error}.") from None
    tokenizer.no_truncation()  # some files are saved with either
    tokenizer.no_padding()
    return tokenizer


def _copy(source: str, target: str) -> None:
    if stores.is_url(source) or os.path.abspath(source) != os.path.abspath(target):
        stores.copy_here(source, target)


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
