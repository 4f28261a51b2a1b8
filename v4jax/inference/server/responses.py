"""JSON objects of answers, as OpenAI's API has them."""

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from v4jax.inference.server.choice import Choice, TokenInfo, Update
from v4jax.inference.server.requests import Asked
from v4jax.text.stream import Delta
from v4jax.text.tokenizer import Tokenizer

_LOWEST = -9999.0  # of log-probabilities, since JSON has no infinity


class Answer:
    """Writes one answer, whole or in chunks.

    Args:
      asked: what was asked for.
      tokenizer: for the texts of tokens.
    """

    def __init__(self, asked: Asked, tokenizer: Tokenizer):
        self._asked, self._tokenizer = asked, tokenizer
        self._is_chat = asked.thinking_mode is not None
        kind = "chatcmpl" if self._is_chat else "cmpl"
        self._head = {
            "id": f"{kind}-{secrets.token_hex(12)}",
            "object": "chat.completion" if self._is_chat else "text_completion",
            "created": int(time.time()),
            "model": asked.model,
        }
        self._calls = [-1] * len(asked.samplings)  # the number of each choice's last call
        self._offsets = [0] * len(asked.samplings)  # characters of each choice's tokens so far

    def whole(self, choices: Sequence[Choice], updates: Sequence[Update], usage: dict) -> dict:
        """The answer of choices that have ended, each with all its updates in one."""
        shown: list[dict[str, Any]] = []
        for choice, update in zip(choices, updates):
            reason = choice.finish_reason
            entry: dict[str, Any] = {"index": choice.index, "finish_reason": reason}
            entry["logprobs"] = self._logprobs(choice.index, update.logprobs)
            if not self._is_chat:
                shown.append(entry | {"text": choice.text})
                continue
            message = choice.message()
            entry["message"] = {
                "role": "assistant",
                "content": message["content"] or (None if message["tool_calls"] else ""),
                "reasoning_content": message["reasoning_content"] or None,
                "refusal": None,
            }
            if calls := [{"id": _call_id(), **call} for call in message["tool_calls"]]:
                entry["message"]["tool_calls"] = calls
            shown.append(entry)
        return {**self._head, "choices": shown, "usage": usage}

    def start(self) -> list[dict]:
        """The chunks that a stream begins with: whose messages follow."""
        if not self._is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, {"delta": delta}, None) for index in range(len(self._calls))]

    def chunks(self, index: int, update: Update) -> list[dict]:
        """The chunks of what a choice has got: its text, and then that it has ended."""
        chunks = []
        for deltas, infos in self._parts(update):
            if deltas or infos:
                logprobs = self._logprobs(index, infos)
                chunks.append(self._chunk(index, self._body(index, deltas), logprobs))
        if update.finish_reason is not None:
            end = {"finish_reason": update.finish_reason}
            chunks.append(self._chunk(index, self._body(index, []) | end, None))
        return chunks

    def _parts(self, update: Update) -> list[tuple[list[Delta], list[TokenInfo]]]:
        """Reasoning apart from what follows it: many clients read one text of a chunk alone."""
        if not self._is_chat:
            return [(update.deltas, update.logprobs)]
        return [
            (
                [delta for delta in update.deltas if (delta.kind == "reasoning") == is_reasoning],
                [info for info in update.logprobs if info.is_reasoning == is_reasoning],
            )
            for is_reasoning in (True, False)
        ]

    def usage_chunk(self, usage: dict) -> dict:
        """The last chunk of a stream with `include_usage`."""
        return {**self._chunk_head(), "choices": [], "usage": usage}

    def _chunk_head(self) -> dict:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {**self._head, "object": kind}

    def _chunk(self, index: int, body: dict, logprobs: dict | None) -> dict:
        choice = {"index": index, "finish_reason": None, "logprobs": logprobs, **body}
        chunk = {**self._chunk_head(), "choices": [choice]}
        return chunk | {"usage": None} if self._asked.includes_usage else chunk

    def _body(self, index: int, deltas: Sequence[Delta]) -> dict:
        if not self._is_chat:
            return {"text": "".join(delta.text for delta in deltas)}
        delta: dict[str, Any] = {}
        for kind, name in (("reasoning", "reasoning_content"), ("content", "content")):
            if text := "".join(d.text for d in deltas if d.kind == kind):
                delta[name] = text
        if calls := list(self._call_deltas(index, deltas)):
            delta["tool_calls"] = calls
        return {"delta": delta}

    def _call_deltas(self, index: int, deltas: Iterable[Delta]) -> list[dict]:
        """What is new of each call, a call once."""
        calls: dict[int, dict] = {}
        for delta in deltas:
            if delta.kind == "call":
                self._calls[index] += 1
                function = {"name": delta.text, "arguments": ""}
                head = {"index": self._calls[index], "id": _call_id(), "type": "function"}
                calls[self._calls[index]] = {**head, "function": function}
            elif delta.kind == "arguments":
                number = self._calls[index]
                call = calls.setdefault(number, {"index": number, "function": {"arguments": ""}})
                call["function"]["arguments"] += delta.text
        return list(calls.values())

    def _logprobs(self, index: int, infos: Sequence[TokenInfo]) -> dict | None:
        if self._asked.top_logprobs is None:
            return None
        if not self._is_chat:
            return self._flat_logprobs(index, infos)
        kinds: dict[bool, list[dict]] = {True: [], False: []}
        for info in infos:
            entry = self._entry(info.token, info.logprob.logprob)
            top = info.logprob.top[: self._asked.top_logprobs]
            entry["top_logprobs"] = [self._entry(token, value) for token, value in top]
            kinds[info.is_reasoning].append(entry)
        return {"content": kinds[False], "reasoning_content": kinds[True], "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": list(data)}

    def _flat_logprobs(self, index: int, infos: Sequence[TokenInfo]) -> dict:
        """The form of `/v1/completions`."""
        texts, offsets = [], []
        for info in infos:
            text = self._tokenizer.token_bytes(info.token).decode("utf-8", "replace")
            texts.append(text)
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        tops = [
            {
                entry["token"]: entry["logprob"]
                for entry in (self._entry(*top) for top in i.logprob.top)
            }
            for i in infos
        ]
        return {
            "tokens": texts,
            "token_logprobs": [max(info.logprob.logprob, _LOWEST) for info in infos],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def usage(prompt_tokens: int, cached_tokens: int, choices: Sequence[Choice]) -> dict:
    """What a request has cost. The tokens of a prompt count once, however many choices it has."""
    completion = sum(choice.completion_tokens for choice in choices)
    reasoning = sum(choice.reasoning_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
