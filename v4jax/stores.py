"""Files and folders of this machine, and of object stores: gs://, s3:// and what else fsspec knows.

A path is a local one or a URL. Local files are mapped. Remote ones are read by byte ranges, and a
request that fails for a reason that may pass is made again: `TRIES` times in all, after waits of 1,
2, 4 and 8 seconds (each less up to half of it, by chance, so that many processes do not come back
together). What cannot pass (no such object, no access) is not tried again.
"""

import functools
import logging
import mmap
import os
import pathlib
import random
import re
import shutil
import stat
import time
from collections.abc import Callable
from typing import Any, TypeVar

TRIES = 5
FIRST_WAIT = 1.0  # seconds; doubles
PIECE_BYTES = 1 << 24  # of one request
_MAX_MESSAGE = 2000  # characters
_URL = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://", re.IGNORECASE)
_SHORTENED = re.compile(r"[a-z][a-z0-9+.-]+:/(?!/)", re.IGNORECASE)
# Protocol -> what `pip install` gets its package with.
_EXTRAS = {"gs": "v4jax[gcs]", "gcs": "v4jax[gcs]", "s3": "v4jax[s3]", "s3a": "v4jax[s3]"}
_PASSING = (408, 425, 429)  # 4xx codes that mean: later
_PERMANENT = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ImportError, NotImplementedError, AttributeError, TypeError, ValueError),
)
_Found = TypeVar("_Found")
Path = str | os.PathLike


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message lists what was found wrong with it."""

    def __init__(self, message: str):
        super().__init__(shortened(message))


def shortened(text: str) -> str:
    """A message of bounded length that any terminal can print: files may hold anything."""
    text = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    if len(text) <= _MAX_MESSAGE:
        return text
    left = len(text) - _MAX_MESSAGE + 60
    return f"{text[: _MAX_MESSAGE - 60]} ... and {left:,} more characters."


# Paths --------------------------------------------------------------------------------------------


def is_url(path: Path) -> bool:
    """Whether a path is one of an object store.

    Raises:
      ValueError: it was one, until pathlib made one slash of two.
    """
    text = os.fspath(path)
    if _SHORTENED.match(text):
        raise ValueError(
            f"{text!r} is neither a path nor a URL: expected two slashes after the colon, in a str "
            "(pathlib.Path makes one of them)."
        )
    return _URL.match(text) is not None


def require_local(path: Path) -> pathlib.Path:
    """A path of this machine: what only it can hold never lands in a folder called `gs:`.

    Raises:
      ValueError: it is a URL.
    """
    if is_url(path):
        raise ValueError(
            f"{os.fspath(path)!r} is a URL: expected a path on this machine. Give a local one, and "
            "copy what is there, for example with `gcloud storage cp -r` or `aws s3 cp --recursive`."
        )
    return pathlib.Path(path)


def join(folder: Path, name: str) -> str:
    """The path of a file in a folder."""
    if is_url(folder):
        return f"{os.fspath(folder).rstrip('/')}/{name.replace(os.sep, '/')}"
    return os.path.join(folder, name)


def in_folder(path: Path, name: str) -> str:
    """A file that is given itself, or by its folder; of URLs, those that end in .json are files."""
    text = os.fspath(path)
    is_folder = not text.endswith(".json") if is_url(path) else os.path.isdir(path)
    return join(path, name) if is_folder else text


def names(folder: Path) -> list[str]:
    """Names of the files in a folder, sorted; those of folders in it are left out if it is remote.

    Raises:
      CheckpointError: a remote folder cannot be listed.
    """
    if not is_url(folder):
        return sorted(os.listdir(folder))
    url = os.fspath(folder).rstrip("/")
    try:
        found = _ask(url, "listing it", lambda store, path: store.ls(path, detail=True))
    except FileNotFoundError:
        raise CheckpointError(f"{url} does not exist, or its store cannot list it.") from None
    files = [entry["name"] for entry in found if entry["type"] == "file"]
    return sorted({name.rpartition("/")[2] for name in files} - {""})


def is_file(path: Path) -> bool:
    """Whether there is such a file.

    Raises:
      CheckpointError: the store does not say.
    """
    if not is_url(path):
        return os.path.isfile(path)
    try:
        return _info(os.fspath(path))["type"] == "file"
    except FileNotFoundError:
        return False


def is_folder(url: str) -> bool:
    """Whether a store has anything below a URL.

    Raises:
      CheckpointError: the store does not say.
    """
    try:
        return _info(url.rstrip("/"))["type"] == "directory"
    except FileNotFoundError:
        return False


# Files --------------------------------------------------------------------------------------------


class LocalFile:
    """A mapped file. A part costs nothing until it is copied.

    Attributes:
      path: as given.
      size: in bytes.

    Raises:
      FileNotFoundError: there is none.
      error: it is no regular file; a pipe or device would make a reader wait for ever.
    """

    is_remote = False

    def __init__(self, path: Path, error: type[ValueError]):
        self.path = os.fspath(path)
        try:
            found = os.stat(self.path)
        except (OSError, ValueError) as why:
            if isinstance(why, FileNotFoundError):
                raise
            raise error(f"{self.path} cannot be read: {why}.") from why
        if not stat.S_ISREG(found.st_mode):
            raise error(
                f"{self.path} is not a file (a folder, pipe or device): expected a regular file."
            )
        self.size = found.st_size
        with open(self.path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes `begin` to `end`, not copied."""
        return memoryview(self._map)[begin:end]

    def drop_pages(self) -> None:
        """Gives the memory of pages read so far back to the system; views stay valid."""
        if hasattr(mmap, "MADV_DONTNEED") and isinstance(self._map, mmap.mmap):
            self._map.madvise(mmap.MADV_DONTNEED)


