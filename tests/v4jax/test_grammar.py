"""Answers of a grammar: they are what it says, whatever else is served, and others do not change."""

import dataclasses
import json
import re

import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import v4jax
from tests.conftest import NANO
from tests.models import small_nano
from v4jax import Engine, Grammar, Sampling
from v4jax.inference import grammar as grammars
from v4jax.inference.grammar import GrammarError, Matchers
from v4jax.inference.sampling import EVERYTHING, masked, num_words
from v4jax.inference.tool_grammar import call_grammar
from v4jax.text.format import CALLS_END, CALLS_START, DSML, EOS, SPECIAL_TOKENS, THINK_END
from v4jax.text.parse import parse_message_from_completion_text
from v4jax.text.stream import CompletionStream
from v4jax.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(NANO)
VOCAB = TOKENIZER.vocab_size
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "walks", "books"]}, "maxItems": 3},
        "is_clever": {"type": "boolean"},
    },
    "required": ["name", "age", "is_clever"],
    "additionalProperties": False,
}
REGEX = r"[A-Z][a-z]{2,8} (Bates|Knightley)\."


def bits(words: np.ndarray) -> np.ndarray:
    return np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = v4jax.load(small_nano(), v4jax.plain("float32"))
    return Engine(model, TOKENIZER, slots=3, chunks=(128,))


@pytest.fixture(scope="module")
def free(engine) -> tuple[list, list[list[int]]]:
    """Requests without a grammar, and their tokens where nothing else is served."""
    asked = [
        ("Emma was", Sampling(seed=1, max_new_tokens=30)),
        ("It was a fine morning, and", Sampling(seed=2, top_p=0.9, logprobs=2, max_new_tokens=40)),
    ]
    return asked, [list(engine.tokens(engine.submit(*one))) for one in asked]


def text_of(request) -> str:
    tokens = request.tokens
    return TOKENIZER.decode(tokens[:-1] if tokens[-1] in TOKENIZER.stop_ids else tokens)


def prompt_of(mode: str) -> list[int]:
    return TOKENIZER.encode(TOKENIZER.render([{"role": "user", "content": "Who?"}], mode).text)


# nano likes white space, of which the grammar allows much.
SPACES = {n: -20.0 for n in range(VOCAB) if not TOKENIZER.decode([n]).strip()}
SAMPLINGS = [
    Sampling(temperature=0, max_new_tokens=300, logit_bias=SPACES),
    Sampling(seed=3, max_new_tokens=300, logit_bias=SPACES),
    Sampling(temperature=3.0, seed=4, logprobs=2, max_new_tokens=300, logit_bias=SPACES),
    Sampling(seed=5, top_k=3, repetition_penalty=1.2, max_new_tokens=300, logit_bias=SPACES),
    Sampling(seed=6, top_p=0.5, min_p=0.2, max_new_tokens=300, logit_bias={**SPACES, 9: 50.0}),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=range(len(SAMPLINGS)))
def test_an_answer_is_json_of_its_schema(engine, sampling):
    request = engine.submit(prompt_of("non-think"), sampling, grammar=Grammar.json_schema(SCHEMA))
    tokens = list(engine.tokens(request))
    assert request.finish_reason == "stop" and tokens[-1] in TOKENIZER.stop_ids
    jsonschema.validate(json.loads(text_of(request)), SCHEMA)
    if sampling.logprobs is not None:
        assert len(request.logprobs) == len(tokens)
        # Of the model as it is: the likeliest token need not be one that the grammar has.
        assert any(t not in dict(e.top) for t, e in zip(tokens, request.logprobs))


