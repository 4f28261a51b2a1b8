"""Data files: what a line becomes, which tokens have loss, rows, and the order of an epoch.

Nothing here is compiled.
"""

import json

import numpy as np
import pytest

from tests.conftest import NANO
from v4jax.cli import data as cli
from v4jax.config import nano
from v4jax.text.format import BOS, EOS
from v4jax.text.prompt import encode_messages, encode_pieces
from v4jax.text.tokenizer import Tokenizer
from v4jax.train import Examples
from v4jax.train.data.examples import Reader
from v4jax.train.data.formats import LineError, Pair, marked, parse_line
from v4jax.train.data.lines import PIECE, Lines
from v4jax.train.data.packing import pack

TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "function": {"name": "get_time", "arguments": '{"city": "Oslo"}'}}
CONVERSATION = [
    {"role": "system", "content": "You tell the time."},
    {"role": "user", "content": "Time in Oslo?"},
    {"role": "assistant", "reasoning_content": "I need a clock.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "10:00"},
    {"role": "assistant", "reasoning_content": "It is ten.", "content": "Ten o'clock."},
    {"role": "user", "content": "And in Rome?"},
    {"role": "assistant", "reasoning_content": "The same zone.", "content": "Ten as well."},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "You are welcome."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(NANO)


def examples_of(record, tokenizer, mode=None):
    return parse_line(json.dumps(record), tokenizer, mode)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_loss_is_on_what_the_assistant_writes_in_a_conversation_with_tools(tokenizer):
    """Three user turns and a tool's result, against a mask made by hand."""
    record = {"messages": CONVERSATION, "tools": [TOOL], "mode": "think-high"}
    (example,) = examples_of(record, tokenizer)

    call = (
        "I need a clock.</think>\n\n<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="get_time">\n'
        '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
        f"</｜DSML｜invoke>\n</｜DSML｜tool_calls>{EOS}"
    )
    by_hand = [
        ("<｜User｜>Time in Oslo?<｜Assistant｜><think>", 0),
        (call, 1),
        ("<｜User｜><tool_result>10:00</tool_result><｜Assistant｜><think>", 0),
        (f"It is ten.</think>Ten o'clock.{EOS}", 1),
        ("<｜User｜>And in Rome?<｜Assistant｜><think>", 0),
        (f"The same zone.</think>Ten as well.{EOS}", 1),
        ("<｜User｜>Thanks!<｜Assistant｜><think>", 0),
        (f"</think>You are welcome.{EOS}", 1),
    ]
    ids, weights = [], []
    for text, has_loss in by_hand:
        found = tokenizer.encode(text)
        ids, weights = ids + found, weights + [has_loss] * len(found)
    print(marked(example, tokenizer))
    start = len(example.ids) - len(ids)
    assert example.ids[start:].tolist() == ids
    assert example.weights[start:].tolist() == weights
    assert not example.weights[:start].any()  # the tools' text
    system = tokenizer.decode(example.ids[:start].tolist(), keep_special=True)
    assert system.startswith(f"{BOS}You tell the time.\n\n## Tools") and "get_time" in system


@pytest.mark.parametrize("mode", ["non-think", "think-high", "think-max"])
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["plain", "tools"])
def test_ids_are_those_of_the_rendered_text(tokenizer, mode, tools):
    """Pieces are encoded one by one, and their borders are borders of tokens."""
    record = {"messages": CONVERSATION, "tools": tools, "mode": mode}
    for example in examples_of(record, tokenizer):
        text = tokenizer.decode(example.ids.tolist(), keep_special=True)
        assert tokenizer.encode(text) == example.ids.tolist()
        learned = marked(example, tokenizer)
        assert learned.count("⟦") == learned.count(f"{EOS}⟧") > 0
        # What stands before an answer is what the model is asked with.
        prompt, _, _ = learned.rpartition("⟦")
        assert prompt.endswith(("<think>", "</think>"))


def test_pieces_join_to_what_the_encoder_writes():
    for thinking_mode in ("chat", "thinking"):
        pieces = encode_pieces(CONVERSATION, thinking_mode)
        assert "".join(p.text for p in pieces) == encode_messages(CONVERSATION, thinking_mode)
        written = [piece.message for piece in pieces if piece.message is not None]
        assert written == [2, 4, 6, 8]


def test_thinking_without_tools_is_learned_turn_by_turn(tokenizer):
    """Each turn after a prompt that lacks the reasoning of those before, as it is asked."""
    turns = [CONVERSATION[i] for i in (0, 1, 4, 5, 6)]
    first, second = examples_of({"messages": turns}, tokenizer)  # reasoning: it is think-high

    start = f"{BOS}You tell the time.<｜User｜>Time in Oslo?<｜Assistant｜>"
    assert marked(first, tokenizer) == f"{start}<think>⟦It is ten.</think>Ten o'clock.{EOS}⟧"
    assert marked(second, tokenizer) == (
        f"{start}</think>Ten o'clock.{EOS}<｜User｜>And in Rome?<｜Assistant｜><think>"
        f"⟦The same zone.</think>Ten as well.{EOS}⟧"
    )
    prompt = tokenizer.render(turns[:-1], "think-high").text
    assert marked(second, tokenizer).startswith(f"{prompt}⟦")
    (chat,) = examples_of({"messages": turns, "mode": "non-think"}, tokenizer)
    assert marked(chat, tokenizer).count("⟦") == 2


def test_messages_of_weight_0_have_no_loss(tokenizer):
    turns = [CONVERSATION[1], {**CONVERSATION[4], "weight": 0}, *CONVERSATION[5:7]]
    (example,) = examples_of({"messages": turns, "mode": "non-think"}, tokenizer)
    assert marked(example, tokenizer) == (
        f"{BOS}<｜User｜>Time in Oslo?<｜Assistant｜></think>Ten o'clock.{EOS}"
        f"<｜User｜>And in Rome?<｜Assistant｜></think>⟦Ten as well.{EOS}⟧"
    )


def test_other_forms(tokenizer):
    (chat,) = examples_of({"prompt": "Who?", "completion": "Emma."}, tokenizer)
    assert marked(chat, tokenizer) == f"{BOS}<｜User｜>Who?<｜Assistant｜></think>⟦Emma.{EOS}⟧"
    (raw,) = examples_of({"prompt": "Emma ", "completion": "was.", "mode": "raw"}, tokenizer)
    assert marked(raw, tokenizer) == f"{BOS}Emma ⟦was.{EOS}⟧"
    (text,) = examples_of({"text": "Emma was."}, tokenizer)
    assert marked(text, tokenizer) == f"{BOS}⟦Emma was.{EOS}⟧"
    asked = [{"role": "user", "content": "Who?"}]
    for given in ({"prompt": "Who?"}, {"prompt": asked}, {"messages": asked}):
        (pair,) = examples_of({**given, "chosen": "Emma.", "rejected": "Ann."}, tokenizer)
        assert isinstance(pair, Pair)
        assert marked(pair.chosen, tokenizer) == marked(chat, tokenizer)
        assert marked(pair.rejected, tokenizer).endswith(f"⟦Ann.{EOS}⟧")


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"messages": [', "no JSON: "),
        ("[1]", r"\[1\]: expected an object"),
        ('{"massages": []}', "the line has the key 'massages': expected 'messages'"),
        ('{"x": []}', "keys are 'x': expected messages, or prompt and completion"),
        ('{"prompt": "a", "completion": "b", "tool": []}', "has the key 'tool': expected 'tools'"),
        (
            '{"prompt": "a", "completion": "b", "Tools": []}',
            "has the key 'Tools': expected 'tools'",
        ),
        ('{"prompt": "a", "completion": "b", "weight": 0}', "key 'weight': expected it in a mess"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "thinking": "b"}]}',
            "a message has the key 'thinking': expected 'reasoning_content'",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}',
            "nothing to learn: the assistant's messages are empty",
        ),
        ('{"prompt": "", "completion": ""}', "completion is '': expected text"),
        ('{"text": ""}', "text is '': expected text"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "chosen and rejected are the same"),
        ('{"prompt": "a", "chosen": "", "rejected": "b"}', "chosen is '': expected text"),
        ('{"messages": []}', r"messages is \[\]: expected a list of messages"),
        ('{"text": 3}', "text is 3: expected text"),
        ('{"prompt": 3, "completion": "a"}', "prompt is 3: expected a list of messages or a text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "nothing to learn: no assistant"),
        ('{"messages": [{"role": "bot", "content": "a"}, {"role": "assistant"}]}', "'role' from"),
        ('{"messages": [{"role": "assistant", "weight": 0.5}]}', "weight of a message is 0.5"),
        ('{"messages": [{"role": "user", "weight": 1}, {"role": "assistant"}]}', "weight 1 of a"),
        ('{"prompt": "a", "completion": "b", "mode": "deep"}', "mode='deep': release 'april' has"),
        ('{"prompt": "a", "completion": "\\ud800"}', "has no UTF-8 form"),
        ('{"prompt": "<｜begin▁of▁sentence｜>", "completion": "b"}', "is in the text of a message"),
    ],
)
def test_lines_that_are_no_examples(tokenizer, line, reason):
    with pytest.raises(LineError, match=reason):
        parse_line(line, tokenizer)


