"""The files of a job, which survive being killed at any moment.

    results.jsonl                        one line per result
    results.jsonl.errors                 one line per request that cannot have one
    results.jsonl.part-00001-of-00004    what process 1 of 4 has written, until all is merged
    results.jsonl.errors.part-...        the same for errors
    results.jsonl.job                    what the results belong to; carries the locks

Every record has the number of its input line. A process appends whole lines to files that are its
own and waits until they are on the disk. What counts as done is what can be read back: any file of
the job may hold it, and a line without its end was being written when the process died.
"""

import array
import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterable, Iterator

import numpy as np

from v4jax import stores

_SPAN = 1 << 20  # bytes of the sidecar that processes share out as locks
_HEADER = _SPAN  # the byte behind them: locked while the text is read or written
_PATIENCE = 5.0  # seconds that a lock is tried: a look at all files may be in progress


class JobError(Exception):
    """A job that cannot run as asked; nothing that was written before is lost."""


def errors_path(output: pathlib.Path) -> pathlib.Path:
    """Where the errors of a job go."""
    return output.with_name(output.name + ".errors")


def part_path(path: pathlib.Path, process: int, count: int) -> pathlib.Path:
    """The file that a process writes: a single one needs no parts."""
    if count == 1:
        return path
    return path.with_name(f"{path.name}.part-{process:05d}-of-{count:05d}")


def _parts(path: pathlib.Path) -> list[pathlib.Path]:
    pattern = glob.escape(str(path)) + ".part-[0-9]*-of-[0-9]*"
    return [pathlib.Path(name) for name in sorted(glob.glob(pattern))]


class Journal:
    """A file of records that one process appends to. Made with its first record."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        if path.exists():
            _cut_torn_line(path)

    def append(self, records: list[dict[str, object]]) -> None:
        """Writes records and returns when they are on the disk."""
        if records:
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            with open(self.path, "ab") as file:
                # Half of a surrogate pair has no UTF-8, but an escape in JSON: this writes it.
                file.write("".join(lines).encode("utf-8", "backslashreplace"))
                _sync(file)


def _cut_torn_line(path: pathlib.Path) -> None:
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)
        _sync(file)


def read_lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """(number of the input line, text) of every whole record of a file, if it exists.

    Raises:
      JobError: a line that is not a record.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        for row, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                return
            try:
                line = json.loads(text)["line"]
            except (ValueError, KeyError, TypeError, RecursionError):
                line = None
            if type(line) is not int or not 1 <= line < 2**63:
                raise JobError(
                    f"{path}, line {row} is no record of a batch job: {text[:80]!r}. Remove the "
                    "line, and its request is done again."
                )
            yield line, text


def done_lines(output: pathlib.Path) -> Iterator[int]:
    """Input lines that any file of the job has a result or an error for; some twice."""
    for path in (output, errors_path(output)):
        for source in (path, *_parts(path)):
            for line, _ in read_lines(source):
                yield line


def _merge(path: pathlib.Path) -> int:
    """Joins `path` and its parts in the order of the input; returns the number of records."""
    parts = _parts(path)
    sources = [source for source in (path, *parts) if source.exists()]
    lines, files, offsets, sizes = (array.array("q") for _ in range(4))
    for index, source in enumerate(sources):
        offset = 0
        for line, text in read_lines(source):
            lines.append(line)
            files.append(index)
            offsets.append(offset)
            sizes.append(len(text))
            offset += len(text)
    # Of two records of one line, which are equal, the first is taken.
    _, order = np.unique(np.array(lines), return_index=True)
    is_merged = not parts and np.array_equal(order, np.arange(len(lines)))
    if not is_merged or (sources and sum(sizes) != path.stat().st_size):
        temporary = path.with_name(path.name + ".tmp")
        with contextlib.ExitStack() as stack:
            inputs = [stack.enter_context(open(source, "rb")) for source in sources]
            merged = stack.enter_context(open(temporary, "wb"))
            for row in order:
                inputs[files[row]].seek(offsets[row])
                merged.write(inputs[files[row]].read(sizes[row]))
            _sync(merged)
        os.replace(temporary, path)
        _sync_folder(path.parent)
        for part in parts:
            part.unlink()
    return len(order)


