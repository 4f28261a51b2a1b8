"""Generation and scoring on a random model with every kind of layer."""

import math

import numpy as np
import pytest

from tests.models import one_of_each, random_model
from tests.tolerances import FLOAT32, assert_close
from v4jax import Transformer, tiny
from v4jax.inference import steps
from v4jax.inference.completions import Completion
from v4jax.inference.engine import Engine
from v4jax.inference.feeding import Feeder
from v4jax.inference.sampling import Sampling
from v4jax.inference.score import Scorer
from v4jax.nn.cache import CacheFullError

CHUNKS = (128, 256)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(one_of_each(), scan_layers=False, seed=1)


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    return Engine(model, slots=3, chunks=CHUNKS)


def sampled(count: int, **options) -> list[Sampling]:
    """Of so many prompts, with seeds of their own."""
    return [Sampling(max_new_tokens=12, seed=3 + n, **options) for n in range(count)]


@pytest.fixture(scope="module")
def scorer(model) -> Scorer:
    return Scorer(model)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 256, n).tolist() for n in (5, 131, 70)]


def test_fed_prompts_give_the_last_logits_of_each(model, scorer, prompts):
    feeder = Feeder(model)
    _, logits = feeder.feed(prompts, feeder.init_cache(3, 200), chunk=128)

    for row, prompt in zip(logits, prompts):
        padded = np.array([prompt + [0] * (131 - len(prompt))])  # causal: padding changes nothing
        assert_close(row, scorer.logits(padded)[0, len(prompt) - 1], FLOAT32)
    with pytest.raises(CacheFullError, match="sequence 0 would have 201 tokens"):
        feeder.feed([[1] * 201], feeder.init_cache(1, 200))


def test_greedy_tokens_are_the_largest_logits(engine, scorer, prompts):
    greedy = Sampling(temperature=0, max_new_tokens=9)
    (completion,) = engine.generate([prompts[1]], greedy, stop_ids=[])
    sequence = np.array([prompts[1] + list(completion.tokens)])

    logits = scorer.logits(sequence, decode_from=len(prompts[1]))[0]

    assert completion.tokens == tuple(logits[len(prompts[1]) - 1 : -1].argmax(-1))


def test_partial_sums_that_stay_apart_through_a_call_give_the_same_tokens(
    model, engine, prompts, monkeypatch
):
    """As on a TPU: 140 tokens, past a window of an HCA layer, in calls of several."""
    monkeypatch.setattr(steps, "target_platform", lambda: "tpu")
    steps._decode_step.cache_clear()  # not what was traced for a CPU
    sampling = Sampling(seed=4, max_new_tokens=140)

    (found,) = Engine(model, slots=1, chunks=CHUNKS).generate([prompts[0]], sampling, stop_ids=[])

    steps._decode_step.cache_clear()
    monkeypatch.undo()
    (expected,) = engine.generate([prompts[0]], sampling, stop_ids=[])
    assert found.tokens == expected.tokens


def test_a_batch_gives_what_each_prompt_gives_alone(engine, prompts):
    """Greedy, drawn, restricted, and of different lengths: all in one batch, to the same bits."""
    requests = [
        Sampling(temperature=0, max_new_tokens=12),
        Sampling(seed=4, max_new_tokens=7),
        Sampling(seed=5, top_k=20, top_p=0.9, max_new_tokens=10),
    ]
    together = engine.generate(prompts, requests, stop_ids=[])

    assert [len(completion.tokens) for completion in together] == [12, 7, 10]
    for prompt, request, completion in zip(prompts, requests, together):
        assert engine.generate([prompt], [request], stop_ids=[]) == [completion]


def test_a_seed_reproduces_and_another_differs(engine, prompts):
    def run(seed):
        return engine.generate(prompts[:1], Sampling(max_new_tokens=12, seed=seed), stop_ids=[])

    assert run(7) == run(7)
    assert run(7) != run(8)


def test_sequences_stop_on_their_own(engine, prompts):
    """Stop ids are taken from what the first prompt gives, so that it ends early."""
    free = engine.generate(prompts, sampled(3), stop_ids=[])
    stop = free[0].tokens[4]
    assert all(completion.finish_reason == "length" for completion in free)

    stopped = engine.generate(prompts, sampled(3), stop_ids=[stop])

    for before, after in zip(free, stopped, strict=True):
        if stop in before.tokens:
            cut = before.tokens[: before.tokens.index(stop) + 1]
            assert after == Completion(cut, "stop")
        else:
            assert after == before
    assert stopped[0].finish_reason == "stop" and len(stopped[0].tokens) <= 5


