"""Requests that come, share, wait and leave: each gets the tokens that it gets alone."""

import asyncio
import dataclasses
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import v4jax
from tests.models import one_of_each, random_model
from v4jax import Engine, Sampling, Transformer
from v4jax.inference.ledger import Ledger
from v4jax.inference.prefix import (
    PIECE,
    HostPrefixes,
    Prefix,
    Prefixes,
    Stored,
    digests_of,
    wide_tokens,
)
from v4jax.inference.requests import EngineFullError
from v4jax.nn.cache import pages_of

CHUNKS = (128,)
RNG = np.random.default_rng(0)
TEXT = RNG.integers(2, 256, 4000).tolist()
# Past the window, past what the indexer selects, and lengths that divide nothing.
PROMPTS = [TEXT[n : n + length] for n, length in enumerate((5, 131, 700, 257, 128, 1037))]
SAMPLINGS = [
    Sampling(temperature=0, max_new_tokens=20),
    Sampling(seed=4, max_new_tokens=7),
    Sampling(seed=5, top_k=20, top_p=0.9, max_new_tokens=30),
    Sampling(seed=6, min_p=0.05, repetition_penalty=1.3, max_new_tokens=11),
    Sampling(seed=7, presence_penalty=0.5, frequency_penalty=0.2, max_new_tokens=9),
    Sampling(temperature=0, logit_bias={9: 3.0, 11: -5.0}, logprobs=3, max_new_tokens=13),
]


# For what has nothing to do with numbers.
ONE_MODEL = pytest.mark.parametrize("model", ["plain float32"], indirect=True)


@pytest.fixture(scope="module", params=["plain float32", "released bfloat16"])
def model(request) -> Transformer:
    if request.param == "plain float32":
        return random_model(one_of_each(), scan_layers=False, seed=1)
    return random_model(one_of_each(), v4jax.released("bfloat16"), scan_layers=False, seed=1)


@pytest.fixture(scope="module")
def alone(model) -> list[tuple[list[int], list]]:
    """Tokens and log-probabilities of each request in an engine where nothing else is."""
    engine = Engine(model, slots=3, chunks=CHUNKS, prefixes=0)
    found = []
    for prompt, sampling in zip(PROMPTS, SAMPLINGS):
        request = engine.submit(prompt, sampling, stop_ids=[])
        engine.run_until_idle()
        found.append((request.tokens, request.logprobs))
    assert [len(tokens) for tokens, _ in found] == [20, 7, 30, 11, 9, 13]
    return found


def check(requests, alone):
    for request, (tokens, logprobs) in zip(requests, alone, strict=True):
        assert request.tokens == tokens and request.logprobs == logprobs
        assert request.finish_reason == "length"


def submit(engine, which=range(len(PROMPTS)), **options):
    return [engine.submit(PROMPTS[i], SAMPLINGS[i], stop_ids=[], **options) for i in which]


def test_together(model, alone):
    engine = Engine(model, slots=3, chunks=CHUNKS)
    requests = submit(engine)
    engine.run_until_idle()
    check(requests, alone)
    stats = engine.stats()
    assert (stats.queued, stats.running, stats.generated_tokens) == (0, 0, 90)
    engine.forget_prefixes()
    assert engine.stats().pages_used == 0


def test_one_by_one_while_others_run(model, alone):
    engine = Engine(model, slots=3, chunks=CHUNKS, steps_per_call=5)
    order, requests = [2, 0, 5, 1, 3, 4], {}
    for index in order:
        requests[index] = submit(engine, [index])[0]
        for _ in range(index):
            engine.step()
    engine.run_until_idle()
    check([requests[i] for i in range(len(PROMPTS))], alone)


def scarce(engine: Engine, left: dict[int, int]) -> None:
    """Takes all but so many free pages away for good."""
    ledger = engine._holdings.ledger
    free = {ratio: len(pages) for ratio, pages in ledger._free[0].items()}
    assert ledger.allocate(0, {ratio: free[ratio] - left[ratio] for ratio in left}) is not None
    ledger.pages = {ratio: count + 1 for ratio, count in left.items()}


def test_when_there_are_pages_for_the_longest_alone(model, alone):
    engine = Engine(model, slots=3, chunks=CHUNKS)
    scarce(engine, {4: 3, 128: 1})
    requests = submit(engine)
    engine.run_until_idle()
    check(requests, alone)


