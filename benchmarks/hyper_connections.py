"""Hyper-connections: collapse, mix, both in one pass, and their gradients.

python -m benchmarks.hyper_connections --list
python -m benchmarks.hyper_connections --only "Flash prefill 8k"
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.case import Case, Trips, main
from pallas_kernels import hyper_connections
from pallas_kernels.hyper_connections import block_sizes, phases, tpu, tpu_backward
from pallas_kernels.hyper_connections.block_sizes import LANES
from v4jax.config import flash, pro

M, ITERS = 4, 20
ROWS = (2 + M) * M
PRE = dict(num_streams=M, sinkhorn_iters=ITERS, eps=1e-6, norm_eps=1e-6)
HEAD = dict(eps=1e-6, norm_eps=1e-6)
DTYPE = jnp.bfloat16

# What is read and written per token, in rows of D channels.
_ROWS = {"hc_pre": M + 1, "hc_post": 2 * M + 1, "hc_post_pre": 2 * M + 2, "hc_head": M + 1}
_COEFFICIENTS = 4 * (M + M * M)  # bytes of a token's post and comb
_GRADIENT_ROWS = {"hc_pre": 2 * M + 1, "hc_post": 3 * M + 2, "hc_post_pre": 3 * M + 3}
_OPS = {
    "hc_pre": functools.partial(hyper_connections.hc_pre, **PRE),
    "hc_post": hyper_connections.hc_post,
    "hc_post_pre": functools.partial(hyper_connections.hc_post_pre, **PRE),
    "hc_head": functools.partial(hyper_connections.hc_head, **HEAD),
}


def cases() -> list[Case]:
    """At the sizes of V4-Flash and V4-Pro."""
    found = []
    for model, d in (("Flash", flash().embed_dim), ("Pro", pro().embed_dim)):
        for op in ("hc_pre", "hc_post", "hc_post_pre"):
            found.append(_forward(op, f"{model} prefill 8k", 1, 8192, d))
        for op in ("hc_pre", "hc_post", "hc_post_pre"):
            found.append(_backward(op, f"{model} gradient 8k", 1, 8192, d))
        found.append(_forward("hc_head", f"{model} prefill 8k", 1, 8192, d))
        for batch in (1, 8, 64):
            for op in ("hc_post", "hc_post_pre"):
                found.append(_forward(op, f"{model} decode {batch}", batch, 1, d))
    return found


def _arguments(op: str, batch: int, length: int, d: int) -> tuple:
    key = iter(jax.random.split(jax.random.key(0), 8))
    columns = M if op == "hc_head" else ROWS
    fn = jax.random.normal(next(key), (M * d, columns)) * (M * d) ** -0.5
    site = fn, jnp.zeros(columns), jnp.full(1 if op == "hc_head" else 3, 0.5)
    streams = jax.random.normal(next(key), (batch, length, M * d), DTYPE)
    f = jax.random.normal(next(key), (batch, length, d), DTYPE)
    post = jax.random.uniform(next(key), (batch, length, M))
    comb = jax.nn.softmax(jax.random.normal(next(key), (batch, length, M, M)))
    mixing = f, streams, post, comb
    return {
        "hc_pre": (streams, *site),
        "hc_head": (streams, *site),
        "hc_post": mixing,
        "hc_post_pre": (*mixing, *site),
    }[op]


def _forward(op: str, shape: str, batch: int, length: int, d: int) -> Case:
    tokens = batch * length
    collapses = op != "hc_post"
    products = M * ROWS * collapses + M * (M + 1) * (op != "hc_pre" and op != "hc_head")
    return Case(
        op=op,
        shape=shape,
        run=_OPS[op],
        make=functools.partial(_arguments, op, batch, length, d),
        flops=2.0 * tokens * d * products,
        bytes=2.0 * tokens * d * _ROWS[op] + 4.0 * M * d * ROWS * collapses,
        trips=functools.partial(_trips, op=op, tokens=tokens, d=d),
    )


def _backward(op: str, shape: str, batch: int, length: int, d: int) -> Case:
    """The gradient alone: what it needs of the forward pass is computed where it is not an input."""

    def make():
        arguments = _arguments(op, batch, length, d)
        d_out = jax.tree.map(
            lambda x: jnp.ones(x.shape, x.dtype), jax.eval_shape(_OPS[op], *arguments)
        )
        return arguments, d_out

    def run(arguments, d_out, implementation):
        vjp = jax.vjp(functools.partial(_OPS[op], implementation=implementation), *arguments)[1]
        return vjp(d_out)

    tokens = batch * length
    return Case(
        op=op,
        shape=shape,
        run=run,
        make=make,
        flops=2.0 * tokens * d * (2 * M * ROWS + 2 * M * (M + 1)),
        bytes=2.0 * tokens * d * _GRADIENT_ROWS[op],
        trips=functools.partial(_gradient_trips, op=op, tokens=tokens, d=d),
    )


def _trips(chip: str, *, op: str, tokens: int, d: int) -> Trips:
    mixes, collapses = op in ("hc_post", "hc_post_pre"), op != "hc_post"
    rows = 8 if op == "hc_head" else ROWS
    makes = op in ("hc_pre", "hc_post_pre")
    few = tokens <= tpu.FEW_TOKENS
    per_token = d * 2 * _ROWS[op] + collapses * 4 * (rows + 8)
    per_token += (mixes + (makes and few)) * _COEFFICIENTS
    scales = 3 if makes else 1
    constant = (3 * rows * M * d * 2 + (rows + scales) * 4) * collapses
    blocks, groups = _blocks(chip, tokens, per_token, constant)
    loops = ()
    if mixes:
        # And once more for numbers that are not finite.
        loops += (_chunks(groups), groups * _steps(d, phases.MIX_CHANNELS), 0)
    if collapses:
        loops += (_steps(M * d, phases.PROJECT_CHANNELS),)
        loops += (groups * _steps(d, phases.COLLAPSE_CHANNELS),)
    if makes and few:
        loops += (ITERS - 1,)
    found = {_KERNELS[op]: _loops(blocks, *loops)}
    if makes and not few:
        found["hc_coefficients"] = _loops(_coefficient_blocks(tokens), ITERS - 1)
    return found


def _gradient_trips(chip: str, *, op: str, tokens: int, d: int) -> Trips:
    found = {}
    if op in ("hc_pre", "hc_post_pre"):
        rows = _GRADIENT_ROWS["hc_pre"] + M * (op == "hc_post_pre")
        per_token = d * 2 * rows + 4 * (2 * ROWS + 2 * 8)
        constant = 3 * ROWS * M * d * 2 + (ROWS + 3) * 4 + ROWS * M * d * 4
        blocks, groups = _blocks(chip, tokens, per_token, constant)
        first = groups * _steps(d, tpu_backward.FIRST_CHANNELS)
        second = M * _steps(d, tpu_backward.SECOND_CHANNELS)
        found["hc_grad_pre"] = _loops(blocks, first, second)
        steps = (_coefficient_blocks(tokens), ITERS - 1, ITERS - 1)
        found["hc_grad_coefficients"] = _loops(*steps)
    if op in ("hc_post", "hc_post_pre"):
        per_token = d * 2 * _GRADIENT_ROWS["hc_post"] + _COEFFICIENTS + 4 * LANES // 2
        blocks, groups = _blocks(chip, tokens, per_token, 0)
        mix = groups * _steps(d, tpu_backward.MIX_CHANNELS)
        found["hc_grad_post"] = _loops(blocks, _chunks(groups), mix, groups)
    # jax names a kernel of a gradient after how it was reached.
    return {f"transpose_jvp_{name}": loops for name, loops in found.items()}


_KERNELS = {
    "hc_pre": "hc_pre",
    "hc_head": "hc_pre",
    "hc_post": "hc_post",
    "hc_post_pre": "hc_fused",
}


def _blocks(chip: str, tokens: int, per_token: int, constant: int) -> tuple[int, int]:
    """Blocks of tokens, and groups of tokens in one."""
    block = block_sizes.block_tokens(chip, tokens, per_token, constant)
    return -(-tokens // block), -(-min(block, tokens) // phases.GROUP)


def _chunks(groups: int) -> int:
    """Of 128 tokens, for which maps are put in order at once."""
    return -(-groups * phases.GROUP // LANES)


def _steps(channels: int, limit: int) -> int:
    return channels // block_sizes.width(channels, limit)


def _coefficient_blocks(tokens: int) -> int:
    return -(-tokens // block_sizes.COEFFICIENT_TOKENS)


def _loops(*trips: int) -> tuple[int, ...]:
    """What the compiler leaves as loops: one that turns once is none."""
    return tuple(t for t in trips if t != 1)


if __name__ == "__main__":
    main(cases(), __doc__)
