import copy
import hashlib
import json
import pathlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax.text import parse as parsing
from v4jax.text.format import (
    APRIL_MAX_EFFORT,
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    JULY_MAX_EFFORT,
    LATEST_REMINDER,
    MODES,
    PAD,
    SPECIAL_TOKENS,
    THINK_END,
    THINK_START,
    USER,
    EncodingError,
    modes_of,
    shown,
)
from v4jax.text.parse import parse_message_from_completion_text, parse_partial_completion
from v4jax.text.prompt import Prompt, encode_messages, render, with_bos

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "encoding_cases.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))
ENCODE_CASES = [case for case in CASES if case["kind"] == "encode"]
PARSE_CASES = [case for case in CASES if case["kind"] == "parse"]
OPTIONS = ("context", "drop_thinking", "add_default_bos_token", "reasoning_effort")

TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
S = {"role": "system", "content": "S"}
Q1 = {"role": "user", "content": "q1"}
Q2 = {"role": "user", "content": "q2"}
A1 = {"role": "assistant", "content": "a1", "reasoning_content": "r1"}
A2 = {"role": "assistant", "content": "a2", "reasoning_content": "r2"}


def name_of(case):
    return case["name"]


def messages_of(case):
    messages = copy.deepcopy(case["messages"])
    if "tools" in case:
        messages[case["tools_on"]]["tools"] = copy.deepcopy(case["tools"])
    return messages


def options_of(case):
    return {option: copy.deepcopy(case[option]) for option in OPTIONS if option in case}


