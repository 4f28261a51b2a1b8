"""What the kernels are made of: phases that work on a block of tokens in VMEM, and how to start one.

Every elementwise phase goes over its block in pieces of 16 tokens (one bfloat16 register) by some
thousand channels, wide enough for the compiler to fill the vector unit.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.hyper_connections import block_sizes

GROUP = 16
LANES = block_sizes.LANES
# Channels of one step of a phase's loop.
MIX_CHANNELS = 2048
COLLAPSE_CHANNELS = 4096
PROJECT_CHANNELS = 1024  # of all streams
HIGHEST = jax.lax.Precision.HIGHEST


class Static(NamedTuple):
    """What kernels need besides arrays."""

    num_streams: int
    sinkhorn_iters: int
    eps: float
    norm_eps: float
    interpret: bool


class Operand(NamedTuple):
    """An argument or a result of a kernel, and which axis its tokens are on."""

    array: jax.Array | jax.ShapeDtypeStruct
    tokens: int | None  # 0: [N / a, channels]; 1: [rows, N]; None: every program sees all of it
    tokens_per_row: int = 1  # a

    def num_bytes(self) -> int:
        """Of the whole array."""
        return self.array.size * self.array.dtype.itemsize

    def spec(self, tokens: int) -> pl.BlockSpec:
        """The block of one program."""
        shape = self.array.shape
        if self.tokens == 0:
            return pl.BlockSpec((tokens // self.tokens_per_row, shape[1]), lambda i: (i, 0))
        if self.tokens == 1:
            return pl.BlockSpec((shape[0], tokens), lambda i: (0, i))
        return pl.BlockSpec(shape, lambda i: (0,) * len(shape))


def launch(
    kernel: Callable,
    name: str,
    operands: Sequence[Operand],
    results: Sequence[Operand],
    scratch: Callable[[int], list],
    *,
    flops_per_byte: float,
    static: Static,
    sequential: bool = False,
) -> list[jax.Array]:
    """Runs `kernel(*refs, static=, worked=)` on blocks of tokens.

    Args:
      scratch: tokens of a block -> scratch shapes.
      sequential: blocks are worked on in order, on one core.
    """
    n = next(o.array.shape[0] for o in operands if o.tokens == 0)
    blocked = [o for o in (*operands, *results) if o.tokens is not None]
    whole = [o for o in (*operands, *results) if o.tokens is None]
    per_token = sum(o.num_bytes() for o in blocked) // n
    constant = sum(o.num_bytes() for o in whole)
    chip = dispatch.target_chip()
    tokens = block_sizes.block_tokens(chip, n, per_token, constant)
    worked = min(tokens, GROUP * pl.cdiv(n, GROUP))  # the rest of a block has no tokens
    return pl.pallas_call(
        functools.partial(kernel, static=static, worked=worked),
        grid=(pl.cdiv(n, tokens),),
        in_specs=[o.spec(tokens) for o in operands],
        out_specs=[o.spec(tokens) for o in results],
        out_shape=[o.array for o in results],
        scratch_shapes=scratch(tokens),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary" if sequential else "parallel",),
            vmem_limit_bytes=block_sizes.vmem_limit(chip),
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(flops_per_byte * n * per_token),
            bytes_accessed=n * per_token + constant,
            transcendentals=0,
        ),
        interpret=static.interpret,
        name=name,
    )(*(o.array for o in operands))


def pieces(
    worked: int,
    dim: int,
    limit: int,
    body: Callable,
    carry: Any = None,
    *,
    only_if: jax.Array | bool = True,
) -> Any:
    """`body(rows, start, size, carry)` for every piece of [worked, dim], at most `limit` channels wide.

    Returns:
      the last of what bodies returned, each of which is the next one's carry.
    """
    size = block_sizes.width(dim, limit)
    count = dim // size

    def step(i, carry):
        rows = pl.ds(pl.multiple_of(i // count * GROUP, GROUP), GROUP)
        return body(rows, pl.multiple_of(i % count * size, size), size, carry)

    steps = worked // GROUP * count
    # Turns, not a condition around the loop: schedules are read by the turns of loops.
    turns = steps if only_if is True else jnp.where(only_if, steps, 0)
    return jax.lax.fori_loop(0, turns, step, carry)


def read(ref, rows, start, size: int) -> jax.Array:
    """A piece, as float32."""
    return ref[rows, pl.ds(start, size)].astype(jnp.float32)


def tile(spread: jax.Array, size: int) -> jax.Array:
    """[16, 128] with equal lanes -> [16, size]."""
    return jnp.tile(spread, (1, size // LANES))


def fold(x: jax.Array) -> jax.Array:
    """[16, size] -> [16, 128]: the sum of its registers."""
    folded: Any = sum(x[:, i : i + LANES] for i in range(0, x.shape[1], LANES))
    return folded


def loader(tokens: int, num_tokens: int) -> Callable:
    """`load(ref, rows, start, size)`: a piece as it is, but zero behind the last token.

    Products over the tokens of a group need that: zero times what memory holds may be a NaN.
    """
    real = num_tokens - pl.program_id(0) * tokens

    def load(ref, rows, start, size: int) -> jax.Array:
        x = ref[rows, pl.ds(start, size)]
        if num_tokens % GROUP == 0:
            return x
        token = rows.start + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where(token < real, x.astype(jnp.float32), 0).astype(x.dtype)

    return load


def maps(tokens: int, num_in: int, num_out: int, dtype: jax.typing.DTypeLike) -> Any:
    """Scratch for the maps of a block's tokens: linear, of I streams of `dtype` to O for each token.

    Row g has the tokens of group g: for each output, for each part of the coefficients (three
    bfloat16 numbers that sum to them, or themselves), for each input, 16 tokens.
    """
    width = pl.cdiv(_num_parts(dtype) * num_in * GROUP, LANES) * LANES
    return pltpu.VMEM((tokens // GROUP, num_out * width), jnp.float32)


def _num_parts(dtype: jax.typing.DTypeLike) -> int:
    """Numbers that a coefficient is cut into for streams of `dtype`."""
    return 3 if dtype == jnp.bfloat16 else 1


def row(ref, i: int):
    """Row `i` of a reference, as one."""
    return ref.at[pl.ds(i, 1)]


def arrange(
    rows: Sequence[Sequence[jax.Array]],  # rows[o][i]: reference [1, tokens] of input i in output o
    maps_ref,  # as `maps` says
    dtype: jax.typing.DTypeLike,
    num_tokens: int,
    worked: int,
) -> None:
    """Writes the maps of a block, eight groups of tokens at a time; zero behind the last token.

    A coefficient of 128 tokens on lanes becomes a register with a group in each row, its 16 tokens
    again and again along the lanes, from which every place takes what belongs there.
    """
    real = num_tokens - pl.program_id(0) * maps_ref.shape[0] * GROUP
    shape = (LANES // GROUP, LANES)
    group = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    place = lane // GROUP
    width = maps_ref.shape[1] // len(rows)

    def chunk(c, _):
        first = pl.multiple_of(c * LANES, LANES)
        is_own = (place == group) & (first + lane < real)

        def parts(ref) -> list[jax.Array]:
            x = jnp.where(is_own, ref[:, pl.ds(first, LANES)], 0.0)
            for shift in (LANES // 2, LANES // 4, LANES // 8):
                x += pltpu.roll(x, shift, 1)
            return cut(x, _num_parts(dtype))

        for o, inputs in enumerate(rows):
            each = [part for of_part in zip(*map(parts, inputs)) for part in of_part]
            for start in range(0, width, LANES):
                put = jnp.zeros(shape, jnp.float32)
                for i, part in enumerate(each[start // GROUP : (start + LANES) // GROUP]):
                    put = jnp.where(place == i, part, put)
                at = pl.ds(pl.multiple_of(c * shape[0], shape[0]), shape[0])
                maps_ref[at, o * width + start : o * width + start + LANES] = put
        return 0

    jax.lax.fori_loop(0, pl.cdiv(worked, LANES), chunk, 0)


def mapped(maps_ref, rows, streams: Sequence[jax.Array], num_out: int) -> list[jax.Array]:
    """float32 [16, size] of each output: the maps of a group applied to a piece of the streams.

    A number that is not finite makes its channel NaN for all tokens of the group: zero times it is no
    zero. One product of the matrix unit with a matrix that is zero between different tokens. Fifteen of
    sixteen of its products are with zeros, and still it takes less than half the time of the vector
    unit. Exact in the coefficients, as their parts go side by side.
    """
    width = maps_ref.shape[1] // num_out
    right = jnp.concatenate(list(streams) * _num_parts(streams[0].dtype))
    token = jax.lax.broadcasted_iota(jnp.int32, (GROUP, width), 0)
    is_own = jax.lax.broadcasted_iota(jnp.int32, (GROUP, width), 1) % GROUP == token
    row = maps_ref[pl.ds(rows.start // GROUP, 1), :]
    own = [jnp.where(is_own, row[:, i * width : (i + 1) * width], 0.0) for i in range(num_out)]
    left = jnp.concatenate(own).astype(right.dtype)[:, : right.shape[0]]
    out = dot(left, right, 1, 0)
    return [out[i * GROUP : (i + 1) * GROUP] for i in range(num_out)]


def spread(
    rows: jax.Array,  # [R, tokens] float32, R a multiple of 8
    out_ref,  # [R, tokens, 128]
    used: Sequence[int],
) -> None:
    """Each used row, from tokens on lanes to tokens on sublanes, equal over 128 lanes.

    A product with ones in the row's place: the matrix unit is idle here, and the permutations this
    would take otherwise cost half as much again. Exact, as the three parts of a number sum to it.
    """
    left = jnp.concatenate(cut(rows, 3)).T.astype(jnp.bfloat16)
    row = jax.lax.broadcasted_iota(jnp.int32, (left.shape[1], LANES), 0) % len(rows)
    for i in used:
        out_ref[i] = dot(left, jnp.where(row == i, 1.0, 0.0).astype(jnp.bfloat16), 1, 0)


def cut(x: jax.Array, count: int) -> list[jax.Array]:
    """float32 arrays that are bfloat16 numbers and sum to `x`, to 8 * count bits.

    Cut, not rounded: compilers drop a conversion to bfloat16 and back.
    """
    parts = []
    for _ in range(count - 1):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & -65536
        parts.append(jax.lax.bitcast_convert_type(bits, jnp.float32))
        x = x - parts[-1]
    return [*parts, x]


def sum_lanes(
    x: jax.Array,  # [tokens, 128] float32
) -> jax.Array:  # [8, tokens]
    """Sums of the rows, with tokens on lanes, eight times."""
    return dot(jnp.ones((8, LANES), jnp.float32), x, 1, 1)


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Matrix product in float32; exact in the products of float32 factors too."""
    return jax.lax.dot_general(
        *(a, b, (((axis_a,), (axis_b,)), ((), ()))),
        preferred_element_type=jnp.float32,
        precision=HIGHEST if a.dtype == jnp.float32 else None,
    )


