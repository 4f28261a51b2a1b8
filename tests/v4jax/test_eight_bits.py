"""Optimizers' state in 8 bits: levels and rounding against float64 NumPy, meshes, memory, steps, files."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sharding import TRAIN, make_mesh
from v4jax.nn.placement import specs
from v4jax.train.eight_bits import Packed, _view, pack, scale_of, unpack
from v4jax.train.optimizers import STATE_DTYPES, adamw, keep_state_in, muon
from v4jax.train.state import Saver
from v4jax.train.step import TrainState, _placed


def _numbers(shape, is_square=False) -> np.ndarray:
    """Over nine orders of magnitude, zeros and a block of zeros among them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 3, shape)
    x[..., ::7] = 0
    x[0, :256, 0] = 0
    return (x**2 if is_square else x).astype(np.float32)


def _neighbours(x: np.ndarray, levels: int, power: int) -> tuple[np.ndarray, np.ndarray]:
    """The values of the levels on both sides of each number, in float64, block by block."""
    below, above = np.zeros_like(x, np.float64), np.zeros_like(x, np.float64)
    for start in range(0, x.shape[-2], 256):
        block = slice(start, start + 256)
        size = np.abs(x[..., block, :].astype(np.float64))
        top = size.max(-2, keepdims=True)
        values = (np.arange(levels + 1) / levels) ** power * top[..., None]
        rank = np.minimum((values <= size[..., None] * (1 + 1e-6)).sum(-1) - 1, levels - 1)
        below[..., block, :], above[..., block, :] = (
            np.take_along_axis(
                np.broadcast_to(values, (*size.shape, levels + 1)), r[..., None], -1
            )[..., 0]
            for r in (rank, rank + 1)
        )
    return below, above


@pytest.mark.parametrize(("is_square", "levels", "power"), [(False, 127, 2), (True, 255, 4)])
def test_numbers_become_a_level_beside_them_and_in_the_mean_themselves(is_square, levels, power):
    """Of 300 rows: a whole block, and a short one."""
    x = _numbers((2, 300, 3), is_square)
    below, above = _neighbours(x, levels, power)
    seeds = np.arange(400, dtype=np.uint32) * 40503
    view = _view(jnp.asarray(x))
    found = jax.vmap(lambda seed: unpack(pack(view, scale_of(view), seed, is_square=is_square)))
    found = jax.jit(found)(seeds).reshape(-1, *x.shape)
    found = np.asarray(found, np.float64)
    sizes, wanted = np.abs(found), np.abs(x.astype(np.float64))

    assert ((found == 0) | (np.sign(found) == np.sign(x))).all()
    is_level = np.isclose(sizes, below, rtol=1e-5) | np.isclose(sizes, above, rtol=1e-5)
    assert is_level.all() and (found[:, x == 0] == 0).all()
    is_mean = np.ones_like(x, bool)
    if is_square:  # what is not 0 stays so: the lowest level stands for all below it
        assert (found[:, x > 0] > 0).all()
        is_mean = below > 0
    certain = 5 * (above - below) / 2 / math.sqrt(len(seeds))
    assert (np.abs(sizes.mean(0) - wanted) <= certain + 1e-5 * wanted)[is_mean].all()


def _variable(shape, axes, rng) -> nnx.Param:
    value = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return nnx.Param(value, matrix=len(axes) > 1, axes=axes, parts=())


def _params() -> nnx.State:
    """Cut within blocks by fsdp x expert and by tensor, in whole blocks, and not at all; a small one."""
    rng = np.random.default_rng(1)
    return nnx.State(
        {
            "within": _variable((2, 480, 16), ("embed", "heads"), rng),
            "odd": _variable((300, 24), (None, "embed"), rng),
            "whole": _variable((2, 4, 1024, 8), ("expert", "expert_embed", None), rng),
            "table": _variable((256, 32), ("vocab", "embed"), rng),
            "norm": _variable((96,), (None,), rng),
        }
    )


def _gradients(params: nnx.State, number: int) -> nnx.State:
    rng = np.random.default_rng(10 + number)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * rng.lognormal(0, 1, x.shape), jnp.float32),
        params,
    )


def _stepped(tx, update, params, state, steps):
    for number in steps:
        grads = _gradients(params, number)
        grads = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), grads, params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# What conftest.py turns off: last bits are compared here.