def calling(*calls, **fields):
    """An assistant message with calls given as (id, name, arguments as JSON or as a dict)."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": id,
                "type": "function",
                "function": {
                    "name": name,
                    "arguments": arguments
                    if isinstance(arguments, str)
                    else json.dumps(arguments, ensure_ascii=False),
                },
            }
            for id, name, arguments in calls
        ],
        **fields,
    }


def result(call_id, content):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def sha256(text):
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# Golden cases: what the released module renders and reads.


def test_golden_file_is_complete():
    assert len(CASES) == 82
    assert len({case["name"] for case in CASES}) == 82


@pytest.mark.parametrize("case", ENCODE_CASES, ids=name_of)
def test_encode_golden(case):
    messages, options = messages_of(case), options_of(case)
    if "expected_error" in case:
        with pytest.raises(EncodingError):
            encode_messages(messages, case["thinking_mode"], **options)
    else:
        assert encode_messages(messages, case["thinking_mode"], **options) == case["expected"]


@pytest.mark.parametrize("case", PARSE_CASES, ids=name_of)
def test_parse_golden(case):
    if "expected_error" in case:
        with pytest.raises(EncodingError):
            parse_message_from_completion_text(case["text"], case["thinking_mode"])
    else:
        message = parse_message_from_completion_text(case["text"], case["thinking_mode"])
        assert message == case["expected_message"]


@pytest.mark.parametrize("case", ENCODE_CASES, ids=name_of)
def test_messages_are_not_mutated(case):
    messages, options = messages_of(case), options_of(case)
    messages_before, options_before = copy.deepcopy(messages), copy.deepcopy(options)
    try:
        encode_messages(messages, case["thinking_mode"], **options)
    except EncodingError:
        pass
    assert messages == messages_before
    assert options == options_before


# Texts whose hash is known.


def test_max_effort_text():
    prompt = encode_messages([Q1], "thinking", reasoning_effort="max")
    effort = prompt.removeprefix(BOS).removesuffix(f"{USER}q1{ASSISTANT}{THINK_START}")
    assert len(effort) == 476
    assert sha256(effort) == "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7"


def test_tools_text():
    system = {"role": "system", "content": "", "tools": [{"function": {"name": "x"}}]}
    prompt = encode_messages([system, Q1], "chat")
    tools = prompt.removeprefix(f"{BOS}\n\n").removesuffix(f"{USER}q1{ASSISTANT}{THINK_END}")
    assert sha256(tools) == "dc9e31da74f1937e315337539b4a430dc16b56526b6f2208748cb3a0335979ee"


def test_schemas_keep_key_order_and_unicode():
    tools = [{"function": {"z": "é", "a": {"日": 1}}}, {"function": {"name": "y"}}]
    prompt = encode_messages([{**S, "tools": tools}], "chat")
    assert '\n\n{"z": "é", "a": {"日": 1}}\n{"name": "y"}\n\n' in prompt


# Tokens, modes, releases.


def test_special_tokens():
    assert SPECIAL_TOKENS[:3] == (BOS, EOS, PAD)
    assert len(set(SPECIAL_TOKENS)) == len(SPECIAL_TOKENS) == 16
    assert BOS == "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    assert EOS == "<\uff5cend\u2581of\u2581sentence\uff5c>"
    assert PAD == "<\uff5c\u2581pad\u2581\uff5c>"
    assert DSML == "\uff5cDSML\uff5c"


def test_golden_prompts_use_no_other_special_token():
    for case in ENCODE_CASES:
        for token in re.findall(r"<?\uff5c[^\uff5c]*\uff5c>?", case.get("expected", "")):
            assert token.removeprefix("<") in SPECIAL_TOKENS or token in SPECIAL_TOKENS


@pytest.mark.parametrize(
    "mode, start, end",
    [
        ("non-think", BOS, THINK_END),
        ("think-high", BOS, THINK_START),
        ("think-max", BOS + APRIL_MAX_EFFORT, THINK_START),
    ],
)
def test_modes(mode, start, end):
    thinking_mode, effort = MODES[mode]
    prompt = encode_messages([Q1], thinking_mode, reasoning_effort=effort)
    assert prompt == f"{start}{USER}q1{ASSISTANT}{end}"


def test_modes_are_complete():
    report = ("non-think", "think-high", "think-max")
    assert modes_of("april") == report
    assert modes_of("0731") == ("non-think", "think-low", "think-high", "think-max")
    assert set(MODES) == {*report, "think-low"}


def test_default_effort_is_high_in_april():
    expected = encode_messages([Q1], "thinking", release="april")
    assert encode_messages([Q1], "thinking", reasoning_effort="high") == expected


@pytest.mark.parametrize(
    "effort, first_line",
    [
        (None, ""),
        ("low", ""),
        ("high", "Reasoning Effort: Absolute maximum with no shortcuts permitted."),
        (
            "max",
            "Reasoning Effort: Beyond maximum \u2014 exhaustive, relentless, and uncompromising.",
        ),
    ],
)
def test_0731_levels(effort, first_line):
    prompt = encode_messages([S, Q1], "thinking", reasoning_effort=effort, release="0731")
    text = prompt.removeprefix(BOS).removesuffix(f"S{USER}q1{ASSISTANT}{THINK_START}")
    assert text.split("\n")[0] == first_line
    if effort in (None, "low"):
        assert text == ""
    else:
        lines = text.split("\n")
        assert len(lines) == 5 and all(lines[:3]) and lines[3:] == ["", ""]


def test_0731_max_text():
    # Not a published hash: it pins the text as it was compared with the description of 0731.
    assert sha256(JULY_MAX_EFFORT) == (
        "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c"
    )


def test_0731_high_is_april_max():
    april = encode_messages([Q1], "thinking", reasoning_effort="max")
    july = encode_messages([Q1], "thinking", reasoning_effort="high", release="0731")
    assert april == july


@pytest.mark.parametrize("release", ["april", "0731"])
def test_effort_text_is_only_for_the_start_of_a_thinking_prompt(release):
    options = {"reasoning_effort": "max", "release": release}
    plain = f"{USER}q2{ASSISTANT}"
    assert encode_messages([Q2], "chat", **options) == BOS + plain + THINK_END
    assert encode_messages([Q2], "thinking", [Q1, A1], **options) == plain + THINK_START
    assert encode_messages([], "thinking", **options) == BOS


@pytest.mark.parametrize(
    "arguments, accepted",
    [
        ({"thinking_mode": "thinking", "release": "july"}, ["july", "april", "0731"]),
        ({"thinking_mode": "thinking", "reasoning_effort": "low"}, ["low", "high", "max"]),
        ({"thinking_mode": "chat", "reasoning_effort": "medium"}, ["medium", "high", "max"]),
        ({"thinking_mode": "think"}, ["think", "chat", "thinking"]),
    ],
    ids=["release", "effort", "effort in chat", "mode"],
)
def test_errors_name_the_accepted_values(arguments, accepted):
    with pytest.raises(ValueError) as error:
        encode_messages([Q1], **arguments)
    for value in accepted:
        assert repr(value) in str(error.value)


# History, and what starts a reply.


def test_dropped_turn_looks_like_a_chat_turn():
    dropped = encode_messages([Q1, A1, Q2], "thinking")
    chat = encode_messages([Q1, A1, Q2], "chat")
    assert dropped == chat.removesuffix(THINK_END) + THINK_START
    assert f"{ASSISTANT}{THINK_END}a1{EOS}" in dropped


@pytest.mark.parametrize("owner", [0, 2], ids=["first message", "later message"])
def test_tools_anywhere_keep_all_reasoning(owner):
    messages = [S, Q1, {"role": "system", "content": "T"}, A1, Q2, A2, Q1]
    messages[owner] = {**messages[owner], "tools": [TOOL]}
    prompt = encode_messages(messages, "thinking")
    assert f"r1{THINK_END}a1{EOS}" in prompt
    assert f"{ASSISTANT}{THINK_START}r2{THINK_END}a2{EOS}" in prompt


def test_tools_in_context_keep_all_reasoning():
    context = [{**S, "tools": [TOOL]}, Q1]
    assert encode_messages([A1, Q2], "thinking", context) == (
        f"r1{THINK_END}a1{EOS}{USER}q2{ASSISTANT}{THINK_START}"
    )
    assert encode_messages([A1, Q2], "thinking", [S, Q1]) == (
        f"a1{EOS}{USER}q2{ASSISTANT}{THINK_START}"
    )


def test_empty_tools_do_not_count():
    messages = [{**S, "tools": []}, Q1, A1, Q2]
    assert encode_messages(messages, "thinking") == encode_messages([S, Q1, A1, Q2], "thinking")


def test_tool_loop_without_tools_drops_the_reasoning_of_the_call():
    call = calling(("c1", "get_time", {}), reasoning_content="r1")
    loop = [Q1, call, result("c1", "10:00")]
    prompt = encode_messages(loop, "thinking")
    assert "r1" not in prompt
    assert prompt.endswith(f"<tool_result>10:00</tool_result>{ASSISTANT}{THINK_START}")
    assert "r1" in encode_messages([{**S, "tools": [TOOL]}, *loop], "thinking")


def test_reminder_after_user_comes_after_the_generation_prefix():
    reminder = {"role": "latest_reminder", "content": "Friday"}
    late = encode_messages([Q1, reminder], "thinking")
    early = encode_messages([reminder, Q1], "thinking")
    assert late == f"{BOS}{USER}q1{ASSISTANT}{THINK_START}{LATEST_REMINDER}Friday"
    assert early == f"{BOS}{LATEST_REMINDER}Friday{USER}q1{ASSISTANT}{THINK_START}"


def test_context_and_messages_join_to_the_whole_prompt():
    messages = [{**S, "tools": [TOOL]}, Q1, A1, Q2, A2, Q1]
    whole = encode_messages(messages, "thinking", reasoning_effort="max")
    for cut in (3, 5):
        head = encode_messages(messages[:cut], "thinking", reasoning_effort="max")
        tail = encode_messages(messages[cut:], "thinking", messages[:cut], reasoning_effort="max")
        assert head + tail == whole


def test_developer_turns_in_context_do_not_shift_the_history():
    developer = {"role": "developer", "content": "d"}
    assert encode_messages([A1, Q2, A2], "thinking", [developer]) == (
        f"a1{EOS}{USER}q2{ASSISTANT}{THINK_START}r2{THINK_END}a2{EOS}"
    )


def test_task_ends_a_user_turn_for_users_but_not_for_results():
    task = {"role": "user", "content": "t", "task": "query"}
    assert encode_messages([task, Q2], "chat") == (f"{BOS}{USER}t{USER}q2{ASSISTANT}{THINK_END}")
    assert encode_messages([task, result("c", "x")], "chat") == (
        f"{BOS}{USER}t\n\n<tool_result>x</tool_result><\uff5cquery\uff5c>"
    )


def test_reply_to_an_action_task_has_no_reasoning():
    task = {"role": "user", "content": "t", "task": "action"}
    reply = {"role": "assistant", "content": "Search", "reasoning_content": "r"}
    assert encode_messages([task, reply, Q2], "thinking") == (
        f"{BOS}{USER}t{ASSISTANT}{THINK_START}<\uff5caction\uff5c>Search{EOS}"
        f"{USER}q2{ASSISTANT}{THINK_START}"
    )


# Tool calls and results.


def test_results_are_sorted_around_text():
    call = calling(("a", "f", {}), ("b", "f", {}), ("c", "f", {}))
    results = [result("c", "3"), {"role": "user", "content": "text"}, result("b", "2")]
    prompt = encode_messages([Q1, call, *results, result("a", "1")], "chat")
    turn = prompt.split(USER)[-1].removesuffix(ASSISTANT + THINK_END)
    assert turn == (
        "<tool_result>1</tool_result>\n\ntext\n\n"
        "<tool_result>2</tool_result>\n\n<tool_result>3</tool_result>"
    )


def test_results_of_unknown_calls_come_first_in_their_order():
    call = calling(("a", "f", {}), ("b", "f", {}))
    results = [result("b", "2"), result("?", "x"), result("!", "y")]
    prompt = encode_messages([Q1, call, *results], "chat")
    assert re.findall("<tool_result>(.)</tool_result>", prompt) == ["x", "y", "2"]


def test_call_id_may_be_in_the_function():
    call = calling((None, "f", {}), (None, "f", {}))
    for id, entry in zip("ab", call["tool_calls"], strict=True):
        entry["function"]["id"] = id
    prompt = encode_messages([Q1, call, result("b", "2"), result("a", "1")], "chat")
    assert re.findall("<tool_result>(.)</tool_result>", prompt) == ["1", "2"]


def too_deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "message",
    [
        "q1",
        too_deep(100_000),
        {"role": too_deep(100_000)},
        {"role": "user", "content": too_deep(100_000)},
        {"role": "user", "content": 10**5000},
        {"role": "user", "content": "x", "task": []},
        {"role": "tool", "content": "x", "tool_call_id": []},
        {"role": "assistant", "reasoning_content": 1},
        {"role": "assistant", "tool_calls": True},
        {
            "role": "assistant",
            "tool_calls": [{"id": [], "function": {"name": "f", "arguments": ""}}],
        },
        {"role": "system", "content": "S", "tools": 3},
        {"role": "system", "content": "S", "tools": [{"function": None}]},
        {"role": "system", "content": "S", "response_format": too_deep(100_000)},
        {"role": "system", "content": "S", "response_format": {"n": 10**5000}},
        {"role": "system", "content": "S", "response_format": {1, 2}},
        {"content": "no role"},
        {"role": "user", "content": 1},
        {"role": "latest_reminder"},
        {"role": "tool", "content": None},
        {"role": "tool", "content": ["part"]},
        {"role": "tool", "content": [{"type": "text"}]},
        {"role": "system", "content": "S", "tools": [{"name": "f"}]},
        {"role": "assistant", "tool_calls": ["f"]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": 1, "arguments": "{}"}}]},
        calling(("c", "f", "[1]")),
        calling(("c", "f", "3")),
    ],
    ids=lambda message: shown(message)[:40],
)
def test_malformed_messages_raise(message):
    """With a short message, whatever was given."""
    with pytest.raises(EncodingError) as error:
        encode_messages([message], "chat")
    assert len(str(error.value)) < 500


def test_fields_that_are_null_are_not_given():
    fields = ("reasoning_content", "tool_calls", "tools", "response_format", "wo_eos", "task")
    for message in (S, A1 | {"reasoning_content": None}, Q1):
        nulls = {**dict.fromkeys(fields), "tool_call_id": None, **message}
        messages = [Q1, nulls, Q2]
        assert encode_messages(messages, "thinking") == encode_messages(
            [Q1, message, Q2], "thinking"
        )


def test_arguments_that_are_nested_too_deep_are_shown_as_they_are():
    text = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    for arguments in (text, '{"a": ' + "[" * 300 + "]" * 300 + "}"):
        prompt = encode_messages([Q1, calling(("c", "f", arguments)), Q2], "chat")
        assert f'<{DSML}parameter name="arguments" string="true">{arguments}</{DSML}' in prompt


# Prompts that ask for a reply.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("release", ["april", "0731"])
def test_render_is_what_the_mode_means_in_the_release(mode, release):
    thinking_mode, effort = MODES[mode]
    if mode == "think-low" and release == "april":
        with pytest.raises(EncodingError, match="'april' has non-think, think-high, think-max"):
            render([Q1], mode, release=release)
        return
    expected = encode_messages([Q1], thinking_mode, reasoning_effort=effort, release=release)
    assert render([Q1], mode, release=release) == Prompt(expected, thinking_mode)


@pytest.mark.parametrize(
    "messages, role",
    [([], "none"), ([S], "system"), ([Q1, A1], "assistant"), ([Q1, S], "system")],
    ids=["nothing", "system", "finished turn", "system last"],
)
def test_a_prompt_that_asks_for_no_reply_is_refused(messages, role):
    for reminders in (0, 2):
        with pytest.raises(EncodingError, match=rf"last message is .*{role}, which asks for no"):
            render([*messages, *reminders * [{"role": "latest_reminder", "content": "Friday"}]])


def test_an_open_turn_is_continued_after_its_reasoning():
    """So its completion is answer from the start, in a thinking mode too."""
    prompt = render([Q1, {**A1, "wo_eos": True}], "think-high")

    assert prompt.text.endswith(f"{THINK_START}r1{THINK_END}a1")
    message = parse_partial_completion(" and more", prompt.thinking_mode, is_complete=True)
    assert (message["content"], message["reasoning_content"]) == (" and more", "")


def test_tools_of_a_request_go_to_its_first_system_message():
    with_tools = [{**S, "tools": [TOOL]}, Q1]

    assert render([S, Q1], tools=[TOOL]) == render(with_tools)
    assert render([Q1], tools=[TOOL]) == render(
        [{"role": "system", "content": "", "tools": [TOOL]}, Q1]
    )
    assert render([S, Q1], tools=[]) == render([S, Q1], tools=None) == render([S, Q1])
    with pytest.raises(EncodingError, match="give them once"):
        render(with_tools, tools=[TOOL])


def test_there_is_one_beginning():
    prompt = encode_messages([Q1], "chat")

    assert with_bos("x") == BOS + "x"
    assert with_bos(prompt) == prompt
    with pytest.raises(EncodingError, match="stands there once"):
        render([{"role": "user", "content": prompt}])


# Round trip: an assistant message, rendered and read back.

# Text with the bar could spell a tag, which nothing in the format escapes.
TEXT = st.text(st.characters(exclude_characters="\uff5c", codec="utf-8")).filter(
    lambda text: THINK_START not in text and THINK_END not in text
)
NAME = st.text(st.characters(exclude_characters='\uff5c"', codec="utf-8"))
JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(NAME, values, max_size=3),
    max_leaves=5,
)
CALL = st.tuples(st.none(), NAME, st.dictionaries(NAME, TEXT | JSON_VALUE, max_size=4))


def completion_of(message, thinking_mode, **options):
    prompt = encode_messages([Q1], thinking_mode, **options)
    whole = encode_messages([Q1, message], thinking_mode, **options)
    assert whole.startswith(prompt)
    return whole.removeprefix(prompt)


@pytest.mark.parametrize("thinking_mode", ["chat", "thinking"])
@settings(deadline=None)
@given(content=TEXT, reasoning=TEXT, calls=st.lists(CALL, max_size=3))
def test_round_trip(thinking_mode, content, reasoning, calls):
    message = calling(*calls, content=content, reasoning_content=reasoning)
    completion = completion_of(message, thinking_mode)
    expected = {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning if thinking_mode == "thinking" else "",
        "tool_calls": [
            {"type": "function", "function": call["function"]} for call in message["tool_calls"]
        ],
    }
    assert parse_message_from_completion_text(completion, thinking_mode) == expected
    assert parse_partial_completion(completion, thinking_mode) == expected


def test_round_trip_of_markup_in_string_arguments():
    value = f'</{DSML}invoke>\n"quoted" <think> {EOS} & <{DSML}tool_calls>\n'
    message = calling(("c1", "f", {"text": value, "n": [1, {"k": "v"}]}))
    parsed = parse_message_from_completion_text(completion_of(message, "chat"), "chat")
    arguments = parsed["tool_calls"][0]["function"]["arguments"]
    assert json.loads(arguments) == {"text": value, "n": [1, {"k": "v"}]}


# The strict parser's further errors.

CALL_TEXT = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n'
    f'<{DSML}parameter name="a" string="false">1</{DSML}parameter>\n'
    f"</{DSML}invoke>\n</{DSML}tool_calls>"
)


@pytest.mark.parametrize(
    "text",
    [
        CALL_TEXT.replace("calls>\n<", "calls><") + EOS,
        CALL_TEXT.replace("invoke>\n<", "invoke><") + EOS,
        CALL_TEXT.replace(' name="f"', "") + EOS,
        CALL_TEXT.replace("1<", "1") + EOS,
        CALL_TEXT.removesuffix(f"\n</{DSML}tool_calls>") + EOS,
        f"a{DSML}b{EOS}",
        f"{BOS}a{EOS}",
        f"a{THINK_END}b{EOS}",
        f"a{EOS}{EOS}",
        "",
    ],
)
def test_strict_parser_raises(text):
    with pytest.raises(EncodingError):
        parse_message_from_completion_text(text, "chat")


@pytest.mark.parametrize("parse", [parse_message_from_completion_text, parse_partial_completion])
def test_parsers_reject_an_unknown_mode(parse):
    with pytest.raises(EncodingError, match="think-high"):
        parse(EOS, "think-high")


# The tolerant parser.

LONG = calling(
    ("c1", "get_time", {"city": "Oslo", "at": None}),
    ("c2", "ping", {}),
    ("c3", "note", {"text": 'a < b\n"</b>"', "tags": ["x", "<y>"], "n": 1.5}),
    content="First a < b,\n\n<b>then</b> </think a list:\n\n- one\n\n\n",
    reasoning_content="Is 1 < 2?\n\n<tool_calls> would help.\n\n",
)


@pytest.mark.parametrize("thinking_mode", ["chat", "thinking"])
def test_partial_parser_on_every_prefix(thinking_mode):
    completion = completion_of(LONG, thinking_mode)
    final = parse_message_from_completion_text(completion, thinking_mode)
    assert len(final["tool_calls"]) == 3
    previous = parse_partial_completion("", thinking_mode)
    assert previous == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "",
        "tool_calls": [],
    }
    for size in range(1, len(completion) + 1):
        message = parse_partial_completion(completion[:size], thinking_mode)
        assert message.keys() == final.keys()
        assert message["content"].startswith(previous["content"])
        assert message["reasoning_content"].startswith(previous["reasoning_content"])
        assert message["tool_calls"][: len(previous["tool_calls"])] == previous["tool_calls"]
        previous = message
    assert previous == final


@pytest.mark.parametrize("case", PARSE_CASES, ids=name_of)
def test_partial_parser_on_golden_cases(case):
    message = parse_partial_completion(case["text"], case["thinking_mode"])
    assert message.keys() == {"role", "content", "reasoning_content", "tool_calls"}
    if "expected_message" in case:
        assert message == case["expected_message"]


PIECES = [*SPECIAL_TOKENS, "\n\n", "<", "</", ">", ">\n", '" string="', "true", '"', "text", " "]
PIECES += ["tool_calls", "invoke", "parameter", ' name="', CALL_TEXT]


@pytest.mark.parametrize("thinking_mode", ["chat", "thinking"])
@settings(deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12))
def test_partial_parser_never_raises(thinking_mode, pieces):
    message = parse_partial_completion("".join(pieces), thinking_mode)
    assert message.keys() == {"role", "content", "reasoning_content", "tool_calls"}


@pytest.mark.parametrize(
    "text, thinking_mode, expected",
    [
        ("cut by length", "chat", ("cut by length", "", [])),
        ("still thinking", "thinking", ("", "still thinking", [])),
        (f"still thinking{EOS}", "thinking", ("", "still thinking", [])),
        (f"r{THINK_END}cut", "thinking", ("cut", "r", [])),
        (f"r{THINK_END}answer{CALL_TEXT[:60]}", "thinking", ("answer", "r", [])),
        (f"answer{EOS}more", "chat", ("answer", "", [])),
        (f"answer{CALL_TEXT}more{EOS}", "chat", ("answer", "", ['{"a": 1}'])),
        (f"answer{CALL_TEXT[1:]}", "chat", ("answer", "", ['{"a": 1}'])),
        (CALL_TEXT.replace("\n", " "), "chat", ("  ", "", ['{"a": 1}'])),
        (CALL_TEXT.replace(">\n", "> \n\n "), "chat", ("", "", ['{"a": 1}'])),
        (CALL_TEXT.replace("false", "yes"), "chat", ("", "", ['{"a": "1"}'])),
        (CALL_TEXT.replace(' string="false"', ""), "chat", ("", "", ['{"a": "1"}'])),
        (f"a{CALL_TEXT}{THINK_END}b", "thinking", ("b", f"a{CALL_TEXT}", [])),
        (f"a {THINK_START} b{EOS}", "chat", (f"a {THINK_START} b", "", [])),
        ("held back\n\n<", "chat", ("held back", "", [])),
        (f"not held back\n\n<{EOS}", "chat", ("not held back\n\n<", "", [])),
    ],
)
def test_partial_parser_recovers(text, thinking_mode, expected):
    message = parse_partial_completion(text, thinking_mode)
    arguments = [call["function"]["arguments"] for call in message["tool_calls"]]
    assert (message["content"], message["reasoning_content"], arguments) == expected


@pytest.mark.parametrize("text", ["so 1 + 1 <", "def f():\n", "a\n\n", f"x{EOS[:9]}", f"y{DSML}"])
@pytest.mark.parametrize("thinking_mode", ["chat", "thinking"])
def test_nothing_is_held_back_from_a_complete_text(text, thinking_mode):
    field = "content" if thinking_mode == "chat" else "reasoning_content"

    message = parse_partial_completion(text, thinking_mode, is_complete=True)

    assert message[field] == text
    assert len(parse_partial_completion(text, thinking_mode)[field]) <= len(text)


def test_a_call_without_the_end_of_reasoning_is_a_call():
    text = f"need it{CALL_TEXT}"

    for complete in (text + EOS, text):
        message = parse_partial_completion(complete, "thinking", is_complete=True)
        assert (message["reasoning_content"], message["content"]) == ("need it", "")
        assert [c["function"]["arguments"] for c in message["tool_calls"]] == ['{"a": 1}']
    # While the text goes on, the end of the reasoning may come: nothing is said too early.
    message = parse_partial_completion(text, "thinking")
    assert (message["reasoning_content"], message["tool_calls"]) == ("need it", [])
    # A block without a closed call is what the model thinks of, and nothing of it is lost.
    thought = f"I could write\n\n<{DSML}tool_calls> and"
    message = parse_partial_completion(thought, "thinking", is_complete=True)
    assert (message["reasoning_content"], message["tool_calls"]) == (thought, [])


def steps_of(parse, text: str) -> int:
    """Characters that a parser's searches go over, as a count that does not depend on the clock."""
    steps = 0

    class Counting:
        def __init__(self, pattern):
            self.pattern = pattern

        def search(self, string, position=0):
            nonlocal steps
            found = self.pattern.search(string, position)
            steps += (found.end() if found else len(string)) - position
            return found

    names = [name for name in vars(parsing) if name.startswith("LOOSE_")]
    patterns = {name: Counting(getattr(parsing, name)) for name in names}
    any_of = parsing._any_of
    with pytest.MonkeyPatch.context() as patch:
        for name, pattern in patterns.items():
            patch.setattr(parsing, name, pattern)
        patch.setattr(parsing, "_any_of", lambda stops: Counting(any_of(stops)))
        try:
            parse(text, "chat")
        except EncodingError:
            pass
    return steps