# The phases ---------------------------------------------------------------------------------------


def mix(
    f_ref,  # [tokens, D]
    x_ref,  # [tokens, M * D]
    post_ref,  # [M, tokens]
    comb_ref,  # [M * M, tokens]
    y_ref,  # [tokens, M * D]
    maps_ref,
    *,
    static: Static,
    worked: int,
    num_tokens: int,
) -> None:
    """streams'[k] = post[k] * f + sum_j comb[j, k] * streams[j].

    Where a token has a number that is not finite, the others of its group are worked out again
    without it, to the bits that they have beside a finite one.
    """
    m, d = static.num_streams, f_ref.shape[1]
    load = loader(f_ref.shape[0], num_tokens)
    rows_of = [[row(post_ref, k), *(row(comb_ref, j * m + k) for j in range(m))] for k in range(m)]
    arrange(rows_of, maps_ref, x_ref.dtype, num_tokens, worked)

    def loaded(rows, start, size):
        return [
            load(f_ref, rows, start, size),
            *(load(x_ref, rows, j * d + start, size) for j in range(m)),
        ]

    def put(outputs, rows, start, size):
        for k, y in enumerate(outputs):
            y_ref[rows, pl.ds(k * d + start, size)] = y.astype(y_ref.dtype)

    def step(rows, start, size, tainted):
        outputs = mapped(maps_ref, rows, loaded(rows, start, size), m)
        put(outputs, rows, start, size)
        return tainted + 0.0 * fold(outputs[0][:8])  # any row tells of all

    def again(rows, start, size, _):
        x = loaded(rows, start, size)
        is_finite = [jnp.abs(a.astype(jnp.float32)) < jnp.inf for a in x]
        clean = [
            jnp.where(ok, a.astype(jnp.float32), 0.0).astype(a.dtype) for ok, a in zip(is_finite, x)
        ]
        keeps = functools.reduce(jnp.logical_and, is_finite)
        outputs = mapped(maps_ref, rows, clean, m)
        put([jnp.where(keeps, y, jnp.nan) for y in outputs], rows, start, size)

    tainted = pieces(worked, d, MIX_CHANNELS, step, jnp.zeros((8, LANES), jnp.float32))
    pieces(worked, d, MIX_CHANNELS, again, only_if=jnp.isnan(jnp.sum(tainted)))


