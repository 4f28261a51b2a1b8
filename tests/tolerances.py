"""Tolerances of comparisons, in one place.

`relative_error` is a fraction of the reference's largest value.
"""

import numpy as np

FLOAT32 = 1e-5
BFLOAT16 = 2e-2
GRADIENT_FLOAT32 = 3e-5  # sums over queries and rows, in another order


def relative_error(actual, expected) -> float:
    """Largest difference, as a fraction of the largest expected magnitude."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.size == 0:
        return 0.0
    scale = np.abs(expected).max()
    return float(np.abs(actual - expected).max() / (scale if scale > 0 else 1.0))


def assert_close(actual, expected, tolerance: float) -> None:
    """Fails if `relative_error` exceeds the tolerance, or anything is not finite."""
    assert np.isfinite(np.asarray(actual, np.float64)).all(), "not finite"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance:.3g}"
