"""Muon against float64 NumPy: the orthogonal factor, algorithm 1, what it takes, and its memory."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

from sharding import TRAIN, make_mesh
from tests.tolerances import FLOAT32, assert_close
from v4jax import LoRA, Transformer, tiny
from v4jax.nn.lora import EXPERTS, add_lora
from v4jax.nn.placement import specs
from v4jax.train.muon import is_orthogonalized, newton_schulz, orthogonalize
from v4jax.train.optimizers import adamw, muon

RNG = functools.partial(np.random.default_rng, 0)


def _polar(matrix: np.ndarray) -> np.ndarray:
    """U V^T of U S V^T, in float64."""
    u, _, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return u @ v


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (16, 80)])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_newton_schulz_finds_the_orthogonal_factor(shape, scale):
    matrix = RNG().normal(size=shape).astype(np.float32) * np.float32(scale)
    found = np.asarray(newton_schulz(matrix))
    assert np.abs(found - _polar(matrix)).max() < 1e-3
    assert np.abs(np.linalg.svd(found)[1] - 1).max() < 1e-3


def test_a_matrix_of_zeros_has_no_direction():
    assert (np.asarray(newton_schulz(jnp.zeros((2, 8, 4)))) == 0).all()


def _variable(shape, parts=(), axes=(None, None), kind=nnx.Param, matrix=True, rng=None):
    value = jnp.asarray((rng or RNG()).normal(size=shape), jnp.float32)
    return kind(value, matrix=matrix, axes=axes, parts=parts)


def test_every_expert_and_every_part_is_a_matrix_of_its_own():
    """Stacked [layers, experts, in, out], and side by side, against the orthogonal factor of each."""
    experts, groups = _variable((2, 3, 48, 32)), _variable((2, 40, 24), parts=(4, 4, 16))
    groups.set_value(groups[...] * np.repeat([1.0, 100.0, 0.01], (4, 4, 16)))
    updates = nnx.State({"experts": experts, "groups": groups})

    found, _ = orthogonalize(0.18).update(updates, optax.EmptyState())

    for layer in range(2):
        for expert in range(3):
            expected = 0.18 * math.sqrt(48) * _polar(np.asarray(experts[...])[layer, expert])
            got = np.asarray(found["experts"][...])[layer, expert]
            assert np.abs(got - expected).max() < 2e-3
            assert abs(np.sqrt((got**2).mean()) / 0.18 - 1) < 0.01
        for start, end in ((0, 4), (4, 8), (8, 24)):
            expected = 0.18 * math.sqrt(40) * _polar(np.asarray(groups[...])[layer, :, start:end])
            got = np.asarray(found["groups"][...])[layer, :, start:end]
            assert np.abs(got - expected).max() < 2e-3
            assert abs(np.sqrt((got**2).mean()) / 0.18 - 1) < 0.01


def _ten_steps(x: np.ndarray) -> np.ndarray:
    """Newton-Schulz as the report writes it, of one matrix in float64."""
    if x.shape[0] > x.shape[1]:
        return _ten_steps(x.T).T
    x = x / np.sqrt((x**2).sum())
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 8 + [(2, -1.5, 0.5)] * 2:
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x


def test_a_step_is_algorithm_1():
    """Three steps of a matrix of two layers and two groups, and of a head and a norm by AdamW."""
    rng = RNG()
    params = nnx.State(
        {
            "wo_a": _variable((2, 24, 20), parts=(10, 10), rng=rng),
            "head": _variable((30, 8), axes=("vocab", "embed"), rng=rng),
            "norm": _variable((2, 8), axes=(None,), matrix=False, rng=rng),
        }
    )
    expected = {name: np.asarray(v[...], np.float64) for name, v in params.items()}
    momentum = np.zeros((2, 24, 20))
    moments = {name: (0.0, 0.0) for name in ("head", "norm")}
    tx = muon(lambda count: 0.02 / (count + 1), clip_norm=1e9)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in (1, 2, 3):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)

        rate, g = 0.02 / t, {name: np.asarray(v[...], np.float64) for name, v in grads.items()}
        momentum = 0.95 * momentum + g["wo_a"]
        ahead = 0.95 * momentum + g["wo_a"]
        for layer in range(2):
            for part in (slice(0, 10), slice(10, 20)):
                w = expected["wo_a"][layer, :, part]
                step = 0.18 * math.sqrt(24) * _ten_steps(ahead[layer, :, part])
                w *= 1 - rate * 0.1
                w -= rate * step
        for name, (m, v) in moments.items():
            m, v = 0.9 * m + 0.1 * g[name], 0.95 * v + 0.05 * g[name] ** 2
            moments[name] = m, v
            step = (m / (1 - 0.9**t)) / np.sqrt(v / (1 - 0.95**t))
            if t == 1:  # AdamW, not NAdam
                assert abs(np.sqrt((step**2).mean()) - 1) < 1e-6
            expected[name] -= rate * (step + (0.1 * expected[name] if name == "head" else 0.0))
    for name, value in expected.items():
        assert_close(params[name][...], value, FLOAT32)


def _abstract(**options) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(tiny(), **options, rngs=nnx.Rngs(0)))


MUON = {  # by the ends of paths, with the widths of matrices side by side
    **{f"attention.{name}.kernel": () for name in ("wq_a", "wq_b", "wkv", "wo_b")},
    "attention.wo_a.kernel": (32, 32),
    "attention.compressor.wkv.kernel": (96, 96),  # two streams of CSA; HCA has one
    "attention.compressor.wgate.kernel": (96, 96),
    "indexer.compressor.wkv.kernel": (32, 32),
    "indexer.compressor.wgate.kernel": (32, 32),
    "indexer.wq_b.kernel": (),
    "indexer.weights_proj.kernel": (),
    "moe.router.gate.kernel": (),
    **{f"moe.{name}.kernel": () for name in ("w1", "w2", "w3")},
    **{f"moe.shared.{name}.kernel": () for name in ("w1", "w2", "w3")},
    "attn_hc.fn": (4, 4, 16),
    "ffn_hc.fn": (4, 4, 16),
    "hc_head.fn": (),
    "e_proj.kernel": (),
    "h_proj.kernel": (),
}
ADAMW = (
    *("embed.table", "head.table", "ape", "sink"),
    *("norm.weight", "attn_norm.weight", "ffn_norm.weight", "q_norm.weight", "kv_norm.weight"),
    *("enorm.weight", "hnorm.weight", "attn_hc.base", "attn_hc.scale", "ffn_hc.base"),
    *("ffn_hc.scale", "hc_head.base", "hc_head.scale"),
)


def test_every_parameter_has_the_rule_of_the_report():
    unused = {*MUON, *ADAMW}
    for path, variable in nnx.to_flat_state(nnx.state(_abstract(), nnx.Param)):
        name = ".".join(map(str, path))
        (end,) = {  # the longest, since indexers have compressors
            max((e for e in (*MUON, *ADAMW) if f".{name}".endswith(f".{e}")), key=len)
        }
        unused.discard(end)
        assert is_orthogonalized(variable) == (end in MUON), name
        is_hca = end.startswith("attention.compressor") and variable.get_value().shape[-1] == 96
        if end in MUON:
            assert variable.parts == ((96,) if is_hca else MUON[end]), name
    assert not unused


def test_the_rest_has_no_rule():
    others = nnx.to_flat_state(nnx.state(_abstract(), nnx.Not(nnx.Param)))
    assert {str(path[-1]) for path, _ in others} == {"bias", "table"}


def test_factors_of_a_lora_take_adamw():
    model = nnx.eval_shape(
        lambda: add_lora(Transformer(tiny(), rngs=nnx.Rngs(0)), LoRA(rank=2, targets=EXPERTS))
    )
    factors = [v for p, v in nnx.to_flat_state(nnx.state(model, nnx.Param)) if "adapter" in p]
    assert len(factors) > 10 and not any(map(is_orthogonalized, factors))


def _some_of_a_model() -> nnx.State:
    """Parameters of each kind of placement, with random numbers."""
    ends = (
        *("embed.table", "2.blocks.1.attention.wq_b.kernel", "2.blocks.1.attention.wo_a.kernel"),
        *("2.blocks.1.attention.wo_b.kernel", "2.blocks.1.moe.w2.kernel", "0.attn_hc.fn"),
        *("1.blocks.0.attention.wq_a.kernel", "1.blocks.0.moe.w1.kernel", "hc_head.fn"),
        *("1.blocks.0.attention.indexer.compressor.wkv.kernel", "2.blocks.1.attention.sink"),
    )
    rng, chosen = RNG(), []
    for path, variable in nnx.to_flat_state(nnx.state(_abstract(), nnx.Param)):
        if ".".join(map(str, path)).endswith(ends):
            value = jnp.asarray(rng.normal(size=variable.get_value().shape), jnp.float32)
            chosen.append((path, variable.replace(value)))
    assert len(chosen) >= len(ends)
    return nnx.from_flat_state(chosen)


@pytest.mark.parametrize(
    "shape", [dict(fsdp=2, expert=2, tensor=2), dict(expert=4, context=2)], ids=str
)
def test_updates_on_a_mesh_are_those_of_one_device(shape):
    params, tx = _some_of_a_model(), muon(1e-2)
    grads = jax.tree.map(lambda x: x + 1, params)
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    mesh = make_mesh(**shape)
    with jax.set_mesh(mesh):
        place = jax.tree.map(functools.partial(jax.NamedSharding, mesh), specs(params, TRAIN))
        params, grads = jax.device_put((params, grads), (place, place))
        step = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()
        found, _ = step(grads, tx.init(params), params)

    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), jax.tree.leaves(place))
    for new, old, where in pairs:
        assert new.sharding.is_equivalent_to(where, new.ndim)
        assert np.abs(np.asarray(new) - old).max() < 1e-5 * np.abs(old).max() + 1e-9
    assert "all-to-all" in step.as_text() and "all-gather(" not in step.as_text()


@pytest.mark.parametrize("optimizer", [adamw, muon])
def test_state_in_bfloat16_needs_half(optimizer):
    params = nnx.state(_abstract(), nnx.Param)

    def size(dtype) -> int:
        state = jax.eval_shape(optimizer(1e-3, state_dtype=dtype).init, params)
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))

    numbers = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    counts = 32  # bytes, at most
    assert 2 * size(jnp.bfloat16) - counts <= size(jnp.float32) <= 2 * size(jnp.bfloat16)
    if optimizer is adamw:
        assert 8 * numbers <= size(jnp.float32) < 8 * numbers + counts
    else:  # one number of a matrix instead of two
        assert 4 * numbers < size(jnp.float32) < 5 * numbers


def test_state_in_bfloat16_is_rounded_between_steps():
    """AdamW's moments against NumPy, which rounds them after each step."""
    params = nnx.State({"w": _variable((6, 5))})
    tx, rng = adamw(1e-2, weight_decay=0.0, clip_norm=1e9, state_dtype=jnp.bfloat16), RNG()
    state, expected = tx.init(params), np.asarray(params["w"][...], np.float64)
    m = v = np.zeros((6, 5), np.float32)
    for t in range(1, 5):
        g = rng.normal(size=(6, 5)).astype(np.float32)
        updates, state = tx.update(
            nnx.State({"w": params["w"].replace(jnp.asarray(g))}), state, params
        )
        params = optax.apply_updates(params, updates)
        m, v = (
            np.float32(0.9) * m + np.float32(0.1) * g,
            np.float32(0.95) * v + np.float32(0.05) * g**2,
        )
        expected -= 1e-2 * (m / (1 - 0.9**t)) / np.sqrt(v / (1 - 0.95**t))
        m, v = (x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in (m, v))
    np.testing.assert_allclose(params["w"][...], expected, atol=1e-5)
    kept = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(kept) == 2 and all(x.dtype == jnp.bfloat16 for x in kept)