def project(fn_ref, x_ref, raw_ref, square_ref, product_ref, *, norm_eps: float, worked: int):
    """raw = x @ fn / rms(x), and below it 1 / rms(x); tokens on lanes."""
    rows_out = raw_ref.shape[0] - 8
    dim = x_ref.shape[1]
    square_ref[...] = jnp.zeros_like(square_ref)
    product_ref[...] = jnp.zeros_like(product_ref)
    size = block_sizes.width(dim, PROJECT_CHANNELS)

    def step(i, _):
        channels = pl.ds(pl.multiple_of(i * size, size), size)
        x = x_ref[:, channels]
        fn = fn_ref[:, channels]
        if fn.dtype != x.dtype:  # float32, not cut
            fn = jnp.concatenate(cut(fn, 3)).astype(x.dtype)
        product = dot(fn, x, 1, 1)
        for start in range(0, worked, GROUP):
            part = x[start : start + GROUP].astype(jnp.float32)
            square_ref[start : start + GROUP] += fold(part * part)
        product_ref[...] += product
        return 0

    jax.lax.fori_loop(0, dim // size, step, 0)
    products = [product_ref[i : i + rows_out] for i in range(0, product_ref.shape[0], rows_out)]
    inverse_rms = jax.lax.rsqrt(sum_lanes(square_ref[...]) / dim + norm_eps)
    raw_ref[:rows_out] = sum(products) * inverse_rms[:1]
    raw_ref[rows_out:] = inverse_rms


def affine(base_ref, scale_ref, m: int) -> tuple[jax.Array, jax.Array]:
    """Columns [E, 1]: what each row of the projections is multiplied by, and what is added.

    Args:
      base_ref: [1, E].
      scale_ref: [1, 3], of rows pre, post and comb; [1, 1] for the head.
    """
    e = base_ref.shape[1]
    row = jax.lax.broadcasted_iota(jnp.int32, (e, e), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (e, e), 1)
    base = jnp.sum(jnp.where(row == lane, base_ref[...], 0.0), axis=1, keepdims=True)
    scale = jnp.broadcast_to(scale_ref[:, :1], (e, 1))
    for i in range(1, scale_ref.shape[1]):
        scale = jnp.where(row[:, :1] < i * m, scale, scale_ref[:, i : i + 1])
    return scale, base


def pre_weights(raw_ref, scale: jax.Array, base: jax.Array, eps: float) -> jax.Array:
    """[8, tokens], of which the first M rows are used."""
    return jax.nn.sigmoid(raw_ref[:8] * scale[:8] + base[:8]) + eps


def collapse(spread_ref, x_ref, u_ref, *, m: int, worked: int) -> None:
    """u = sum_k pre[k] * streams[k]."""
    d = u_ref.shape[1]

    def body(rows, start, size, _):
        u: Any = sum(
            tile(spread_ref[k, rows], size) * read(x_ref, rows, k * d + start, size)
            for k in range(m)
        )
        u_ref[rows, pl.ds(start, size)] = u.astype(u_ref.dtype)

    pieces(worked, d, COLLAPSE_CHANNELS, body)
