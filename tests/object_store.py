"""A server of this process that speaks the JSON API of Google Cloud Storage, and plain HTTP."""

import collections
import contextlib
import http.server
import json
import re
import threading
import urllib.parse


class Store:
    """Objects by path `bucket/name`, what was asked for, and failures that are due.

    Attributes:
      objects: their bytes.
      failing: (part of a path, status): how many more requests fail like that.
      ignores_ranges: whole files are sent, as some HTTP servers do.
      requests: (path, first byte, end) of every request for data.
    """

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.failing: collections.Counter = collections.Counter()
        self.requests: list[tuple[str, int, int]] = []
        self.asked: collections.Counter = collections.Counter()  # requests of any kind, by path
        self.ignores_ranges = False
        self.lock = threading.Lock()

    def put_folder(self, folder, prefix: str) -> None:
        for path in sorted(folder.iterdir()):
            if path.is_file():
                self.objects[f"{prefix}/{path.name}"] = path.read_bytes()

    def failure(self, path: str) -> int | None:
        with self.lock:
            self.asked[path] += 1
            for (part, status), left in self.failing.items():
                if left > 0 and part in path:
                    self.failing[part, status] -= 1
                    return status
        return None

    def served(self, part: str) -> int:
        """Bytes of data, of paths that have `part` in them."""
        return sum(end - begin for path, begin, end in self.requests if part in path)


class Handler(http.server.BaseHTTPRequestHandler):
    """What gcsfs asks of the JSON API of Google Cloud Storage; and plain files below /plain/."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms

    def log_message(self, *args):
        pass

    def answer(self, status: int, data: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # gcsfs asks two things at once, and drops one
            self.wfile.write(data if self.command != "HEAD" else b"")

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
        asked = "" if self.server.store.ignores_ranges else self.headers.get("Range", "")
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", asked):
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
        """An upload: in one request with a part of metadata and one of data, or in two."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/session/"):  # the second; gcsfs sends up to 50 MB at once
            path, data = urllib.parse.unquote(self.path.removeprefix("/session/")), body
        else:
            bucket = re.search("/b/([^/]+)/o", self.path)[1]
            if "uploadType=resumable" in self.path:
                path = urllib.parse.quote(f"{bucket}/{json.loads(body)['name']}")
                self.answer(200, Location=f"http://{self.headers['Host']}/session/{path}")
                return
            parts = [part.partition(b"\n\n")[2] for part in body.split(b"--==0==")]
            path, data = f"{bucket}/{json.loads(parts[1])['name']}", parts[2].removesuffix(b"\n")
        self.server.store.objects[path] = data
        self.answer_json(self.resource(path))
