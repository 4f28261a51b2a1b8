"""Packed rows of 448 + 64 channels in VMEM on a TPU: from words to keys (`packed_rows.py`).

Picked rows (`PackedRows`) are copied one by one. A row of 146 words begins at any word of a line and
reaches into the next line, or the one after it, so a copy takes three. With a row on each sublane,
three permutations of lanes put its words where they are wanted.

Columns (`PackedColumns`) come as blocks, and have their bytes in the order of 8-bit and 16-bit
registers: those are what they are taken for.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.formats import tpu_formats, tpu_pages
from pallas_kernels.formats.packed_rows import (
    LINE,
    ROW_BLOCK,
    PackedColumns,
    PackedRows,
    row_bytes,
)
from pallas_kernels.formats.pages import PAGE

CHANNELS = (448, 64)
WORDS = row_bytes(*CHANNELS) // 4
COPIED = 3  # lines that hold any row
_SUBLANES = 8
PLANES = 4  # bytes of a word: runs of 128 channels


def where_rows_are(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For rows of a pool to copy: the first of `COPIED` lines, and the row's first word in them (< 256).

    All lines are the row's page's own.
    """
    word = rows % PAGE * WORDS
    line = jnp.minimum(word // LINE, WORDS - COPIED)
    return rows // PAGE * WORDS + line, word - line * LINE


def keys_of_copies(lines: list[jax.Array], offset: jax.Array, dtype) -> jax.Array:
    """Keys [R, 512] of R rows: lines [R, 128] and offset [R, 128] of `where_rows_are`; -1: zeros."""
    first, second, third = (jnp.where(offset < 0, jnp.zeros_like(x), x) for x in lines)
    is_late = offset >= LINE  # at the end of a page
    first, second = jnp.where(is_late, second, first), jnp.where(is_late, third, second)
    planes = _planes(first, second, third, offset & (LINE - 1))
    return jnp.concatenate([p.astype(jnp.bfloat16) for p in planes], axis=1).astype(dtype)


def keys_of_columns(lines_ref, dtype) -> jax.Array:
    """Keys [512, S], transposed, of whole groups of 128 columns: lines [S * 146 / 128, 128]."""
    groups = lines_ref.shape[0] // WORDS
    keys = [_keys_of_group(lines_ref, group * WORDS) for group in range(groups)]
    return jnp.concatenate(keys, axis=1).astype(dtype)


def unpacker(pool) -> Callable | None:
    """What unpacks a page of a pool for `tpu_rows.float_rows`; None if nothing here does."""
    if not isinstance(pool, PackedColumns | PackedRows) or (
        (pool.nope_dim, pool.rope_dim) != CHANNELS
    ):
        return None
    if isinstance(pool, PackedColumns):
        return lambda lines_ref, page: _keys_of_group(lines_ref, page * WORDS).T
    return _rows_of_page


def _rows_of_page(lines_ref, page) -> jax.Array:
    """Keys [128, 512] of a page of `PackedRows`, whose lines [146, 128] hold row after row.

    Row r begins in lane 18 r % 128 of line r + 18 r // 128. Of 8 rows, the lines they begin in follow one
    another but for one place where a line is left out.
    """
    extra = WORDS - LINE
    eights = []  # of 8 rows: the lines they begin in, and those one and two further
    for row in range(0, PAGE, _SUBLANES):
        begin = WORDS * row // LINE
        late = [WORDS * (row + i) // LINE - begin - i for i in range(_SUBLANES)]
        # The page's last rows lie in two lines each: what their third is does not matter.
        found = [min(begin + i, WORDS - _SUBLANES) for i in range(COPIED + max(late))]
        loaded = [lines_ref[pl.ds(page * WORDS + line, _SUBLANES)] for line in found]
        if any(late):
            of_eight = jax.lax.broadcasted_iota(jnp.int32, (_SUBLANES, LINE), 0)
            is_late = of_eight >= late.index(1)
            loaded = [jnp.where(is_late, *pair) for pair in zip(loaded[1:], loaded)]
        eights.append(loaded)
    first, second, third = (jnp.concatenate(x, axis=0) for x in zip(*eights))
    rows = jax.lax.broadcasted_iota(jnp.int32, (PAGE, LINE), 0)
    planes = _planes(first, second, third, extra * rows & (LINE - 1))
    return jnp.concatenate([p.astype(jnp.bfloat16) for p in planes], axis=1)


def _keys_of_group(lines_ref, first: int) -> jax.Array:
    nope, rope = CHANNELS
    chip = dispatch.target_chip()
    fp8, product = tpu_formats.best_e4m3(chip), tpu_formats.product_dtype(chip)
    scales = lines_ref[pl.ds(first + WORDS - 2, 2)]
    rows = []
    for block in range(nope // ROW_BLOCK):
        words = lines_ref[pl.ds(first + block * ROW_BLOCK // 4, ROW_BLOCK // 4)]
        values = pltpu.bitcast(words, fp8)
        scale = scales[block // 4 : block // 4 + 1]
        scale = _shift(scale, 23 - 8 * (block % 4)) & 0x7F800000  # a power of two is its exponent
        scale = tpu_formats.scale_words(scale, fp8, product)
        rows.append(tpu_formats.scaled(values, scale, product).astype(jnp.bfloat16))
    words = lines_ref[pl.ds(first + nope // 4, rope // 2)]
    return jnp.concatenate([*rows, pltpu.bitcast(words, jnp.bfloat16)], axis=0)


def _planes(first, second, third, offset):
    """Channels [R, 128] float32, four times, of rows that begin in lane `offset` of `first`."""
    lane = jax.lax.broadcasted_iota(jnp.int32, first.shape, 1)
    in_first = lane >= offset
    body = tpu_pages.lanes(jnp.where(in_first, first, second), offset + lane)  # words 0..127
    rest = jnp.where(in_first, second, third)  # 128..145
    low = tpu_pages.lanes(rest, offset + (lane & 15)) >> _unsigned((lane >> 4 & 3) << 3) << 16
    # Scales are exponents, and so are 29 less here: magnitudes are 2**29 times theirs.
    scales = tpu_pages.lanes(rest, offset + 16 + (lane >> 6)) - jnp.uint32(0x1D1D1D1D)
    planes = []
    for plane in range(PLANES):
        sign = _shift(body, 24 - 8 * plane) & jnp.uint32(1 << 31)
        magnitude = _signed(_shift(body, 20 - 8 * plane) & 0x07F00000)
        normal = magnitude + (149 << 23)
        number = jnp.where(magnitude < 8 << 20, _bits(magnitude.astype(jnp.float32)), normal)
        scale = _float(_shift(scales, 23 - 8 * plane) & 0x7F800000)
        planes.append(_float(_unsigned(number) | sign) * scale)
    rope = _float(body & jnp.uint32(0xFF << 24) | low & 0x00FF0000)
    planes[3] = jnp.where(lane < LINE // 2, planes[3], rope)
    return planes


def _shift(x, bits: int):
    return x << bits if bits >= 0 else x >> -bits


def _float(x):
    return jax.lax.bitcast_convert_type(x, jnp.float32)


def _bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _signed(x):
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _unsigned(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint32)
