"""Learning rates at the ends of a run, and in between, by their formulas."""

import math

import numpy as np
import pytest

from v4jax.train.schedules import SHAPES, schedule

PEAK, STEPS, WARMUP = 2e-3, 50, 10


def _rates(shape: str, **options) -> np.ndarray:
    """Of steps 1, 2, ..., which an optimizer counts from 0."""
    rate = schedule(shape, PEAK, STEPS, warmup_steps=WARMUP, **options)
    return np.array([float(rate(count)) for count in range(STEPS + 5)])


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_up_begins_at_its_first_rate_and_ends_at_the_peak(shape):
    np.testing.assert_allclose(_rates(shape)[:10], PEAK * np.arange(1, 11) / 10, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_step_takes_the_final_rate(shape):
    rates = _rates(shape, final_fraction=0.05)
    final = PEAK if shape == "constant" else 0.05 * PEAK
    np.testing.assert_allclose(rates[STEPS - 1 :], final, rtol=1e-5)
    assert (np.diff(rates[9:STEPS]) <= 0).all()


def test_between_the_ends():
    middle = 30  # halfway from step 10 to step 50
    assert math.isclose(_rates("linear")[middle - 1], 0.55 * PEAK, rel_tol=1e-5)
    assert math.isclose(_rates("cosine")[middle - 1], 0.55 * PEAK, rel_tol=1e-5)
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert math.isclose(_rates("cosine")[19], quarter * PEAK, rel_tol=1e-5)

    stable = _rates("wsd", decay_fraction=0.4)  # 30 steps, then 20 of decay
    np.testing.assert_allclose(stable[9:30], PEAK, rtol=1e-6)
    assert math.isclose(stable[39], 0.55 * PEAK, rel_tol=1e-5) and stable[30] < PEAK


def test_short_runs_have_rates():
    assert [round(float(schedule("cosine", 1.0, 2)(count)), 3) for count in (0, 1)] == [1.0, 0.1]
    assert round(float(schedule("wsd", 1.0, 1)(0)), 3) == 0.1


def test_unknown_shapes_and_numbers_are_named():
    with pytest.raises(ValueError, match="schedule 'step': expected one of constant, linear"):
        schedule("step", 1e-3, 100)
    with pytest.raises(ValueError, match="final_fraction=2: expected a number from 0 to 1"):
        schedule("linear", 1e-3, 100, final_fraction=2)
    with pytest.raises(ValueError, match="total_steps=0"):
        schedule("linear", 1e-3, 0)