def test_malformed_lines_are_named_by_number(tokenizer, tmp_path):
    path = write(tmp_path / "d.jsonl", {"text": "Emma"}, {"x": 1}, {"text": "Emma"})
    with open(path, "a") as file:
        file.write("\n{")
    found = list(Reader(path, tokenizer).all())
    assert [(f.line, f.error is None) for f in found] == [
        *((1, True), (2, False), (3, True), (4, True), (5, False))
    ]
    with pytest.raises(ValueError, match=r"line 2: keys are 'x'.*; line 5: no JSON"):
        Examples(path, tokenizer, 64)


@pytest.mark.parametrize("end", ["", "\n"])
def test_lines_by_number(tmp_path, end):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + ("a\n\nbcd\né" + end).encode())
    lines = Lines(path)
    assert [lines[i].decode().rstrip("\n") for i in (3, 0, 2, 1)] == ["é", "a", "bcd", ""]
    assert len(lines) == 4
    with pytest.raises(ValueError, match=r"\.jsonl \(an example a line\)"):
        Lines(tmp_path / "d.csv")


def test_a_text_is_read_in_pieces_of_whole_lines(tmp_path, tokenizer):
    text = "".join(f"line {i} of Emma\n" for i in range(5000))
    (tmp_path / "t.txt").write_text(text)
    lines = Lines(tmp_path / "t.txt")
    pieces = [lines[i] for i in range(len(lines))]
    assert b"".join(pieces) == text.encode()
    assert all(piece.endswith(b"\n") and len(piece) < PIECE + 100 for piece in pieces)
    *some, last = (found.examples[0] for found in Reader(tmp_path / "t.txt", tokenizer).all())
    assert len(some) > 3 and last.ids[-1] == tokenizer.id(EOS) != some[0].ids[-1]


