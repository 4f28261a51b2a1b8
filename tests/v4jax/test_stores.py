"""Checkpoints in object stores: read through gcsfs and HTTP from servers of this process."""

import http.server
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import threading
import time

import fsspec
import jax
import pytest

import v4jax
from tests.conftest import NANO, ROOT, environment, free_port
from tests.object_store import Handler, Store
from tests.reference.checkpoints import assert_same_parameters, parameters
from v4jax import stores
from v4jax.checkpoint import Checkpoint, CheckpointError
from v4jax.checkpoint.convert import Conversion
from v4jax.checkpoint.folders import INDEX_NAME, SINGLE_NAME
from v4jax.cli import main
from v4jax.inference.batch.files import fingerprint
from v4jax.text.release import release_of

URL = "gs://bucket/models/nano"


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def store(server, monkeypatch):
    """A bucket with nano; no wait takes long."""
    server.store = Store()
    server.store.put_folder(NANO, "bucket/models/nano")
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setitem(fsspec.config.conf, "gs", {"endpoint_url": address, "token": "anon"})
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.01)
    return server.store


@pytest.fixture
def plain_url(server, store):
    """The same folder from a server that cannot list."""
    return f"http://127.0.0.1:{server.server_port}/plain/bucket/models/nano"


@pytest.fixture(scope="module")
def local():
    return parameters(v4jax.load(NANO))


def test_a_model_from_a_bucket_is_that_of_the_folder(store, local):
    assert_same_parameters(parameters(v4jax.load(URL)), local)


def test_a_server_that_cannot_list_serves_a_folder_with_an_index(store, plain_url, local):
    with pytest.raises(CheckpointError, match=re.escape(plain_url)):
        v4jax.load(plain_url)
    store.objects[f"bucket/models/nano/{INDEX_NAME}"] = index_of(dict.fromkeys(HEADER, SINGLE_NAME))

    assert_same_parameters(parameters(v4jax.load(plain_url)), local)


with open(NANO / SINGLE_NAME, "rb") as _file:
    (LENGTH,) = struct.unpack("<Q", _file.read(8))
    HEADER = json.loads(_file.read(LENGTH))
    HEADER.pop("__metadata__", None)
SIZE = (NANO / SINGLE_NAME).stat().st_size
WEIGHTS = f"bucket/models/nano/{SINGLE_NAME}"


def index_of(weight_map: dict[str, str]) -> bytes:
    return json.dumps({"weight_map": weight_map}).encode()


# Small files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [URL, f"{URL}/", f"{URL}/tokenizer.json"])
def test_a_tokenizer_from_a_bucket(store, url, tmp_path):
    found, expected = v4jax.Tokenizer(url), v4jax.Tokenizer(NANO)

    assert found.encode("Emma was") == expected.encode("Emma was")
    assert found.release == expected.release
    found.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (NANO / "tokenizer.json").read_bytes()


def test_config_release_and_fingerprint_are_those_of_the_folder(store):
    config = json.loads((NANO / "config.json").read_text())
    config["dsv4_reasoning_effort_profile"] = "official"
    store.objects["bucket/models/nano/config.json"] = json.dumps(config).encode()
    assert v4jax.from_hf(URL) == v4jax.from_hf(f"{URL}/config.json") == v4jax.from_hf(NANO)
    assert release_of(URL) == "0731"
    for name in (SINGLE_NAME, "tokenizer.json"):
        assert fingerprint([f"{URL}/{name}"]) == fingerprint([NANO / name])


# Which bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use, mesh", [("serve", {}), ("train", {"fsdp": 2}), ("serve", {"expert": 2})]
)
def test_every_byte_is_read_once(store, use, mesh):
    v4jax.load(URL, use=use, mesh=v4jax.make_mesh(**mesh, devices=jax.devices()[:2]))

    assert store.served(SINGLE_NAME) == SIZE


def test_a_request_is_no_larger_than_a_piece(store, local, monkeypatch):
    monkeypatch.setattr(stores, "PIECE_BYTES", 20_000)
    monkeypatch.setattr("v4jax.checkpoint.loading.AHEAD_BYTES", 100_000)

    assert_same_parameters(parameters(v4jax.load(URL)), local)
    assert max(end - begin for _, begin, end in store.requests) <= 20_000
    assert store.served(SINGLE_NAME) == SIZE
    assert v4jax.Tokenizer(URL).vocab_size == v4jax.Tokenizer(NANO).vocab_size


PROCESS = """
import sys
import jax, v4jax
address, number, url = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, number)
v4jax.load(url, mesh=v4jax.make_mesh(expert=2))
"""


