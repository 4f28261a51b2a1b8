"""Generation and scoring on a random model with every kind of layer."""

import math

import numpy as np
import pytest

from tests.models import random_model
from tests.tolerances import FLOAT32, assert_close
from v4jax import Transformer, tiny
from v4jax.inference.generate import Completion, Generator
from v4jax.inference.sampling import Greedy, Temperature, TopK
from v4jax.inference.score import Scorer
from v4jax.nn.cache import CacheFullError

CHUNKS = (16, 64)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(tiny(), scan_layers=False, seed=1)


@pytest.fixture(scope="module")
def generator(model) -> Generator:
    return Generator(model, chunks=CHUNKS)


@pytest.fixture(scope="module")
def scorer(model) -> Scorer:
    return Scorer(model)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 256, n).tolist() for n in (5, 131, 70)]


def test_prefill_gives_the_last_logits_of_each_prompt(generator, scorer, prompts):
    _, logits = generator.prefill(prompts, generator.init_cache(3, 200))

    for row, prompt in zip(logits, prompts):
        padded = np.array([prompt + [0] * (131 - len(prompt))])  # causal: padding changes nothing
        assert_close(row, scorer.logits(padded)[0, len(prompt) - 1], FLOAT32)


def test_greedy_tokens_are_the_largest_logits(generator, scorer, prompts):
    (completion,) = generator.generate([prompts[1]], max_new_tokens=9, stop_ids=[])
    sequence = np.array([prompts[1] + list(completion.tokens)])

    logits = scorer.logits(sequence, decode_from=len(prompts[1]))[0]

    assert completion.tokens == tuple(logits[len(prompts[1]) - 1 : -1].argmax(-1))


@pytest.mark.parametrize("sampler", [Greedy(), Temperature(), TopK(20)], ids=str)
def test_a_batch_gives_what_each_prompt_gives_alone(sampler, generator, prompts):
    options = dict(sampler=sampler, max_new_tokens=12, stop_ids=[])
    together = generator.generate(prompts, seed=[3, 4, 5], **options)

    alone = [
        generator.generate([prompt], seed=[seed], **options)[0]
        for prompt, seed in zip(prompts, (3, 4, 5))
    ]

    assert together == alone


def test_a_seed_reproduces_and_another_differs(generator, prompts):
    def run(seed):
        return generator.generate(
            prompts[:1], sampler=Temperature(), max_new_tokens=12, stop_ids=[], seed=seed
        )

    assert run(7) == run(7)
    assert run(7) != run(8)


def test_sequences_stop_on_their_own(generator, prompts):
    """Stop ids are taken from what the first prompt gives, so that it ends early."""
    options = dict(sampler=Temperature(), max_new_tokens=12, seed=[3, 4, 5])
    free = generator.generate(prompts, stop_ids=[], **options)
    stop = free[0].tokens[4]
    assert all(completion.finish_reason == "length" for completion in free)

    stopped = generator.generate(prompts, stop_ids=[stop], **options)

    for before, after in zip(free, stopped, strict=True):
        if stop in before.tokens:
            cut = before.tokens[: before.tokens.index(stop) + 1]
            assert after == Completion(cut, "stop")
        else:
            assert after == before
    assert stopped[0].finish_reason == "stop" and len(stopped[0].tokens) <= 5


def test_stream_yields_minus_one_after_the_end(generator, prompts):
    options = dict(sampler=Temperature(), max_new_tokens=12, seed=[3, 4, 5])
    first = generator.generate(prompts, stop_ids=[], **options)[0].tokens[2]

    steps = np.stack(list(generator.stream(prompts, stop_ids=[first], **options)))

    for column in steps.T:
        ends = np.flatnonzero(column == first)
        if len(ends):
            assert (column[ends[0] + 1 :] == -1).all()
        else:
            assert (column >= 0).all()


def test_the_number_of_programs_is_bounded(model, prompts, compilations):
    """One program per chunk size, capacity and batch size; lengths do not matter."""
    generator = Generator(model, chunks=CHUNKS)
    for length in (1, 16, 64, 131):
        generator.generate([prompts[1][:length]], max_new_tokens=3, stop_ids=[])
    assert generator._prefill._cache_size() == len(CHUNKS)
    assert generator._decode._cache_size() == 1

    before = compilations()
    for length in (2, 15, 17, 40, 63, 65, 100, 130):
        generator.generate([prompts[1][:length]], max_new_tokens=5, stop_ids=[])
    assert compilations() == before


@pytest.mark.parametrize(
    "length, sizes",
    [(1, [16]), (16, [16]), (17, [16, 16]), (33, [64]), (64, [64]), (65, [64, 16]), (97, [64, 64])],
)
def test_prompts_are_cut_into_few_chunks(generator, length, sizes):
    assert list(generator._chunk_sizes(length)) == sizes


def test_bad_input_is_refused(generator, prompts):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generator.generate([[1], []])
    with pytest.raises(ValueError, match=r"token ids are in 1\.\.256: expected 0\.\.255"):
        generator.generate([[1, 256]])
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generator.generate([[1]], max_new_tokens=0)
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        generator.generate([[1]], seed=[1, 2])
    with pytest.raises(ValueError, match="65541 tokens are more than max_length=65536 of tiny"):
        generator.generate([[1] * 5], max_new_tokens=tiny().max_length)
    with pytest.raises(CacheFullError, match="sequence 0 would have 257 tokens"):
        generator.prefill([[1] * 257], generator.init_cache(1, 200))


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