OPEN = f'<{DSML}parameter name="a" string="true">x'
PARAMETER = f'<{DSML}parameter name="{{}}" string="true">x</{DSML}parameter>\n'


@pytest.mark.parametrize("parse", [parse_message_from_completion_text, parse_partial_completion])
@pytest.mark.parametrize(
    "repeated",
    [
        lambda n: f'<{DSML}invoke name="f">\n{OPEN * n}</{DSML}invoke>',
        lambda n: f'<{DSML}invoke name="f">\n' * n,
        lambda n: (
            f'<{DSML}invoke name="f">\n{"".join(map(PARAMETER.format, range(n)))}</{DSML}invoke>'
        ),
        lambda n: f'<{DSML}invoke name="f">\n\n</{DSML}invoke>\n' * n,
    ],
    ids=["open parameters", "open calls", "many parameters", "many calls"],
)
def test_parsers_read_a_text_about_once(parse, repeated):
    """A model that loops writes a tag again and again: that takes linear time."""
    small, large = (
        steps_of(parse, f"\n\n<{DSML}tool_calls>\n{repeated(n)}{EOS}") for n in (50, 200)
    )
    assert 0 < large <= 5 * small


def test_a_parameter_of_repeated_heads_is_read_in_linear_time():
    """Not a search but a match: the time is measured, of texts so long that a square shows."""

    def seconds(n: int) -> float:
        head = '" string="true">' * n
        text = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n<{DSML}parameter name="a{head}'
        start = time.process_time()
        with pytest.raises(EncodingError):
            parse_message_from_completion_text(f"{text}x/{DSML}parameter>{EOS}", "chat")
        return time.process_time() - start

    seconds(100)
    assert seconds(20_000) < 0.5  # a square takes some ten seconds


def test_partial_parser_keeps_the_closed_calls_of_a_cut_block():
    completion = completion_of(LONG, "chat")
    cut = completion[: completion.index('name="note"')]
    message = parse_partial_completion(cut, "chat")
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_time", "ping"]
    assert message["content"] == LONG["content"]
