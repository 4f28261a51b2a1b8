"""A job: the requests of one process, generated, written as they end, and at the last merged."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Self

import numpy as np

from v4jax.inference.batch.files import (
    JobError,
    Journal,
    Sidecar,
    done_lines,
    errors_path,
    merge_all,
    part_path,
)
from v4jax.inference.batch.plan import Plan
from v4jax.inference.batch.requests import Request, Settings
from v4jax.inference.engine import Engine
from v4jax.inference.grammar import GrammarError
from v4jax.inference.requests import Request as EngineRequest
from v4jax.inference.stop_text import StopScanner
from v4jax.text.parse import parse_partial_completion
from v4jax.text.tokenizer import StreamDecoder, Tokenizer

AHEAD = 2  # requests that are in slots or wait for one, for every slot


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a step of `Job.run` has added."""

    requests: int  # finished and on the disk
    tokens: int  # generated


class Job:
    """One process's share of a job, to be used in a `with` statement.

        with Job(input, output, Settings(), batch_size=8, identity={...}) as job:
            for progress in job.run(engine, tokenizer):
                ...
            left = job.finish()

    Every `count`-th request of the plan, from `process` on, is its share; it leaves out those that are
    done, whichever process of whichever earlier run has done them.

    Processes whose devices one mesh spans compute a share together, each with a Job of the same
    arguments: the one that leads reads what is done and writes, the others follow.

    Args:
      input: JSON lines, see `parse_request`.
      output: where results go; the other files of the job lie beside it.
      settings: for lines that do not say otherwise.
      batch_size: slots of the engine, which decide the last bits of results.
      identity: what else decides the results, such as the checkpoint; JSON values.
      release: whose prompts to render; `Tokenizer.release` of the checkpoint.
      models: that lines may name: the model's own name, then those of the engine's adapters.
      leads: false for the processes that follow.
      agree: gives every one of the processes that compute together the leader's array.

    Attributes:
      plan: what the input holds.
      total: valid requests of the share.
      remaining: how many of them were not done when the job was opened.

    Raises:
      JobError: a process is at work on this share, or the output belongs to another job.
    """

    def __init__(
        self,
        input: str | os.PathLike,
        output: str | os.PathLike,
        settings: Settings,
        *,
        batch_size: int,
        identity: Mapping[str, object],
        release: str = "april",
        models: Sequence[str] = (),
        process: int = 0,
        count: int = 1,
        leads: bool = True,
        agree: Callable[[np.ndarray], np.ndarray] = lambda array: array,
    ):
        if not 0 <= process < count:
            raise ValueError(f"process={process}: expected 0..{count - 1}.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1.")
        self.output, self._batch_size = pathlib.Path(output), batch_size
        self._leads, self._agree = leads, agree
        self._sidecar: Sidecar | None = None  # of the process that leads
        self._results_path = part_path(self.output, process, count)
        try:
            done = bytearray()
            if leads:
                self._sidecar = Sidecar(self.output)
                # Before the first pass over the input: others' passes take as long.
                self._sidecar.lock_share(process, count)
                self.plan = Plan(input, settings, release, models)
                self._sidecar.claim(self._header(identity), process, count)
                done = self._open_files(process, count)
        except BaseException:
            self.close()
            agree(np.array(-1, np.int32))  # the others wait for it
            raise
        size = int(agree(np.array(len(done), np.int32)))
        if size < 0:
            raise JobError(f"the process that leads this one could not open {self.output}.")
        if not leads:
            self.plan, done = Plan(input, settings, release, models), bytearray(size)
        self._done = bytearray(agree(np.frombuffer(done, np.uint8)))
        share = range(process, self.plan.requests, count)
        self._open = [place for place in share if not self._done[self.plan.line(place)]]
        self.total, self.remaining = len(share), len(self._open)

    def _open_files(self, process: int, count: int) -> bytearray:
        """Opens the files of the output; a flag for every line that is done."""
        self._results = Journal(self._results_path)
        self._errors = Journal(part_path(errors_path(self.output), process, count))
        done = self._read_done()
        # Written with the first batch: a job whose model does not load then has written nothing.
        malformed = self.plan.malformed if process == 0 else []
        self._malformed = [record for record in malformed if not done[record["line"]]]
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the share."""
        if self._sidecar is not None:
            self._sidecar.close()

    def _header(self, identity: Mapping[str, object]) -> dict[str, object]:
        plan = self.plan
        return {
            "input": {"bytes": plan.size, "sha256": plan.digest},
            "requests": plan.count,
            "batch_size": self._batch_size,
            "settings": dataclasses.asdict(plan.settings),
            "release": plan.release,
            **identity,
        }

    def _read_done(self) -> bytearray:
        """A flag for every line of the input."""
        done = bytearray(self.plan.last_line + 1)
        for line in done_lines(self.output):
            if line >= len(done):
                raise JobError(f"{self.output} has a record of line {line}, which does not exist.")
            done[line] = True
        return done

    def run(self, engine: Engine, tokenizer: Tokenizer) -> Iterator[Progress]:
        """Generates what is not done. Results are on the disk before the engine's next step.

        Yields:
          after every step of the engine its tokens, and the requests that have ended.
        """
        self._write_malformed()
        waiting = iter(self._open)
        rows: dict[EngineRequest, _Row] = {}
        while True:
            errors: list[dict[str, object]] = []
            while len(rows) < AHEAD * self._batch_size:
                place = next(waiting, None)
                if place is None:
                    break
                request = self.plan.request(place)
                row, error = self._begin(engine, tokenizer, request)
                if row is not None:
                    rows[row.running] = row
                else:
                    errors.append({"line": request.line, "id": request.id, "error": error})
            if not rows and not errors:
                return
            tokens, ended = 0, []
            for running in engine.step() if rows else ():
                row = rows.get(running)
                if row is not None:
                    tokens += row.read()
                    if row.is_ended:
                        ended.append(rows.pop(running))
            if self._leads:
                self._results.append([row.record() for row in ended])
                self._errors.append(errors)
            yield Progress(len(ended) + len(errors), tokens)

    def _begin(
        self, engine: Engine, tokenizer: Tokenizer, request: Request
    ) -> tuple["_Row | None", str]:
        """The request in the engine's queue, or why it cannot be there."""
        prompt = tokenizer.encode(request.prompt)
        limit, wanted = engine.cfg.max_length, request.settings.max_new_tokens
        if len(prompt) + wanted > limit:
            return None, (
                f"{len(prompt)} prompt tokens and max_new_tokens={wanted} are more than the {limit} "
                f"tokens of {engine.cfg.name}: shorten the prompt or generate fewer tokens."
            )
        try:
            running = engine.submit(
                prompt,
                request.settings.sampling,
                stop_ids=tokenizer.stop_ids,
                grammar=request.settings.grammar,
                adapter=request.adapter,
            )
        except GrammarError as error:
            return None, str(error)
        return _Row(request, running, tokenizer), ""

    def finish(self) -> int:
        """Waits until no process is at work; the first to see it joins what all have written.

        Processes that began together so end together, which jax.distributed needs.

        Returns:
          how many requests have neither a result nor an error, because their process died or was
          not started. The parts are not joined then.
        """
        left = 0 if self._sidecar is None else self._finish(self._sidecar)
        return int(self._agree(np.array(left, np.int32)))

    def _write_malformed(self) -> None:
        """Reports the lines that are no requests, once."""
        if self._leads:
            self._errors.append(self._malformed)
            self._malformed = []

    def _finish(self, sidecar: Sidecar) -> int:
        self._write_malformed()
        is_part = self._results_path != self.output and self._results_path.exists()
        sidecar.unlock()
        while not sidecar.lock_all():
            time.sleep(0.5)
        try:
            if is_part and not self._results_path.exists():
                return 0  # another process has joined everything
            left = self.plan.count - sum(self._read_done())
            if not left:
                merge_all(self.output)
                self.output.touch()  # there may be no result at all
            return left
        finally:
            sidecar.unlock()


