"""Attention against one explicit softmax per query, in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.attention import (
    block_sizes,
    decode_attention,
    selected_attention,
    selected_mass,
    window_attention,
    xla,
)
from pallas_kernels.formats.pages import Pages
from pallas_kernels.selection import Selection
from tests.tolerances import BFLOAT16, FLOAT32, GRADIENT_FLOAT32, assert_close

N, H = 2, 8
SCALE = H**-0.5
# Block sizes under which a few dozen queries and entries take several blocks and chunks.
SMALL_BLOCKS = (32, 16)
MODULE_BLOCKS = (xla.BLOCK_QUERIES, xla.BLOCK_ENTRIES)
KERNEL_BLOCKS = (256, 64, 128)  # rows (two heads count as eight), rows of a chunk, entries


KERNEL_WINDOW_CASES = [
    (1, 8, 0, 1, (0, 5)),
    (7, 16, 5, 4, (0, 30)),  # window longer than the row's past, and not
    (33, 8, 0, 1, (3, 0)),
    (70, 130, 300, 2, (0, 700)),  # no visible entry, all of them, a padded block of each kind
]
KERNEL_SELECTED_CASES = [
    (1, 8, 5, 3, 128),
    (70, 16, 300, 12, 128),
    (18, 8, 4300, 9, 2048),  # more entries than a row of words
]


def visible_entries(positions, num_entries: int, ratio: int) -> list[list[np.ndarray]]:
    """The entries whose last token is not after the query, for each query."""
    return [[np.arange(min((p + 1) // ratio, num_entries)) for p in row] for row in positions]


def chosen_entries(indices) -> list[list[np.ndarray]]:
    return [[row[row >= 0] for row in rows] for rows in indices]


def attend(q, window, entries, sink, positions, chosen):
    """out and log of the denominator. `chosen[b][t]` are the entries query t of row b visits."""
    size = window.shape[1] - q.shape[1]
    out, log_denominator = np.zeros(q.shape), np.zeros(q.shape[:3])
    for b, t in np.ndindex(*positions.shape):
        num_near = min(size, positions[b, t] + 1)  # the query's own row and those before it
        near = window[b, size + t - num_near + 1 : size + t + 1]
        keys = np.concatenate([near, entries[b, chosen[b][t]]]).astype(np.float64)
        scores = SCALE * q[b, t].astype(np.float64) @ keys.T  # [N, keys]
        peak = np.maximum(scores.max(axis=1), sink)
        p = np.exp(scores - peak[:, None])
        denominator = p.sum(axis=1) + np.exp(sink - peak)
        out[b, t] = p @ keys / denominator[:, None]
        log_denominator[b, t] = peak + np.log(denominator)
    return out, log_denominator


def inputs(num_queries, size, num_entries, starts, dtype=np.float32):
    """q, window, entries, sink, positions; queries follow each row's start."""
    rng = np.random.default_rng(num_queries + num_entries)
    shapes = ((2, num_queries, N, H), (2, size + num_queries, H), (2, num_entries, H))
    q, window, entries = (rng.standard_normal(shape) for shape in shapes)
    sink = np.array([1.0, -0.5], np.float32)
    positions = np.asarray(starts, np.int32)[:, None] + np.arange(num_queries, dtype=np.int32)
    return (2 * q).astype(dtype), window.astype(dtype), entries.astype(dtype), sink, positions


def picks(num_queries: int, num_entries: int, num_picked: int) -> np.ndarray:
    """Distinct indices with -1 anywhere among them; the first query picks nothing."""
    rng = np.random.default_rng(11)
    rows = [rng.permutation(num_entries)[:num_picked] for _ in range(2 * num_queries)]
    indices = np.stack(rows).astype(np.int32)
    indices[rng.random(indices.shape) < 0.25] = -1
    indices = indices.reshape(2, num_queries, num_picked)
    indices[:, 0] = -1
    return indices


def cotangents(q) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    d_out, d_lse = rng.standard_normal(q.shape), rng.standard_normal(q.shape[:3])
    return d_out.astype(np.float32), d_lse.astype(np.float32)


