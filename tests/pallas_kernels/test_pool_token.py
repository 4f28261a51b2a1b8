"""Open windows of compressors that are filled token by token: against whole windows, and kernel against XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_pool import Pool, pool_windows
from pallas_kernels.pool_token import pool_token
from tests.tolerances import FLOAT32, assert_close


def _state(batch: int, channels: int, overlaps: bool) -> tuple[Pool, Pool | None]:
    return Pool.empty((batch, channels)), Pool.empty((batch, channels // 2)) if overlaps else None


@functools.cache
def _step(implementation: str):
    return jax.jit(functools.partial(pool_token, dtype=jnp.float32, implementation=implementation))


@pytest.mark.parametrize(
    ("batch", "ratio", "overlaps"), [(1, 4, True), (3, 4, True), (8, 5, False)]
)
def test_token_by_token_gives_what_whole_windows_give(batch, ratio, overlaps):
    """In both implementations, of sequences that start apart and now and then have no token."""
    channels, steps = 256, 3 * ratio + 2
    rng = np.random.default_rng(ratio)
    value, gate = rng.standard_normal((2, batch, steps, channels)).astype(np.float32)
    bias = rng.standard_normal((ratio, channels)).astype(np.float32)
    state = _state(batch, channels, overlaps)
    seen = np.zeros(batch, int)
    tokens: list[list[int]] = [[] for _ in range(batch)]
    means = [{} for _ in range(batch)]
    for step in range(steps):
        valid = rng.random(batch) < 0.8
        slot = (seen % ratio).astype(np.int32)
        args = (*state, value[:, step], gate[:, step], bias, slot, valid)
        found, expected = _step("interpret")(*args), _step("xla")(*args)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            # A CPU may round a product and a sum once or twice.
            np.testing.assert_allclose(one, other, rtol=2**-21, atol=2**-21)
        mean, *state = found
        for b in np.flatnonzero(valid):
            tokens[b].append(step)
            if slot[b] == ratio - 1:
                means[b][seen[b] // ratio] = np.asarray(mean[b])
            seen[b] += 1

    assert sum(map(len, means)) >= 2 * batch
    for b in range(batch):
        whole = len(tokens[b]) // ratio * ratio
        shape = (1, -1, ratio, channels)
        rows = (x[b, tokens[b][:whole]].reshape(shape) for x in (value, gate))
        pools = pool_windows(*rows, bias)
        if overlaps:
            half = channels // 2
            before = jax.tree.map(
                lambda p, e: jnp.concatenate([e, p[:, :-1, :half]], axis=1),  # noqa: B023
                pools,
                Pool.empty((1, 1, half)),
            )
            pools = before.join(jax.tree.map(lambda p: p[..., half:], pools))  # noqa: B023
        expected = np.asarray(pools.mean()[0])
        for window, mean in means[b].items():
            assert_close(mean, expected[window], FLOAT32)


def test_means_are_rounded_once():
    rng = np.random.default_rng(0)
    value, gate = rng.standard_normal((2, 3, 128)).astype(np.float32)
    bias = np.zeros((4, 128), np.float32)
    slot, valid = np.zeros(3, np.int32), np.ones(3, bool)
    for implementation in ("interpret", "xla"):
        current, previous = _state(3, 128, False)
        args = (current, previous, value, gate, bias, slot, valid)
        mean, *_ = pool_token(*args, dtype=jnp.bfloat16, implementation=implementation)
        np.testing.assert_array_equal(mean, value.astype(jnp.bfloat16))


def test_what_does_not_fit_together_is_refused():
    value, slot, valid = jnp.zeros((2, 128)), jnp.zeros(2, jnp.int32), jnp.ones(2, bool)
    call = functools.partial(pool_token, dtype=jnp.float32, implementation="interpret")
    current, previous = _state(2, 128, True)
    with pytest.raises(ValueError, match=r"value \(2, 64\)"):
        call(current, None, value[:, :64], value, jnp.zeros((4, 128)), slot, valid)
    with pytest.raises(ValueError, match=r"previous windows \(2, 128\): expected \(2, 64\)"):
        call(current, current, value, value, jnp.zeros((4, 128)), slot, valid)
    with pytest.raises(ValueError, match="whole 128 channels"):
        call(current, previous, value, value, jnp.zeros((4, 128)), slot, valid)
