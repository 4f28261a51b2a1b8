"""What a TPU program does while rows travel, and gradients of experts on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from pallas_kernels.formats.quantize import quantize_weight
from pallas_kernels.grouped_matmul import by_expert, of_pairs, pairs_by_expert, summed
from sharding import DECODE, TRAIN, collectives, expert_parallel, make_mesh
from sharding.expert_parallel import apply_experts
from v4jax.planning.hlo import exchanges
from v4jax.planning.topologies import COMPILER_OPTIONS, topology_devices

SORTS = by_expert, pairs_by_expert


def in_order(of_rows):
    """For `apply_experts`, made of a function of rows that are sorted by expert."""

    def experts_fn(params, x, order, weights, labels):
        x = x.reshape(-1, x.shape[-1])  # devices' tokens
        out = of_rows(params, of_pairs(x, order.row), order.sizes, weights)
        return summed(out, order.position.reshape(x.shape[0], -1))

    return experts_fn


def test_rows_of_one_round_travel_while_those_of_another_are_computed(not_kept):
    pytest.importorskip("libtpu")
    devices, tokens, dim, k = 4, 1024, 1024, 2

    @in_order
    def experts_fn(weights, rows, sizes, row_weights):
        return jnp.matmul(rows * row_weights[:, None].astype(rows.dtype), weights[0])

    def fn(weights, x, experts, row_weights):
        return apply_experts(experts_fn, *SORTS, weights, x, experts, row_weights, 1)

    mesh = make_mesh(expert=devices, devices=topology_devices("v6e:2x2"))
    arrays = [
        ((devices, dim, dim), jnp.bfloat16),
        ((devices * tokens, dim), jnp.bfloat16),
        ((devices * tokens, k), jnp.int32),
        ((devices * tokens, k), jnp.float32),
    ]
    with jax.set_mesh(mesh):
        cut = jax.NamedSharding(mesh, P("expert"))
        shapes = [jax.ShapeDtypeStruct(*array, sharding=cut) for array in arrays]
        step = jax.jit(collectives.per_device(fn, TRAIN, (P("expert"),) * 4, P("expert")))
        compiled = step.lower(*shapes).compile(COMPILER_OPTIONS)

    found = exchanges(compiled.as_text())

    # Not all: a compiler may do one at once whose rows fit into a core's own memory.
    assert {one.kind for one in found} == {"ragged-all-to-all"}
    assert sum("dot_general" in one.work for one in found) >= 2, found


EXPERTS, TOKENS, DIM, CHOICES = 4, 64, 8, 2


@in_order
def _with_adapter(params, rows, sizes, row_weights):
    """Experts of a frozen FP8 matrix and a trained one beside it; plain products, for comparison."""
    weights = params["frozen"].dequantize(jnp.float32) + params["adapter"]
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows.shape[0]), side="right")
    chosen = weights[jnp.minimum(expert, weights.shape[0] - 1)]
    out = jnp.einsum("rd,rde->re", rows, chosen) * row_weights[:, None]
    return jnp.where((expert < weights.shape[0])[:, None], out, 0)


def _gradients(load: str, **sizes):
    """Output, and gradients of the adapter, the rows and their weights, on a mesh or one device."""
    rng = np.random.default_rng(0)
    frozen = quantize_weight(jnp.asarray(rng.normal(size=(EXPERTS, DIM, DIM)), jnp.float32), "fp8")
    params = {"frozen": frozen, "adapter": rng.normal(size=(EXPERTS, DIM, DIM)).astype(np.float32)}
    x = rng.normal(size=(TOKENS, DIM)).astype(np.float32)
    experts = np.argsort(rng.random((TOKENS, EXPERTS)), axis=1)[:, :CHOICES].astype(np.int32)
    if load == "uneven":  # nearly all rows go to one expert: rounds of an even load do not do
        experts[:-4] = [0, 1]
    weights = rng.random((TOKENS, CHOICES)).astype(np.float32)
    direction = rng.normal(size=(TOKENS, DIM)).astype(np.float32)

    def fn(adapter, frozen, x, weights, experts, direction):
        def loss(adapter, x, weights):
            params = {"frozen": frozen, "adapter": adapter}
            args = params, x, experts, weights, len(adapter)
            out = apply_experts(_with_adapter, *SORTS, *args)
            return jnp.sum(out * direction), out

        grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(adapter, x, weights)
        others = tuple(a for a in ("fsdp", "context") if sizes.get(a, 1) > 1)
        adapter = jax.lax.psum(grads[0], others) if others else grads[0]
        return out, adapter, grads[1], grads[2]

    arguments = (params["adapter"], frozen, x, weights, experts, direction)
    if not sizes:
        return jax.jit(fn)(*arguments)
    tokens, cut = P(("fsdp", "expert", "context")), P("expert")
    with jax.set_mesh(make_mesh(**sizes)):
        specs = (cut, cut, tokens, tokens, tokens, tokens), (tokens, cut, tokens, tokens)
        return jax.jit(collectives.per_device(fn, TRAIN, *specs))(*arguments)


@pytest.mark.parametrize("load", ["even", "uneven"])
@pytest.mark.parametrize("overlap", [False, True], ids=["one loop", "unrolled rounds"])
@pytest.mark.parametrize(
    "sizes",
    [dict(expert=4), dict(fsdp=2, expert=2), dict(expert=2, context=2), dict(expert=2, tensor=2)],
    ids=str,
)
def test_trained_leaves_learn_beside_frozen_ones(sizes, overlap, load, monkeypatch):
    """Also in the form that TPUs and GPUs run: rounds of an even load unrolled, a loop for the rest."""
    monkeypatch.setattr(expert_parallel, "rounds_overlap", lambda: overlap)

    found = _gradients(load, **sizes)

    expected = _gradients(load)
    assert np.abs(expected[1]).max() > 1
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("rules", [TRAIN, DECODE], ids=["all_to_all", "gather"])
def test_labels_go_where_their_tokens_go(rules):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(TOKENS, DIM)).astype(np.float32)
    experts = np.argsort(rng.random((TOKENS, EXPERTS)), axis=1)[:, :CHOICES].astype(np.int32)
    weights = rng.random((TOKENS, CHOICES)).astype(np.float32)
    labels = rng.integers(0, 5, TOKENS).astype(np.int32)
    factors = rng.normal(size=(EXPERTS, 5)).astype(np.float32)

    def experts_fn(factors, x, order, weights, labels):
        x = x.reshape(-1, x.shape[-1])  # devices' tokens
        rows, position = of_pairs(x, order.row), order.position.reshape(x.shape[0], -1)
        expert = jnp.searchsorted(jnp.cumsum(order.sizes), jnp.arange(len(rows)), side="right")
        own = factors.at[expert, labels[order.row // position.shape[1]]].get(
            mode="fill", fill_value=0
        )
        return summed(rows * (own * weights)[:, None], position)

    def fn(factors, x, experts, weights, labels):
        return apply_experts(
            experts_fn, *SORTS, factors, x, experts, weights, len(factors), labels=labels
        )

    tokens, cut = P(("fsdp", "expert")), P("expert")
    with jax.set_mesh(make_mesh(fsdp=2, expert=2)):
        step = collectives.per_device(fn, rules, (cut, tokens, tokens, tokens, tokens), tokens)
        found = jax.jit(step)(factors, x, experts, weights, labels)

    own = np.sum(weights * factors[experts, labels[:, None]], axis=1, dtype=np.float64)
    np.testing.assert_allclose(found, x * own[:, None], atol=1e-5, rtol=1e-5)
