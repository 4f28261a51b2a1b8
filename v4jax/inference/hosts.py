"""One engine over several processes: process 0 says before every step what came, the others do the same.

    engine = Engine(model, tokenizer)           on every process, over one mesh of all devices
    if jax.process_index() == 0:
        engine.lead()                           now submit, stream, start, serve
    else:
        engine.follow()                         returns when process 0 has called `engine.end()`

What a scheduler does depends on the requests that it was given, the cancellations, and the tokens that
every process reads from the devices: on nothing else, no clock among it. So a message a step is enough:

    new        requests, with the numbers that process 0 gave them
    cancelled  numbers of requests that are not wanted any more
    digest     of all tokens that process 0 has read before this step
    task       what all do together in place of a step: a prefix to save or to load

A follower whose own digest differs stops with an error: its devices computed something else. Messages go
through the key-value store that jax.distributed keeps on process 0, beside the devices: a collective would
wait for the step that runs.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from v4jax.inference.grammar import Grammar
from v4jax.inference.requests import Request
from v4jax.inference.sampling import Sampling
from v4jax.inference.steps import MOST_STEPS

KEPT = 256  # messages between two rounds of receipts, after which older ones are removed
_POLL = 10_000  # milliseconds that a follower waits at once; it goes on as long as it takes
_opened = 0  # channels: every process counts alike


class ProcessesDifferError(RuntimeError):
    """Processes of one engine have read different tokens."""


@dataclasses.dataclass(frozen=True)
class Message:
    """What a step begins with on every process."""

    new: Sequence[Request] = ()
    cancelled: Sequence[int] = ()  # by number
    digest: str = ""
    task: Any = None  # in place of a step, as JSON has it (`Engine._do`)
    is_end: bool = False

    def encoded(self) -> str:
        """As JSON."""
        fields = {
            "new": [_fields(request) for request in self.new],
            "cancelled": list(self.cancelled),
            "digest": self.digest,
            "task": self.task,
            "is_end": self.is_end,
        }
        return json.dumps(fields, default=lambda number: number.item())  # NumPy's

    @staticmethod
    def decoded(text: str) -> "Message":
        """The inverse; requests are without what their grammar allows."""
        fields = json.loads(text)
        new = tuple(map(_request, fields.pop("new")))
        return Message(new=new, **fields)


class Channel:
    """Messages from process 0 to all others, in order.

    Args:
      store: the client of a key-value store.
      name: of this channel in it.
      process: number of this process, of `count`.
    """

    def __init__(self, store: Any, name: str, process: int, count: int):
        self._store, self._prefix = store, name
        self._process, self._count = process, count
        self._sent = 0  # or received
        self._digest = hashlib.blake2b(digest_size=16)

    @classmethod
    def open(cls) -> "Channel":
        """Another one of the processes of jax.distributed, which all have to open it.

        Raises:
          ValueError: there are no others.
        """
        global _opened
        from jax._src import distributed  # jax has no public name for its key-value store

        store = distributed.global_state.client
        if store is None:
            raise ValueError(
                "this is the only process: call jax.distributed.initialize before an engine leads or "
                "follows."
            )
        _opened += 1
        return cls(store, f"v4jax/engine/{_opened}", jax.process_index(), jax.process_count())

    def add(self, events: Iterable[Request]) -> None:
        """Takes the tokens of a step into the digest."""
        for request in events:
            last = request.tokens[-MOST_STEPS:]  # a step gives no more
            self._digest.update(f"{request.number} {len(request.tokens)} {last};".encode())

    def send(
        self,
        new: Sequence[Request] = (),
        cancelled: Sequence[int] = (),
        *,
        task: Any = None,
        is_end: bool = False,
    ) -> None:
        """Process 0, before a step."""
        message = Message(new, cancelled, self._digest.hexdigest(), task, is_end)
        self._store.key_value_set(self._key(self._sent), message.encoded())
        self._sent += 1
        if self._sent % KEPT == 0 and self._sent > KEPT:
            self._remove(self._sent - 2 * KEPT, self._sent - KEPT)

    def receive(self) -> Message:
        """All others, before a step. Waits for it.

        Raises:
          ProcessesDifferError: process 0 has read other tokens.
        """
        text = self._waited_for(self._key(self._sent))
        self._sent += 1
        if self._sent % KEPT == 0:
            self._store.key_value_set(self._receipt(self._sent, self._process), "")
        message = Message.decoded(text)
        if message.digest != self._digest.hexdigest():
            raise ProcessesDifferError(
                f"process {self._process} has read other tokens than process 0 before step "
                f"{self._sent}: the devices of the two computed different things."
            )
        return message

    def _remove(self, first: int, end: int) -> None:
        """Messages that everybody has received."""
        for process in range(1, self._count):
            receipt = self._receipt(end, process)
            self._waited_for(receipt)
            self._store.key_value_delete(receipt)
        for number in range(first, end):
            self._store.key_value_delete(self._key(number))

    def _waited_for(self, key: str) -> str:
        while True:
            try:
                return self._store.blocking_key_value_get(key, _POLL)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def _key(self, number: int) -> str:
        return f"{self._prefix}/{number}"

    def _receipt(self, number: int, process: int) -> str:
        return f"{self._prefix}/received/{number}/{process}"


def _fields(request: Request) -> dict[str, Any]:
    sampling = dataclasses.asdict(request.sampling)
    sampling["logit_bias"] = list(request.sampling.logit_bias.items())
    return {
        "number": request.number,
        "prompt": request.prompt,
        "sampling": sampling,
        "stop_ids": request.stop_ids,
        "priority": request.priority,
        "grammar": None if request.grammar is None else request.grammar.text,
        "adapter": request.adapter,
    }


def _request(fields: dict[str, Any]) -> Request:
    sampling = fields["sampling"]
    sampling["logit_bias"] = dict(sampling["logit_bias"])
    grammar = fields["grammar"]
    return Request(
        number=fields["number"],
        prompt=fields["prompt"],
        sampling=Sampling(**sampling),
        stop_ids=tuple(fields["stop_ids"]),
        priority=fields["priority"],
        grammar=None if grammar is None else Grammar(grammar),
        adapter=fields["adapter"],
    )