AS_USERS = {"xla_cpu_use_fusion_emitters": True, "xla_cpu_parallel_codegen_split_count": 32}


@pytest.fixture(scope="module")
def alone():
    """Adam without the clipping, whose norm a mesh rounds otherwise; after four steps on one device."""
    tx = keep_state_in("int8", optax.adam(1e-2))
    update, params = jax.jit(tx.update, compiler_options=AS_USERS), _params()
    return tx, update, *_stepped(tx, update, params, tx.init(params), range(4))


def _same(found, wanted) -> bool:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_a_mesh_computes_the_same_bits(alone):
    """Scales of whole blocks lie with them, the others on every device of the axis."""
    tx, _, expected, state = alone
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    with jax.set_mesh(mesh):
        params = _params()
        place = jax.tree.map(functools.partial(jax.NamedSharding, mesh), specs(params, TRAIN))
        params = jax.device_put(params, place)
        start = tx.init(params)
        shapes = _placed(jax.eval_shape(tx.init, params), TRAIN, place["whole"].get_value())
        found, after = _stepped(
            tx, jax.jit(tx.update, compiler_options=AS_USERS), params, start, range(4)
        )

    assert _same(after, state) and _same(found, expected)
    for a, b, c in zip(*map(jax.tree.leaves, (start, after, shapes)), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        assert a.sharding.is_equivalent_to(c.sharding, a.ndim) and (a.shape, a.dtype) == (
            c.shape,
            c.dtype,
        )
    packed = jax.tree.leaves(after, is_leaf=lambda x: isinstance(x, Packed))
    cuts = {
        x.codes.shape: (x.codes.sharding.spec, x.scale.sharding.spec)
        for x in packed
        if isinstance(x, Packed)
    }
    assert cuts[2, 4, 1024, 8][0] == cuts[2, 4, 1024, 8][1]
    assert cuts[2, 480, 16][0][1] and not cuts[2, 480, 16][1][1]
    assert len(cuts) == 3  # not of the table and the norm


@pytest.mark.parametrize("optimizer", [adamw, muon])
def test_steps_are_those_of_float32_but_for_rounding(optimizer):
    params = nnx.State(
        {name: v for name, v in _params().items() if name in ("odd", "table", "norm")}
    )
    found = []
    for dtype in ("float32", "int8"):
        tx = optimizer(1e-2, state_dtype=dtype)
        found.append(_stepped(tx, jax.jit(tx.update), params, tx.init(params), range(4))[0])
    wide, narrow = found
    for name, start in params.items():
        moved = np.asarray(wide[name][...]) - np.asarray(start[...])
        off = np.asarray(narrow[name][...]) - np.asarray(wide[name][...])
        share = np.sqrt((off**2).mean() / (moved**2).mean())
        assert share < 0.1 if name == "odd" else share < 1e-5


def test_states_are_read_again_to_the_same_bits(alone, tmp_path):
    """And the run goes on to the same bits."""
    tx, update, params, state = alone
    half = _stepped(tx, update, _params(), tx.init(_params()), range(2))
    saver = Saver(tmp_path)
    saver.save(2, TrainState(half[0], nnx.State({}), half[1]))
    saver.wait()
    shapes = jax.eval_shape(lambda: TrainState(_params(), nnx.State({}), tx.init(_params())))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    found, _ = saver.restore(shapes)
    saver.close()

    assert _same((found.params, found.opt_state), half)
    after = _stepped(tx, update, found.params, found.opt_state, (2, 3))
    assert _same(after, (params, state))


@pytest.mark.parametrize(("optimizer", "numbers"), [(adamw, 2), (muon, 1)])
def test_a_number_of_state_takes_8_bits_and_its_share_of_a_scale(optimizer, numbers):
    params = nnx.State({"w": nnx.Param(jnp.zeros((1024, 64)), matrix=True, axes=(None, None))})
    state = jax.eval_shape(optimizer(1e-3, state_dtype="int8").init, params)
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    counts = 16
    assert 0 < size - numbers * 64 * (1024 + 4 * 4) <= counts


def test_other_dtypes_are_refused():
    assert STATE_DTYPES == ("float32", "bfloat16", "int8")
    with pytest.raises(
        ValueError, match="state_dtype='float16': expected one of float32, bfloat16"
    ):
        keep_state_in("float16", optax.adam(1e-3))
