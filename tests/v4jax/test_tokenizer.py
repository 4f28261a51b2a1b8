"""The tokenizer of a folder: its file, what it refuses, and whose prompts it renders."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import NANO
from v4jax.checkpoint.hf_config import from_hf
from v4jax.text.format import BOS, EFFORT_PROMPTS, EOS, EncodingError
from v4jax.text.release import ENCODER, PROFILE_KEY, release_of
from v4jax.text.tokenizer import Tokenizer, train_tokenizer

USER = {"role": "user", "content": "Who is Emma?"}
DRAFTER = {"dspark_block_size": 5}
APRIL = 'REASONING_EFFORT_MAX = (\n    "..."\n)\n'
JULY = 'DEFAULT_REASONING_EFFORT = "low"\nREASONING_EFFORT_PROMPTS = {\n    "low": "",\n}\n'
MENTION = f'"""Before: REASONING_EFFORT_PROMPTS"""\n{APRIL}'


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(NANO)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint's folder without the weights."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(NANO / name, tmp_path / name)
    return tmp_path


def configure(folder, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **keys}), encoding="utf-8")


def put_encoder(folder, source: str | bytes) -> None:
    (folder / ENCODER).parent.mkdir(exist_ok=True)
    (folder / ENCODER).write_bytes(source.encode() if isinstance(source, str) else source)


@pytest.mark.parametrize(
    "config, encoder, release",
    [
        ({}, None, "april"),
        ({}, APRIL, "april"),
        ({}, JULY, "0731"),
        ({}, MENTION, "april"),
        ({}, b"\xff\x00 not Python", "april"),
        (DRAFTER, None, "0731"),
        (DRAFTER, JULY, "0731"),
        (DRAFTER, APRIL, "april"),  # V4-Flash-DSpark: the April weights and a drafter
        ({PROFILE_KEY: "official"}, APRIL, "0731"),
        ({PROFILE_KEY: "preview", **DRAFTER}, JULY, "april"),
        ({PROFILE_KEY: None, **DRAFTER}, None, "0731"),
    ],
    ids=str,
)
def test_a_folder_tells_its_release(config, encoder, release, folder):
    configure(folder, **config)
    if encoder is not None:
        put_encoder(folder, encoder)

    tokenizer = Tokenizer(folder)

    assert tokenizer.release == Tokenizer(folder / "tokenizer.json").release == release
    assert ("think-low" in tokenizer.modes) == (release == "0731")
    for mode, effort in (("think-high", "high"), ("think-max", "max")):
        prompt = tokenizer.render([USER], mode)
        assert prompt.text.startswith(f"{BOS}{EFFORT_PROMPTS[release][effort]}<")


@pytest.mark.parametrize("config", ["", "[]", "[" * 100_000, "\ufeff{}", '{"dspark_x"'], ids=repr)
def test_a_config_that_cannot_be_read_is_for_the_loader_to_complain_about(config, tmp_path):
    (tmp_path / "config.json").write_text(config, encoding="utf-8")

    assert release_of(tmp_path) == release_of(tmp_path / "absent") == "april"


@pytest.mark.parametrize("profile", ["0731", [], 3])
def test_an_unknown_profile_is_an_error(profile, folder):
    configure(folder, **{PROFILE_KEY: profile})

    with pytest.raises(EncodingError, match=r"expected one of \('preview', 'official'\)"):
        Tokenizer(folder)


def test_a_release_can_be_named(folder):
    configure(folder, **DRAFTER)

    assert Tokenizer(folder, release="april").release == "april"
    with pytest.raises(EncodingError, match="release='may': expected one of"):
        Tokenizer(folder, release="may")


@pytest.mark.parametrize("encoder", [None, JULY])
def test_a_saved_tokenizer_keeps_its_release(encoder, folder, tmp_path_factory):
    """What is trained from a 0731 model has no drafter that would tell."""
    configure(folder, **(DRAFTER if encoder is None else {}))
    if encoder:
        put_encoder(folder, encoder)
    target = tmp_path_factory.mktemp("target")
    shutil.copyfile(NANO / "config.json", target / "config.json")

    Tokenizer(folder).save(target)
    Tokenizer(folder).save(folder)

    assert Tokenizer(target).release == Tokenizer(folder).release == "0731"
    assert Tokenizer(target).encode("Emma") == Tokenizer(folder).encode("Emma")
    assert from_hf(target) == from_hf(NANO)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    assert config.get(PROFILE_KEY) == (None if encoder else "official")


@pytest.mark.parametrize(
    "text, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n", "pointer of Git LFS"),
        (b"", "is no tokenizer.json"),
        (b"\xff\xfe{}", "is no tokenizer.json"),
        (b"[" * 100_000, "is no tokenizer.json"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "has no token <"),
    ],
    ids=["pointer", "empty", "UTF-16", "deep", "another model's"],
)
def test_a_file_that_is_no_tokenizer_is_named(text, message, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(text)

    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        Tokenizer(tmp_path)


def test_a_mark_before_the_file_and_settings_that_cut_texts_do_not_matter(tokenizer, tmp_path):
    content = json.loads((NANO / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    text = "\ufeff" + json.dumps(content)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")

    assert Tokenizer(tmp_path).encode("Who is Emma?") == tokenizer.encode("Who is Emma?")


@pytest.mark.parametrize("text", ["caf\udce9", "x\ud83d"])
def test_text_that_has_no_utf8_is_refused(text, tokenizer):
    with pytest.raises(ValueError, match=rf"after '{text[:-1]}' has no UTF-8 form"):
        tokenizer.encode(text)


@settings(deadline=None)
@given(st.data())
def test_pieces_of_a_stream_join_to_the_text(tokenizer, data):
    """Also when it ends within a character, where the rest has to be let go."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=8))
    ids += tokenizer.encode(data.draw(st.sampled_from(["", "日本", "é", "🙂"])))
    ids = ids[: data.draw(st.integers(0, len(ids)))]

    for keep in (False, True):
        pieces = list(tokenizer.decode_stream(ids, keep_special=keep))
        assert "".join(pieces) == tokenizer.decode(ids, keep_special=keep)


def test_a_trained_tokenizer_has_the_tokens_of_the_format(tmp_path):
    tokenizer = train_tokenizer(["some text " * 20], 300, tmp_path / "tokenizer.json")

    prompt = tokenizer.render([USER]).text + EOS
    assert tokenizer.decode(tokenizer.encode(prompt), keep_special=True) == prompt
    assert tokenizer.encode(BOS) == [0] and tokenizer.stop_ids[0] == 1