class Sidecar:
    """`results.jsonl.job`: which job the results belong to, and who is at work on them.

    Process i of n locks the i-th of n equal ranges of the file, so two processes with the same
    share exclude each other, and so do jobs with different numbers of processes. Who can lock the
    whole range is alone. The system lets go of the locks of a process that dies.

    Locks need one file system that all hosts see and that has POSIX locks (a local disk, NFS 4,
    Lustre, GPFS). They are lost when a process closes any handle of the file: open one per process.
    """

    def __init__(self, output: pathlib.Path):
        self.output = output
        self.path = output.with_name(output.name + ".job")
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)

    def close(self) -> None:
        """Lets go of all locks."""
        os.close(self._file)

    def lock_share(self, process: int, count: int) -> None:
        """Keeps other processes away from a share.

        Raises:
          JobError: one is at work on it.
        """
        start, end = _share(process, count)
        deadline = time.monotonic() + _PATIENCE
        while not self._lock(start, end - start):
            if time.monotonic() > deadline:
                raise JobError(
                    f"another process is at work on {self.output}: wait for it, or stop it."
                )
            time.sleep(0.1)

    def lock_all(self) -> bool:
        """Whether no other process is at work; from now on none can be, until `unlock`."""
        return self._lock(0, _SPAN)

    def unlock(self) -> None:
        """Lets go of the share, or of everything."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, _SPAN, 0)

    def _lock(self, start: int, size: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, size, start)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def header(self) -> dict[str, object] | None:
        """What is written in it; None before `claim`.

        Raises:
          JobError: it is not what a job writes.
        """
        text = os.pread(self._file, _SPAN, 0)
        if not text.endswith(b"\n"):  # it may have been cut short
            return None
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict):
            raise JobError(
                f"{self.path} is damaged: {text[:80]!r}. Move the results away, or choose another "
                "output."
            )
        return header

    def claim(self, header: dict[str, object], process: int = 0, count: int = 1) -> None:
        """Writes what the results belong to, or compares it with what is written.

        A job that ended before it wrote anything, say because its options were wrong, gives way to
        the next one; the caller holds the lock of its share.

        Raises:
          JobError: they belong to something else, or to nobody knows what.
        """
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, _HEADER)
        try:
            header, found = json.loads(json.dumps(header)), self.header()
            if found is None:
                if existing := [path for path in self._files() if path.exists()]:
                    raise JobError(
                        f"{existing[0]} exists, but {self.path} does not say of which job: move it "
                        "away, or choose another output."
                    )
                self._write(header)
            elif found != header:
                if self._is_free(process, count):
                    self._write(header)
                    return
                names = [key for key in header | found if header.get(key) != found.get(key)]
                was = "; ".join(f"{n} was {found.get(n)}, is {header.get(n)}" for n in names)
                raise JobError(
                    f"{self.output} belongs to another job ({was}): go on with the same input, "
                    "checkpoint and options, or choose another output."
                )
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _HEADER)

    def _files(self) -> list[pathlib.Path]:
        paths = (self.output, errors_path(self.output))
        return [file for path in paths for file in (path, *_parts(path))]

    def _is_free(self, process: int, count: int) -> bool:
        """Whether nothing is written, and nobody else is about to write."""
        if any(True for _ in done_lines(self.output)) or not self.lock_all():
            return False
        start, end = _share(process, count)  # keeps that, and lets go of the rest
        if start:
            fcntl.lockf(self._file, fcntl.LOCK_UN, start, 0)
        if end < _SPAN:
            fcntl.lockf(self._file, fcntl.LOCK_UN, _SPAN - end, end)
        return True

    def _write(self, header: dict[str, object]) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, (json.dumps(header) + "\n").encode(), 0)
        os.fsync(self._file)
        _sync_folder(self.path.parent)


def _share(process: int, count: int) -> tuple[int, int]:
    """The bytes of the sidecar that a process locks."""
    return process * _SPAN // count, (process + 1) * _SPAN // count


def merge_all(output: pathlib.Path) -> tuple[int, int]:
    """Joins all parts; the caller holds the lock. Returns the numbers of results and errors."""
    return _merge(output), _merge(errors_path(output))


def merge_files(output: str | os.PathLike) -> tuple[int, int, int]:
    """Joins what the processes of a job have written, in the order of the input.

    Returns:
      numbers of results, of errors, and of requests that have neither yet.

    Raises:
      JobError: there is no such job, or a process is at work on it.
    """
    output = pathlib.Path(output)
    if not output.with_name(output.name + ".job").exists():
        raise JobError(f"{output}.job does not exist: there is nothing to merge.")
    with contextlib.closing(Sidecar(output)) as sidecar:
        if not sidecar.lock_all():
            raise JobError(f"a process is at work on {output}: it merges when it has finished.")
        header = sidecar.header()
        if header is None:
            raise JobError(f"{sidecar.path} is empty: the job was stopped before its first result.")
        requests = header.get("requests")
        if not isinstance(requests, int):
            raise JobError(
                f"{sidecar.path} does not say how many requests there are: it is damaged."
            )
        results, errors = merge_all(output)
        return results, errors, requests - results - errors


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(paths: Iterable[str | os.PathLike]) -> str:
    """A digest of files by name, size, and 64 KiB of each at its start, middle and end.

    It tells models apart without reading hundreds of gigabytes. Files may be those of a store.
    """
    sha, piece = hashlib.sha256(), 1 << 16
    for path in paths:
        file = stores.open_file(path)
        sha.update(f"{os.path.basename(path)} {file.size}\n".encode())
        for begin in (0, max(0, file.size // 2 - piece // 2), max(0, file.size - piece)):
            sha.update(file.read(begin, min(begin + piece, file.size)))
    return sha.hexdigest()