def test_when_pages_run_out_while_two_decode(model):
    """Each of them needs a second page of CSA rows, and there are three: the later one has to leave."""
    prompts = [TEXT[n : n + 500] for n in (0, 1)]
    sampling = Sampling(seed=3, max_new_tokens=30)
    engine = Engine(model, slots=3, chunks=CHUNKS, prefixes=0)
    expected = [engine.generate([prompt], [sampling], stop_ids=[])[0].tokens for prompt in prompts]
    scarce(engine, {4: 3, 128: 3})
    requests = [engine.submit(prompt, sampling, stop_ids=[]) for prompt in prompts]
    engine.run_until_idle()
    assert [tuple(request.tokens) for request in requests] == expected
    assert engine.stats().preemptions == 1
    assert requests[0].finished_at < requests[1].finished_at


def test_who_leaves_its_slot_comes_back_as_it_was(model, alone):
    """Forced: whoever decodes is put out at every third step."""
    engine = Engine(model, slots=3, chunks=CHUNKS)
    requests = submit(engine)
    for step in range(400):
        engine.step()
        decoding = [slot.request for slot in engine.slots if slot.generated]
        if step % 3 == 0 and decoding:
            engine._scheduler._make_room(decoding[0], {})
        if not engine.has_work:
            break
    check(requests, alone)
    assert engine.stats().preemptions > 5


@pytest.mark.parametrize("offset", [0, 122, 127, 300, 895])
def test_after_a_prefix_of_any_length(offset, alone, cached_engine):
    """Of whole pieces, which end inside a window and a page: 128 tokens twice, 256, 384 and 1,024."""
    shared, length = PROMPTS[5][: 129 + offset], len(PROMPTS[5])
    other = [*shared, 1, 1, 1]
    cached_engine.forget_prefixes()
    cached_engine.generate([other], Sampling(max_new_tokens=2), stop_ids=[])
    request = cached_engine.submit(PROMPTS[5], SAMPLINGS[5], stop_ids=[])
    cached_engine.run_until_idle()
    assert request.cached_tokens == min(len(shared), length - 1) // PIECE * PIECE
    check([request], alone[5:])


@pytest.fixture(scope="module")
def cached_engine(model) -> Engine:
    return Engine(model, slots=3, chunks=CHUNKS)


def test_prefixes_of_prefixes_and_their_end(model, alone, cached_engine):
    """A chat: each turn begins with the one before. Then the oldest leave, and pages come back."""
    engine = cached_engine
    engine.forget_prefixes()
    for length in (140, 300, 700, 1037):
        request = engine.submit(PROMPTS[5][:length], SAMPLINGS[5], stop_ids=[])
        engine.run_until_idle()
    assert request.cached_tokens == 640
    check([request], alone[5:])
    prefixes, held = engine._holdings.prefixes, engine.stats().pages_used
    assert len(prefixes) >= 4
    while prefixes.evict(0):
        assert engine.stats().pages_used <= held
        held = engine.stats().pages_used
    assert held == 0


@ONE_MODEL
def test_a_prompt_that_ends_where_a_snapshot_is_due(cached_engine):
    """Its last piece is fed for its logits, and is no prefix."""
    cached_engine.forget_prefixes()
    cold, warm = [], []
    for found in (cold, warm):
        request = cached_engine.submit(TEXT[:1024], SAMPLINGS[0], stop_ids=[])
        cached_engine.run_until_idle()
        found += [request.cached_tokens, request.tokens]
    assert [cold[0], warm[0]] == [0, 896]
    assert cold[1] == warm[1] and len(cold[1]) == 20


def test_prefixes_of_wide_chunks(model):
    """Of another shape are other bits, so of a chat's turns only those count that have the same."""
    sampling = Sampling(temperature=0, logprobs=2, max_new_tokens=6)
    turns = [PROMPTS[5][:length] for length in (140, 300, 530, 1037)]
    whole = Engine(model, slots=3, chunks=(128, 256), prefixes=0)
    engine, cached = Engine(model, slots=3, chunks=(128, 256)), []
    for turn in turns:
        alone = whole.submit(turn, sampling, stop_ids=[])
        request = engine.submit(turn, sampling, stop_ids=[])
        for one in (whole, engine):
            one.run_until_idle()
        assert (request.tokens, request.logprobs) == (alone.tokens, alone.logprobs)
        cached.append(request.cached_tokens)
    # 128 narrow tokens; 256 wide ones, twice; all wide ones.
    assert cached == [0, 0, 256, 512]


@pytest.mark.parametrize(
    "length, wide",
    [(1, 0), (129, 0), (513, 0), (641, 640), (1025, 1024), (1153, 1024), (1999, 1920)],
)
def test_which_tokens_go_in_wide_chunks(length, wide):
    assert wide_tokens(length, 1024) == wide


