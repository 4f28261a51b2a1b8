"""Decode attention: kernel (in the interpreter) and XLA form against the reference.

Entries lie in shuffled pages, in a pool where all else is no number; for the reference, side by side.
That the reference is attention to a history is tested in `test_attention.py`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.attention import decode_attention, tpu_decode
from pallas_kernels.formats import tpu_pages
from pallas_kernels.formats.packed_rows import PackedColumns, PackedRows
from pallas_kernels.formats.pages import Pages, table_limit
from pallas_kernels.formats.quantize import round_fp8
from tests.paged import paged
from tests.tolerances import BFLOAT16, FLOAT32, assert_close

IMPLEMENTATIONS = ["interpret", "xla"]
TOLERANCE = {jnp.float32: FLOAT32, jnp.bfloat16: BFLOAT16}
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])


def inputs(batch, num_heads, width, ring, num_entries, num_picked, dtype=jnp.float32):
    """q, window, entries, indices (None for num_picked=None), sink."""
    keys = jax.random.split(jax.random.key(num_entries or 0), 3)
    shapes = [(batch, num_heads, width), (batch, ring, width), (batch, num_entries or 0, width)]
    q, window, entries = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes))
    entries = None if num_entries is None else entries
    indices = None
    if num_picked is not None:
        rng = np.random.default_rng(3)
        indices = [rng.permutation(num_entries)[:num_picked] for _ in range(batch)]
        indices = np.array(indices, np.int32).reshape(batch, num_picked)
        indices[rng.random(indices.shape) < 0.2] = -1
    return 2 * q, window, entries, indices, jnp.linspace(-1.0, 2.0, num_heads)


def run(implementation, args, positions, ratio=4):
    """Entries [B, S, H] of `args` are put into pages; None and pages are taken as they are."""
    q, window, entries, indices, sink = args
    scale = q.shape[-1] ** -0.5
    decode = functools.partial(
        decode_attention, ratio=ratio, scale=scale, implementation=implementation
    )
    if isinstance(entries, jax.Array):
        is_clean = implementation == "reference"
        entries = Pages.of(entries) if is_clean else paged(entries, entries.dtype)
    positions = np.asarray(positions, np.int32)
    return jax.jit(decode)(q, window, entries, indices, sink, positions)


def check(implementation, args, positions, ratio=4):
    if args[2] is not None:  # no more are visible than there are
        positions = np.minimum(positions, ratio * (args[2].shape[1] + 1) - 2)
    wide = [x if x is None or x.dtype != jnp.bfloat16 else x.astype(jnp.float32) for x in args]
    out = run(implementation, args, positions, ratio)
    assert out.dtype == args[0].dtype
    expected = run("reference", wide, positions, ratio)
    assert_close(out, expected, BFLOAT16 if out.dtype == jnp.bfloat16 else FLOAT32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "num_heads, width, ring, num_entries, ratio, positions, dtype",
    [
        (4, 96, 16, None, 1, (0, 40), jnp.float32),  # a window alone; a ring of one row
        (4, 128, 64, 5, 4, (2, 19), jnp.bfloat16),  # no visible entry; all of them
        (
            3,
            128,
            7,
            130,
            128,
            (127, 20000),
            jnp.float32,
        ),  # ragged ring, one entry, a page and a bit
        (1, 256, 16, 2500, 4, (4095, 9999), jnp.bfloat16),  # the first block just full; several
        (2, 128, 16, 4500, 4, (9, 17999), jnp.float32),  # more blocks than are held at once
    ],
)
def test_every_visible_entry(
    num_heads, width, ring, num_entries, ratio, positions, dtype, implementation
):
    args = inputs(2, num_heads, width, ring, num_entries, None, dtype)
    check(implementation, args, positions, ratio)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@DTYPES
@pytest.mark.parametrize(
    "num_entries, num_picked", [(5, 0), (5, 3), (300, 128), (512, 200), (1300, 1040)]
)
def test_picked_entries(num_entries, num_picked, dtype, implementation):
    args = inputs(2, 4, 128, 16, num_entries, num_picked, dtype)
    check(implementation, args, (3, 4 * num_entries))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, PackedRows])
def test_picks_of_a_long_sequence(dtype, implementation):
    """Past 65,536 entries, and past 128 pages, which are a register's lanes. Pages are used again."""
    num_entries, order = 140000, np.random.default_rng(0).integers(0, 12, 1100, np.int32)
    rows = round_nope(jax.random.normal(jax.random.key(0), (1, 12 * 128, 512), jnp.bfloat16))
    pool = pack(rows, 64) if dtype is PackedRows else rows.astype(dtype)
    q, window, _, _, sink = inputs(1, 2, 512, 16, 1, None, jnp.bfloat16)
    args = [q, window] if dtype is PackedRows else [x.astype(dtype) for x in (q, window)]
    picks = np.array([0, 127, 128, 16383, 16384, 65535, 65536, num_entries - 1])
    indices = np.array([[*picks, *[-1] * 120]], np.int32)
    found = rows[:, order[picks // 128] * 128 + picks % 128].astype(jnp.float32)
    table = jnp.asarray(order)[None]
    near = np.array([[*range(len(picks)), *[-1] * 120]], np.int32)
    position = [4 * num_entries]
    out = run(implementation, [*args, Pages(pool, table), indices, sink], position)
    wide = [x.astype(jnp.float32) for x in (q, window)]
    expected = run("reference", [*wide, found, near, sink], position)
    assert_close(out, expected, FLOAT32 if out.dtype == jnp.float32 else BFLOAT16)


@pytest.mark.parametrize("kind", [jnp.bfloat16, PackedColumns])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sequences_of_different_length_under_a_table_wider_than_any(kind, implementation):
    """No entry, a page less one, a page, three blocks and a bit; what is behind is no number."""
    counts = np.array([0, 127, 128, 3200, 1, 1024])
    q, window, rows, _, sink = inputs(6, 4, 512, 16, 3200, None, jnp.bfloat16)
    rows = round_nope(rows)
    is_held = (np.arange(3200) < counts[:, None])[..., None]
    pages = paged(jnp.where(is_held, rows, jnp.nan), kind, wider=9)
    positions = 4 * counts
    out = run(implementation, [q, window, pages, None, sink], positions)
    wide = [x.astype(jnp.float32) for x in (q, window, rows)]
    assert_close(out, run("reference", [*wide, None, sink], positions), BFLOAT16)
    for b in (2, 3):  # alone
        one = Pages(pages.pool, pages.table[b : b + 1])
        alone = run(implementation, [q[b:][:1], window[b:][:1], one, None, sink], positions[b:][:1])
        np.testing.assert_array_equal(alone, out[b : b + 1])


@pytest.mark.parametrize("kind", [jnp.float32, PackedRows])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_entry_picked(kind, implementation):
    """Nor does the first page, which copies of none are of, hold numbers."""
    q, window, _, _, sink = inputs(2, 4, 512, 16, 256, 128)
    none = np.full((2, 128), -1, np.int32)
    pages = paged(jnp.full((2, 256, 512), jnp.nan), kind)
    dtype = jnp.float32 if kind is jnp.float32 else jnp.bfloat16
    args = [q.astype(dtype), window.astype(dtype), pages, none, sink]
    expected = run("reference", [q, window, None, None, sink], (3, 40))
    tolerance = TOLERANCE[dtype]
    assert_close(run(implementation, args, (3, 40)), expected, tolerance)


def test_a_chip_of_two_cores_computes_every_sequence(monkeypatch):
    """Five sequences: the second core has two, and one of them again."""
    args = inputs(5, 4, 128, 16, 2500, None)
    picked = [*args[:3], inputs(5, 4, 128, 16, 2500, 128)[3], args[4]]
    positions = (9, 5000, 9999, 700, 8191)
    expected = [run("interpret", x, positions) for x in (args, picked)]
    monkeypatch.setattr(dispatch, "target_chip", lambda: "v5p")
    assert tpu_pages.grid_of(5).shape == (2, 3)
    for x, values in zip((args, picked), expected):
        np.testing.assert_array_equal(run("interpret", x, positions), values)


@pytest.mark.parametrize("sinks", [(100.0, -1000.0, 0.0, 1e4), (-1e4, 8.0, -8.0, 30.0)])
def test_sinks_far_from_all_scores(sinks):
    args = [*inputs(2, 4, 128, 16, 130, None)[:4], jnp.asarray(sinks)]
    for implementation in IMPLEMENTATIONS:
        check(implementation, args, (9, 500))


def test_rows_that_are_not_written_yet_do_not_count():
    q, window, entries, _, sink = inputs(2, 4, 128, 16, 40, None)
    args = [q, window.at[:, 3:].set(1e3), entries.at[:, 1:].set(1e3), None, sink]
    short = [q, window[:, :3], entries[:, :1], None, sink]
    positions = (2, 2), (4, 4)
    for implementation in IMPLEMENTATIONS:
        out = run(implementation, args, positions[0])
        assert_close(out, run("reference", short, positions[0]), FLOAT32)


pack = jax.jit(PackedRows.pack, static_argnums=1)


@jax.jit
def round_nope(rows):
    nope = round_fp8(rows[..., :448], 64)
    return jnp.concatenate([nope, rows[..., 448:]], axis=-1).astype(jnp.bfloat16)


def packed_inputs(num_entries, num_picked):
    q, window, entries, indices, sink = inputs(2, 4, 512, 16, num_entries, num_picked, jnp.bfloat16)
    entries *= jnp.exp2(jnp.arange(512) // 64 * 3.0 - 9)  # another scale for each block
    return [q, window, round_nope(entries), indices, sink]


@pytest.mark.parametrize(
    "num_entries, num_picked",
    [(300, 128), (640, 300)],  # 640 rows end with a page
)
def test_picked_packed_rows_equal_the_rows_they_hold(num_entries, num_picked):
    args = packed_inputs(num_entries, num_picked)
    args[3][args[3] == num_entries - 1] = -1
    args[3][:, -1] = num_entries - 1  # whose copy begins before the line it is in
    packed = [*args[:2], paged(args[2], PackedRows), *args[3:]]
    positions = (10, 4 * num_entries)
    for implementation in IMPLEMENTATIONS:
        expected = run(implementation, args, positions)
        np.testing.assert_array_equal(run(implementation, packed, positions), expected)


@pytest.mark.parametrize("num_entries", [5, 1300])
def test_packed_columns_equal_the_rows_they_hold(num_entries):
    args = packed_inputs(num_entries, None)
    packed = [*args[:2], paged(args[2], PackedColumns), *args[3:]]
    positions = (10, 4 * num_entries)
    for implementation in IMPLEMENTATIONS:
        expected = run(implementation, args, positions)
        np.testing.assert_array_equal(run(implementation, packed, positions), expected)


@pytest.mark.parametrize("size, rope_dim", [(128, 64), (16, 128)])
def test_packed_window(size, rope_dim):
    """Of widths that the kernel does not read, it is unpacked before."""
    args = packed_inputs(256, None)
    held = PackedColumns.pack(args[2][:, :size], rope_dim)
    rows = held.unpack(jnp.bfloat16)
    for implementation in IMPLEMENTATIONS:
        expected = run(implementation, [args[0], rows, None, *args[3:]], (10, 80))
        out = run(implementation, [args[0], held, None, *args[3:]], (10, 80))
        assert_close(out, expected, BFLOAT16)


def test_a_sequence_does_not_depend_on_its_batch():
    args = inputs(3, 4, 128, 16, 130, 32)
    positions = np.array([3, 40, 600], np.int32)
    together = run("interpret", args, positions)
    alone = run("interpret", [*(x[1:2] for x in args[:4]), args[4]], positions[1:2])
    np.testing.assert_array_equal(alone, together[1:2])


@pytest.mark.parametrize(
    "replace, message",
    [
        (dict(q=(2, 3)), r"must be \[B, N, H\]"),
        (dict(window=(2, 8, 9)), r"window \(2, 8, 9\) must have q's batch 2 and width 8"),
        (dict(entries=(1, 5, 8)), r"entries \(1, 128, 8\) must have q's batch 2 and width 8"),
        (dict(indices=(1, 3)), r"indices \(1, 3\) must be \[B, K\]"),
        (dict(entries=None), r"indices \(2, 3\) of no entries"),
        (dict(sink=(2,)), "N=3 heads"),
        (dict(positions=(3,)), r"positions \(3,\) must be \(2,\)"),
    ],
)
def test_shapes_that_do_not_agree_are_refused(replace, message):
    shapes = dict(
        q=(2, 3, 8), window=(2, 8, 8), entries=(2, 5, 8), indices=(2, 3), sink=(3,), positions=(2,)
    )
    args = {name: shape and jnp.zeros(shape) for name, shape in (shapes | replace).items()}
    args["entries"] = args["entries"] if args["entries"] is None else Pages.of(args["entries"])
    with pytest.raises(ValueError, match=message):
        decode_attention(**args, ratio=4, scale=1.0)


def test_what_the_kernel_cannot_take_is_refused_by_name_and_falls_back():
    q, window, entries, _, sink = inputs(2, 4, 96, 16, 40, None)
    mixed = [q, window, entries.astype(jnp.bfloat16), None, sink]
    with pytest.raises(ValueError, match=r"\['bfloat16', 'float32'\]: the kernel takes one"):
        run("interpret", mixed, (3, 40))
    unaligned = [q, window, entries, None, sink]
    with pytest.raises(ValueError, match="entries of 96 channels: the kernel copies multiples"):
        run("interpret", unaligned, (3, 40))
    narrow = [q, window, paged(entries, PackedColumns, rope_dim=32), None, sink]
    with pytest.raises(ValueError, match=r"64 \+ 32 channels: the kernel unpacks 448 \+ 64"):
        run("interpret", narrow, (3, 40))
    assert run(None, narrow, (3, 40)).shape == run(None, unaligned, (3, 40)).shape == q.shape


def test_a_table_that_scalar_memory_does_not_hold_is_refused():
    limit = table_limit("v6e")
    assert 64 * 2048 <= limit < 128 * 2048  # sequences of a million tokens of CSA
    q, window, entries, _, _ = inputs(1, 1, 128, 16, 1, None)
    for count, message in ((limit, None), (limit + 1, rf"1 x {limit + 1} pages: .* {limit} in")):
        pages = Pages(Pages.of(entries).pool, jnp.zeros((1, count), jnp.int32))
        refused = tpu_decode.unsupported(q, window, pages, None)
        assert refused is None if message is None else re.search(message, refused)
        assert tpu_decode.unsupported(q, window, pages, jnp.zeros((1, 128), jnp.int32)) is None