def value_and_gradients(implementation, args, d_out, d_lse, indices=None, ratio=1, first=None):
    """(out, log denominator) and gradients of q, window, entries, sink."""
    *args, positions = args

    @jax.jit  # anew each time: the block sizes count when it is traced
    def run(args, d_out, d_lse):
        static = dict(scale=SCALE, implementation=implementation)

        def op(q, window, entries, sink):
            if indices is None:
                static["ratio"] = ratio
                return window_attention(q, window, entries, sink, positions, first, **static)
            selection = Selection.of_indices(jnp.asarray(indices), entries.shape[1])
            return selected_attention(q, window, entries, selection, sink, positions, **static)

        out, vjp = jax.vjp(op, *args)
        return out, vjp((d_out.astype(out[0].dtype), d_lse))

    return run(args, d_out, d_lse)


def set_blocks(monkeypatch, blocks: tuple[int, int]):
    monkeypatch.setattr(xla, "BLOCK_QUERIES", blocks[0])
    monkeypatch.setattr(xla, "BLOCK_ENTRIES", blocks[1])


@pytest.fixture
def kernel_blocks(monkeypatch):
    """Several blocks and chunks of the kernel for a few dozen queries."""
    for table in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(block_sizes, table, {"v6e": KERNEL_BLOCKS})
    return monkeypatch


def assert_all_close(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, tolerance)


def check(args, chosen, implementation="xla", **kwargs):
    """Values against the loop, and gradients against the reference's."""
    expected = attend(*args, chosen)
    gradients = []
    for each in ("reference", implementation):
        values, grads = value_and_gradients(each, args, *cotangents(args[0]), **kwargs)
        assert_all_close(values, expected, FLOAT32)
        gradients.append(grads)
    assert_all_close(gradients[1], gradients[0], GRADIENT_FLOAT32)


@pytest.mark.parametrize(
    "num_queries, size, num_entries, ratio, starts, blocks",
    [
        (1, 8, 0, 1, (0, 5), MODULE_BLOCKS),
        (1, 8, 5, 4, (0, 19), MODULE_BLOCKS),  # no visible entry; all of them
        (7, 16, 0, 1, (0, 30), MODULE_BLOCKS),  # window longer than the row's past, and not
        (7, 8, 5, 4, (0, 9), MODULE_BLOCKS),
        (129, 16, 80, 4, (0, 200), MODULE_BLOCKS),
        (129, 8, 0, 1, (3, 0), SMALL_BLOCKS),
        (129, 8, 5, 128, (100, 511), SMALL_BLOCKS),
        (300, 16, 80, 4, (0, 37), SMALL_BLOCKS),
        (300, 8, 5, 128, (0, 400), MODULE_BLOCKS),
    ],
)
def test_window_attention_equals_float64_loop(
    num_queries, size, num_entries, ratio, starts, blocks, monkeypatch
):
    set_blocks(monkeypatch, blocks)
    args = inputs(num_queries, size, num_entries, starts)
    check(args, visible_entries(args[-1], num_entries, ratio), ratio=ratio)