def test_several_grammars_beside_requests_without_one(engine, free):
    """More than there are slots, so that grammars begin and end while the others are decoded."""
    asked, alone = free
    sampling = Sampling(seed=7, temperature=1.5, max_new_tokens=300)
    kinds = [Grammar.json_schema(SCHEMA), Grammar.regex(REGEX), Grammar.lark('start: "yes" | "no"')]
    constrained, others = [], []
    for number in range(6):
        one = dataclasses.replace(sampling, seed=number)
        constrained.append(engine.submit("Emma was", one, grammar=kinds[number % 3]))
        if number % 3 == 1:
            others.append(engine.submit(*asked[number // 3]))
    engine.run_until_idle()
    assert [request.tokens for request in others] == alone
    for request in constrained:
        assert request.finish_reason == "stop"
    for request in constrained[::3]:
        jsonschema.validate(json.loads(text_of(request)), SCHEMA)
    assert all(re.fullmatch(REGEX, text_of(request)) for request in constrained[1::3])
    assert all(text_of(request) in ("yes", "no") for request in constrained[2::3])
    again = [r.tokens for r in constrained]
    for number, tokens in enumerate(again):  # nor do they depend on what else is served
        one = dataclasses.replace(sampling, seed=number)
        request = engine.submit("Emma was", one, grammar=kinds[number % 3])
        assert list(engine.tokens(request)) == tokens


def test_who_leaves_its_slot_goes_on_in_its_grammar(engine, free):
    """Forced: whoever decodes is put out at every third step. Prefixes are used again, too."""
    asked, alone = free
    sampling, grammar = Sampling(seed=3, max_new_tokens=300), Grammar.json_schema(SCHEMA)
    prompt = [*range(10, 250), *prompt_of("non-think")]
    first = list(engine.tokens(engine.submit(prompt, sampling, grammar=grammar)))
    before = engine.stats().preemptions
    request, other = engine.submit(prompt, sampling, grammar=grammar), engine.submit(*asked[1])
    for step in range(2000):
        engine.step()
        decoding = [slot.request for slot in engine.slots if slot.generated]
        if step % 3 == 0 and decoding:
            engine._scheduler._make_room(decoding[0], {})
        if not engine.has_work:
            break
    assert request.cached_tokens == 128 and engine.stats().preemptions > before + 5
    assert request.tokens == first and other.tokens == alone[1]


def test_the_reasoning_is_free(engine):
    """Its tokens are those without a grammar; the turn does not end in it."""
    prompt = prompt_of("think-high")
    end = TOKENIZER.id(THINK_END)
    ends = {end: 4.0}  # two layers alone never would
    bias = {index: -100.0 for index in TOKENIZER.stop_ids}
    free = engine.submit(prompt, Sampling(seed=2, max_new_tokens=150, logit_bias=bias | ends))
    engine.run_until_idle()
    sampling = Sampling(seed=2, max_new_tokens=400, logit_bias=ends)
    request = engine.submit(prompt, sampling, grammar=Grammar.regex("[0-9]{4}"))
    engine.run_until_idle()
    assert request.finish_reason == "stop"
    length = request.tokens.index(end) + 1
    assert request.tokens[:length] == free.tokens[:length]
    assert re.fullmatch("[0-9]{4}", TOKENIZER.decode(request.tokens[length:-1]))
    reply = engine.chat(
        "Tell me of Emma.", "think-high", sampling, grammar=Grammar.regex("[0-9]{4}")
    )
    assert reply.reasoning and re.fullmatch("[0-9]{4}", reply.content)


def test_the_limit_cuts_and_a_cancelled_request_leaves(engine, free):
    asked, alone = free
    long = Grammar.regex("[a-z]{500}")
    cut = engine.submit("Emma", Sampling(max_new_tokens=9), grammar=long)
    engine.run_until_idle()
    assert cut.finish_reason == "length" and len(cut.tokens) == 9
    assert re.fullmatch("[a-z]{9,500}", text_of(cut))
    gone = engine.submit("Emma", Sampling(max_new_tokens=400), grammar=long)
    other = engine.submit(*asked[0])
    while len(gone.tokens) < 5:
        engine.step()
    gone.cancel()
    engine.run_until_idle()
    assert gone.finish_reason == "cancelled" and other.tokens == alone[0]


def test_a_grammar_that_cannot_go_on_ends_its_request_alone(engine, free, monkeypatch):
    asked, alone = free

    def fails(self):
        raise GrammarError("the grammar cannot be followed: too complex.")

    monkeypatch.setattr(grammars.Matcher, "allowed", fails)
    failed = engine.submit("Emma", Sampling(max_new_tokens=9), grammar=Grammar.json_object())
    other = engine.submit(*asked[0])
    engine.run_until_idle()
    assert failed.finish_reason == "error" and "too complex" in failed.error
    assert other.tokens == alone[0]
    with pytest.raises(RuntimeError, match="too complex"):
        engine.generate("Emma", grammar=Grammar.json_object())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.json_schema({"type": "foo"}), "Invalid type: foo"),
        (lambda: Grammar.json_schema({"not": {}}), r'Unimplemented keys: \["not"\]'),
        (lambda: Grammar.json_schema({"a": {1}}), "the schema is not JSON"),
        (lambda: Grammar.json_schema([1]), r"\S"),
        (lambda: Grammar.regex("a("), "unclosed group"),
        (lambda: Grammar.lark("start: foo"), 'unknown name: "foo"'),
    ],
)
def test_what_cannot_be_compiled_is_said(make, message):
    with pytest.raises(GrammarError, match=message):
        make()


