"""Packed rows, columns and keys: every code, appending in any place, and the kernels that read them.

Attention over them is tested in `test_decode_attention.py`.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import dispatch
from pallas_kernels.attention import tpu_packed
from pallas_kernels.formats.packed_append import append
from pallas_kernels.formats.packed_rows import PackedColumns, PackedKeys, PackedRows
from pallas_kernels.formats.pages import Pages
from pallas_kernels.formats.quantize import round_fp4, round_fp8
from pallas_kernels.indexer import index_topk
from tests.paged import paged

KINDS = pytest.mark.parametrize("kind", [PackedRows, PackedColumns, PackedKeys])


def pack(kind, values):
    return kind.pack(values) if kind is PackedKeys else kind.pack(values, values.shape[-1] // 8)


def random(kind, *shape):
    """What `kind` holds exactly."""
    scale = jnp.exp2(jnp.arange(shape[-1]) // 32 % 5 * 3.0 - 6)
    values = jax.random.normal(jax.random.key(len(shape) + shape[-2]), shape) * scale
    if kind is PackedKeys:
        return round_fp4(values, 32)
    nope = shape[-1] // 8 * 7
    nope, rope = round_fp8(values[..., :nope], 64), values[..., nope:]
    return jnp.concatenate([nope, rope.astype(jnp.bfloat16).astype(jnp.float32)], axis=-1)


@KINDS
@pytest.mark.parametrize("length, width", [(1, 64), (300, 64), (77, 512)])
def test_what_is_packed_is_unpacked(kind, width, length):
    values = random(kind, 2, length, width)
    packed = pack(kind, values)
    assert packed.shape == values.shape and packed.data.dtype == jnp.uint32
    np.testing.assert_array_equal(packed.unpack(jnp.float32), values)


@pytest.mark.parametrize("kind", [PackedRows, PackedColumns])
def test_every_code_of_e4m3_and_every_bfloat16(kind):
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # without NaN
    values = np.zeros((1, 8, 64), np.float32)
    values[0, :4].reshape(-1)[: len(codes)] = codes.view(ml_dtypes.float8_e4m3fn)
    values[0, :, 0] = 448  # so that the scale is 1
    bits = np.arange(8 * 8192, dtype=np.uint16).reshape(1, 8, 8192)
    rope = np.asarray(bits.view(ml_dtypes.bfloat16), np.float32)
    both = np.concatenate([values, np.where(np.isfinite(rope), rope, 0)], axis=-1)
    np.testing.assert_array_equal(kind.pack(both, 8192).unpack(jnp.float32), both)


@pytest.mark.parametrize("chip", ["v5e", "v6e", "v7x"])  # they convert in different ways
def test_a_kernel_reads_every_code_of_e4m3(chip, monkeypatch):
    monkeypatch.setattr(dispatch, "target_chip", lambda: chip)
    codes = (np.arange(128 * 448).reshape(128, 448) + 7) % 256
    codes[codes % 128 == 127] = 0  # NaN
    codes[:, ::64] = 0x7E  # 448, so that the scale is 1
    nope = codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert (np.signbit(nope) & (nope == 0)).any()  # minus zero
    rows = np.concatenate([nope, np.ones((128, 64), np.float32)], axis=1)

    def kernel(lines_ref, keys_ref):
        keys_ref[...] = tpu_packed.keys_of_columns(lines_ref, jnp.float32)

    keys = pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((512, 128), jnp.float32), interpret=True
    )(PackedColumns.pack(rows, 64).data)
    np.testing.assert_array_equal(keys, rows.T)


def test_every_code_of_e2m1():
    codes = np.arange(64, dtype=np.uint8) % 16
    magnitude = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.where(codes < 8, 1, -1) * magnitude[codes % 8]
    keys = np.stack([values, 2.0**-7 * np.roll(values, 5), 64 * values[::-1]])[None]
    np.testing.assert_array_equal(PackedKeys.pack(keys).unpack(jnp.float32), keys)


def decoded_rows(kind, count: int) -> np.ndarray:
    """bfloat16 rows or keys as a step of decoding gives them: rounded, of any size, zeros of both signs."""
    width = 128 if kind is PackedKeys else 512
    rng = np.random.default_rng(count)
    values = rng.standard_normal((count, 1, width)) * np.exp2(
        rng.integers(-20, 20, (count, 1, width))
    )
    values[rng.random(values.shape) < 0.1] = 0.0
    values[rng.random(values.shape) < 0.1] *= -0.0
    values = jnp.asarray(values, jnp.bfloat16)
    if kind is PackedKeys:
        return np.asarray(round_fp4(values, 32))
    return np.asarray(jnp.concatenate([round_fp8(values[..., :448], 64), values[..., 448:]], -1))


@KINDS
@pytest.mark.parametrize("count", [1, 3, 8, 41])
def test_the_kernel_makes_the_words_of_a_few_rows_that_xla_makes(kind, count):
    rows = decoded_rows(kind, count)
    packed = kind.zeros((1, 1, 128)) if kind is PackedKeys else kind.zeros((1, 1, 512), 64)

    kernel, xla = (
        jax.jit(functools.partial(packed.words_of, implementation=name))(rows)
        for name in ("interpret", "xla")
    )

    assert kernel.shape == (count, 1, packed.num_words) and kernel.dtype == jnp.uint32
    np.testing.assert_array_equal(kernel, xla)


def test_words_of_rows_that_are_not_v4_s_are_xla_s():
    packed = PackedRows.zeros((1, 1, 64), 8)
    with pytest.raises(ValueError, match="rows of 64 channels, 8 of them rotated"):
        packed.words_of(jnp.zeros((1, 1, 64)), implementation="interpret")


@KINDS
@pytest.mark.parametrize(
    "length, new, start, counts",
    [
        (300, 1, (0, 299, 127, 128), (1, 1, 0, 1)),  # one each, a page's last and first, none
        (300, 5, (126, 380, 384, 0), (5, 5, 5, 3)),  # over a border, past the end
        (300, 290, (3, 150, 0, 299), (290, 290, 17, 0)),
        (3, 9, (0, 120, 128, 1), (9, 9, 9, 1)),  # more than there is room for
    ],
)
def test_appending_to_pages(kind, length, new, start, counts):
    """In one call as a place-by-place copy in NumPy; nothing else changes, nor other pages."""
    old, added = random(kind, 4, length, 64), random(kind, 4, new, 64) * 2
    pages = paged(old, kind, rope_dim=8)
    start, counts = jnp.array(start), jnp.array(counts)
    put = jax.jit(lambda p, x: p.append(p.pool.words_of(x), start, counts))
    appended = put(pages, added)
    expected = np.array(pages.contiguous().unpack(jnp.float32))
    for b, (first, count) in enumerate(zip(start, counts)):
        stop = min(first + count, pages.shape[1])
        expected[b, first:stop] = added[b, : max(stop - first, 0)]
    np.testing.assert_array_equal(appended.contiguous().unpack(jnp.float32), expected)
    others = jnp.asarray(np.setdiff1d(np.arange(pages.num_pages), pages.table))[None]
    before, after = (Pages(x.pool, others).contiguous().data for x in (pages, appended))
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    "length, new, start, counts",
    [
        (300, 1, (0, 299, 127, 128), (1, 1, 0, 1)),
        (300, 290, (3, 10, 0, 299), (290, 290, 17, 0)),
    ],
)
def test_appending_columns_to_a_ring(length, new, start, counts):
    old, added = random(PackedColumns, 4, length, 64), random(PackedColumns, 4, new, 64) * 2
    start, counts = jnp.array(start), jnp.array(counts)
    put = jax.jit(lambda p, x: p.append(x, start, counts))
    expected = np.array(old)
    for b, (first, count) in enumerate(zip(start, counts)):
        expected[b, first : first + count] = added[b, :count]
    packed = put(pack(PackedColumns, old), added)
    np.testing.assert_array_equal(packed.unpack(jnp.float32), expected)


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("on_lanes, words", [(False, 146), (False, 34), (True, 146), (True, 17)])
def test_the_kernel_appends_one_item_as_xla_does(on_lanes, words, batch):
    """Nine sequences, two programs: at the beginning, over borders of lines and at the end; or the last."""
    table = jax.random.permutation(jax.random.key(2), 45).reshape(9, 5)
    data = jax.random.bits(jax.random.key(0), (1, 45 * words, 128), jnp.uint32)
    new = jax.random.bits(jax.random.key(1), (9, 1, words), jnp.uint32)
    start = jnp.array([0, 1, 63, 127, 128, 500, 638, 639, 639])
    counts = jnp.array([1, 1, 1, 1, 1, 0, 1, 1, 1])
    table, new, start, counts = (x[-batch:] for x in (table, new, start, counts))

    def run(implementation):
        options = dict(on_lanes=on_lanes, table=table, implementation=implementation)
        return jax.jit(lambda *a: append(*a, **options))(data, new, start, counts)

    changed = run("xla")
    assert 0 < np.count_nonzero(changed != data) <= min(batch, 8) * words
    np.testing.assert_array_equal(run("interpret"), changed)


def test_the_kernel_appends_columns_to_a_ring_as_xla_does():
    data = jax.random.bits(jax.random.key(0), (9, 146, 128), jnp.uint32)
    new = jax.random.bits(jax.random.key(1), (9, 1, 146), jnp.uint32)
    start, counts = jnp.arange(9) * 15, jnp.arange(9) % 3
    changed = [
        append(data, new, start, jnp.minimum(counts, 1), on_lanes=True, implementation=name)
        for name in ("xla", "interpret")
    ]
    np.testing.assert_array_equal(*changed)
    with pytest.raises(ValueError, match="on_lanes=False without a table"):
        append(data, new, start, counts, on_lanes=False)


@KINDS
def test_the_kernel_makes_words_of_the_rows_that_it_appends(kind):
    """One row of each of nine sequences, of which some have none."""
    rows = decoded_rows(kind, 9)
    packed = kind.zeros((1, 1, 128)) if kind is PackedKeys else kind.zeros((1, 1, 512), 64)
    data = jax.random.bits(jax.random.key(0), (1, 18 * packed.num_words, 128), jnp.uint32)
    table, start = jnp.arange(18).reshape(9, 2), jnp.arange(9) * 31
    options = dict(table=table, packing=packed.packing, on_lanes=kind is not PackedRows)

    def run(implementation):
        put = functools.partial(append, implementation=implementation, **options)
        return jax.jit(put)(data, rows, start, jnp.arange(9) % 3 % 2)

    changed = run("xla")
    assert np.count_nonzero(changed != data) > 2 * packed.num_words
    np.testing.assert_array_equal(run("interpret"), changed)


@KINDS
def test_bytes_are_those_of_the_released_layout(kind):
    shape = (3, 32768, 128 if kind is PackedKeys else 512)
    packed = jax.eval_shape(lambda: kind.zeros(shape, *(() if kind is PackedKeys else (64,))))
    row = 68 if kind is PackedKeys else 584
    assert packed.data.size * 4 == 3 * 32768 * row


@pytest.mark.parametrize(
    "num_entries, topk, dtype", [(700, 128, jnp.float32), (1300, 32, jnp.bfloat16)], ids=str
)
def test_the_decoding_indexer_reads_packed_keys(num_entries, topk, dtype):
    """Sums of products of e2m1 numbers are exact in float32, so selections are equal."""
    q = round_fp4(jax.random.normal(jax.random.key(0), (2, 1, 64, 128)), 32).astype(dtype)
    weights = jax.random.normal(jax.random.key(1), (2, 1, 64))
    keys = round_fp4(jax.random.normal(jax.random.key(2), (2, num_entries, 128)), 32)
    positions = jnp.array([[4 * num_entries - 1], [1203]])

    def select(keys, implementation):
        options = dict(topk=topk, ratio=4, implementation=implementation)
        selection = jax.jit(lambda *a: index_topk(*a, **options))(q, weights, keys, positions)
        return np.sort(selection.to_indices(), axis=-1)

    expected = select(paged(keys, dtype), "interpret")
    packed = paged(keys, PackedKeys)
    np.testing.assert_array_equal(select(packed, "interpret"), expected)
    np.testing.assert_array_equal(select(packed, "xla"), expected)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PackedRows.zeros((1, 4, 64), 65), "rope_dim=65: expected 0..64"),
        (lambda: PackedColumns.zeros((1, 4, 66), 2), "rows of 66 channels, rope_dim=2"),
        (lambda: PackedKeys.zeros((1, 4, 96)), "keys of 96 channels: expected 8, 16, 32"),
    ],
)
def test_widths_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