def test_packing_places_every_document_once():
    rng = np.random.default_rng(0)
    lengths, order = rng.integers(1, 700, 500), rng.permutation(500)
    rows = pack(lengths, order, 512, 128, is_cut=np.ones(500, bool))

    seen = {}
    for row in range(len(rows)):
        end = 0
        for document, offset, place in rows.parts(row):
            assert place % 128 == 0 and place >= end and (document, offset) not in seen
            end = place + min(lengths[document] - offset, 512)
            seen[document, offset] = True
        assert 0 < end <= 512
    assert set(seen) == {(d, o) for d in range(500) for o in range(0, lengths[d], 512)}
    assert lengths.sum() / (len(rows) * 512) > 0.8
    one = pack(lengths, order, 512, 128, shares_rows=False)
    assert len(one) == 500 and (one.places == 0).all() and (one.offsets == 0).all()


@pytest.fixture
def data(tmp_path, tokenizer):
    """Texts of different lengths, and `make`, which gives their rows."""
    texts = [{"text": "Emma was " * n} for n in (3, 40, 7, 90, 11, 25, 60)]
    path = write(tmp_path / "d.jsonl", *texts)

    def make(seq_len=256, **options):
        return Examples(path, tokenizer, seq_len, **options)

    make.texts = [tokenizer.encode(BOS + record["text"] + EOS) for record in texts]
    return make


