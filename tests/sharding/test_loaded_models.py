"""A loaded model carries its mesh: what runs it asks the model, and moves no weights."""

import dataclasses

import jax
import numpy as np
import pytest

import v4jax
from sharding import make_mesh
from tests.models import random_model
from v4jax import checkpoint, tiny
from v4jax.inference.engine import Engine
from v4jax.inference.sampling import Sampling
from v4jax.inference.score import Scorer
from v4jax.inference.steps import decode_shapes
from v4jax.planning.hlo import collectives

PROMPTS = [np.random.default_rng(n).integers(2, 256, n).tolist() for n in (150, 37)]
GREEDY = Sampling(temperature=0, max_new_tokens=6)
SHAPES = [dict(fsdp=2, expert=4), dict(expert=2, tensor=2, context=2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CSA and an HCA layer, in float32."""
    path = tmp_path_factory.mktemp("two") / "model"
    cfg = dataclasses.replace(tiny(), layers=tiny().layers[1:3], mtp_layers=(), expert_format=None)
    checkpoint.save(random_model(cfg, scan_layers=False, seed=2), path)
    return path


@pytest.fixture(scope="module")
def alone(folder):
    """What one device computes: completions, and logits of whole sequences."""
    model = checkpoint.load(folder)
    tokens = np.array([PROMPTS[0][:144]] * 8, np.int32)
    completions = Engine(model, chunks=(256,)).generate(PROMPTS, GREEDY, stop_ids=[])
    return completions, tokens, np.asarray(jax.jit(lambda t: model(t))(tokens))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_moves_no_weights(folder, alone, shape):
    """Read in the program that `load` and `generate` run, with no mesh set around them."""
    model = v4jax.load(folder, v4jax.plain(), mesh=make_mesh(**shape))
    engine = Engine(model, chunks=(256,))

    assert engine.generate(PROMPTS, GREEDY, stop_ids=[]) == alone[0]

    with engine._on_mesh():
        _, *others = decode_shapes(model, 8, 4096)
        step = engine._decode.lower(engine.leaves, engine._holdings.slots, *others)
        text = step.compile().as_text()
    largest = max(leaf.nbytes for leaf in engine.leaves)
    sent = [found.sent_bytes for found in collectives(text)]
    assert sum(sent) < largest / 4, sent


@pytest.mark.parametrize("shape", SHAPES[:1], ids=str)
def test_requests_move_between_the_parts_of_a_mesh(folder, alone, shape):
    """Put out while they decode, they come back into any part; prefixes are of one part each."""
    model = v4jax.load(folder, v4jax.plain(), mesh=make_mesh(**shape))
    engine = Engine(model, chunks=(256,), steps_per_call=1, host_bytes=1 << 30)
    holdings = engine._holdings
    requests = [engine.submit(prompt, GREEDY, stop_ids=[]) for prompt in PROMPTS * 6]
    for _ in range(200):
        engine.step()
        decoding = [r for r in holdings.in_slot if r is not None and r.tokens]
        if decoding:
            engine._scheduler._make_room(decoding[-1], {})
        if not engine.has_work:
            break
    assert engine.stats().preemptions > 3
    for request, expected in zip(requests, alone[0] * 6, strict=True):
        assert tuple(request.tokens) == expected.tokens
    while any(holdings.prefixes.evict(part) for part in range(holdings.parts)):
        pass
    again = engine.submit(PROMPTS[0], GREEDY, stop_ids=[])
    engine.run_until_idle()
    assert again.cached_tokens == 128 and tuple(again.tokens) == alone[0][0].tokens


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_model_on_a_mesh_is_called_as_any_other(folder, alone, shape):
    model = v4jax.load(folder, v4jax.plain(), mesh=make_mesh(**shape))

    np.testing.assert_allclose(model(alone[1]), alone[2], atol=1e-4)
    with pytest.raises(ValueError, match="cuts batch=3"):
        model(alone[1][:3])


def test_weights_that_lie_for_training_are_refused(folder):
    mesh = make_mesh(fsdp=2, expert=4)
    model = v4jax.load(folder, v4jax.plain(), mesh=mesh, use="train", scan_layers=False)

    with pytest.raises(ValueError, match=r'lies by .* use="serve"'):
        Engine(model)
    with pytest.raises(ValueError, match=r'lies by .* use="serve"'):
        Scorer(model)
    with pytest.raises(ValueError, match="use='play': expected one of 'serve', 'train'"):
        v4jax.load(folder, use="play")
