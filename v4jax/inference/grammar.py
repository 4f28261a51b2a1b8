"""What an answer has to be: JSON of a schema, or a text of a regular expression or a grammar.

    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    request = engine.submit(prompt, grammar=Grammar.json_schema(schema))

llguidance (the extra `structured`) says which tokens may come next. It holds for the answer alone: in the
thinking modes the reasoning is free, and ends with `</think>`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from v4jax.inference.sampling import EVERYTHING, num_words
from v4jax.text.format import BOS, EOS, THINK_END, THINK_START
from v4jax.text.tokenizer import Tokenizer

KEPT = 64  # compiled grammars, those that were used last
# Between two tokens of JSON. Without a bound a small model writes nothing else.
SPACE = r"[\x20\x0A\x0D\x09]{1,64}"


class GrammarError(ValueError):
    """A schema or grammar that cannot be used, and why; or there is nothing to use it with."""


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an answer has to be; made by one of the methods below.

    Raises:
      GrammarError: llguidance cannot compile it, says why; or llguidance is not installed.
    """

    text: str  # as llguidance writes grammars

    def __post_init__(self):
        fault = _library().LLMatcher.validate_grammar(self.text)
        if fault and not fault.startswith("WARNING"):
            raise GrammarError(_sentence(fault))

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> "Grammar":
        """JSON that a schema describes. White space between its tokens: at most 64 characters."""
        try:
            text = json.dumps(schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"the schema is not JSON: {error}.") from None
        options = {"whitespace_pattern": SPACE}
        make = _library().LLMatcher.grammar_from_json_schema
        return cls(_made(make, text, options))

    @classmethod
    def json_object(cls) -> "Grammar":
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """Texts that a regular expression of the Rust crate `regex` matches from end to end."""
        return cls(_made(_library().LLMatcher.grammar_from_regex, pattern))

    @classmethod
    def lark(cls, grammar: str) -> "Grammar":
        """Texts of the rule `start` of a grammar, in llguidance's dialect of Lark."""
        return cls(_made(_library().LLMatcher.grammar_from_lark, grammar))


class Matcher:
    """Which token may come next in one answer. Follows the answer token by token.

    Args:
      answer: llguidance's matcher, at its beginning.
      stop_ids: tokens that end the answer: allowed where the grammar may end, and nowhere else.
      eos: the token that ends a grammar in llguidance; allowed only if it is one of these.
      free: [W] uint32 mask of the reasoning, see `allowed`: all but the stop ids.
      end_of_reasoning: the token after which the answer begins; None: it begins at once.
    """

    def __init__(
        self,
        answer,
        stop_ids: Sequence[int],
        eos: int,
        free: np.ndarray,
        end_of_reasoning: int | None,
    ):
        self._answer, self._stop_ids, self._eos, self._free = answer, stop_ids, eos, free
        self._end_of_reasoning = end_of_reasoning

    def allowed(self) -> np.ndarray:
        """[W] uint32: bit i % 32 of word i // 32 is set if token i may come next.

        Raises:
          GrammarError: llguidance has met one of its limits, or no token of the vocabulary fits.
        """
        if self._end_of_reasoning is not None:
            return self._free
        words = np.frombuffer(self._answer.compute_bitmask(), np.uint32)[: len(self._free)].copy()
        if fault := self._answer.get_error():
            raise GrammarError(_sentence(f"the grammar cannot be followed: {fault}"))
        _set(words, (self._eos,), False)
        _set(words, self._stop_ids, self._answer.is_accepting())
        if not words.any():
            raise GrammarError("the grammar cannot be followed: no token fits.")
        return words

    def accept(self, token: int) -> None:
        """That this token has come."""
        if self._end_of_reasoning is not None:
            if token == self._end_of_reasoning:
                self._end_of_reasoning = None
        elif token not in self._stop_ids:
            self._answer.consume_token(token)  # a fault shows at the next mask


class Matchers:
    """Makes matchers for the tokens of a tokenizer. From any thread.

    Args:
      tokenizer: of the answers.
      vocab: ids of the model, which may be more than the tokenizer's.

    Raises:
      GrammarError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int):
        self._think, self._end = (tokenizer.id(token) for token in (THINK_START, THINK_END))
        self._format = tokenizer.added_ids
        self._vocab = vocab
        library = _library()
        self._tokens = library.LLTokenizer(
            library.TokenizerWrapper(_Vocabulary(tokenizer, vocab)), n_vocab=vocab
        )
        self._eos = tokenizer.id(EOS)
        self._compiled = functools.lru_cache(maxsize=KEPT)(self._compile)

    def matcher(self, grammar: Grammar, prompt: Sequence[int], stop_ids: Sequence[int]) -> Matcher:
        """For the completion of a prompt.

        If `<think>` is its last token of the prompt format, the completion begins with reasoning.

        Raises:
          GrammarError: llguidance cannot compile it, or there are no stop ids, so that nothing could
            end an answer.
        """
        ends = tuple(index for index in stop_ids if 0 <= index < self._vocab)
        if not ends:
            raise GrammarError(
                f"stop_ids={list(stop_ids)}: expected an id that ends an answer of a grammar."
            )
        last = next((token for token in reversed(prompt) if token in self._format), None)
        is_reasoning = last == self._think
        free = np.full(num_words(self._vocab), EVERYTHING)
        _set(free, ends, False)
        answer = self._compiled(grammar).deep_copy()
        return Matcher(answer, ends, self._eos, free, self._end if is_reasoning else None)

    def _compile(self, grammar: Grammar):
        matcher = _library().LLMatcher(self._tokens, grammar.text, log_level=0)
        if fault := matcher.get_error():
            raise GrammarError(_sentence(fault))
        return matcher


class _Vocabulary:
    """What llguidance asks of a tokenizer. Tokens of the prompt format stand in no text."""

    def __init__(self, tokenizer: Tokenizer, vocab: int):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.id(EOS), tokenizer.id(BOS)
        self.tokens = [tokenizer.token_bytes(index) for index in range(vocab)]
        nothing = [index for index, token in enumerate(self.tokens) if not token]
        for index in nothing:  # without a name they would be the beginning of every special token
            self.tokens[index] = f"<nothing {index}>".encode()
        self.special_token_ids = sorted({*tokenizer.added_ids, *nothing})

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _set(words: np.ndarray, tokens: Sequence[int], value: bool) -> None:
    for token in tokens:
        bit = np.uint32(1 << token % 32)
        words[token // 32] = words[token // 32] | bit if value else words[token // 32] & ~bit


def _made(make: Callable[..., str], *arguments) -> str:
    try:
        return make(*arguments)
    except (ValueError, TypeError) as error:
        raise GrammarError(_sentence(str(error))) from None


def _sentence(fault: str) -> str:
    """What llguidance says, on one line."""
    return " ".join(fault.split()).rstrip(".") + "."


def _library():
    try:
        import llguidance
    except ImportError:
        raise GrammarError(
            "structured output needs llguidance: pip install 'v4jax[structured]'."
        ) from None
    return llguidance
