"""Meshes of 8 devices compute what one device does: loss, gradients, logits, generated tokens.

A part of a sequence begins at 17, 34 or 68 tokens and their multiples: inside windows of both
compressors, and less than a sliding window's width from its neighbour where it is 16 or wider.
"""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from sharding import DECODE, TRAIN, collectives, make_mesh
from tests.models import one_of_each, random_model
from v4jax import Transformer, V4Config, checkpoint, nano_path, tiny
from v4jax.inference.engine import Engine
from v4jax.inference.sampling import Sampling
from v4jax.inference.score import Scorer
from v4jax.nn.placement import check_mesh, specs
from v4jax.train.losses import LossWeights, shifted
from v4jax.train.step import loss_and_gradients

LENGTH, BATCH = 136, 8  # past 128 (HCA) and 4 * topk = 64; 136 = 8 * 17
TOLERANCE = 1e-4  # of logits and gradients, and of the loss relative to it
# Gradients reach 0.05, those of some parameters only 1e-6, so they are held relative to a parameter's
# largest value too, or to the 1e-9 that is left of the rounding where 1,088 terms cancel. A sum over
# devices that is missing or done twice moves an eighth at least.
RELATIVE_TOLERANCE, FLOOR = 1e-3, 5e-9
NOISE = 2e-7  # relative, of parameters: three times what float32 rounds them by
# Of 4,000 rows of random tokens, those where rounding decides nothing in either model. The last expert
# or entry that is chosen and the first that is not are 1e-4 of the largest score apart; where a
# gradient has a step, no argument is nearer than 1e-5 of the limit of a SwiGLU, or 2e-5 of the largest
# product of an indexer's relu. Elsewhere a value passes that limit by 1e-7 on one mesh and not on
# another, which moves its expert's gradients by percents.
ROWS = (255, 2468, 939, 1176, 3314, 3790, 251, 280)


def _once() -> V4Config:
    """One layer of each kind, and the MTP block; in an order in which rounding decides nothing."""
    window, csa, hca = one_of_each().layers
    return dataclasses.replace(tiny(), layers=(window, hca, csa))


MODELS = {"once": _once(), "tiny": tiny()}


def _allowed() -> list[dict[str, int]]:
    """Meshes of 8 devices that `TRAIN` allows for tiny()."""
    found = []
    for shape in itertools.product((1, 2, 4, 8), repeat=4):
        sizes = dict(zip(("fsdp", "expert", "tensor", "context"), shape))
        if math.prod(shape) != 8:
            continue
        try:
            check_mesh(tiny(), TRAIN, batch=BATCH, length=LENGTH, sizes=sizes)
        except ValueError:
            continue
        found.append({axis: n for axis, n in sizes.items() if n > 1})
    return found


# Every triple of axes, and those two by themselves whose devices exchange the most.
SHAPES = (
    dict(context=8),
    dict(expert=8),
    dict(fsdp=2, expert=2, tensor=2),
    dict(fsdp=2, expert=2, context=2),
    dict(fsdp=2, tensor=2, context=2),
)
CASES = [("once", shape) for shape in SHAPES]
CASES += [("tiny", dict(expert=2, tensor=2, context=2))]


TOKENS = np.random.default_rng(1).integers(2, 256, (4000, LENGTH + 2))[list(ROWS)].astype(np.int32)


def _compiled(model: Transformer):
    """A function of parameters and fixed variables: gradients by name, metrics and logits.

    Over the ambient mesh, where it puts its arguments first. tiny() is computed as it is trained,
    recomputing layers in the backward pass.
    """
    graphdef, *state = nnx.split(model, nnx.Param, ...)
    placed = [specs(part, TRAIN) for part in state]

    def forward(params, fixed, inputs):
        return nnx.merge(graphdef, params, fixed)(inputs)

    step = loss_and_gradients(
        graphdef, LossWeights(balance=1.0), TRAIN, remat="layers" if model.cfg == tiny() else "none"
    )
    step = jax.jit(step)
    forward = collectives.per_device(forward, TRAIN, (*placed, TRAIN.tokens), TRAIN.tokens)
    forward = jax.jit(forward)

    def run(*state):
        if not jax.sharding.get_abstract_mesh().empty:
            sharding = functools.partial(jax.NamedSharding, jax.sharding.get_mesh())
            state = jax.device_put(state, jax.tree.map(sharding, tuple(placed)))
        gradients, metrics = step(*state, *shifted(TOKENS))
        named = jax.tree_util.tree_leaves_with_path(gradients)
        gradients = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in named}
        return gradients, metrics, np.asarray(forward(*state, TOKENS[:, :LENGTH]))

    return run


