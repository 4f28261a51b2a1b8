"""Checkpoint folders, here or in an object store: what is in them.

A folder holds `config.json` and safetensors files, with an index if there are several. Released and
transformers names are understood.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
import re

import numpy as np

from v4jax import stores
from v4jax.checkpoint import names
from v4jax.checkpoint.errors import CheckpointError, read_json
from v4jax.checkpoint.hf_config import from_hf
from v4jax.checkpoint.safetensors import DTYPES, SafetensorsFile

LOCAL_READERS, REMOTE_READERS = 8, 32  # threads; those of a store mostly wait
MAX_EXPERTS, MAX_NAMES = 1 << 16, 1 << 17
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A stored tensor, or a part of one, under its released name."""

    file: SafetensorsFile
    stored_name: str
    shape: tuple[int, ...]
    first: int = 0  # element of the stored tensor, if that one stacks several

    @property
    def tag(self) -> str:
        """The safetensors dtype."""
        return self.file.tensors[self.stored_name].tag

    @property
    def dtype(self) -> np.dtype:
        """Of its data; that of packed FP4 is uint8."""
        return np.dtype(np.uint8) if self.tag == "I8" else DTYPES[self.tag]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self) -> np.ndarray:
        """The data: mapped, or read from a store."""
        return self._elements(0, math.prod(self.shape)).reshape(self.shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some rows of a tensor that has any: mapped, or read from a store."""
        width = math.prod(self.shape[1:])
        flat = self._elements(start * width, (stop - start) * width)
        return flat.reshape(stop - start, *self.shape[1:])

    def _elements(self, start: int, count: int) -> np.ndarray:
        return self.file.view(self.stored_name, self.first + start, count).view(self.dtype)


class Checkpoint:
    """An opened folder.

    Attributes:
      path: the folder, or its URL.
      config: its architecture, without MTP blocks if the folder has none that can be loaded.
      tensors: released name -> `Tensor`.
      notes: what is in the folder and will not be loaded, in words.

    Raises:
      CheckpointError: a file is broken or missing.
      ConfigError: the config describes another architecture.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        if not stores.is_file(stores.join(self.path, "config.json")):
            raise CheckpointError(f"{self.path} has no config.json: expected a checkpoint folder.")
        self.config = from_hf(self.path)
        self.files = _open_files(self.path)
        self.notes: list[str] = []
        self.tensors: dict[str, Tensor] = {}
        for file in self.files:
            for stored_name in file.tensors:
                self._add(file, stored_name)
        self._settle_mtp()
        self._settle_expert_format()
        blocks = len(self.config.layers) + len(self.config.mtp_layers)
        if blocks * self.config.moe.num_experts > MAX_NAMES:
            raise CheckpointError(
                f"{self.path}: the config has {blocks} layers with {self.config.moe.num_experts} "
                f"experts, the files have {len(self.tensors)} tensors: they do not belong together."
            )

    def _add(self, file: SafetensorsFile, stored_name: str) -> None:
        name = names.from_transformers(stored_name)
        if isinstance(name, names.StackedExperts):
            shape, parts = file.tensors[stored_name].shape, name.parts
            if len(shape) != 3 or shape[1] % len(parts) or shape[0] > MAX_EXPERTS:
                raise CheckpointError(
                    f"{file.path}: {stored_name} is {list(shape)}: expected [experts, "
                    f"{len(parts)} * rows, columns], and at most {MAX_EXPERTS} experts."
                )
            rows = shape[1] // len(parts)
            new = {
                name.released_name(expert, part): Tensor(
                    file, stored_name, (rows, shape[2]), (expert * shape[1] + i * rows) * shape[2]
                )
                for expert in range(shape[0])
                for i, part in enumerate(parts)
            }
        else:
            released_name = re.sub(r"\.(weight_)?scale_inv$", ".scale", name)
            new = {released_name: Tensor(file, stored_name, file.tensors[stored_name].shape)}
        for released_name, tensor in new.items():
            if released_name in self.tensors:
                raise CheckpointError(
                    f"{file.path}: {stored_name} has {released_name}, which occurs twice in "
                    f"{self.path}."
                )
            self.tensors[released_name] = tensor

    def _settle_mtp(self) -> None:
        """Drops what of `mtp.*` is not an MTP block of the preview releases."""
        mtp = [name for name in self.tensors if name.startswith("mtp.")]
        if any(names.DRAFTER.match(name) for name in mtp):
            self.notes.append(
                f"{len(mtp)} tensors under mtp.* belong to a DSpark draft model (0731 / 0813 "
                "releases), which v4jax does not have: the main model is complete without them."
            )
            for name in mtp:
                del self.tensors[name]
            mtp = []
        for name in [name for name in mtp if names.DUPLICATES.fullmatch(name)]:
            self.notes.append(f"{name} repeats a tensor of the main model.")
            del self.tensors[name]
        if not mtp and self.config.mtp_layers:
            if not self.notes:
                self.notes.append("the config has an MTP block, the files have none.")
            self.config = dataclasses.replace(self.config, mtp_layers=())

    def _settle_expert_format(self) -> None:
        """Trusts the files: early configs and converted ones do not say, or say otherwise."""
        tensor = self.tensors.get("layers.0.ffn.experts.0.w1.weight")
        if tensor is not None:
            fmt = {"I8": "fp4", "F8_E4M3": "fp8"}.get(tensor.tag)
            self.config = dataclasses.replace(self.config, expert_format=fmt)


@functools.cache
def readers(is_remote: bool) -> concurrent.futures.ThreadPoolExecutor:
    """Threads that read parts of files; what they call lets go of Python's lock."""
    count = REMOTE_READERS if is_remote else min(LOCAL_READERS, os.cpu_count() or 1)
    return concurrent.futures.ThreadPoolExecutor(count)


def weight_files(folder: str | os.PathLike) -> list[str]:
    """Paths of all safetensors files of a folder, sorted."""
    found = [name for name in stores.names(folder) if name.endswith(".safetensors")]
    return [stores.join(folder, name) for name in found]


def _open_files(path: str) -> list[SafetensorsFile]:
    index = stores.join(path, INDEX_NAME)
    if not (stores.is_file(index) if stores.is_url(path) else os.path.lexists(index)):
        # Hidden ones are a system's own, such as the ._ files of macOS.
        found = [file for file in weight_files(path) if not os.path.basename(file).startswith(".")]
        if not found:
            raise CheckpointError(f"{path} has no .safetensors file.")
        return list(readers(stores.is_url(path)).map(SafetensorsFile, found))
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map that is an object of file names.")
    for tensor, name in weight_map.items():
        if not _is_file_name(name) or (stores.is_url(path) and re.search("[%?#]", name)):
            raise CheckpointError(
                f"{index} has {tensor!r} in {str(name)[:200]!r}: expected the name of a file in "
                "this folder, without a path."
            )

    def opened(name: str) -> SafetensorsFile | str:
        try:
            return SafetensorsFile(stores.join(path, name))
        except FileNotFoundError:
            return f"{name} is listed in {INDEX_NAME} but missing"
        except CheckpointError as error:
            return str(error)

    listed = sorted(set(weight_map.values()))
    tried = dict(zip(listed, readers(stores.is_url(path)).map(opened, listed)))
    problems = [problem for problem in tried.values() if isinstance(problem, str)]
    files = {name: file for name, file in tried.items() if not isinstance(file, str)}
    for tensor, name in weight_map.items():
        if name in files and tensor not in files[name].tensors:
            problems.append(f"{tensor} is not in {name}, where {INDEX_NAME} says it is")
    if problems:
        raise CheckpointError(f"{path}:\n  " + "\n  ".join(problems))
    return list(files.values())


def _is_file_name(name: object) -> bool:
    """Whether it names a file of its own folder: nothing outside is opened (a link is the owner's)."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and name == os.path.basename(name)
        and "\\" not in name
        and name.isprintable()  # no null bytes, no halves of surrogate pairs
    )