def test_a_row_has_its_documents_with_their_targets(data):
    examples = data(packing=True, align=64)
    tokens, weights, (starts, valid) = examples.row(0)
    assert len(np.unique(starts)) > 1
    for start in np.unique(starts):
        size = int(valid[starts == start].sum())
        assert valid[start : start + size].all() and start % 64 == 0
        ids = next(
            ids for ids in data.texts if ids[:-1] == tokens[0, start : start + size].tolist()
        )
        assert tokens[1, start : start + size].tolist() == ids[1:]
        assert tokens[2, start : start + size - 1].tolist() == ids[2:]
        assert weights[0, start : start + size].all()
        assert weights[1, start : start + size - 1].all() and not weights[1, start + size - 1]
    assert not weights[:, valid == 0].any()


def test_every_epoch_has_every_document_in_another_order(data):
    examples, count = data(packing=False), len(data.texts)

    def texts(epoch):
        found = []
        for row in range(epoch * count, (epoch + 1) * count):
            tokens, _, (_, valid) = examples.row(row)
            found.append(tokens[0, valid > 0].tolist())
        return found

    first, second = texts(0), texts(1)
    assert first != second and sorted(first) == sorted(second) == sorted(x[:-1] for x in data.texts)
    assert data(packing=False, seed=1).row(0)[0].tolist() != examples.row(0)[0].tolist()


def test_a_step_is_the_same_whatever_was_read_before(data):
    """What a run that goes on needs: rows far ahead, of a new reader, and of some devices alone."""
    examples, again = data(align=128), data(align=128)
    batches = [examples.targets(step, 3, nano(), None) for step in range(6)]
    for step in (5, 2):
        for new, old in zip(again.targets(step, 3, nano(), None), batches[step]):
            if new is old is None:
                continue
            np.testing.assert_array_equal(getattr(new, "starts", new), getattr(old, "starts", old))
    row = again.row(5 * 3 + 2)
    np.testing.assert_array_equal(row[0][0], batches[5].inputs[2])
    np.testing.assert_array_equal(row[2][1] > 0, batches[5].documents.valid[2])


def test_what_is_longer_than_a_row(data, tmp_path, tokenizer):
    """A text goes on in further rows; a conversation ends; either is refused if that is asked for."""
    examples = data(64, packing=False)
    assert examples.cut == sum(len(ids) > 65 for ids in data.texts)
    total = 0
    for row in range(len(examples._rows_of(0))):
        _, weights, _ = examples.row(row)
        total += int(weights[0].sum())
    assert total == sum(len(ids) - 1 for ids in data.texts)  # every target once
    with pytest.raises(ValueError, match=rf"line 2 has {len(data.texts[1])} tokens, and a row 64"):
        data(64, too_long="refuse")
    with pytest.raises(ValueError, match="too_long='drop': expected one of"):
        data(64, too_long="drop")
    path = write(
        tmp_path / "c.jsonl",
        {"prompt": "Emma was " * 90, "completion": "Yes."},
        {"prompt": "Who?", "completion": "Emma was " * 90},
    )
    talk = Examples(path, tokenizer, 64, packing=False)
    assert (talk.count, talk.cut, talk.left_out, len(talk._rows_of(0))) == (2, 2, 1, 1)
    _, weights, (_, valid) = talk.row(0)
    assert valid.all() and weights[0, -1] == 1