class _Row:
    """A request that is being generated."""

    def __init__(self, request: Request, running: EngineRequest, tokenizer: Tokenizer):
        self.request, self.running, self._stop_ids = request, running, tokenizer.stop_ids
        self._decoder = StreamDecoder(tokenizer)
        self._scanner = StopScanner(request.settings.stop, request.thinking_mode)
        self._texts: list[str] = []
        self._count = 0  # tokens
        self.is_ended = self._is_stopped = False

    def read(self) -> int:
        """Takes the engine's new tokens, up to one that ends the text; returns their number."""
        new = self.running.tokens[self._count :]
        for count, token in enumerate(new, 1):
            self._count += 1
            self._is_stopped = token in self._stop_ids
            if not self._is_stopped:
                self._texts.append(self._scanner.push(self._decoder.push(token)))
                self._is_stopped = self._scanner.is_met
            if self._is_stopped:
                self.running.cancel()
                self.is_ended = True
                return count
        self.is_ended = self.running.is_ended
        return len(new)

    def record(self) -> dict[str, object]:
        """The line for the output, once it has ended."""
        request = self.request
        self._texts += [self._scanner.push(self._decoder.close()), self._scanner.close()]
        text = "".join(self._texts)
        record = {"line": request.line, "id": request.id, "text": text}
        if request.thinking_mode is not None:
            message = parse_partial_completion(text, request.thinking_mode, is_complete=True)
            record |= {key: message[key] for key in ("content", "reasoning_content", "tool_calls")}
        return record | {
            "finish_reason": "stop" if self._is_stopped else "length",
            "prompt_tokens": self.running.prompt_length,
            "completion_tokens": self._count,
        }
