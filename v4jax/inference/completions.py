"""Calls for prompts that return with their completions: `generate`, `chat`, `stream`."""

import abc
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import numpy as np

from v4jax.config import V4Config
from v4jax.inference.grammar import Grammar
from v4jax.inference.loop import RequestLoop
from v4jax.inference.requests import Request
from v4jax.inference.sampling import Sampling
from v4jax.inference.steps import NO_TOKEN
from v4jax.text.parse import parse_partial_completion
from v4jax.text.prompt import with_bos
from v4jax.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated for one prompt."""

    tokens: tuple[int, ...]  # the stop token included, if there was one
    finish_reason: str  # "stop" or "length"
    text: str | None = None  # without the stop token; None if the engine has no tokenizer


@dataclasses.dataclass(frozen=True)
class Reply:
    """An assistant's turn."""

    content: str
    reasoning: str
    tool_calls: list[dict]
    tokens: tuple[int, ...]
    finish_reason: str  # "stop" or "length"

    @property
    def message(self) -> dict:
        """The turn as a message, to be put behind the others."""
        message: dict[str, object] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message


class Completions(RequestLoop, abc.ABC):
    """Whole prompts on top of `submit`, which the engine has."""

    cfg: V4Config
    tokenizer: Tokenizer | None

    @abc.abstractmethod
    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling = Sampling(),
        *,
        stop_ids: Sequence[int] | None = None,
        grammar: Grammar | None = None,
        adapter: str | None = None,
    ) -> Request:
        """Puts a request in the queue."""

    @overload  # a text is a sequence of texts too
    def generate(  # type: ignore[overload-overlap]
        self,
        prompts: str,
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        *,
        stop_ids: Sequence[int] | None = None,
        grammar: Grammar | None = None,
        adapter: str | None = None,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        *,
        stop_ids: Sequence[int] | None = None,
        grammar: Grammar | None = None,
        adapter: str | None = None,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        *,
        stop_ids: Sequence[int] | None = None,
        grammar: Grammar | None = None,
        adapter: str | None = None,
    ) -> Completion | list[Completion]:
        """Completions of prompts: one of a text, a list of a list.

        Args:
          prompts: a text, a list of texts, or a list of lists of token ids. A text begins with BOS
            whether it says so or not.
          sampling: of all prompts, or one for each. Of several prompts with one sampling, the n-th
            draws with its seed plus n.
          stop_ids: ids that end a completion; default those of the tokenizer that end a turn, or the
            model's end-of-sentence id.
          grammar: what every completion has to be, behind its reasoning, see `submit`.
          adapter: name of the engine's adapter that computes them.

        Raises:
          ValueError, RuntimeError: see `stream`.
        """
        several = [prompts] if isinstance(prompts, str) else prompts
        stops = self._stop_ids(stop_ids)
        steps = list(
            self.stream(several, sampling, stop_ids=stops, grammar=grammar, adapter=adapter)
        )
        completions = []
        for row in np.stack(steps, axis=1) if steps else ():
            tokens = tuple(int(token) for token in row[row >= 0])
            is_stopped = bool(tokens) and tokens[-1] in stops
            text = None
            if self.tokenizer is not None:
                text = self.tokenizer.decode(tokens[:-1] if is_stopped else tokens)
            completions.append(Completion(tokens, "stop" if is_stopped else "length", text))
        return completions[0] if isinstance(prompts, str) else completions

    def chat(
        self,
        messages: str | Sequence[Mapping],
        mode: str = "non-think",
        sampling: Sampling = Sampling(),
        *,
        tools: Sequence[Mapping] | None = None,
        grammar: Grammar | None = None,
        adapter: str | None = None,
    ) -> Reply:
        """The assistant's next turn.

        Args:
          messages: a text of the user, or messages as in docs/prompts.md.
          mode: "non-think", "think-high" or "think-max" (releases since 0731 also "think-low").
          tools: functions that the assistant may call.
          grammar: what the answer has to be; tools are called then only if it says so (`call_grammar`).
          adapter: name of the engine's adapter that computes it.

        Raises:
          ValueError: there is no tokenizer, or messages or mode that cannot be rendered; else as
            `stream`.
          RuntimeError: as `stream`.
        """
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer: Engine(model, v4jax.Tokenizer(folder)).")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        prompt = self.tokenizer.render(messages, mode, tools=tools)
        ids = self.tokenizer.encode(prompt.text)
        (completion,) = self.generate([ids], sampling, grammar=grammar, adapter=adapter)
        text = completion.text or ""
        message = parse_partial_completion(text, prompt.thinking_mode, is_complete=True)
        return Reply(
            message["content"],
            message.get("reasoning_content") or "",
            message.get("tool_calls") or [],
            completion.tokens,
            completion.finish_reason,
        )

    def stream(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        *,
        stop_ids: Sequence[int] | None = None,
        grammar: Grammar | None = None,
        adapter: str | None = None,
    ) -> Iterator[np.ndarray]:
        """As `generate`, token by token. A row depends on its own prompt and sampling alone.

        Yields:
          [B] int32 per step: each row's token, or -1 once it has ended.

        Raises:
          ValueError: a prompt that is empty, has ids outside the vocabulary, or is too long for
            the model together with what it may generate; a grammar that cannot be used; no such
            adapter.
          RuntimeError: a request ended with an error.
        """
        ids = self._ids(prompts)
        stops = self._stop_ids(stop_ids)
        requests = []
        try:
            for prompt, one in zip(ids, _one_each(sampling, len(ids))):
                request = self.submit(prompt, one, stop_ids=stops, grammar=grammar, adapter=adapter)
                requests.append(request)
            for step in itertools.count():
                for request in requests:
                    while len(request.tokens) <= step and not request.is_ended:
                        self._advance(request, step)
                if faults := [request.error for request in requests if request.error]:
                    raise RuntimeError(faults[0])
                tokens = [r.tokens[step] if step < len(r.tokens) else NO_TOKEN for r in requests]
                if all(token == NO_TOKEN for token in tokens):
                    return
                yield np.array(tokens, np.int32)
        finally:  # whoever stops reading wants no more of it
            for request in requests:
                request.cancel()

    def _ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of prompts, checked."""
        if isinstance(prompts, str):
            raise ValueError(  # noqa: TRY004 - as other wrong prompts
                f"prompts={prompts[:40]!r}: expected a list of prompts."
            )
        checked = []
        for number, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                if self.tokenizer is None:
                    raise ValueError(
                        f"prompt {number} is a text: expected token ids, or an engine with a "
                        "tokenizer: Engine(model, v4jax.Tokenizer(folder))."
                    )
                prompt = self.tokenizer.encode(with_bos(prompt))
            ids = np.asarray(prompt)
            if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
                raise ValueError(
                    f"prompt {number} is {str(prompt)[:40]}: expected a list of token ids; prompts "
                    "are a list of such lists."
                )
            if not ids.size:
                raise ValueError(f"prompt {number} is empty: it needs a token.")
            if ids.min() < 0 or ids.max() >= self.cfg.vocab_size:
                raise ValueError(
                    f"prompt {number} has token ids in {ids.min()}..{ids.max()}: expected "
                    f"0..{self.cfg.vocab_size - 1}."
                )
            checked.append(ids.tolist())
        return checked

    def _stop_ids(self, given: Sequence[int] | None) -> tuple[int, ...]:
        if given is not None:
            return tuple(int(token) for token in given)
        return (self.cfg.eos_id,) if self.tokenizer is None else tuple(self.tokenizer.stop_ids)


def _one_each(sampling: Sampling | Sequence[Sampling], count: int) -> list[Sampling]:
    """A sampling for each of so many prompts."""
    if isinstance(sampling, Sampling):
        seeds = [(sampling.seed + n) % 2**32 for n in range(count)]
        return [dataclasses.replace(sampling, seed=seed) for seed in seeds]
    if len(sampling) != count:
        raise ValueError(f"{len(sampling)} samplings for {count} prompts.")
    return list(sampling)
