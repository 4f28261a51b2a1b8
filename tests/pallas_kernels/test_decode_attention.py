"""Decode attention: kernel (in the interpreter) and XLA form against the reference.

That the reference is attention to a history is tested in `test_attention.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import decode_attention, tpu_decode
from pallas_kernels.formats.packed_rows import PackedColumns, PackedRows
from pallas_kernels.formats.quantize import round_fp8
from tests.tolerances import BFLOAT16, FLOAT32, assert_close

IMPLEMENTATIONS = ["interpret", "xla"]
TOLERANCE = {jnp.float32: FLOAT32, jnp.bfloat16: BFLOAT16}
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])


def inputs(batch, num_heads, width, ring, num_entries, num_picked, dtype=jnp.float32):
    """q, window, entries, indices (None for num_picked=None), sink."""
    keys = jax.random.split(jax.random.key(num_entries), 3)
    shapes = [(batch, num_heads, width), (batch, ring, width), (batch, num_entries, width)]
    q, window, entries = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes))
    indices = None
    if num_picked is not None:
        rng = np.random.default_rng(3)
        indices = [rng.permutation(num_entries)[:num_picked] for _ in range(batch)]
        indices = np.array(indices, np.int32).reshape(batch, num_picked)
        indices[rng.random(indices.shape) < 0.2] = -1
    return 2 * q, window, entries, indices, jnp.linspace(-1.0, 2.0, num_heads)


def run(implementation, args, positions, ratio=4):
    scale = args[0].shape[-1] ** -0.5
    decode = functools.partial(
        decode_attention, ratio=ratio, scale=scale, implementation=implementation
    )
    return jax.jit(decode)(*args, np.asarray(positions, np.int32))


def check(implementation, args, positions, ratio=4):
    wide = [x if x is None or x.dtype != jnp.bfloat16 else x.astype(jnp.float32) for x in args]
    out = run(implementation, args, positions, ratio)
    assert out.dtype == args[0].dtype
    expected = run("reference", wide, positions, ratio)
    assert_close(out, expected, BFLOAT16 if out.dtype == jnp.bfloat16 else FLOAT32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@DTYPES
@pytest.mark.parametrize(
    "num_heads, width, ring, num_entries, ratio, positions",
    [
        (4, 96, 16, 0, 1, (0, 40)),  # a window and nothing else; a ring of one row
        (4, 96, 64, 5, 4, (2, 19)),  # no visible entry; all of them
        (3, 128, 7, 130, 128, (127, 20000)),  # ragged ring, one entry, a ragged last block
        (1, 64, 16, 2500, 4, (4095, 9999)),  # the first block just full; several blocks
    ],
)
def test_every_visible_entry(
    num_heads, width, ring, num_entries, ratio, positions, dtype, implementation
):
    args = inputs(2, num_heads, width, ring, num_entries, None, dtype)
    check(implementation, args, positions, ratio)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@DTYPES
@pytest.mark.parametrize("num_entries, num_picked", [(5, 0), (5, 3), (300, 32), (1300, 128)])
def test_picked_entries_under_a_mask(num_entries, num_picked, dtype, implementation):
    args = inputs(2, 4, 96, 16, num_entries, num_picked, dtype)
    check(implementation, args, (3, 4 * num_entries))


@pytest.fixture
def gather_always(monkeypatch):
    monkeypatch.setattr(tpu_decode, "GATHER_RATIO", dict.fromkeys(tpu_decode.GATHER_RATIO, 0))


@DTYPES
@pytest.mark.parametrize("num_entries, num_picked", [(300, 128), (512, 256)])
def test_picked_entries_copied_one_by_one(num_entries, num_picked, dtype, gather_always):
    args = inputs(2, 4, 128, 16, num_entries, num_picked, dtype)
    assert tpu_decode.gathers(args[2], num_picked, "v6e")
    check("interpret", args, (3, 4 * num_entries))


@pytest.mark.parametrize("path", ["mask", "gather"])
def test_no_entry_picked(path, request):
    if path == "gather":
        request.getfixturevalue("gather_always")
    args = list(inputs(2, 4, 128, 16, 256, 128))
    args[3] = np.full((2, 128), -1, np.int32)
    expected = run("reference", [*args[:2], args[2][:, :0], None, args[4]], (3, 40))
    assert_close(run("interpret", args, (3, 40)), expected, FLOAT32)


@pytest.mark.parametrize("sinks", [(100.0, -1000.0, 0.0, 1e4), (-1e4, 8.0, -8.0, 30.0)])
def test_sinks_far_from_all_scores(sinks):
    args = [*inputs(2, 4, 96, 16, 130, None)[:4], jnp.asarray(sinks)]
    for implementation in IMPLEMENTATIONS:
        check(implementation, args, (9, 500))


def test_rows_that_are_not_written_yet_do_not_count():
    q, window, entries, _, sink = inputs(2, 4, 96, 16, 40, None)
    args = [q, window.at[:, 3:].set(1e3), entries.at[:, 1:].set(1e3), None, sink]
    short = [q, window[:, :3], entries[:, :1], None, sink]
    positions = (2, 2), (4, 4)
    for implementation in IMPLEMENTATIONS:
        out = run(implementation, args, positions[0])
        assert_close(out, run("reference", short, positions[0]), FLOAT32)


pack = jax.jit(PackedRows.pack, static_argnums=1)
pack_columns = jax.jit(PackedColumns.pack, static_argnums=1)


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
    [(300, 128), (64, 64), (640, 300)],  # 640 rows end with a line, and so do 64
)
def test_picked_packed_rows_equal_the_rows_they_hold(num_entries, num_picked, gather_always):
    args = packed_inputs(num_entries, num_picked)
    args[3][args[3] == num_entries - 1] = -1
    args[3][:, -1] = num_entries - 1  # whose copy begins before the line it is in
    packed = [*args[:2], pack(args[2], 64), *args[3:]]
    positions = (10, 4 * num_entries)
    whole = [*args[:3], np.pad(args[3], ((0, 0), (0, -num_picked % 128)), constant_values=-1)]
    expected = run("interpret", [*whole, args[4]], positions)
    np.testing.assert_array_equal(run("interpret", packed, positions), expected)
    np.testing.assert_array_equal(run("xla", packed, positions), run("xla", args, positions))


@pytest.mark.parametrize("num_entries", [5, 300, 1300])
def test_packed_columns_equal_the_rows_they_hold(num_entries):
    args = packed_inputs(num_entries, None)
    packed = [*args[:2], pack_columns(args[2], 64), *args[3:]]
    positions = (10, 4 * num_entries)
    for implementation in IMPLEMENTATIONS:
        expected = run(implementation, args, positions)
        np.testing.assert_array_equal(run(implementation, packed, positions), expected)


@pytest.mark.parametrize("size", [16, 128])
def test_packed_window(size):
    """As columns, which the kernel reads, and as rows, which are unpacked before."""
    args = packed_inputs(256, None)
    ring, entries = args[2][:, :size], args[2][:, :20]
    for kind in (pack_columns, pack):
        packed = [args[0], kind(ring, 64), entries, *args[3:]]
        for implementation in IMPLEMENTATIONS:
            expected = run(implementation, [args[0], ring, entries, *args[3:]], (10, 80))
            assert_close(run(implementation, packed, (10, 80)), expected, BFLOAT16)


def test_a_sequence_does_not_depend_on_its_batch():
    args = inputs(3, 4, 96, 16, 130, 32)
    positions = np.array([3, 40, 600], np.int32)
    together = run("interpret", args, positions)
    alone = run("interpret", [*(x[1:2] for x in args[:4]), args[4]], positions[1:2])
    np.testing.assert_array_equal(alone, together[1:2])


@pytest.mark.parametrize(
    "replace, message",
    [
        (dict(q=(2, 3)), r"must be \[B, N, H\]"),
        (dict(window=(2, 8, 9)), "must have q's batch 2 and width 8"),
        (dict(entries=(1, 5, 8)), "must have q's batch 2 and width 8"),
        (dict(indices=(1, 3)), r"indices \(1, 3\) must be \[B, K\]"),
        (dict(sink=(2,)), "N=3 heads"),
        (dict(positions=(3,)), r"positions \(3,\) must be \(2,\)"),
    ],
)
def test_shapes_that_do_not_agree_are_refused(replace, message):
    shapes = dict(
        q=(2, 3, 8), window=(2, 8, 8), entries=(2, 5, 8), indices=(2, 3), sink=(3,), positions=(2,)
    )
    args = {name: jnp.zeros(shape) for name, shape in (shapes | replace).items()}
    with pytest.raises(ValueError, match=message):
        decode_attention(**args, ratio=4, scale=1.0)


def test_what_the_kernel_cannot_take_is_refused_by_name_and_falls_back():
    q, window, entries, _, sink = inputs(2, 4, 96, 16, 40, None)
    mixed = [q, window, entries.astype(jnp.bfloat16), None, sink]
    with pytest.raises(ValueError, match=r"\['bfloat16', 'float32'\]: the kernel takes one"):
        run("interpret", mixed, (3, 40))
    narrow = [q, window, pack(entries, 32), None, sink]
    with pytest.raises(ValueError, match=r"64 \+ 32 channels: the kernel unpacks 448 \+ 64"):
        run("interpret", narrow, (3, 40))
    assert run(None, narrow, (3, 40)).shape == q.shape