def test_a_prefix_that_left_for_host_memory_comes_back(model, alone):
    engine = Engine(model, slots=3, chunks=CHUNKS, host_bytes=1 << 30)
    holdings = engine._holdings
    engine.generate([PROMPTS[5]], Sampling(max_new_tokens=2), stop_ids=[])
    while holdings.prefixes.evict(0):
        pass
    assert engine.stats().pages_used == 0 and holdings.host.nbytes > 0
    request = engine.submit(PROMPTS[5], SAMPLINGS[5], stop_ids=[])
    engine.run_until_idle()
    assert request.cached_tokens == 1024
    check([request], alone[5:])


def test_host_memory_has_a_limit():
    host = HostPrefixes(most_bytes=100)
    for name in (b"a", b"b", b"c"):
        host.add(name, Stored(128, 0, np.zeros(40, np.uint8), []))
    assert host.nbytes == 80
    found = [host.find([name], 0, longer_than=0) for name in (b"a", b"b", b"c")]
    assert [one is not None for one in found] == [False, True, True]
    assert host.find([b"b"], 0, longer_than=128) is None and host.find([b"b"], 128, 0) is None


def test_a_prefix_in_a_file(model, alone, tmp_path):
    path = tmp_path / "document.npz"
    engine = Engine(model, slots=3, chunks=CHUNKS)
    assert engine.save_prefix(PROMPTS[5], path) == 1024
    other = Engine(model, slots=3, chunks=CHUNKS)
    assert other.load_prefix(path) == 1024
    request = other.submit(PROMPTS[5], SAMPLINGS[5], stop_ids=[])
    other.run_until_idle()
    assert request.cached_tokens == 1024
    check([request], alone[5:])
    wrong = random_model(one_of_each(), model.numerics, scan_layers=False, seed=2)
    with pytest.raises(ValueError, match="was saved by an engine with another model"):
        Engine(wrong, slots=3, chunks=CHUNKS).load_prefix(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="is no prefix that an engine has saved"):
        other.load_prefix(path)
    with pytest.raises(ValueError, match="the prompt has 128 tokens: expected 129 or more"):
        engine.save_prefix(PROMPTS[4], path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["document.npz"]


@ONE_MODEL
def test_priority_and_order(cached_engine):
    engine = cached_engine
    first, second, third = submit(engine, [0, 4, 0])
    (urgent,) = submit(engine, [1], priority=2)
    engine.step()
    assert in_slots(engine) == {urgent.number, first.number, second.number}
    engine.run_until_idle()
    assert urgent.first_token_at < first.first_token_at < second.first_token_at
    assert first.submitted_at < first.first_token_at < first.finished_at < third.finished_at


def in_slots(engine: Engine) -> set[int]:
    return {slot.request.number for slot in engine.slots if slot.request}


def test_who_comes_later_with_a_higher_priority_takes_a_slot(cached_engine, alone):
    """Of whoever came last with the lowest, while it decodes or is fed. Equals wait."""
    engine, before = cached_engine, cached_engine.stats().preemptions
    engine.forget_prefixes()
    low = submit(engine, [2, 0, 5])  # 5 is the last to be fed
    while not (low[0].tokens and low[1].tokens):
        engine.step()
    assert [slot.state for slot in engine.slots] == ["decode", "decode", "prefill"]
    assert engine.slots[2].request is low[2] and engine.slots[2].cached % PIECE == 0
    equal, first = *submit(engine, [4]), *submit(engine, [1], priority=1)
    engine.step()
    assert in_slots(engine) == {low[0].number, low[1].number, first.number}
    second, third, fourth = submit(engine, [3, 4, 1], priority=1)
    engine.step()
    assert in_slots(engine) == {first.number, second.number, third.number}
    assert engine.stats().preemptions == before + 3 and low[0].tokens and low[1].tokens
    engine.run_until_idle()
    assert engine.stats().preemptions == before + 3
    check([low[0], low[1], low[2]], [alone[2], alone[0], alone[5]])
    check([equal, first, second, third, fourth], [alone[i] for i in (4, 1, 3, 4, 1)])
    assert fourth.finished_at < min(request.finished_at for request in low)
    free = dict.fromkeys(engine.slots)
    assert [(s.state, s.request, s.cached, s.generated) for s in free] == [("free", None, 0, 0)]


def test_who_comes_later_with_a_higher_priority_takes_pages(model, alone):
    engine = Engine(model, slots=3, chunks=CHUNKS, prefixes=0)
    scarce(engine, {4: 3, 128: 3})
    low = submit(engine, [0, 3])
    while not low[0].tokens:
        engine.step()
    (high,) = submit(engine, [5], priority=1)  # needs all three
    engine.step()
    assert in_slots(engine) == {high.number} and engine.stats().preemptions == 2
    engine.run_until_idle()
    check([*low, high], [alone[i] for i in (0, 3, 5)])
    assert high.finished_at < low[0].finished_at

    most = submit(engine, [0], priority=2)  # and who comes then is not in the way of 5
    low = submit(engine, [4])
    while not (most[0].tokens and low[0].tokens):
        engine.step()
    high = submit(engine, [5], priority=1)
    engine.step()
    assert in_slots(engine) == {most[0].number, low[0].number}
    engine.run_until_idle()
    check([*most, *low, *high], [alone[i] for i in (0, 4, 5)])
    assert engine.stats().preemptions == 2


def test_cancelled_requests_leave_at_once(cached_engine):
    engine, seen = cached_engine, []
    engine.forget_prefixes()
    requests = submit(engine, [2, 2, 2, 2, 0], listener=lambda r: seen.append(r.number))
    for _ in range(6):
        engine.step()
    for request in requests[:4]:
        request.cancel()
    engine.run_until_idle()
    assert [r.finish_reason for r in requests] == ["cancelled"] * 4 + ["length"]
    assert len(requests[4].tokens) == 20 and len(requests[0].tokens) < 30
    assert {r.number for r in requests} == set(seen)
    engine.forget_prefixes()
    assert engine.stats().pages_used == 0


@ONE_MODEL
def test_a_thread_serves_many(model, alone):
    engine = Engine(model, slots=3, chunks=CHUNKS)
    engine.start()
    found: list = [None] * len(PROMPTS)

    def ask(i):
        (request,) = submit(engine, [i])
        found[i] = list(engine.tokens(request))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == [tokens for tokens, _ in alone]
    running = engine.submit(PROMPTS[0], Sampling(max_new_tokens=20_000), stop_ids=[])
    while not running.tokens:
        time.sleep(0.01)
    engine.stop(grace=0.1)
    assert running.finish_reason == "cancelled" and not engine.has_work


@ONE_MODEL
def test_tokens_for_asyncio(model, alone):
    engine, seen = Engine(model, slots=3, chunks=CHUNKS), []
    engine.start()

    async def read(index):
        (request,) = submit(engine, [index], listener=lambda r: seen.append(r.number))
        return [token async for token in engine.async_tokens(request)]

    async def all_of_them():
        found = await asyncio.gather(*map(read, range(len(PROMPTS))))
        (request,) = submit(engine, [2])
        async for token in engine.async_tokens(request):  # who reads no further does no harm
            return found, token

    found, first = asyncio.run(all_of_them())
    assert found == [tokens for tokens, _ in alone] and first == alone[2][0][0]
    assert len(set(seen)) == len(PROMPTS)  # its own listener is called as well
    running = engine.submit(PROMPTS[0], Sampling(max_new_tokens=20_000), stop_ids=[])

    async def until_the_end():
        return [token async for token in engine.async_tokens(running)]

    end = threading.Timer(0.3, engine.stop)
    end.start()
    assert asyncio.run(until_the_end()) == running.tokens
    end.join()
    assert running.finish_reason == "cancelled"
    waits = engine.submit(PROMPTS[0], SAMPLINGS[0], stop_ids=[])

    async def one():
        return await anext(engine.async_tokens(waits))

    with pytest.raises(RuntimeError, match=r"call start\(\) first"):
        asyncio.run(one())


@ONE_MODEL
def test_what_cannot_be_served_is_refused(model):
    engine = Engine(model, slots=1, cache_tokens=512, queue=2)
    with pytest.raises(ValueError, match="5009 tokens are more than the cache_tokens=512"):
        engine.submit([1] * 9, Sampling(max_new_tokens=5000))
    with pytest.raises(ValueError, match=r"logit_bias has token ids up to 256: expected 0\.\.255"):
        engine.submit([1], Sampling(logit_bias={256: 1.0}))
    engine.submit([1])
    engine.submit([1])
    with pytest.raises(EngineFullError, match="2 requests are waiting"):
        engine.submit([1])
    for bad, message in (
        (dict(slots=0), "slots=0: expected at least 1"),
        (dict(cache_tokens=0), "cache_tokens=0: expected a positive number"),
        (dict(steps_per_call=33), r"steps_per_call=33: expected 1\.\.32"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(model, **bad)


@ONE_MODEL
def test_the_cache_grows_for_a_long_request(model, monkeypatch):
    monkeypatch.setattr("v4jax.inference.engine.CACHE_TOKENS", 256)
    engine = Engine(model, slots=3, chunks=CHUNKS, prefixes=0)
    before = engine.stats().pages
    prompt = TEXT[:1600]
    small, large = engine.generate([PROMPTS[1], prompt], Sampling(max_new_tokens=3), stop_ids=[])
    assert engine.stats().pages > before and len(large.tokens) == 3
    assert engine.generate([PROMPTS[1]], Sampling(max_new_tokens=3), stop_ids=[]) == [small]


@ONE_MODEL
def test_a_step_does_not_touch_what_is_not_filled(cached_engine):
    """Tables are as wide as the longest running request needs, whatever the cache has room for."""
    engine = cached_engine
    engine.generate([PROMPTS[0]], Sampling(max_new_tokens=3), stop_ids=[])
    widths = set()
    decode = engine._scheduler.run.decode

    def spy(slots, tables, *others):
        widths.add(tables[4].shape[1])
        return decode(slots, tables, *others)

    engine._scheduler.run = dataclasses.replace(engine._scheduler.run, decode=spy)
    engine.generate([PROMPTS[0]], Sampling(max_new_tokens=3), stop_ids=[])
    engine._scheduler.run = dataclasses.replace(engine._scheduler.run, decode=decode)
    assert widths == {pages_of(4096, 4)}


# Ledger and prefixes: of numbers alone.


@settings(deadline=None)
@given(data=st.data())
def test_a_page_belongs_to_those_that_hold_it(data):
    ledger, held = Ledger({4: 9, 128: 4}), []
    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["take", "share", "leave"])):
            case "take":
                wanted = {r: data.draw(st.integers(0, 4)) for r in (4, 128)}
                free = {r: len(ledger._free[0][r]) for r in (4, 128)}
                got = ledger.allocate(0, wanted)
                assert (got is None) == any(free[r] < wanted[r] for r in free)
                if got is not None:
                    assert {r: len(p) for r, p in got.items()} == wanted
                    used = [page for other in held for page in other[4]]
                    assert not set(got[4]) & set(used) and 0 not in got[4]
                    held.append(got)
            case "share" if held:
                held.append(data.draw(st.sampled_from(held)))
                ledger.hold(0, held[-1])
            case "leave" if held:
                ledger.release(0, held.pop(data.draw(st.integers(0, len(held) - 1))))
        distinct = {(r, page) for pages in held for r in pages for page in pages[r]}
        assert ledger.used == len(distinct)
    for pages in held:
        ledger.release(0, pages)
    assert ledger.used == 0 and ledger.total == 11


def test_a_ledger_grows():
    ledger = Ledger({4: 3}, parts=2)
    first = ledger.allocate(1, {4: 2})
    assert ledger.allocate(1, {4: 1}) is None
    ledger.grow({4: 5})
    second = ledger.allocate(1, {4: 2})
    assert sorted(first[4] + second[4]) == [1, 2, 3, 4] and ledger.allocate(1, {4: 1}) is None


def test_digests_tell_prefixes_apart():
    tokens = TEXT[:700]
    digests = digests_of(tokens)
    assert len(digests) == 5 and digests_of(tokens[:640]) == digests
    for place in (0, 127, 128, 639):
        other = digests_of([*tokens[:place], tokens[place] + 1, *tokens[place + 1 :]])
        assert [a == b for a, b in zip(digests, other)] == [n < place // 128 for n in range(5)]


def test_the_least_recently_used_prefix_leaves():
    ledger = Ledger({4: 9})
    prefixes = Prefixes(ledger, most=2)
    for name in (b"a", b"b"):
        pages = ledger.allocate(0, {4: 1})
        prefixes.add(0, name, Prefix(128, 0, pages, None))
        ledger.release(0, pages)
    assert prefixes.find(0, [b"a", b"x"], 0).length == 128
    assert prefixes.find(1, [b"a"], 0) is None and prefixes.find(0, [b"a"], 128) is None
    pages = ledger.allocate(0, {4: 1})
    prefixes.add(0, b"c", Prefix(128, 0, pages, None))
    assert [prefixes.wants(0, name, 0) for name in (b"a", b"b", b"c")] == [False, True, False]
    assert ledger.used == 2 and prefixes.evict(0) and ledger.used == 1 and not prefixes.evict(1)