def test_documents_of_a_row_do_not_see_each_other(monkeypatch):
    """Documents that begin in a block of queries, inside it and with a chunk; one has no entry."""
    set_blocks(monkeypatch, SMALL_BLOCKS)
    *args, _ = inputs(300, 16, 75, (0, 0))
    begins = np.array([[0, 64, 160, 164], [0, 4, 96, 292]])
    at = np.arange(300)
    starts = np.stack([row[np.searchsorted(row, at, side="right") - 1] for row in begins])
    positions, first = (at - starts).astype(np.int32), (starts // 4).astype(np.int32)
    chosen = [[f + np.arange((p + 1) // 4) for f, p in zip(*row)] for row in zip(first, positions)]
    check((*args, positions), chosen, ratio=4, first=first)
    static = dict(ratio=4, scale=SCALE)
    with pytest.raises(ValueError, match="rows of one document, without `first`"):
        window_attention(*args, positions, first, implementation="interpret", **static)
    with pytest.raises(ValueError, match=r"first \(2, 2\) must be \(2, 300\)"):
        window_attention(*args, positions, first[:, :2], **static)


@pytest.mark.parametrize(
    "num_queries, size, num_entries, num_picked, starts, blocks",
    [
        (1, 8, 5, 3, (0, 40), MODULE_BLOCKS),
        (7, 16, 5, 5, (2, 9), MODULE_BLOCKS),
        (129, 8, 80, 6, (0, 321), MODULE_BLOCKS),
        (300, 16, 80, 12, (0, 37), SMALL_BLOCKS),
    ],
)
def test_selected_attention_equals_float64_loop(
    num_queries, size, num_entries, num_picked, starts, blocks, monkeypatch
):
    set_blocks(monkeypatch, blocks)
    args = inputs(num_queries, size, num_entries, starts)
    indices = picks(num_queries, num_entries, num_picked)
    check(args, chosen_entries(indices), indices=indices)


@pytest.mark.parametrize("num_queries, size, num_entries, ratio, starts", KERNEL_WINDOW_CASES)
def test_kernel_of_window_attention(num_queries, size, num_entries, ratio, starts, kernel_blocks):
    args = inputs(num_queries, size, num_entries, starts)
    chosen = visible_entries(args[-1], num_entries, ratio)
    check(args, chosen, "interpret", ratio=ratio)


@pytest.mark.parametrize("num_queries, size, num_entries, num_picked, block", KERNEL_SELECTED_CASES)
def test_kernel_of_selected_attention(
    num_queries, size, num_entries, num_picked, block, kernel_blocks
):
    kernel_blocks.setattr(block_sizes, "FORWARD", {"v6e": (*KERNEL_BLOCKS[:2], block)})
    args = inputs(num_queries, size, num_entries, (0, 37))
    indices = picks(num_queries, num_entries, num_picked)
    check(args, chosen_entries(indices), "interpret", indices=indices)


def test_kernel_over_all_heads_of_a_model(kernel_blocks):
    """As many heads as lanes: no head is padded."""
    for table in ("FORWARD", "BACKWARD"):
        kernel_blocks.setattr(block_sizes, table, {"v6e": (2048, 1024, 128)})
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((1, 17, 128, 8), (1, 8 + 17, 8), (1, 9, 8))
    q, window, entries = (jax.random.normal(k, s) for k, s in zip(keys, shapes))
    sink, positions = jnp.linspace(-1, 1, 128), jnp.arange(3, 20, dtype=jnp.int32)[None]
    args = (q, window, entries, sink, positions)
    outs = [
        value_and_gradients(implementation, args, *cotangents(q), ratio=2)
        for implementation in ("interpret", "reference")
    ]
    assert_all_close(*map(jax.tree.leaves, outs), GRADIENT_FLOAT32)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_no_index_at_all_leaves_the_window(implementation):
    args = inputs(7, 8, 5, (0, 40))
    indices = np.full((2, 7, 3), -1, np.int32)
    check(args, chosen_entries(indices), implementation, indices=indices)
    _, grads = value_and_gradients(implementation, args, *cotangents(args[0]), indices=indices)
    np.testing.assert_array_equal(grads[2], 0)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_selected_attention_of_a_sequence_too_short_for_any_entry(implementation):
    args = inputs(3, 8, 0, (0, 0))
    indices = np.zeros((2, 3, 0), np.int32)
    check(args, chosen_entries(indices), implementation, indices=indices)


def test_bits_and_indices_are_the_same_selection():
    *args, positions = inputs(7, 8, 20, (0, 40))
    selection = Selection.of_indices(jnp.asarray(picks(7, 20, 6)), 20)
    bits = Selection.of_mask(selection.mask(), 6)
    for implementation in ("xla", "reference"):
        outs = [
            selected_attention(
                *(*args[:3], s, args[3], positions), scale=SCALE, implementation=implementation
            )
            for s in (selection, bits)
        ]
        assert_all_close(*outs, FLOAT32)


def test_selected_mass_of_a_sequence_too_short_for_any_entry():
    q, _, entries, _, _ = inputs(3, 8, 0, (0, 0))
    indices, log_denominator = np.zeros((2, 3, 0), np.int32), np.zeros((2, 3, N), np.float32)
    assert selected_mass(q, entries, indices, log_denominator, scale=SCALE).shape == (2, 3, 0)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("op", ["window", "selected"])
def test_gradients_equal_central_differences(op, implementation, monkeypatch):
    set_blocks(monkeypatch, (8, 4))
    args = inputs(21, 8, 10, (0, 17))
    d_out, d_lse = cotangents(args[0])
    if op == "window":
        chosen, kwargs = visible_entries(args[-1], 10, 4), dict(ratio=4)
    else:
        indices = picks(21, 10, 4)
        chosen, kwargs = chosen_entries(indices), dict(indices=indices)
    _, grads = value_and_gradients(implementation, args, d_out, d_lse, **kwargs)

    def truth(*args):
        out, log_denominator = attend(*args, chosen)
        return np.sum(out * d_out) + np.sum(log_denominator * d_lse)

    rng = np.random.default_rng(2)
    step = 1e-5
    for which, grad in enumerate(grads):
        entries = [tuple(rng.integers(grad.shape)) for _ in range(8)]
        entries.append(np.unravel_index(np.argmax(np.abs(grad)), grad.shape))  # sets the measure
        expected = []
        for entry in entries:
            moved = [[x.astype(np.float64) for x in args[:4]] for _ in range(2)]
            moved[0][which][entry] += step
            moved[1][which][entry] -= step
            expected.append((truth(*moved[0], args[4]) - truth(*moved[1], args[4])) / (2 * step))
        assert_close([float(grad[entry]) for entry in entries], expected, GRADIENT_FLOAT32)


@pytest.mark.parametrize(
    "num_queries, sinks",
    [
        (32, (8.0, -8.0)),
        (33, (8.0, -8.0)),  # the last block is padded
        (32, (100.0, -1000.0)),
        (33, (100.0, -1000.0)),
        (32, (1e4, 0.0)),
        (33, (1e4, 0.0)),
    ],
    ids=str,
)
def test_sinks_far_from_all_scores(num_queries, sinks, monkeypatch):
    set_blocks(monkeypatch, (16, 4))
    *args, _, positions = inputs(num_queries, 8, 10, (0, 17))
    args = (*args, np.asarray(sinks, np.float32), positions)
    check(args, visible_entries(positions, 10, 4), ratio=4)


@pytest.mark.parametrize("sinks", [(100.0, -1000.0), (1e4, 0.0)], ids=str)
def test_kernel_with_sinks_far_from_all_scores(sinks):
    *args, _, positions = inputs(7, 8, 10, (0, 17))
    args = (*args, np.asarray(sinks, np.float32), positions)
    check(args, visible_entries(positions, 10, 4), "interpret", ratio=4)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_scores_far_from_zero_and_far_from_each_other(implementation, monkeypatch):
    set_blocks(monkeypatch, (4, 2))
    q, window, entries, sink, positions = inputs(9, 8, 10, (0, 40))
    # Multiples of 1/4: scores of a few hundred are then exact sums, apart from the scale.
    q, window, entries = (np.round(x * 4) / 4 for x in (q * 20, window, entries))
    entries *= np.arange(1, 11, dtype=np.float32)[:, None]  # each chunk surpasses those before it
    args = (q, window, entries, sink, positions)
    chosen = visible_entries(positions, 10, 4)
    expected = attend(*args, chosen)
    assert expected[1].max() > 400
    values, grads = value_and_gradients(implementation, args, *cotangents(q), ratio=4)
    assert_all_close(values, expected, FLOAT32)
    _, expected_grads = value_and_gradients("reference", args, *cotangents(q), ratio=4)
    assert_all_close(grads, expected_grads, GRADIENT_FLOAT32)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("op", ["window", "selected"])
def test_bfloat16(op, implementation, monkeypatch):
    set_blocks(monkeypatch, SMALL_BLOCKS)
    args = inputs(70, 16, 20, (0, 37), ml_dtypes.bfloat16)
    if op == "window":
        chosen, kwargs = visible_entries(args[-1], 20, 4), dict(ratio=4)
    else:
        indices = picks(70, 20, 6)
        chosen, kwargs = chosen_entries(indices), dict(indices=indices)
    cots = [d.astype(ml_dtypes.bfloat16).astype(np.float32) for d in cotangents(args[0])]
    (out, log_denominator), grads = value_and_gradients(implementation, args, *cots, **kwargs)
    assert out.dtype == jnp.bfloat16 and log_denominator.dtype == jnp.float32
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 3 + [jnp.float32]
    expected, expected_log_denominator = attend(*args, chosen)
    assert_close(out, expected, BFLOAT16)
    assert_close(log_denominator, expected_log_denominator, FLOAT32)  # products are exact
    wide = (*(x.astype(np.float32) for x in args[:4]), args[4])
    _, expected_grads = value_and_gradients("reference", wide, *cots, **kwargs)
    assert_all_close(grads, expected_grads, BFLOAT16)


def ring_case(positions, num_entries: int, size: int = 8):
    """A history per row, its ring (unwritten rows hold rubbish), and the same as a window."""
    rng = np.random.default_rng(9)
    batch = len(positions)
    ring = np.full((batch, size, H), 1e3, np.float32)
    window = np.zeros((batch, size + 1, H), np.float32)
    for b, position in enumerate(positions):
        history = rng.standard_normal((position + 1, H)).astype(np.float32)
        for t in range(position + 1):
            ring[b, t % size] = history[t]
            if t > position - size:
                window[b, size - (position - t)] = history[t]
    q = 2 * rng.standard_normal((batch, N, H)).astype(np.float32)
    entries = rng.standard_normal((batch, num_entries, H)).astype(np.float32)
    return q, ring, window, entries, np.array([1.0, -0.5], np.float32)


@pytest.mark.parametrize("num_entries, ratio", [(0, 1), (80, 4), (3, 128)])
def test_decoding_over_a_ring_equals_attention_to_the_history(num_entries, ratio):
    # Before the ring is full, as it fills, just after it wraps, and well after.
    positions = np.array([0, 3, 7, 8, 21, 300], np.int32)
    q, ring, window, entries, sink = ring_case(positions, num_entries)
    chosen = visible_entries(positions[:, None], num_entries, ratio)
    for b, (visible,) in enumerate(chosen):
        entries[b, len(visible) :] = 1e3  # not written yet
    expected, _ = attend(q[:, None], window, entries, sink, positions[:, None], chosen)
    decode = functools.partial(decode_attention, ratio=ratio, scale=SCALE)
    pages = Pages.of(entries) if entries.shape[1] else None
    out = jax.jit(decode)(q, ring, pages, None, sink, positions)
    assert_close(out, expected[:, 0], FLOAT32)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
def test_decoding_with_selected_entries_equals_attention_to_the_history(dtype):
    positions = np.array([0, 7, 8, 21], np.int32)
    q, ring, window, entries, sink = ring_case(positions, 5)
    q, ring, window, entries = (x.astype(dtype) for x in (q, ring, window, entries))
    indices = np.array([[-1, -1, -1], [1, -1, 0], [-1, 1, -1], [4, 0, 2]], np.int32)
    chosen = chosen_entries(indices[:, None])
    expected, _ = attend(q[:, None], window, entries, sink, positions[:, None], chosen)
    decode = functools.partial(decode_attention, ratio=4, scale=SCALE)
    out = jax.jit(decode)(q, ring, Pages.of(entries), indices, sink, positions)
    assert out.dtype == dtype
    assert_close(out, expected[:, 0], FLOAT32 if dtype == np.float32 else BFLOAT16)


def test_selected_mass_is_the_probability_of_each_entry_summed_over_heads(monkeypatch):
    set_blocks(monkeypatch, SMALL_BLOCKS)
    q, window, entries, sink, positions = inputs(70, 8, 20, (0, 37))
    indices = picks(70, 20, 6)
    args = (q, window, entries, sink, positions)
    _, log_denominator = attend(*args, chosen_entries(indices))
    expected = np.zeros(indices.shape)
    for b, t, k in np.ndindex(*indices.shape):
        if indices[b, t, k] >= 0:
            scores = SCALE * q[b, t].astype(np.float64) @ entries[b, indices[b, t, k]]
            expected[b, t, k] = np.exp(scores - log_denominator[b, t]).sum()
    mass = jax.jit(functools.partial(selected_mass, scale=SCALE))
    actual = mass(q, entries, indices, log_denominator.astype(np.float32))
    assert_close(actual, expected, FLOAT32)
    np.testing.assert_array_equal(actual[indices < 0], 0)


def temporary_bytes(num_queries: int, implementation: str, *, backward: bool) -> int:
    """Temporary memory of selected attention; entries and picks stay as they are."""
    static = dict(scale=SCALE, implementation=implementation)
    shape = jax.ShapeDtypeStruct
    floats = [
        shape((1, num_queries, N, H), jnp.float32),
        shape((1, 16 + num_queries, H), jnp.float32),
        shape((1, 64, H), jnp.float32),
        shape((N,), jnp.float32),
    ]
    integers = [shape((1, num_queries, n), jnp.int32) for n in (4, 1)]

    def forward(floats, integers):
        q, window, entries, sink = floats
        indices, positions = integers
        selection = Selection.of_indices(indices, 64)
        return selected_attention(q, window, entries, selection, sink, positions[..., 0], **static)

    def loss(floats, integers):
        return sum(jnp.sum(x) for x in forward(floats, integers))

    compiled = jax.jit(jax.grad(loss) if backward else forward).lower(floats, integers).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_grows_linearly_with_the_number_of_queries(backward):
    few, many = (temporary_bytes(t, "xla", backward=backward) for t in (512, 1024))
    assert many < 2.2 * few
    # What the reference, which forms [T, T] arrays, needs: the numbers are not idle.
    few, many = (temporary_bytes(t, "reference", backward=backward) for t in (512, 1024))
    assert many > 3 * few


SHAPES = dict(q=(2, 7, 3, 8), window=(2, 15, 8), entries=(2, 5, 8), sink=(3,), positions=(2, 7))


@pytest.mark.parametrize(
    "replace, message",
    [
        (dict(q=(2, 7, 8)), r"must be \[B, T, N, H\]"),
        (dict(window=(2, 15, 9)), "must have q's batch 2 and width 8"),
        (dict(entries=(1, 5, 8)), "must have q's batch 2 and width 8"),
        (dict(window=(2, 7, 8)), "window has 7 rows for 7 queries"),
        (dict(sink=(2,)), "N=3 heads"),
        (dict(positions=(2, 8)), r"positions \(2, 8\) must be \(2, 7\)"),
    ],
)
def test_shapes_that_do_not_agree_are_refused(replace, message):
    args = {name: jnp.zeros(shape) for name, shape in (SHAPES | replace).items()}
    with pytest.raises(ValueError, match=message):
        window_attention(**args, ratio=4, scale=1.0)
    with pytest.raises(ValueError, match=message):
        selection = Selection.of_indices(jnp.zeros((2, 7, 2), jnp.int32), 5)
        selected_attention(**args, selection=selection, scale=1.0)


@pytest.mark.parametrize("shape, num_entries", [((2, 6, 3), 5), ((1, 7, 3), 5), ((2, 7, 3), 6)])
def test_selections_of_another_shape_are_refused(shape, num_entries):
    args = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    selection = Selection.of_indices(jnp.zeros(shape, jnp.int32), num_entries)
    with pytest.raises(ValueError, match=r"selection, for .*, must be for \[B, T\] of q"):
        selected_attention(**args, selection=selection, scale=1.0)


@pytest.mark.parametrize(
    "replace, message",
    [
        (dict(q=jnp.zeros((2, 7, 3, 8), jnp.bfloat16)), "have dtypes bfloat16, float32 and float"),
        (dict(q=jnp.zeros((2, 7, 129, 8)), sink=jnp.zeros(129)), "up to 128 heads, not 129"),
    ],
    ids=["dtype", "heads"],
)
def test_what_the_kernel_does_not_take_is_named(replace, message):
    args = {name: jnp.zeros(shape) for name, shape in SHAPES.items()} | replace
    with pytest.raises(ValueError, match=message):
        window_attention(**args, ratio=4, scale=1.0, implementation="interpret")


def test_unknown_implementation_is_refused():
    args = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    with pytest.raises(ValueError, match="implementation='pallas': expected one of"):
        window_attention(**args, ratio=4, scale=1.0, implementation="pallas")
