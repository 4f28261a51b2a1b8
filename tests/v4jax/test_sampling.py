"""Rows draw from the distributions that their options promise, whatever the other rows do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.inference.sampling import (
    TOP,
    Sampling,
    SamplingRows,
    log_probabilities,
    penalised,
    sample,
)

LOGITS = np.log(np.array([0.05, 0.4, 0.25, 0.2, 0.1])).astype(np.float32)
DRAWS = 20_000
CASES = [  # options, the tokens that are left, the temperature
    (Sampling(), [0, 1, 2, 3, 4], 1.0),
    (Sampling(temperature=0.5), [0, 1, 2, 3, 4], 0.5),
    (Sampling(top_k=2), [1, 2], 1.0),
    (Sampling(top_k=3, temperature=2.0), [1, 2, 3], 2.0),
    (Sampling(top_k=99), [0, 1, 2, 3, 4], 1.0),
    (Sampling(top_p=0.6), [1, 2], 1.0),  # 0.4 is not enough, 0.65 is
    (Sampling(top_p=0.3), [1], 1.0),
    (Sampling(top_p=1e-300), [1], 1.0),
    (Sampling(top_p=1.0, temperature=2.0), [0, 1, 2, 3, 4], 2.0),
    (Sampling(min_p=0.6), [1, 2], 1.0),  # 0.24 is the least
    (Sampling(top_k=4, top_p=0.8, min_p=0.3), [1, 2, 3], 1.0),  # all of them: 0.8 of what k left
    (Sampling(top_k=3, top_p=0.7), [1, 2], 1.0),  # 0.65 of 0.85 is 0.76
    (Sampling(temperature=0), [1], 1.0),
    (Sampling(temperature=0, top_k=3, top_p=0.5), [1], 1.0),
]


@pytest.fixture(scope="module")
def shares():
    """Of the tokens drawn for each case, all cases being rows of one program."""
    rows = SamplingRows.of([options for options, *_ in CASES], 5)
    logits = np.tile(LOGITS, (len(CASES), 1))
    keys = jax.random.split(jax.random.key(0), (DRAWS, len(CASES)))
    tokens = np.asarray(jax.jit(jax.vmap(sample, (None, 0, None)))(logits, keys, rows))
    return [np.bincount(row, minlength=len(LOGITS)) / DRAWS for row in tokens.T]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: str(CASES[n][0]))
def test_draws_follow_the_distribution(number, shares):
    _, keep, temperature = CASES[number]
    expected = np.zeros(len(LOGITS))
    expected[keep] = np.exp(LOGITS[keep].astype(np.float64) / temperature)
    expected /= expected.sum()
    noise = 4.5 * np.sqrt(expected * (1 - expected) / DRAWS)  # one in 150,000 per token

    assert (np.abs(shares[number] - expected) <= noise).all()


def test_greedy_takes_the_first_of_the_largest():
    rows = SamplingRows.of([Sampling(temperature=0)], 4)
    logits = jnp.array([[1.0, 3.0, 3.0, 2.0]])

    assert sample(logits, jax.random.split(jax.random.key(0), 1), rows).tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-5, 1e-6, 1e-30, 1e-38, 1e-45, 1e-300])
def test_a_tiny_temperature_tends_to_the_most_likely_token(temperature):
    rows = SamplingRows.of([Sampling(temperature=temperature, top_k=k) for k in (None, 2)], 4)
    logits = jnp.tile(jnp.array([3.0, 15.0, 27.0, 9.0]), (2, 1))

    for seed in range(5):
        keys = jax.random.split(jax.random.key(seed), 2)
        assert jax.jit(sample)(logits, keys, rows).tolist() == [2, 2]


def test_penalties_are_those_of_a_plain_computation():
    """A prompt of token 1, an answer of tokens 2 and, twice, 3."""
    options = dict(repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=0.5)
    several = [
        Sampling(),
        Sampling(**options, logit_bias={0: 2.0, 3: -1.0}),
        Sampling(repetition_penalty=2.0),
        Sampling(logit_bias={4: 100.0}),
    ]
    logits = np.array([0.5, 1.0, -1.0, 2.0, 0.25], np.float32)
    counts = np.array([0, 0, 1, 2, 0], np.int32)
    rows = SamplingRows.of(several, 5, [[1]] * 4)

    found = jax.jit(penalised)(np.tile(logits, (4, 1)), np.tile(counts, (4, 1)), rows)

    expected = [
        logits,
        [2.5, 1 / 1.5, -1.5 - 0.25 - 0.5, 1 / 1.5 - 0.25 - 1.0, 0.25],
        [0.5, 0.5, -2.0, 1.0, 0.25],
        [0.5, 1.0, -1.0, 2.0, 100.25],
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(found[0], logits)  # to the bit, whatever others ask for


def test_log_probabilities_are_those_of_the_logits():
    logits = np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32)
    wanted = np.array([True, False])

    own, ids, top = jax.jit(log_probabilities)(logits, np.array([7, 3]), wanted)

    exact = logits[0].astype(np.float64)
    exact -= np.log(np.exp(exact).sum())
    np.testing.assert_allclose(own[0], exact[7], rtol=1e-6)
    assert ids[0].tolist() == np.argsort(-exact)[:TOP].tolist()
    np.testing.assert_allclose(top[0], np.sort(exact)[::-1][:TOP], rtol=1e-6)
    for nothing in jax.jit(log_probabilities)(logits, np.array([7, 3]), np.zeros(2, bool)):
        assert not np.any(nothing)


def test_a_row_does_not_depend_on_the_others():
    keys = jax.random.split(jax.random.key(1), 3)
    logits = jax.random.normal(jax.random.key(2), (3, 50))
    several = [Sampling(), Sampling(top_p=0.5), Sampling(temperature=0)]

    together = jax.jit(sample)(logits, keys, SamplingRows.of(several, 50))

    for i, options in enumerate(several):
        alone = SamplingRows.of([options], 50)
        assert jax.jit(sample)(logits[i : i + 1], keys[i : i + 1], alone)[0] == together[i]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=-1.0), r"temperature=-1\.0: expected a number from 0 on"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature=float("inf")), "temperature=inf"),
        (dict(temperature=10**400), "temperature=10"),
        (dict(temperature="1"), "temperature='1'"),
        (dict(temperature=True), "temperature=True"),
        (dict(top_k=0), "top_k=0: expected a positive integer"),
        (dict(top_k=1.5), r"top_k=1\.5"),
        (dict(top_p=0.0), r"top_p=0\.0: expected a number in \(0, 1\]"),
        (dict(top_p=1.5), r"top_p=1\.5"),
        (dict(min_p=-0.1), r"min_p=-0\.1: expected a number in \[0, 1\]"),
        (dict(repetition_penalty=0), r"repetition_penalty=0: expected a number in \(0, 100\]"),
        (dict(presence_penalty="a"), r"presence_penalty='a': expected a number in -100\.\.100"),
        (dict(frequency_penalty=101), "frequency_penalty=101"),
        (dict(logit_bias={"1": 2.0}), "logit_bias=.*: expected token ids with numbers"),
        (dict(logit_bias={1: 1e5}), "logit_bias="),
        (dict(logprobs=21), r"logprobs=21: expected an integer in 0\.\.20"),
        (dict(seed=-1), "seed=-1"),
        (dict(max_new_tokens=0), "max_new_tokens=0: expected a positive integer"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
