"""Arrays side by side and apart: copies in a kernel, and what XLA makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.side_by_side import apart, side_by_side


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("rows", [1, 9])
def test_arrays_lie_one_after_the_other_and_come_apart(rows, implementation):
    widths = (128, 384, 128, 256)
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((rows, w)), jnp.float32) for w in widths]

    whole = jax.jit(functools.partial(side_by_side, implementation=implementation))(arrays)
    cut = jax.jit(functools.partial(apart, widths=widths, implementation=implementation))
    parts = cut(whole)

    np.testing.assert_array_equal(whole, np.concatenate(arrays, axis=1))
    assert [part.shape for part in parts] == [(rows, width) for width in widths]
    for part, array in zip(parts, arrays, strict=True):
        np.testing.assert_array_equal(part, array)


def test_columns_that_are_no_whole_registers_are_xla_s():
    arrays = [jnp.ones((2, 128)), jnp.ones((2, 64))]

    assert side_by_side(arrays).shape == (2, 192)
    with pytest.raises(ValueError, match=r"parts of \[128, 64\]: the kernel copies whole 128"):
        side_by_side(arrays, implementation="interpret")
    with pytest.raises(ValueError, match=r"parts of \[100\]: the kernel copies whole 128"):
        apart(jnp.ones((2, 100)), (100,), implementation="interpret")
