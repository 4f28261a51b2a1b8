"""Several adapters in one batch: every row computes what it would with its adapter alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import make_mesh
from tests.models import random_model
from tests.tolerances import FLOAT32, assert_close
from v4jax import Engine, Sampling, Transformer, tiny
from v4jax.checkpoint import load_adapter, save_adapter
from v4jax.nn.adapter_rows import choosing, with_adapters
from v4jax.nn.lora import LoRA, add_lora, matrices, merge_lora

CONFIG = dataclasses.replace(tiny(), layers=tiny().layers[:2], mtp_layers=())
# Other ranks, scales and targets: the second has nothing beside shared experts, or one matrix of experts.
OF_SECOND = ("attention.wq_a", "wo_b", "indexer.wq_b", "compressor.wkv", "moe.w1", "moe.w2")
LORAS = {
    "a": LoRA(rank=4, targets="all-linear"),
    "b": LoRA(rank=2, alpha=6, targets=OF_SECOND),
}
GREEDY = Sampling(temperature=0, max_new_tokens=12)


def _learnt(model: Transformer, lora: LoRA, seed: int) -> Transformer:
    """With adapters whose B is not zero."""
    model = add_lora(model, lora, seed=seed)
    for i, (_, matrix) in enumerate(matrices(model)):
        if matrix.adapter is not None:
            b = matrix.adapter.b
            key = jax.random.fold_in(jax.random.key(seed), i)
            value = 0.3 * jax.random.normal(key, b.get_value().shape)
            b.set_value(jax.device_put(value, b.get_value().sharding))
    return model


def _adapted(model: Transformer) -> dict[str, Transformer]:
    """By name, with adapters of the projection in groups too, which files have no form for."""
    return {
        name: _learnt(model, dataclasses.replace(lora, targets=(*lora.targets, "wo_a")), seed)
        for seed, (name, lora) in enumerate(LORAS.items())
    }


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(CONFIG, scan_layers=False, seed=1)


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, lora) in enumerate(LORAS.items()):
        save_adapter(_learnt(model, lora, seed), folder / name)
    return {name: str(folder / name) for name in LORAS}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 256, n).tolist() for n in (9, 140, 33)]


@pytest.fixture(scope="module")
def engine(model, folders) -> Engine:
    return Engine(model, slots=3, chunks=(128,), adapters=folders)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(2, 256, (4, 32)).astype(np.int32)


@pytest.fixture(scope="module")
def expected(model, tokens) -> np.ndarray:
    """Logits of rows with no adapter, the second, the first and the second, each by a model of its own."""
    logits = jax.jit(lambda m, t: m(t))
    adapted = _adapted(model)
    alone = {name: merge_lora(one) for name, one in adapted.items()} | {None: model}
    rows = [logits(alone[name], tokens[[i]])[0] for i, name in enumerate([None, "b", "a", "b"])]
    assert_close(logits(adapted["a"], tokens[[2]])[0], rows[2], FLOAT32)
    assert np.abs(rows[2] - logits(model, tokens[[2]])[0]).max() > 0.1
    return np.stack(rows)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_rows_compute_what_their_adapters_compute_alone(model, tokens, expected, scan_layers):
    cfg = dataclasses.replace(CONFIG, layers=(CONFIG.layers[0],) * 2) if scan_layers else CONFIG
    base = random_model(cfg, scan_layers=True, seed=2) if scan_layers else model
    if scan_layers:
        targets = "attention.wkv", "wo_a", "moe.w2"
        adapted = [_learnt(base, LoRA(rank=3, targets=targets), 5)]
        rows = jnp.array([1, 0, 1, 0])
        logits = jax.jit(lambda m, t: m(t))
        both = logits(merge_lora(adapted[0]), tokens), logits(base, tokens)
        expected = jnp.stack([both[1 - row][i] for i, row in enumerate(rows.tolist())])
    else:
        adapted = list(_adapted(base).values())
        rows = jnp.array([0, 2, 1, 2])

    found = jax.jit(lambda m, rows, t: choosing(m, rows)(t))(
        with_adapters(base, adapted), rows, tokens
    )

    assert_close(found, expected, FLOAT32)


def test_rows_compute_it_on_a_mesh_too(tokens, expected):
    with jax.set_mesh(make_mesh(expert=2, tensor=2)):
        base = random_model(CONFIG, scan_layers=False, seed=1)
        adapted = list(_adapted(base).values())
        several = choosing(with_adapters(base, adapted), jnp.array([0, 2, 1, 2]))

        found = several(jnp.asarray(tokens))

    assert_close(found, expected, FLOAT32)


def test_requests_of_one_batch_get_the_tokens_they_get_alone(engine, prompts, compilations):
    chosen = [("a", 0), (None, 1), ("b", 1), ("b", 0), ("a", 2), (None, 0), ("a", 1)]

    sampling = dataclasses.replace(GREEDY, logprobs=3)  # which tell every bit

    def submit(adapter, which):
        return engine.submit(prompts[which], sampling, stop_ids=[], adapter=adapter)

    def given(requests):
        return [(request.tokens, request.logprobs) for request in requests]

    alone = []
    for one in chosen:
        alone.append(submit(*one))
        engine.run_until_idle()
    together = [submit(*one) for one in chosen]
    engine.run_until_idle()
    before = compilations()
    reverse = [submit(*one) for one in chosen[::-1]]
    engine.run_until_idle()

    assert compilations() == before  # whatever mix
    assert given(together) == given(alone) == given(reverse[::-1])
    of_prompt = {r.adapter: r.tokens for r in alone if r.prompt == prompts[1]}
    assert len({tuple(tokens) for tokens in of_prompt.values()}) == 3


def test_the_engine_decodes_what_the_model_with_the_adapter_would(engine, model, folders, prompts):
    (completion,) = engine.generate([prompts[2]], GREEDY, stop_ids=[], adapter="a")
    sequence = jnp.array([prompts[2] + list(completion.tokens)])

    logits = merge_lora(load_adapter(model, folders["a"]))(sequence)[0]

    predicted = logits[len(prompts[2]) - 1 : -1].argmax(-1)
    assert completion.tokens == tuple(predicted.tolist())


def test_prefixes_belong_to_their_adapter(engine, prompts, tmp_path):
    prompt = [5, *prompts[1]]
    cached = []
    for adapter in ("a", "b", None, "b", None, "a"):
        request = engine.submit(prompt, GREEDY, adapter=adapter)
        engine.run_until_idle()
        cached.append(request.cached_tokens)
    assert cached == [0, 0, 0, 128, 128, 128]

    engine.save_prefix(prompt, tmp_path / "prefix", adapter="b")
    engine.forget_prefixes()
    engine.load_prefix(tmp_path / "prefix")
    again = {name: engine.submit(prompt, GREEDY, adapter=name) for name in (None, "a", "b")}
    engine.run_until_idle()
    assert {name: r.cached_tokens for name, r in again.items()} == {None: 0, "a": 0, "b": 128}


def test_a_request_that_leaves_its_slot_keeps_its_adapter(engine, prompts):
    before = engine.generate([prompts[0]] * 3, GREEDY, stop_ids=[], adapter="a")
    requests = [
        engine.submit(prompts[0], dataclasses.replace(GREEDY), stop_ids=[], adapter="a")
        for _ in range(3)
    ]
    while not all(request.tokens for request in requests):
        engine.step()
    urgent = engine.submit(prompts[2], GREEDY, adapter="b", priority=1)
    preemptions = engine.stats().preemptions
    engine.run_until_idle()

    assert engine.stats().preemptions == preemptions + 1 and urgent.is_ended
    assert [tuple(request.tokens) for request in requests] == [one.tokens for one in before]


def test_what_cannot_be_done_is_said(engine, model, folders, prompts, tmp_path):
    with pytest.raises(ValueError, match="adapter='c': this engine has one of a, b, or None"):
        engine.submit(prompts[0], adapter="c")
    with pytest.raises(ValueError, match="adapter='a': this engine has None"):
        Engine(model, slots=1, chunks=(128,)).submit(prompts[0], adapter="a")
    with pytest.raises(ValueError, match=r"attention\.wkv has an adapter already: merge it"):
        Engine(load_adapter(model, folders["a"]), slots=1, adapters=folders)
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        Engine(model, slots=1, adapters={"gone": tmp_path / "gone"})