def test_a_grammar_needs_a_tokenizer_and_a_way_to_end(engine):
    with pytest.raises(GrammarError, match=r"stop_ids=\[\]: expected an id"):
        engine.submit("Emma", stop_ids=[], grammar=Grammar.json_object())
    without = Engine.__new__(Engine)
    without.tokenizer = None
    with pytest.raises(GrammarError, match="a grammar needs a tokenizer"):
        _ = without._matchers


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(GrammarError, match=r"pip install 'v4jax\[structured\]'"):
        Grammar.json_object()


# Matchers alone, without a model.


@pytest.fixture(scope="module")
def matchers() -> Matchers:
    return Matchers(TOKENIZER, VOCAB + 40)  # a model may have more ids than its tokenizer


def write(matchers, grammar: Grammar, rng, stop_ids, limit: int) -> str | None:
    """What a model that likes all allowed tokens equally writes; None if it is cut."""
    matcher = matchers.matcher(grammar, [5], stop_ids)
    tokens: list[int] = []
    while len(tokens) < limit:
        found = np.flatnonzero(bits(matcher.allowed()))
        token = int(rng.choice(found))
        if token in stop_ids:
            return TOKENIZER.decode(tokens, keep_special=True)
        matcher.accept(token)
        tokens.append(token)
    return None


NAMES = st.text('abcé "\\{}<｜', min_size=1, max_size=6)
SCALARS = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -5, "maximum": 70},
        {"type": "string", "maxLength": 4},
        {"enum": ["a", 1, None, {"b": []}]},
        {"const": '"\\'},
    ]
)


def nested(inner):
    def of(properties):
        return {
            "type": "object",
            "properties": properties,
            "required": sorted(properties)[::2],
            "additionalProperties": False,
        }

    items = inner.map(lambda one: {"type": "array", "items": one, "maxItems": 3})
    objects = st.dictionaries(NAMES, inner, max_size=4).map(of)
    return st.one_of(
        items, objects, st.lists(inner, min_size=1, max_size=3).map(lambda i: {"anyOf": i})
    )


@settings(deadline=None, max_examples=40)
@given(schema=st.recursive(SCALARS, nested, max_leaves=8), seed=st.integers(0, 2**32 - 1))
def test_whatever_is_allowed_is_of_the_schema(matchers, schema, seed):
    rng, stop_ids = np.random.default_rng(seed), TOKENIZER.stop_ids
    text = write(matchers, Grammar.json_schema(schema), rng, stop_ids, 600)
    if text is not None:
        jsonschema.validate(json.loads(text), schema)


def test_tokens_of_the_prompt_format_stand_in_no_text(matchers):
    """Not even where a grammar allows any text: they would begin another's turn."""
    matcher = matchers.matcher(Grammar.regex("(.|\n)*"), [5], TOKENIZER.stop_ids)
    allowed = bits(matcher.allowed())
    stops = set(TOKENIZER.stop_ids)
    assert all(allowed[TOKENIZER.id(t)] == (TOKENIZER.id(t) in stops) for t in SPECIAL_TOKENS)
    assert allowed.sum() > VOCAB - 120 and not allowed[VOCAB : VOCAB + 40].any()


def test_a_stop_id_is_allowed_where_the_grammar_may_end(matchers):
    (letter,) = TOKENIZER.encode("a")
    matcher = matchers.matcher(Grammar.regex("b{1,2}"), [5], [letter])
    assert not bits(matcher.allowed())[letter]
    matcher.accept(TOKENIZER.encode("b")[0])
    allowed = bits(matcher.allowed())
    assert allowed[letter] and not allowed[TOKENIZER.stop_ids[0]]


# Calls.


def function(name: str, parameters=None, **options) -> dict:
    described = {"name": name, **options}
    if parameters is not None:
        described["parameters"] = parameters
    return {"type": "function", "function": described}


def an_object(*required: str, **properties) -> dict:
    closed = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**closed, "required": [*required]}


PACE = {"anyOf": [{"enum": ["slow", "fast"]}, {"type": "null"}]}
WALK = an_object("to", to={"type": "string"}, km={"type": "integer"}, pace=PACE)
TOOLS = [
    function("walk", WALK, strict=True),
    function("rest"),
    function("note", {"type": "object"}),
    function("date", an_object("day", day={"type": "string", "format": "date"})),
    function("say", an_object(text={"type": "string", "minLength": 1, "maxLength": 3})),
]