def test_what_cannot_be_trained_on(data, tmp_path, tokenizer):
    with pytest.raises(
        ValueError, match=r"token \d+ .*line \d.* is outside the vocabulary: .*0\.\.9"
    ):
        data().require_ids(10)
    with pytest.raises(ValueError, match="align=64: expected a multiple of 128"):
        data(align=64).targets(0, 1, nano(), None)
    pairs = write(tmp_path / "p.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(ValueError, match="line 1 is a preference pair"):
        Examples(pairs, tokenizer, 64)
    short = write(tmp_path / "s.jsonl", {"prompt": "Emma was " * 90, "completion": "b"})
    with pytest.raises(ValueError, match="nothing to learn: 1 examples, 1 without a token"):
        Examples(short, tokenizer, 64)


@pytest.fixture
def check(monkeypatch, capsys):
    """`v4jax data check FILE ...`: exit status, and what it prints."""

    def call(*words: object) -> tuple[int, str]:
        status = 0
        monkeypatch.setattr(
            "sys.argv", ["data", "check", *map(str, words), "--checkpoint", str(NANO)]
        )
        try:
            cli.main()
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().out

    return call


def test_a_file_is_checked(check, tmp_path):
    asked = {"messages": CONVERSATION, "tools": [TOOL], "mode": "think-high"}
    pair = {"prompt": "Who?", "chosen": "Emma.", "rejected": "Ann."}
    good = write(tmp_path / "d.jsonl", asked, {"text": "Emma was " * 99})
    status, out = check(good, "--seq-len", 256)
    assert status == 0
    assert "2 lines, examples: 1 conversations, 1 texts" in out
    assert "cut" in out and "<｜Assistant｜><think>⟦I need a clock.</think>" in out
    assert "are no examples" not in out

    with open(good, "a") as file:
        file.write('{"x": 1}\n' + json.dumps(pair) + "\n{\n")
    status, out = check(good, "--sample", 3)
    assert status == 1
    assert (
        "2 of 5 lines are no examples:\n  line 3: keys are 'x'" in out and "\n  line 5: no" in out
    )
    assert "chosen: " in out and f"⟦Ann.{EOS}⟧" in out


def test_keys_that_mean_nothing_to_training_may_be_there(tokenizer):
    line = {"prompt": "a", "completion": "b"}
    (plain,) = parse_line(json.dumps(line), tokenizer)
    others = {"id": 7, "source": "x", "model": "m", "metadata": {"weight": 1}, "prompt_id": "y"}
    (found,) = parse_line(json.dumps({**line, **others}), tokenizer)
    np.testing.assert_array_equal(found.ids, plain.ids)

    # Null is not given: tables that were exported have such columns.
    nulls = dict.fromkeys(("weight", "tool", "messages2"))
    asked = {"role": "user", "content": "a", "context": "c", "function_call": None}
    said = {"role": "assistant", "content": "b", "thinking": None, "reasoning": None}
    (found,) = parse_line(json.dumps({"messages": [asked, said], **nulls}), tokenizer)
    np.testing.assert_array_equal(found.ids, plain.ids)


def test_pairs_are_checked_and_stand_alone(check, tmp_path):
    pair = {"prompt": "Who?", "chosen": "Emma.", "rejected": "Ann."}
    long = {**pair, "prompt": "Emma was " * 99}
    path = write(tmp_path / "d.jsonl", pair, long)
    status, out = check(path, "--seq-len", 64)
    assert status == 0
    assert "rows of 64: 4, one a side; 2 cut, 1 examples without loss left out" in out

    status, out = check(write(tmp_path / "m.jsonl", {"text": "Emma"}, pair, pair))
    assert status == 1
    assert (
        "takes preference pairs among other examples: texts from line 1 on, pairs from line 2"
        in out
    )


def test_lengths_are_reported(check, tmp_path, tokenizer):
    texts = [{"text": "Emma was " * n} for n in (1, 5, 9)]
    sizes = [len(tokenizer.encode(BOS + t["text"] + EOS)) for t in texts]
    _, out = check(write(tmp_path / "d.jsonl", *texts))
    assert f"min {min(sizes)}, median {sizes[1]}, p95 " in out and f"max {max(sizes)}" in out
    assert f"tokens with loss: {sum(sizes) - 3} of {sum(sizes)}" in out


def test_files_without_examples_and_token_files(check, tmp_path):
    (tmp_path / "e.jsonl").write_text("\n\n")
    assert check(tmp_path / "e.jsonl") == (
        1,
        f"{tmp_path / 'e.jsonl'}: 2 lines, examples: none\nthe file has no examples\n",
    )
    np.save(tmp_path / "t.npy", np.arange(100))
    status, out = check(tmp_path / "t.npy")
    assert status == 0 and "100 tokens" in out
    np.save(tmp_path / "t.npy", np.arange(10000))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        check(tmp_path / "t.npy")
