"""Strategies draw from the distributions they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.inference.sampling import Greedy, Temperature, TopK, TopP, sampler_of

LOGITS = np.log(np.array([0.05, 0.4, 0.25, 0.2, 0.1])).astype(np.float32)
DRAWS = 20_000


def _shares(sampler) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), DRAWS)
    tokens = jax.jit(jax.vmap(sampler, (None, 0)))(LOGITS, keys)
    return np.bincount(tokens, minlength=len(LOGITS)) / DRAWS


def _expected(keep: list[int], temperature: float) -> np.ndarray:
    p = np.zeros(len(LOGITS))
    p[keep] = np.exp(LOGITS[keep].astype(np.float64) / temperature)
    return p / p.sum()


@pytest.mark.parametrize(
    "sampler, keep, temperature",
    [
        (Temperature(), [0, 1, 2, 3, 4], 1.0),
        (Temperature(0.5), [0, 1, 2, 3, 4], 0.5),
        (TopK(2), [1, 2], 1.0),
        (TopK(3, temperature=2.0), [1, 2, 3], 2.0),
        (TopK(99), [0, 1, 2, 3, 4], 1.0),
        (TopP(0.6), [1, 2], 1.0),  # 0.4 is not enough, 0.65 is
        (TopP(0.3), [1], 1.0),
        (TopP(1.0, temperature=2.0), [0, 1, 2, 3, 4], 2.0),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampler, keep, temperature):
    expected = _expected(keep, temperature)
    noise = 4.5 * np.sqrt(expected * (1 - expected) / DRAWS)  # one in 150,000 per token

    assert (np.abs(_shares(sampler) - expected) <= noise).all()


def test_greedy_takes_the_first_of_the_largest():
    assert Greedy()(jnp.array([1.0, 3.0, 3.0, 2.0]), jax.random.key(0)) == 1


@pytest.mark.parametrize(
    "options, sampler",
    [
        (dict(), Temperature()),
        (dict(temperature=0, top_k=3), Greedy()),
        (dict(temperature=0.5, top_k=3), TopK(3, 0.5)),
        (dict(temperature=2.0, top_p=0.9), TopP(0.9, 2.0)),
    ],
    ids=str,
)
def test_options_name_a_strategy(options, sampler):
    assert sampler_of(**options) == sampler


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Temperature(0.0), "temperature=0.0"),
        (lambda: Temperature(-1.0), "temperature=-1.0"),
        (lambda: TopK(0), "k=0"),
        (lambda: TopP(0.0), "p=0.0"),
        (lambda: TopP(1.5), "p=1.5"),
        (lambda: sampler_of(top_k=2, top_p=0.5), "top_k=2 and top_p=0.5 exclude each other"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