def called(name: str, *arguments: tuple[str, str, str]) -> str:
    inner = "".join(
        f'<{DSML}parameter name="{key}" string="{flag}">{value}</{DSML}parameter>\n'
        for key, flag, value in arguments
    )
    return f'<{DSML}invoke name="{name}">\n{inner or chr(10)}</{DSML}invoke>\n'


def block(*calls: str) -> str:
    return f"{CALLS_START}>\n{''.join(calls)}{CALLS_END}"


TO, KM = ("to", "true", 'Box </ "Hill"\n'), ("km", "false", "7")
REST = called("rest")


@pytest.mark.parametrize(
    ("text", "required", "named", "auto"),
    [
        (block(called("walk", TO, KM)), True, True, True),
        (block(called("walk", ("to", "true", ""), ("pace", "true", "slow"))), True, True, True),
        (block(called("walk", TO, ("pace", "false", "null"))), True, True, True),
        (block(REST, called("walk", TO)), True, False, True),
        (block(called("walk", TO), called("walk", TO)), True, False, True),
        (block(called("note", ("a", "true", "x"), ("b", "false", "[1]"))), True, False, True),
        (block(called("note")), True, False, True),
        (block(called("date", ("day", "false", '"1815-12-23"'))), True, False, True),
        (block(called("say", ("text", "true", "漢é</"[:3]))), True, False, True),
        (block(called("say")), True, False, True),
        ("", False, False, True),
        ("It is <b>\n\n< fine.", False, False, True),
        ("I go." + block(called("walk", TO)), False, False, True),
        (block(called("walk", KM)), False, False, False),  # an argument is missing
        (block(called("walk", KM, TO)), False, False, False),  # not in order
        (block(called("walk", TO, ("km", "true", "7"))), False, False, False),
        (block(called("walk", TO, ("km", "false", "x"))), False, False, False),
        (block(called("walk", TO, ("pace", "true", "slowly"))), False, False, False),
        (block(called("walk", TO, ("by", "true", "x"))), False, False, False),
        (block(called("ride")), False, False, False),
        (block(called("rest", TO)), False, False, True),  # it is not strict
        (block(called("date", ("day", "false", '"1815-13-23"'))), False, False, True),
        (block(called("say", ("text", "true", "four"))), False, False, True),
        (block(called("walk", TO)) + "More.", False, False, False),
        (block(), False, False, False),
    ],
)
def test_which_answers_call(matchers, text, required, named, auto):
    """Read by the strict parser of the format, too, where they are allowed."""
    grammars = (
        call_grammar(TOOLS, TOKENIZER),
        call_grammar(TOOLS, TOKENIZER, name="walk"),
        call_grammar(TOOLS, TOKENIZER, is_required=False),
    )
    assert [follows(matchers, one, text) for one in grammars] == [required, named, auto]
    if auto:
        parse_message_from_completion_text(text + EOS, "chat")


def follows(matchers, grammar: Grammar, text: str) -> bool:
    """Whether all its tokens are allowed, and the end behind them."""
    matcher = matchers.matcher(grammar, [5], TOKENIZER.stop_ids)
    for token in (*TOKENIZER.encode(text), TOKENIZER.stop_ids[0]):
        if not bits(matcher.allowed())[token]:
            return False
        matcher.accept(token)
    return True


def test_one_call_if_they_are_not_parallel(matchers):
    one = call_grammar(TOOLS, TOKENIZER, is_parallel=False)
    assert follows(matchers, one, block(REST)) and not follows(matchers, one, block(REST, REST))