def test_a_process_reads_only_the_experts_of_its_devices(store, server):
    address = f"127.0.0.1:{free_port()}"
    variables = {
        "FSSPEC_GS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "FSSPEC_GS_TOKEN": "anon",
    }
    processes = []
    for number in range(2):
        store.put_folder(NANO, f"bucket/{number}")
        words = [sys.executable, "-c", PROCESS, address, str(number), f"gs://bucket/{number}"]
        options = dict(cwd=ROOT, env=environment(**variables), stderr=subprocess.PIPE, text=True)
        processes.append(subprocess.Popen(words, **options))
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-4000:]

    begins_and_ends = [e["data_offsets"] for name, e in HEADER.items() if ".experts." in name]
    experts = sum(end - begin for begin, end in begins_and_ends)
    assert experts > SIZE / 4
    for number in range(2):
        assert store.served(f"bucket/{number}/{SINGLE_NAME}") == SIZE - experts // 2


# Failures -----------------------------------------------------------------------------------------


def test_what_passes_is_tried_again(store, plain_url, local):
    store.objects[f"bucket/models/nano/{INDEX_NAME}"] = index_of(dict.fromkeys(HEADER, SINGLE_NAME))
    store.failing["config.json", 503] = stores.TRIES - 1
    store.failing[SINGLE_NAME, 429] = 3
    store.failing[INDEX_NAME, 500] = 2

    assert_same_parameters(parameters(v4jax.load(plain_url)), local)
    assert not +store.failing


def test_gcsfs_tries_again_too(store, local):
    store.failing[SINGLE_NAME, 503] = 1

    assert_same_parameters(parameters(v4jax.load(URL)), local)
    assert not +store.failing


def test_what_does_not_pass_ends_in_one_error(store, plain_url):
    checkpoint = opened(store, plain_url)
    store.failing[SINGLE_NAME, 503] = 10**6
    with pytest.raises(CheckpointError) as info:
        v4jax.load(checkpoint)

    message = str(info.value)
    assert f"{plain_url}/{SINGLE_NAME}: reading bytes" in message
    assert "503" in message and f"last of {stores.TRIES} tries" in message
    before = sum(store.asked.values())
    time.sleep(0.1)
    assert sum(store.asked.values()) == before, "threads have ended"


def opened(store: Store, url: str) -> Checkpoint:
    store.objects[f"bucket/models/nano/{INDEX_NAME}"] = index_of(dict.fromkeys(HEADER, SINGLE_NAME))
    return Checkpoint(url)


@pytest.mark.parametrize("status", [403, 401])
def test_no_access_is_one_error_about_credentials(store, status, caplog):
    store.failing["config.json", status] = 10**6
    store.failing["nano", status] = 10**6  # of listing too
    with pytest.raises(CheckpointError, match=r"gs://bucket/models/nano/config.*credentials"):
        v4jax.load(URL)
    assert sum(store.asked.values()) <= 4
    with pytest.raises(CheckpointError, match="application-default login"):
        v4jax.Tokenizer(URL)


def test_a_folder_that_does_not_exist(store):
    with pytest.raises(CheckpointError, match=r"gs://bucket/models/other has no config\.json"):
        v4jax.load("gs://bucket/models/other")
    with pytest.raises(FileNotFoundError, match=r"gs://bucket/models/other/tokenizer\.json"):
        v4jax.Tokenizer("gs://bucket/models/other")
    assert sum(store.asked.values()) <= 6, "nothing is tried again"


def test_an_object_that_vanishes_is_one_error(store):
    checkpoint = Checkpoint(URL)
    del store.objects[WEIGHTS]
    with pytest.raises(CheckpointError, match=rf"{URL}/{SINGLE_NAME} is gone"):
        v4jax.load(checkpoint)


# Damage -------------------------------------------------------------------------------------------


def test_a_truncated_object_is_found_before_data_is_read(store):
    store.objects[WEIGHTS] = store.objects[WEIGHTS][:-1000]
    with pytest.raises(CheckpointError, match=rf"(?s){URL}/{SINGLE_NAME}.*truncated"):
        v4jax.load(URL)
    assert store.served(SINGLE_NAME) == 8 + LENGTH


@pytest.mark.parametrize(
    "name, data, problem",
    [
        ("config.json", b"{", "config.json is not JSON"),
        ("config.json", b"[]", "holds a list"),
        (SINGLE_NAME, b"", "0 bytes"),
        (SINGLE_NAME, b"<!DOCTYPE html><html></html>", "not a safetensors file"),
        (SINGLE_NAME, struct.pack("<Q", 7) + b"no json", "header is not valid"),
        (INDEX_NAME, b"[1]", "holds a list"),
        (INDEX_NAME, index_of({"a": "../b.safetensors"}), "without a path"),
        (INDEX_NAME, index_of({"a": "%2e%2e%2fb.safetensors"}), "without a path"),
        (INDEX_NAME, index_of({"a": "b.safetensors"}), "b.safetensors is listed in .* missing"),
    ],
)
def test_damaged_folders_give_the_errors_of_local_ones(store, name, data, problem):
    store.objects[f"bucket/models/nano/{name}"] = data
    with pytest.raises(ValueError, match=problem) as info:
        v4jax.load(URL)
    assert URL in str(info.value)


