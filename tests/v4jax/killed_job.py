"""What `test_batch.py` runs in processes that it kills: a job whose engine makes tokens up."""

import random
import time

from tests.conftest import NANO
from v4jax import tiny
from v4jax.inference.batch import Job, Settings
from v4jax.inference.requests import Request
from v4jax.text.tokenizer import Tokenizer

SLOTS = 3
MODELS = ("own", "first", "second")


class SlowEngine:
    """A few requests at a time; a request's tokens depend on its prompt, adapter and seed alone."""

    cfg = tiny()

    def __init__(self, pause: float):
        self._pause, self._requests = pause, []

    def submit(self, prompt, sampling, *, stop_ids, grammar, adapter):
        request = Request(
            *(len(self._requests), prompt, sampling, tuple(stop_ids)), adapter=adapter
        )
        self._requests.append(request)
        return request

    def step(self):
        time.sleep(self._pause)
        served = [request for request in self._requests if not request.is_ended][:SLOTS]
        for request in served:
            drawn = request.prompt, request.adapter, request.sampling.seed, len(request.tokens)
            draw = random.Random(repr(drawn))
            request.tokens.append(draw.randrange(3, 1000))
            if len(request.tokens) == request.sampling.max_new_tokens:
                request.finish_reason = "length"
        return served


def run(requests: str, output: str, pause: float) -> None:
    """The whole job, or what is left of it."""
    settings = Settings(max_new_tokens=5)
    options = dict(batch_size=SLOTS, identity={}, models=MODELS)
    with Job(requests, output, settings, **options) as job:
        for _ in job.run(SlowEngine(pause), Tokenizer(NANO)):
            pass
        assert job.finish() == 0