@settings(deadline=None, max_examples=30)
@given(
    properties=st.dictionaries(
        st.text("abé \\{}<>'\n", min_size=1, max_size=5),
        st.recursive(SCALARS, nested, max_leaves=5),
        max_size=4,
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_is_called_is_of_the_schema(matchers, properties, seed):
    """As the released format has it, and as a stream of it is read."""
    schema = an_object(*sorted(properties)[::2], **properties)
    grammar = call_grammar([function("f é", schema)], TOKENIZER, is_parallel=False)
    text = write(matchers, grammar, np.random.default_rng(seed), TOKENIZER.stop_ids, 600)
    if text is None:
        return
    message = parse_message_from_completion_text(text + EOS, "chat")
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "f é" and message["content"] == ""
    jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
    stream = CompletionStream("chat")
    deltas = [delta for character in text for delta in stream.push(character)]
    assert "".join(d.text for d in deltas if d.kind == "arguments") == call["function"]["arguments"]


def test_definitions_are_followed(matchers):
    tree = {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}}
    colour = {"enum": ["red", 3], "description": "of it"}
    schema = an_object("in", "of", **{"in": {"$ref": "#/$defs/colour"}, "of": tree})
    schema["$defs"] = {"colour": colour, "tree": tree | {"additionalProperties": False}}
    grammar = call_grammar([function("f", schema)], TOKENIZER)
    of = ("of", "false", '{"next": {"next": {}}}')
    good = [("in", "true", "red"), ("in", "false", "3")]
    assert all(follows(matchers, grammar, block(called("f", one, of))) for one in good)
    bad = [("in", "true", "blue"), ("in", "true", "3"), ("in", "false", '"red"')]
    assert not any(follows(matchers, grammar, block(called("f", one, of))) for one in bad)


@pytest.mark.parametrize(
    ("tools", "options", "message"),
    [
        (TOOLS, {"name": "ride"}, "'ride' is no tool: expected one of walk, rest, note, date, say"),
        ([], {}, "there are no tools"),
        ([{"type": "function"}], {}, "expected a function with a name"),
        ([function('a"b')], {}, """'a"b' is the name of a function: expected one without"""),
        ([function("f", an_object(**{f"a{DSML}": {}}))], {}, "is the name of an argument of 'f'"),
        (
            [function("f", [1])],
            {},
            r"parameters of 'f' are \[1\]: expected the schema of an object",
        ),
        ([function("f", {"type": "array"})], {}, "expected the schema of an object"),
        ([function("f", {"anyOf": [{}]})], {}, "parameters of 'f' have 'anyOf': of an object"),
        ([function("f", {"required": [["a"]]})], {}, "required as a list of texts"),
        ([function("f", an_object("b", a={}))], {}, "parameters of 'f' require 'b'"),
        (
            [function("f", an_object(a={"not": {}}))],
            {},
            r"argument 'a' of 'f': .*keys: \[\"not\"\]",
        ),
        (
            [function("f", an_object(a=False))],
            {},
            "argument 'a' of 'f': False: expected a JSON sch",
        ),
        ([function("f", an_object(a={"type": 5}))], {}, "argument 'a' of 'f': "),
        (
            [function("f", an_object(a={"type": "string", "minLength": 3, "maxLength": 2}))],
            {},
            "argument 'a' of 'f': ",
        ),
        ([function("f", an_object(a={"$ref": "#"}))], {}, r"\$ref '#': expected one to #/\$defs"),
        ([function("f", an_object(a={"$ref": "#/$defs/b"}))], {}, "there is no such schema"),
    ],
)
def test_what_cannot_be_called_is_said(tools, options, message):
    with pytest.raises(GrammarError, match=message):
        call_grammar(tools, TOKENIZER, **options)


def test_a_model_that_has_to_call_does(engine):
    """Behind its reasoning, which is free."""
    age = {"type": "integer", "minimum": 0, "maximum": 99}
    tools = [function("greet", an_object("age", "pace", age=age, pace=PACE))]
    calls = call_grammar(tools, TOKENIZER, name="greet")
    for mode in ("non-think", "think-high"):
        sampling = Sampling(seed=2, max_new_tokens=400)
        reply = engine.chat("Who?", mode, sampling, tools=tools, grammar=calls)
        assert bool(reply.reasoning) == (mode == "think-high") and not reply.content
        (call,) = reply.tool_calls
        assert call["function"]["name"] == "greet" and reply.finish_reason == "stop"
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, tools[0]["function"]["parameters"])


@settings(deadline=None)
@given(data=st.data())
def test_a_mask_takes_away_what_it_does_not_allow(data):
    vocab = data.draw(st.sampled_from([1, 31, 32, 33, 100]))
    logits = np.linspace(-3, 3, 2 * vocab, dtype=np.float32).reshape(2, vocab)
    masks = np.full((2, num_words(vocab)), EVERYTHING)
    words = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=masks.shape[1]))
    masks[1] = words[: masks.shape[1]]
    found = np.asarray(masked(jnp.asarray(logits), jnp.asarray(masks)))
    assert np.array_equal(found[0], logits[0])
    kept = bits(masks[1])[:vocab]
    assert np.array_equal(found[1], np.where(kept, logits[1], -np.inf))
