"""Checkpoints in object stores: read through gcsfs and HTTP from servers of this process."""

import collections
import http.server
import json
import os
import re
import struct
import threading
import urllib.parse

import jax
import numpy as np
import pytest

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # no gRPC: before gcsfs is imported

import fsspec

import v4jax
from tests.conftest import NANO
from tests.reference.checkpoints import assert_same_parameters, parameters
from v4jax import stores
from v4jax.checkpoint import Checkpoint, CheckpointError
from v4jax.checkpoint.convert import Conversion
from v4jax.checkpoint.folders import INDEX_NAME, SINGLE_NAME
from v4jax.cli import main
from v4jax.inference.batch.files import fingerprint
from v4jax.text.release import release_of

URL = "gs://bucket/models/nano"


class Store:
    """Objects by path `bucket/name`, what was asked for, and failures that are due.

    Attributes:
      objects: their bytes.
      failing: (part of a path, status): how many more requests fail like that.
      requests: (path, first byte, end) of every request for data.
    """

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.failing: collections.Counter = collections.Counter()
        self.requests: list[tuple[str, int, int]] = []
        self.lock = threading.Lock()

    def put_folder(self, folder, prefix: str) -> None:
        for path in sorted(folder.iterdir()):
            if path.is_file():
                self.objects[f"{prefix}/{path.name}"] = path.read_bytes()

    def failure(self, path: str) -> int | None:
        with self.lock:
            for (part, status), left in self.failing.items():
                if left > 0 and part in path:
                    self.failing[part, status] -= 1
                    return status
        return None

    @property
    def served(self) -> int:
        """Bytes of data."""
        return sum(end - begin for _, begin, end in self.requests)


class Handler(http.server.BaseHTTPRequestHandler):
    """What gcsfs asks of the JSON API of Google Cloud Storage; and plain files below /plain/."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status: int, data: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer_json(self, value: dict) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def fails(self, path: str) -> bool:
        if status := self.server.store.failure(path):
            error = {"error": {"code": status, "message": "made up"}}
            self.answer(status, json.dumps(error).encode())
            return True
        return False

    def answer_data(self, path: str, data: bytes) -> None:
        begin, end, status = 0, len(data), 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            begin, end, status = int(match[1]), min(int(match[2]) + 1, len(data)), 206
        if self.command == "GET":
            with self.server.store.lock:
                self.server.store.requests.append((path, begin, end))
        where = {"Content_Range": f"bytes {begin}-{end - 1}/{len(data)}"} if status == 206 else {}
        self.answer(status, data[begin:end], Accept_Ranges="bytes", **where)

    def resource(self, path: str) -> dict:
        bucket, _, name = path.partition("/")
        size = str(len(self.server.store.objects[path]))
        return {"kind": "storage#object", "bucket": bucket, "name": name, "size": size} | {
            "contentType": "application/octet-stream",
            "md5Hash": "",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def do_GET(self):
        objects = self.server.store.objects
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if url.path.startswith("/plain/"):
            path = url.path.removeprefix("/plain/")
            if not self.fails(path):
                found = path in objects
                self.answer_data(path, objects[path]) if found else self.answer(404)
            return
        match = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o(?:/(.+))?", url.path)
        if not match:
            self.answer(404)
        elif match[2] is None:
            self.list(match[1], query)
        else:
            path = f"{match[1]}/{urllib.parse.unquote(match[2])}"
            if self.fails(path):
                return
            if path not in objects:
                self.answer(404)
            elif query.get("alt") == "media":
                self.answer_data(path, objects[path])
            else:
                self.answer_json(self.resource(path))

    do_HEAD = do_GET

    def list(self, bucket: str, query: dict) -> None:
        prefix = f"{bucket}/{query.get('prefix', '')}"
        if self.fails(prefix):
            return
        items, folders = [], set()
        for path in sorted(self.server.store.objects):
            if path.startswith(prefix):
                head, slash, _ = path[len(prefix) :].partition("/")
                if slash and query.get("delimiter"):
                    folders.add(f"{prefix}{head}/".partition("/")[2])
                else:
                    items.append(self.resource(path))
        self.answer_json({"items": items, "prefixes": sorted(folders)})

    def do_POST(self):
        """An upload in one request: a part with metadata, and one with the data."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        boundary = re.search("boundary=['\"]?([^'\"]+)", self.headers["Content-Type"])[1].encode()
        _, metadata, data, _ = body.split(b"--" + boundary)
        name = json.loads(metadata.partition(b"\n\n")[2])["name"]
        data = data.partition(b"\n\n")[2].removesuffix(b"\n")
        bucket = re.search("/b/([^/]+)/o", self.path)[1]
        self.server.store.objects[f"{bucket}/{name}"] = data
        self.answer_json(self.resource(f"{bucket}/{name}"))


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