class RemoteFile:
    """A file of an object store, read by byte ranges. Several threads may read it.

    Attributes:
      path: its URL.
      size: in bytes.

    Raises:
      FileNotFoundError: there is none.
      error: the store does not give its size.
    """

    is_remote = True

    def __init__(self, url: str, error: type[ValueError]):
        self.path, info = url, _info(url)
        if info["type"] != "file":
            raise error(f"{url} is not a file: expected one.")
        if not isinstance(info.get("size"), int):
            raise error(f"{url}: its server does not say how large it is, and v4jax has to know.")
        self.size = info["size"]

    def read(self, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end`, in pieces of `PIECE_BYTES`.

        Raises:
          CheckpointError: the store does not give them.
        """
        starts = range(begin, end, PIECE_BYTES)
        pieces = [self._piece(start, min(start + PIECE_BYTES, end)) for start in starts]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _piece(self, begin: int, end: int) -> bytes:
        def read(store: Any, path: str) -> bytes:
            if path.startswith("http"):  # `cat_file` takes all that a server without ranges sends
                with store.open(path, cache_type="none", size=self.size) as file:
                    file.seek(begin)
                    data = file.read(end - begin)
            else:
                data = store.cat_file(path, start=begin, end=end)
            if len(data) != end - begin:
                raise OSError(f"{len(data):,} bytes came, expected {end - begin:,}")
            return data

        try:
            return _ask(self.path, f"reading bytes {begin:,} to {end:,}", read)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} is gone: it was there a moment ago.") from None

    def drop_pages(self) -> None:
        """Nothing is kept."""


def open_file(path: Path, error: type[ValueError] = CheckpointError) -> LocalFile | RemoteFile:
    """A file to read from.

    Raises:
      FileNotFoundError: there is none.
      error: it is no file.
    """
    return RemoteFile(os.fspath(path), error) if is_url(path) else LocalFile(path, error)


def read_start(path: Path, limit: int | None = None) -> bytes:
    """The first `limit` bytes of a file, by default all.

    Raises:
      FileNotFoundError: there is none.
      CheckpointError: it cannot be read.
    """
    file = open_file(path)
    return bytes(file.read(0, file.size if limit is None else min(file.size, limit)))


def copy_here(source: Path, target: str) -> None:
    """Copies a file to a local path.

    Raises:
      FileNotFoundError, CheckpointError: as `open_file`.
    """
    if not is_url(source):
        shutil.copyfile(source, target)
        return
    file = open_file(source)
    with open(target, "wb") as new:
        new.writelines(
            file.read(start, min(start + PIECE_BYTES, file.size))
            for start in range(0, file.size, PIECE_BYTES)
        )


def upload(source: str, url: str) -> None:
    """Copies a local file into a store.

    Raises:
      CheckpointError: the store does not take it.
    """
    try:
        _ask(url, "writing it", lambda store, path: store.put_file(source, path))
    except FileNotFoundError:  # a bucket
        raise CheckpointError(f"{url} cannot be written: its bucket does not exist.") from None


# Stores -------------------------------------------------------------------------------------------


def _info(url: str) -> dict[str, Any]:
    return _ask(url, "asking for its size", lambda store, path: store.info(path))


@functools.cache
def _store_of(protocol: str) -> Callable[[str], tuple[Any, str]]:
    """fsspec's function from URLs to stores and paths; what stores log goes to those who listen."""
    # gcsfs would ask for the kind of bucket before each request, by gRPC and for up to a minute where
    # that is blocked or not allowed.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    for name in {protocol, "gcsfs", "s3fs"}:  # gcsfs logs a traceback of every error that it raises
        logging.getLogger(name).addHandler(logging.NullHandler())
    # A folder may change between two looks at it.
    return functools.partial(fsspec.url_to_fs, use_listings_cache=False)


def _ask(url: str, what: str, ask: Callable[[Any, str], _Found]) -> _Found:
    """`ask(store, path)`, made again after failures that may pass.

    Args:
      what: "reading it" and the like, for messages.

    Raises:
      FileNotFoundError: there is no such object.
      CheckpointError: names the URL, what failed and what to do.
    """
    protocol = re.split("::|:", url)[0].lower()
    for attempt in range(TRIES):
        try:
            return ask(*_store_of(protocol)(url))
        except ImportError as missing:
            extra = _EXTRAS.get(protocol)
            hint = f"pip install '{extra}'" if extra else str(missing)
            raise CheckpointError(
                f"{url}: {protocol}:// needs a package that is not installed: {hint}"
            ) from missing
        except Exception as found:
            error = _behind(found)
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(2, "no such object", url) from None
            if _is_permanent(error) or attempt == TRIES - 1:
                raise CheckpointError(_failure(url, what, error, attempt + 1)) from found
            time.sleep(FIRST_WAIT * 2**attempt * random.uniform(0.5, 1.0))
    raise AssertionError("the last try returns or raises")


def _behind(error: Exception) -> Exception:
    """What has happened, where fsspec's HTTP store says of any failure that there is no such file."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        is_of_network = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
        if (is_of_network or _status(cause)) and _status(cause) not in (404, 410):
            return cause
    return error


def _status(error: Exception) -> int | None:
    """The HTTP status behind an error of aiohttp, gcsfs, s3fs (botocore) or requests."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if hasattr(response, "status_code"):
        return response.status_code
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):  # gcsfs's OSError
        return 403
    value = error.status if hasattr(error, "status") else getattr(error, "code", None)
    return int(str(value)) if str(value).isdecimal() else None


def _is_permanent(error: Exception) -> bool:
    """Whether another try would fail too."""
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in _PASSING
    # Errors of google.auth say it themselves.
    return isinstance(error, _PERMANENT) or getattr(error, "retryable", True) is False


def _failure(url: str, what: str, error: Exception, tries: int) -> str:
    text = f"{type(error).__name__}: {error}".strip(": ").replace("\n", " ")[:600]
    status = _status(error)
    if status in (401, 403) or type(error).__module__.startswith("google.auth"):
        advice = (
            "The credentials that were found have no access, or there are none: see Object stores "
            "in docs/checkpoints.md (gs://: `gcloud auth application-default login`)."
        )
    elif tries == TRIES:
        advice = f"That was the last of {TRIES} tries: look at the connection, and start again."
    else:
        advice = "Another try would fail too: look at the URL."
    return f"{url}: {what} failed ({text}). {advice}"
