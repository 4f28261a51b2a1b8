"""Whatever a checkpoint folder holds, opening it works or ends in one clear error, at once."""

import json
import os
import pathlib
import shutil
import struct
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import NANO
from v4jax.checkpoint import Checkpoint, CheckpointError
from v4jax.checkpoint.folders import INDEX_NAME, SINGLE_NAME
from v4jax.checkpoint.hf_config import ConfigError
from v4jax.checkpoint.loading import matched_leaves

CONFIG = json.loads((NANO / "config.json").read_text())
with open(NANO / SINGLE_NAME, "rb") as file:
    (LENGTH,) = struct.unpack("<Q", file.read(8))
    HEADER, DATA = json.loads(file.read(LENGTH)), file.read()
SECONDS = 10  # of a busy machine; what hangs takes for ever

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.sampled_from([2**31, 2**63, 10**30, 10**400, -(10**30), 1e400, -1e400, float("nan"), 0.5]),
    st.text(st.characters(), max_size=5),
    st.sampled_from(["/etc/passwd", "../model.safetensors", "\0", "\ud800", "a/b.safetensors", ""]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["", "a", "dtype", "shape", "\0"]), inner, max_size=3),
    ),
    max_leaves=6,
)
bounded = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def folder(tmp_path):
    """A copy of nano that every example damages anew."""
    path = tmp_path / "model"

    def make() -> pathlib.Path:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        shutil.copyfile(NANO / "config.json", path / "config.json")
        os.link(NANO / SINGLE_NAME, path / SINGLE_NAME)
        return path

    return make


def opens_or_says_why(path: pathlib.Path, opened: list[str], *, whole: bool = False) -> bool:
    """Whether it opens; fails on any other error, on a long message, and outside the folder."""
    started = time.monotonic()
    del opened[:]
    try:
        checkpoint = Checkpoint(path)
        if whole:
            matched_leaves(checkpoint)
        return True
    except (CheckpointError, ConfigError) as error:
        assert 10 < len(str(error)) <= 2000
        str(error).encode()
        return False
    finally:
        assert time.monotonic() - started < SECONDS
        strangers = [name for name in opened if os.path.dirname(name) != str(path)]
        assert not strangers, strangers


@pytest.fixture
def opened(monkeypatch):
    """Paths that the reader opens."""
    names: list[str] = []
    real = open

    def watched(name, *args, **options):
        names.append(os.path.abspath(os.fspath(name)))
        return real(name, *args, **options)

    monkeypatch.setattr("v4jax.stores.open", watched, raising=False)
    return names


@bounded
@given(data=st.data())
def test_configs(folder, opened, data):
    path, config = folder(), dict(CONFIG)
    key = data.draw(st.sampled_from([*CONFIG, "layer_types", "mlp_layer_types", "rope_parameters"]))
    inner = data.draw(st.sampled_from([None, *CONFIG["rope_scaling"]]))
    if key == "rope_scaling" and inner:
        config[key] = {**config[key], inner: data.draw(values)}
    elif data.draw(st.booleans()):
        config[key] = data.draw(values)
    else:
        config.pop(key, None)
    (path / "config.json").write_text(json.dumps(config))

    opens_or_says_why(path, opened, whole=True)


@bounded
@given(text=st.one_of(st.binary(max_size=30), values.map(lambda v: json.dumps(v).encode())))
def test_files_that_are_no_config_or_index(folder, opened, text):
    for name in ("config.json", INDEX_NAME):
        path = folder()
        (path / name).write_bytes(text)
        assert not opens_or_says_why(path, opened)


@bounded
@given(name=values, tensor=st.sampled_from([*HEADER][:5]))
def test_indexes_that_name_anything(folder, opened, name, tensor):
    path = folder()
    weight_map = {stored: SINGLE_NAME for stored in HEADER if stored != "__metadata__"}
    (path / INDEX_NAME).write_text(json.dumps({"weight_map": {**weight_map, tensor: name}}))

    assert not opens_or_says_why(path, opened)


@bounded
@given(data=st.data())
def test_headers(folder, opened, data):
    path, header = folder(), dict(HEADER)
    name = data.draw(st.sampled_from([*HEADER][:8]))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
    if field is None or name == "__metadata__":
        header[name] = data.draw(values)
    else:
        header[name] = {**header[name], field: data.draw(values)}
    text = json.dumps(header).encode()
    (path / SINGLE_NAME).unlink()
    (path / SINGLE_NAME).write_bytes(struct.pack("<Q", len(text)) + text + DATA)

    opens_or_says_why(path, opened)


@bounded
@given(at=st.integers(0, LENGTH + 7), byte=st.integers(0, 255))
def test_a_byte_of_a_header(folder, opened, at, byte):
    path = folder()
    text = bytearray((NANO / SINGLE_NAME).read_bytes())
    text[at] = byte
    (path / SINGLE_NAME).unlink()
    (path / SINGLE_NAME).write_bytes(text)

    opens_or_says_why(path, opened)


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, SINGLE_NAME])
def test_what_is_no_file_is_not_waited_for(folder, opened, name):
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)):
        path = folder()
        (path / name).unlink(missing_ok=True)
        make(path / name)
        assert not opens_or_says_why(path, opened)


def test_nothing_is_read_outside_the_folder(folder, opened, tmp_path):
    shutil.copyfile(NANO / SINGLE_NAME, tmp_path / SINGLE_NAME)
    for name in (f"../{SINGLE_NAME}", str(tmp_path / SINGLE_NAME), f"x/../../{SINGLE_NAME}"):
        path = folder()
        (path / SINGLE_NAME).unlink()
        (path / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(HEADER, name)}))
        assert not opens_or_says_why(path, opened)


def test_links_into_a_download_cache_are_followed(folder, opened, tmp_path):
    shutil.copyfile(NANO / SINGLE_NAME, tmp_path / "blob")
    path = folder()
    (path / SINGLE_NAME).unlink()
    os.symlink("../blob", path / SINGLE_NAME)

    assert opens_or_says_why(path, opened, whole=True)
    assert opened, "what is opened is watched"


@pytest.mark.parametrize("dtype", ["F32", "I8"])
def test_nesting_and_absurd_sizes_end_at_once(folder, opened, dtype):
    deep = b"[" * 100_000
    huge = {"dtype": dtype, "shape": [2**40] * 8, "data_offsets": [0, 2**47]}
    many = {"dtype": dtype, "shape": [10**9, 2, 0], "data_offsets": [0, 0]}
    for text in (deep, json.dumps({"a": huge}).encode(), json.dumps(stacked(many)).encode()):
        path = folder()
        (path / SINGLE_NAME).unlink()
        (path / SINGLE_NAME).write_bytes(struct.pack("<Q", len(text)) + text)
        assert not opens_or_says_why(path, opened)
    for name in ("config.json", INDEX_NAME):
        path = folder()
        (path / name).write_bytes(deep)
        assert not opens_or_says_why(path, opened)


def stacked(entry: dict) -> dict:
    """As transformers names the stacked experts of a layer."""
    return {"model.layers.0.mlp.experts.gate_up_proj": entry}