def test_stream_yields_minus_one_after_the_end(engine, prompts):
    first = engine.generate(prompts, sampled(3), stop_ids=[])[0].tokens[2]

    steps = np.stack(list(engine.stream(prompts, sampled(3), stop_ids=[first])))

    for column in steps.T:
        ends = np.flatnonzero(column == first)
        if len(ends):
            assert (column[ends[0] + 1 :] == -1).all()
        else:
            assert (column >= 0).all()


def test_a_session_compiles_few_programs(model, prompts, compilations):
    """Numbers of prompts, lengths, samplers, stop ids and limits are data, and so are weights."""
    engine = Engine(model, slots=3, chunks=CHUNKS)
    engine.generate([prompts[1]], Sampling(max_new_tokens=2), stop_ids=[])
    engine.generate([prompts[1]], Sampling(max_new_tokens=2), stop_ids=[])  # from a prefix

    before = compilations()
    for length in (2, 15, 17, 40, 63, 65, 100, 130):
        request = Sampling(temperature=length / 100, top_k=length, max_new_tokens=3, seed=length)
        engine.generate([prompts[1][:length]], request, stop_ids=range(length % 8))
    engine.generate([*prompts, [5]], sampled(4, min_p=0.1), stop_ids=[7])
    assert compilations() == before
    other = Engine(random_model(one_of_each(), scan_layers=False, seed=2), slots=3, chunks=CHUNKS)
    before = compilations()
    other.generate(prompts, Sampling(max_new_tokens=2), stop_ids=[])
    assert compilations() == before


def test_bad_input_is_refused(engine, model):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.generate([[1], []])
    with pytest.raises(ValueError, match=r"prompt 0 has token ids in 1\.\.256: expected 0\.\.255"):
        engine.generate([[1, 256]])
    with pytest.raises(ValueError, match=r"prompt 0 is 5: expected a list of token ids"):
        engine.generate([5, 6])
    with pytest.raises(ValueError, match=r"prompt 0 is \[1\.5\]: expected a list of token ids"):
        engine.generate([[1.5]])
    with pytest.raises(ValueError, match=r"prompt 0 is a text: .* an engine with a tokenizer"):
        engine.generate(["hi"])
    with pytest.raises(ValueError, match="chat needs a tokenizer"):
        engine.chat("hi")
    with pytest.raises(ValueError, match="2 samplings for 1 prompts"):
        engine.generate([[1]], [Sampling(), Sampling()])
    with pytest.raises(ValueError, match="65541 tokens are more than max_length=65536 of tiny"):
        engine.generate([[1] * 5], Sampling(max_new_tokens=tiny().max_length))
    with pytest.raises(ValueError, match="9 stop ids: expected at most 8"):
        engine.generate([[1]], stop_ids=range(9))
    with pytest.raises(ValueError, match=r"chunks=\(16, 128\): expected multiples of 128"):
        Engine(model, chunks=(16, 128))


def test_no_prompt_gives_no_completion(engine):
    assert engine.generate([]) == []


def test_perplexity_is_that_of_the_logits(scorer):
    """Against a plain computation: windows of 64 that overlap by half, each target once."""
    tokens = np.random.default_rng(2).integers(0, 256, 150)
    perplexity, count = scorer.perplexity(tokens, context=64, batch_size=2)

    losses = {}
    for start in (0, 32, 64, 85):
        window = tokens[start : start + 65]
        logits = scorer.logits(window[None, :-1])[0].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for i, target in enumerate(window[1:]):
            losses.setdefault(start + i + 1, -log_p[i, target])
    assert count == len(losses) == 149
    assert math.isclose(perplexity, math.exp(sum(losses.values()) / count), rel_tol=FLOAT32)


def test_scoring_refuses_bad_tokens(scorer):
    with pytest.raises(ValueError, match=r"float64\(2, 3\): expected integers"):
        scorer.logits(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"-1\.\.0: expected 0\.\.255"):
        scorer.logits(np.array([[0, -1]]))
    with pytest.raises(ValueError, match=r"decode_from=4: expected 1\.\.3"):
        scorer.logits(np.zeros((1, 3), int), decode_from=4)
    with pytest.raises(ValueError, match="1 tokens: perplexity needs"):
        scorer.perplexity([1])