def test_without_weights_or_config_it_is_no_checkpoint(store):
    del store.objects[WEIGHTS]
    with pytest.raises(CheckpointError, match=r"nano has no \.safetensors"):
        v4jax.load(URL)
    del store.objects["bucket/models/nano/config.json"]
    with pytest.raises(CheckpointError, match=r"nano has no config\.json"):
        v4jax.load(URL)


def test_a_server_without_ranges_is_refused(store, plain_url):
    checkpoint = opened(store, plain_url)
    store.ignores_ranges = True
    with pytest.raises(CheckpointError, match="range requests"):
        v4jax.load(checkpoint)


# Packages and protocols ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "protocol, package, extra", [("gs", "gcsfs", "v4jax[gcs]"), ("s3", "s3fs", "v4jax[s3]")]
)
def test_a_missing_package_is_named_with_its_extra(protocol, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    with pytest.raises(CheckpointError, match=re.escape(f"pip install '{extra}'")):
        v4jax.load(f"{protocol}://bucket/folder")


def test_an_unknown_protocol_is_named():
    with pytest.raises(CheckpointError, match=r"(?i)abc://bucket.*protocol not known"):
        v4jax.load("abc://bucket/folder")


def test_other_protocols_of_fsspec_work(local):
    memory = fsspec.filesystem("memory")
    for path in NANO.iterdir():
        memory.pipe_file(f"/models/nano/{path.name}", path.read_bytes())
    assert_same_parameters(parameters(v4jax.load("memory://models/nano")), local)


# Writing ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp's, of gcsfs
def test_a_model_is_saved_into_a_bucket_config_last(store):
    url, source = "gs://bucket/new/model", Checkpoint(NANO)
    v4jax.save(v4jax.load(NANO), url, like=source)

    new = [path for path in store.objects if path.startswith("bucket/new/")]
    assert new[-1] == "bucket/new/model/config.json"
    assert store.objects[f"bucket/new/model/{SINGLE_NAME}"] == store.objects[WEIGHTS]
    assert "bucket/new/model/tokenizer.json" in new
    assert_same_parameters(parameters(v4jax.load(url)), parameters(v4jax.load(NANO)))
    with pytest.raises(ValueError, match=rf"{url} already holds {SINGLE_NAME}"):
        v4jax.save(v4jax.load(NANO), url)


def test_convert_reads_a_bucket(store, tmp_path, monkeypatch):
    target = tmp_path / "new"
    monkeypatch.setattr(sys, "argv", sys.argv)
    main(["convert", URL, str(target)])
    Conversion(NANO, tmp_path / "other").run()

    for name in (SINGLE_NAME, "config.json", "tokenizer.json"):
        assert (target / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


FINETUNE = ["finetune", "--model", "nano"]
OUTPUTS = [
    [*FINETUNE, "--tokens", "t.npy", "--output", "gs://b/x"],
    [*FINETUNE, "--tokens", "gs://b/x", "--output", "o"],
    ["batch", "--checkpoint", "nano", "--input", "r.jsonl", "--output", "gs://b/x"],
    ["batch", "--checkpoint", "nano", "--input", "gs://b/x", "--output", "o"],
    ["convert", "nano", "gs://b/x"],
    ["score", "--checkpoint", "nano", "--tokens", "t.npy", "--out", "gs://b/x"],
]


@pytest.mark.parametrize("words", OUTPUTS, ids=lambda words: " ".join(words))
def test_outputs_and_other_inputs_are_local(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as end:
        main(words)

    err = capsys.readouterr().err
    assert end.value.code == 2
    assert "'gs://b/x' is a URL" in err and "gcloud storage cp -r" in err
    assert os.listdir(tmp_path) == []


def test_no_way_leads_to_a_folder_called_gs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lost = pathlib.Path("gs://b/x")  # pathlib makes gs:/b/x of it
    with pytest.raises(ValueError, match="two slashes"):
        v4jax.load(lost)
    with pytest.raises(ValueError, match="two slashes"):
        v4jax.save(None, lost)
    with pytest.raises(ValueError, match="is a URL"):
        Conversion(NANO, "gs://b/x")
    with pytest.raises(ValueError, match="is a URL"):
        v4jax.Tokenizer(NANO).save("gs://b/x")
    assert os.listdir(tmp_path) == []
