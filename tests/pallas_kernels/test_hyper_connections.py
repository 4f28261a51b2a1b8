"""Hyper-connections against the formulas of the report, written out in float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import hyper_connections
from tests.tolerances import BFLOAT16, FLOAT32, GRADIENT_FLOAT32, assert_close

M, D, EPS, NORM_EPS = 4, 8, 1e-6, 1e-5
sinkhorn = jax.jit(hyper_connections.sinkhorn, static_argnums=(1, 2))
PRE_OPTIONS = ("num_streams", "sinkhorn_iters", "eps", "norm_eps", "implementation")
hc_pre = jax.jit(hyper_connections.hc_pre, static_argnames=PRE_OPTIONS)
hc_post = jax.jit(hyper_connections.hc_post, static_argnames="implementation")
hc_post_pre = jax.jit(hyper_connections.hc_post_pre, static_argnames=PRE_OPTIONS)
hc_head = jax.jit(hyper_connections.hc_head, static_argnames=("eps", "norm_eps", "implementation"))
PRE = dict(num_streams=M, sinkhorn_iters=20, eps=EPS, norm_eps=NORM_EPS)
HEAD = dict(eps=EPS, norm_eps=NORM_EPS)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def sinkhorn_loop(logits: np.ndarray, iters: int, eps: float = EPS) -> np.ndarray:
    """One matrix. The softmax is the first row step; every iteration ends on a column step."""
    c = np.zeros(logits.shape)
    for j in range(len(c)):
        c[j] = np.exp(logits[j] - logits[j].max())
        c[j] = c[j] / c[j].sum() + eps
    for i in range(iters):
        if i > 0:
            for j in range(len(c)):
                c[j] = c[j] / (c[j].sum() + eps)
        for k in range(len(c)):
            c[:, k] = c[:, k] / (c[:, k].sum() + eps)
    return c


def pre_loop(streams, fn, base, scale, eps=EPS):
    """u, post, comb of every token."""
    batch, length, _ = streams.shape
    u, post = np.zeros((batch, length, D)), np.zeros((batch, length, M))
    comb = np.zeros((batch, length, M, M))
    for b, t in np.ndindex(batch, length):
        x = streams[b, t].astype(np.float64)
        x_normed = x / np.sqrt((x**2).mean() + NORM_EPS)
        raw = [float(x_normed @ fn[:, column]) for column in range((2 + M) * M)]
        logits = np.zeros((M, M))
        for i in range(M):
            pre = sigmoid(raw[i] * scale[0] + base[i]) + eps
            u[b, t] += pre * x[i * D : (i + 1) * D]
            post[b, t, i] = 2 * sigmoid(raw[M + i] * scale[1] + base[M + i])
            for k in range(M):
                column = 2 * M + M * i + k
                logits[i, k] = raw[column] * scale[2] + base[column]
        comb[b, t] = sinkhorn_loop(logits, 20, eps)
    return u, post, comb


def post_loop(f, streams, post, comb):
    out = np.zeros(streams.shape)
    for b, t in np.ndindex(*streams.shape[:2]):
        x = streams[b, t].astype(np.float64).reshape(M, D)
        for k in range(M):
            mixed = sum(float(comb[b, t, j, k]) * x[j] for j in range(M))
            out[b, t, k * D : (k + 1) * D] = post[b, t, k] * f[b, t].astype(np.float64) + mixed
    return out


def head_loop(streams, fn, base, scale, eps=EPS):
    out = np.zeros((*streams.shape[:2], D))
    for b, t in np.ndindex(*streams.shape[:2]):
        x = streams[b, t].astype(np.float64)
        x_normed = x / np.sqrt((x**2).mean() + NORM_EPS)
        for i in range(M):
            weight = sigmoid(x_normed @ fn[:, i] * scale[0] + base[i]) + eps
            out[b, t] += weight * x[i * D : (i + 1) * D]
    return out


def site(columns: int, dtype=np.float32, seed: int = 0) -> list[np.ndarray]:
    """Streams of unequal size, and parameters that make coefficients far from uniform."""
    rng = np.random.default_rng(seed)
    streams = rng.standard_normal((2, 3, M, D)) * np.array([0.3, 1, 2, 5])[:, None]
    fn = rng.standard_normal((M * D, columns)) / 3
    base = rng.standard_normal(columns)
    scale = np.array([0.7, 1.3, 1.9])[: 1 if columns == M else 3]
    streams = streams.reshape(2, 3, M * D).astype(dtype)
    return [streams, *(a.astype(np.float32) for a in (fn, base, scale))]


def mixing(dtype=np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    f, streams = rng.standard_normal((2, 3, D)), rng.standard_normal((2, 3, M * D))
    post, comb = 2 * rng.random((2, 3, M)), rng.random((2, 3, M, M))
    return [f.astype(dtype), streams.astype(dtype), *(a.astype(np.float32) for a in (post, comb))]


def assert_rounded_once(actual, exact):
    """Each bfloat16 is within half a unit in the last place of `exact`, give or take float32."""
    assert actual.dtype == jnp.bfloat16
    half_ulp = np.exp2(np.floor(np.log2(np.abs(exact))) - 8)
    error = np.abs(np.asarray(actual, np.float64) - exact)
    assert (error <= half_ulp + FLOAT32 * np.abs(exact).max()).all()


def derivative(f, args: list[np.ndarray], which: int, index: tuple[int, ...]) -> float:
    """Central difference of the scalar `f(*args)` in one entry of one argument, in float64."""
    step = 1e-5
    up, down = ([a.astype(np.float64) for a in args] for _ in range(2))
    up[which][index] += step
    down[which][index] -= step
    return (f(*up) - f(*down)) / (2 * step)


@pytest.mark.parametrize("eps", [EPS, 0.1])
def test_pre_equals_float64_formulas(eps):
    args = site((2 + M) * M)
    results = hc_pre(*args, **PRE | dict(eps=eps))
    for actual, expected in zip(results, pre_loop(*args, eps), strict=True):
        assert_close(actual, expected, FLOAT32)


def test_norm_eps_counts_for_small_streams():
    args = site((2 + M) * M)
    args[0] = args[0] * np.float32(1e-3)
    for actual, expected in zip(hc_pre(*args, **PRE), pre_loop(*args), strict=True):
        assert_close(actual, expected, FLOAT32)


@pytest.mark.parametrize("eps", [EPS, 0.1])
def test_head_equals_float64_formulas(eps):
    args = site(M)
    assert_close(hc_head(*args, **HEAD | dict(eps=eps)), head_loop(*args, eps), FLOAT32)


def test_post_equals_float64_formulas():
    args = mixing()
    assert_close(hc_post(*args), post_loop(*args), FLOAT32)


def test_stream_j_goes_where_row_j_of_comb_sends_it():
    f, streams, post, _ = mixing()
    comb = np.zeros((2, 3, M, M), np.float32)
    for j in range(M):
        comb[..., j, (j + 1) % M] = 1  # not symmetric: its transpose shifts the other way
    out = hc_post(f, streams, np.zeros_like(post), comb)
    np.testing.assert_array_equal(out, np.roll(streams, D, axis=-1))


def test_comb_logits_are_row_major():
    streams, fn, base, scale = site((2 + M) * M)
    fn, base = np.zeros_like(fn), np.zeros_like(base)
    for j in range(M):
        base[2 * M + M * j + (j + 1) % M] = 40
    _, _, comb = hc_pre(streams, fn, base, scale, **PRE)
    shift = np.roll(np.eye(M), 1, axis=1)
    np.testing.assert_allclose(comb, np.broadcast_to(shift, comb.shape), atol=10 * EPS)


@pytest.mark.parametrize("iters", [1, 2, 20])
def test_sinkhorn_equals_loop(iters):
    logits = 3 * np.random.default_rng(iters).standard_normal((3, 2, M, M)).astype(np.float32)
    expected = [[sinkhorn_loop(matrix, iters) for matrix in row] for row in logits]
    assert_close(sinkhorn(logits, iters, EPS), expected, FLOAT32)


def test_sinkhorn_ends_on_columns():
    logits = 4 * np.random.default_rng(0).standard_normal((5, M, M)).astype(np.float32)
    comb = np.asarray(sinkhorn(logits, 2, EPS), np.float64)  # far from converged
    np.testing.assert_allclose(comb.sum(axis=-2), 1, atol=3 * EPS)
    assert np.abs(comb.sum(axis=-1) - 1).max() > 0.01


def test_many_sinkhorn_iterations_make_a_doubly_stochastic_matrix():
    logits = np.random.default_rng(0).standard_normal((5, M, M)).astype(np.float32)
    comb = np.asarray(sinkhorn(logits, 20, EPS), np.float64)
    np.testing.assert_allclose(comb.sum(axis=-2), 1, atol=3 * EPS)
    np.testing.assert_allclose(comb.sum(axis=-1), 1, atol=3 * EPS)
    assert np.abs(comb - comb.swapaxes(-1, -2)).max() > 0.1


def test_results_for_bfloat16_streams_are_rounded_once():
    args = site((2 + M) * M, ml_dtypes.bfloat16)
    u, post, comb = hc_pre(*args, **PRE)
    expected_u, expected_post, expected_comb = pre_loop(*args)
    assert_rounded_once(u, expected_u)
    assert_close(post, expected_post, FLOAT32)  # coefficients stay float32
    assert_close(comb, expected_comb, FLOAT32)

    args = mixing(ml_dtypes.bfloat16)
    assert_rounded_once(hc_post(*args), post_loop(*args))
    args = site(M, ml_dtypes.bfloat16)
    assert_rounded_once(hc_head(*args, **HEAD), head_loop(*args))


@pytest.mark.parametrize(
    "op, truth, args",
    [
        (functools.partial(hc_pre, **PRE), pre_loop, site((2 + M) * M)),
        (hc_post, post_loop, mixing()),
        (functools.partial(hc_head, **HEAD), head_loop, site(M)),
    ],
    ids=["pre", "post", "head"],
)
def test_gradients_equal_central_differences(op, truth, args):
    """A few entries of each gradient of a weighted sum of the results."""
    rng = np.random.default_rng(4)
    d_out = [rng.standard_normal(np.shape(x)) for x in jax.tree.leaves(truth(*args))]

    def weighted_sum(op, args):
        return sum((x * d).sum() for x, d in zip(jax.tree.leaves(op(*args)), d_out))

    grads = jax.jit(jax.grad(functools.partial(weighted_sum, op)))(args)
    for which, grad in enumerate(grads):
        entries = [tuple(rng.integers(grad.shape)) for _ in range(6)]
        entries.append(np.unravel_index(np.argmax(np.abs(grad)), grad.shape))  # sets the measure
        expected = [derivative(lambda *a: weighted_sum(truth, a), args, which, i) for i in entries]
        assert_close([float(grad[i]) for i in entries], expected, GRADIENT_FLOAT32)


# The kernels, in the interpreter, against the reference --------------------------------------------


def arrays(shape: tuple[int, int, int], dtype) -> dict[str, tuple]:
    """Arguments of each operation for [B, T, D], coefficients far from uniform."""
    batch, length, d = shape
    rng = np.random.default_rng(5)

    def normal(*shape, size=1.0):
        return jnp.asarray(rng.standard_normal(shape) * size, jnp.float32)

    sizes = np.array([0.3, 1, 2, 5])[:, None]
    streams = normal(batch, length, M, d, size=sizes).reshape(batch, length, M * d).astype(dtype)
    f = normal(batch, length, d).astype(dtype)
    post = 2 * jax.nn.sigmoid(normal(batch, length, M))
    comb = jax.nn.softmax(normal(batch, length, M, M))
    fn = normal(M * d, (2 + M) * M, size=3 * (M * d) ** -0.5)
    base, scale = normal((2 + M) * M), jnp.array([0.7, 1.3, 1.9])
    return {
        "pre": (streams, fn, base, scale),
        "post": (f, streams, post, comb),
        "post_pre": (f, streams, post, comb, fn, base, scale),
        "head": (streams, fn[:, :M], base[:M], scale[:1]),
    }


OPS = {
    "pre": functools.partial(hyper_connections.hc_pre, **PRE),
    "post": hyper_connections.hc_post,
    "post_pre": functools.partial(hyper_connections.hc_post_pre, **PRE),
    "head": functools.partial(hyper_connections.hc_head, **HEAD),
}


@functools.partial(jax.jit, static_argnames=("op", "implementation"))
def with_gradients(d_out, args, *, op, implementation):
    out, vjp = jax.vjp(functools.partial(OPS[op], implementation=implementation), *args)
    return out, vjp(d_out)


def cotangents(op: str, args: tuple):
    rng = np.random.default_rng(6)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype),
        jax.eval_shape(OPS[op], *args),
    )


def compare(op: str, args: tuple, implementation: str, tolerance: float, grad_tolerance: float):
    d_out = cotangents(op, args)
    actual = with_gradients(d_out, args, op=op, implementation=implementation)
    expected = with_gradients(d_out, args, op=op, implementation="reference")
    for one, other in zip(jax.tree.leaves(actual[0]), jax.tree.leaves(expected[0]), strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other, tolerance)
    for one, other in zip(actual[1], expected[1], strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other, grad_tolerance)


@pytest.mark.parametrize(
    "op, shape",
    [
        *((op, (2, 9, 256)) for op in ("pre", "post", "head")),
        ("post_pre", (1, 1, 128)),
        ("post_pre", (2, 75, 128)),  # two blocks, the second ragged
    ],
    ids=str,
)
def test_kernel_equals_reference(op, shape):
    args = arrays(shape, jnp.float32)[op]
    compare(op, args, "interpret", FLOAT32, GRADIENT_FLOAT32)


@pytest.mark.parametrize(
    "implementation, length", [("xla", 20), ("interpret", 20), ("interpret", 150)]
)
def test_bfloat16_streams_equal_reference(implementation, length):
    """Of 20 tokens the kernel cuts `fn` itself, of 150 XLA does."""
    args = arrays((1, length, 256), jnp.bfloat16)["post_pre"]
    compare("post_pre", args, implementation, BFLOAT16, BFLOAT16)


@pytest.mark.parametrize("op", list(OPS))
def test_xla_equals_reference(op):
    compare(op, arrays((2, 5, 24), jnp.float32)[op], "xla", FLOAT32, GRADIENT_FLOAT32)


def test_kernel_rounds_bfloat16_results_once():
    args = arrays((1, 20, 256), jnp.bfloat16)["post_pre"]
    f, streams, post, comb, *site = args

    mixed, u, new_post, new_comb = hc_post_pre(*args, **PRE, implementation="interpret")

    x = np.asarray(streams, np.float64).reshape(1, 20, M, -1)
    exact = np.einsum("btjk,btjd->btkd", np.asarray(comb, np.float64), x)
    exact += np.asarray(post, np.float64)[..., None] * np.asarray(f, np.float64)[:, :, None]
    assert_rounded_once(mixed, exact.reshape(streams.shape))
    # The next site reads the rounded streams, with float32 coefficients.
    expected = hc_pre(mixed, *site, **PRE, implementation="reference")
    np.testing.assert_array_equal(u, expected[0])
    for actual, other in zip((new_post, new_comb), expected[1:]):
        assert_close(actual, other, FLOAT32)


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_numbers_that_are_not_finite_stay_with_their_token(dtype, implementation):
    """The kernel mixes 16 tokens by one product, with zeros between them."""
    f, streams, post, comb, *site = arrays((1, 40, 128), dtype)["post_pre"]
    run = jax.jit(functools.partial(hc_post_pre, **PRE, implementation=implementation))
    clean = run(f, streams, post, comb, *site)

    f = f.at[0, 3, 5].set(jnp.inf)
    streams = streams.at[0, 18, 2 * 128 + 7].set(jnp.nan)
    post = post.at[0, 33].set(jnp.nan)
    found = run(f, streams, post, comb, *site)

    others = np.setdiff1d(np.arange(40), [3, 18, 33])
    for one, other in zip(found, clean, strict=True):
        np.testing.assert_array_equal(one[:, others], other[:, others])
    mixed = np.asarray(found[0], np.float32).reshape(40, M, 128)
    assert not np.isfinite(mixed[3, :, 5]).any() and np.isfinite(mixed[3, :, 6]).all()
    assert np.isnan(mixed[18, :, 7]).all() and np.isfinite(mixed[18, :, 8]).all()
    assert np.isnan(mixed[33]).all()


def test_fused_equals_one_after_the_other():
    args = arrays((2, 3, 24), jnp.float32)["post_pre"]
    f, streams, post, comb, *site = args
    mixed = hc_post(f, streams, post, comb)
    expected = mixed, *hc_pre(mixed, *site, **PRE)
    for actual, other in zip(hc_post_pre(*args, **PRE), expected, strict=True):
        assert_close(actual, other, FLOAT32)


@pytest.mark.parametrize(
    "op, position, shape, message",
    [
        ("pre", 0, (2, 96), r"streams \(2, 96\) must be \[B, T, M \* D\]"),
        ("pre", 1, (96, 4), r"fn \(96, 4\).*must be \[M \* D, 24\], \[24\] and \[3\]"),
        ("head", 3, (3,), r"scale \(3,\) must be"),
        ("post", 0, (2, 5, 12), r"f \(2, 5, 12\) float32 must be \[B, T, D\]"),
        ("post_pre", 3, (2, 5, 4), r"comb \(2, 5, 4\) must be"),
    ],
)
def test_bad_shapes_are_refused(op, position, shape, message):
    args = list(arrays((2, 5, 24), jnp.float32)[op])
    args[position] = jnp.zeros(shape)
    with pytest.raises(ValueError, match=message):
        OPS[op](*args)


def test_kernels_say_what_they_cannot_take():
    for shape, message in [((1, 2, 24), "multiple of 128"), ((1, 0, 128), "no tokens")]:
        args = arrays(shape, jnp.float32)["post"]
        with pytest.raises(ValueError, match=message):
            hyper_connections.hc_post(*args, implementation="interpret")
        hyper_connections.hc_post(*args)  # None falls back