@functools.cache
def _one_device(name: str):
    """A model and what one device computes, from its parameters and from ones a rounding away."""
    model = random_model(MODELS[name], rules=TRAIN, seed=1)
    _, params, fixed = nnx.split(model, nnx.Param, ...)
    rng = np.random.default_rng(0)

    def moved(x):
        return x * (1 + NOISE * rng.normal(size=x.shape)).astype(np.float32)

    run = _compiled(model)
    return model, run(params, fixed), run(jax.tree.map(moved, params), fixed)


def _assert_same(found, expected) -> None:
    (gradients, metrics, logits), (old_gradients, old_metrics, old_logits) = found, expected
    for old, new in zip(*map(jax.tree.leaves, (old_metrics, metrics)), strict=True):
        np.testing.assert_allclose(new, old, rtol=TOLERANCE)
    np.testing.assert_allclose(logits, old_logits, atol=TOLERANCE)
    assert gradients.keys() == old_gradients.keys()
    for name, old in old_gradients.items():
        difference = np.abs(gradients[name] - old).max()
        assert difference <= TOLERANCE, name
        assert difference <= max(RELATIVE_TOLERANCE * np.abs(old).max(), FLOOR), name


def test_all_triples_of_axes_are_allowed_and_compared():
    triples = {frozenset(mesh) for mesh in _allowed() if len(mesh) == 3}

    assert len(_allowed()) == 16
    assert len(triples) == 4 and triples <= {frozenset(shape) for _, shape in CASES}


@pytest.mark.parametrize("name", MODELS)
def test_rounding_decides_nothing(name):
    """Else the gradients of another mesh might belong to another choice of experts."""
    _, expected, moved = _one_device(name)
    _assert_same(moved, expected)


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_loss_gradients_and_logits_are_those_of_one_device(name, shape):
    model, expected, _ = _one_device(name)
    with jax.set_mesh(make_mesh(**shape)):
        found = _compiled(model)(*nnx.split(model, nnx.Param, ...)[1:])

    _assert_same(found, expected)


PROMPTS = [np.random.default_rng(n).integers(2, 256, n).tolist() for n in (150, 37, 201)]


def _serve():
    model = random_model(one_of_each(), rules=DECODE, seed=1)
    engine = Engine(model, chunks=(128,))
    greedy = Sampling(temperature=0, max_new_tokens=8)
    completions = engine.generate(PROMPTS, greedy, stop_ids=(0,))
    return completions, Scorer(model).logits(TOKENS[:, :LENGTH])


@pytest.fixture(scope="module")
def served():
    return _serve()


@pytest.mark.parametrize(
    "shape",
    [dict(fsdp=2, context=4), dict(expert=2, tensor=2, context=2)],
    ids=str,
)
def test_generation_and_logits_are_those_of_one_device(shape, served):
    with jax.set_mesh(make_mesh(**shape)):
        completions, logits = _serve()

    assert completions == served[0]
    np.testing.assert_allclose(logits, served[1], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(tensor=4), r"tensor=4 cuts o_groups=2 into 4 parts: sizes that would do are 1, 2"),
        (dict(expert=16), r"expert=16 cuts moe.num_experts=8 .* would do are 1, 2, 4, 8"),
        (dict(context=7), r"context=7 cuts length=136 .* would do are 1, 2, 4, 8, 17"),
        (dict(fsdp=3), r"fsdp=3 cuts embed_dim=128"),
        (dict(fsdp=2, expert=8), r"fsdp=2 x expert=8 cuts batch=8 into 16 parts"),
    ],
)
def test_meshes_that_do_not_divide_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        check_mesh(tiny(), TRAIN, batch=BATCH, length=LENGTH, sizes=sizes)


def test_parts_of_quantised_weights_must_be_whole_blocks():
    with pytest.raises(ValueError, match=r"expert_dim=64 into 2 parts in multiples of 256"):
        check_mesh(tiny(), TRAIN, sizes=dict(tensor=2), quantized=True)


def test_a_device_must_hold_whole_blocks_of_quantised_weights():
    with jax.set_mesh(make_mesh(tensor=2)):
        model = checkpoint.load(nano_path())
        with pytest.raises(ValueError, match=r"tensor=2 cuts .* need blocks of \d+ whole"):
            Engine(model)


def test_a_mesh_is_refused_before_anything_is_compiled(compilations):
    model = random_model(one_of_each(), rules=DECODE, seed=1)
    with jax.set_mesh(make_mesh(context=8)):
        spread = random_model(one_of_each(), rules=DECODE, seed=1)
    before = compilations()
    with jax.set_mesh(make_mesh(tensor=4)), pytest.raises(ValueError, match="o_groups=2"):
        Engine(model)
    with pytest.raises(ValueError, match="length=20"):
        Scorer(spread).logits(TOKENS[:, :20])
    assert compilations() == before
