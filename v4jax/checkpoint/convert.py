"""Checkpoints in other storage formats and under other names, file by file, without a model.

| format     | routed experts | other matrices that the releases quantise | scales |
|------------|----------------|-------------------------------------------|--------|
| `released` | FP4            | FP8                                       | E8M0   |
| `fp8`      | FP8            | FP8                                       | E8M0   |
| `base`     | FP8            | FP8                                       | F32    |
| `bf16`     | BF16           | BF16                                      |        |
| `fp4-bf16` | FP4            | BF16                                      | E8M0   |
| `fp8-bf16` | FP8            | BF16                                      | E8M0   |
| `stored`   | as they are    | as they are                               |        |

Other floats become what the releases have, BF16 or F32; hash tables stay. An adapter is added to its
matrices in float32, before they are rounded to the format. Tensors are read from the mapped file, converted
and written one at a time. A finished file is recorded with its digest in
`report.json`, behind which an interrupted conversion goes on.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from v4jax import stores
from v4jax.checkpoint import names
from v4jax.checkpoint.adapters import Adapter, may_have_adapter
from v4jax.checkpoint.codecs import Matrix
from v4jax.checkpoint.folders import INDEX_NAME, Checkpoint, Tensor
from v4jax.checkpoint.hf_config import to_hf
from v4jax.checkpoint.leaves import Leaf
from v4jax.checkpoint.loading import matched_leaves
from v4jax.checkpoint.reading import refuse_damage
from v4jax.checkpoint.recode import Recoded, Storage, join, parts, recode
from v4jax.checkpoint.safetensors import CheckpointError, NewTensor, write_safetensors
from v4jax.checkpoint.saving import copy_other_files, write_text

REPORT_NAME = "report.json"
NAMINGS = ("released", "transformers")

_FP4, _FP8 = Storage("I8", "F8_E8M0"), Storage("F8_E4M3", "F8_E8M0")
_BASE, _BF16, _F32 = Storage("F8_E4M3", "F32"), Storage("BF16"), Storage("F32")
# Format -> storage of experts, and of what else the releases have in FP8. None: as it is.
FORMATS = {
    "released": (_FP4, _FP8),
    "fp8": (_FP8, _FP8),
    "base": (_BASE, _BASE),
    "bf16": (_BF16, _BF16),
    "fp4-bf16": (_FP4, _BF16),
    "fp8-bf16": (_FP8, _BF16),
    "stored": None,
}


@dataclasses.dataclass
class Row:
    """A line of the report: what happened to the tensors of one kind."""

    kind: str  # released name without the layer, `*` for the expert
    source: str
    target: str
    tensors: int = 0
    weights: int = 0
    max_error: float = 0.0  # largest |new - old|
    relative_error: float = 0.0  # that, over the largest |old| of its tensor
    saturated: int = 0  # values beyond the largest that their block can hold, clipped to it
    lossy: dict[str, str] = dataclasses.field(default_factory=dict)  # tensor -> what did not fit


def _merged(rows: Iterable[Row]) -> list[Row]:
    """One line for each kind and pair of formats."""
    table: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = row.kind, row.source, row.target
        total = table.setdefault(key, Row(*key))
        total.tensors += row.tensors
        total.weights += row.weights
        total.max_error = max(total.max_error, row.max_error)
        total.relative_error = max(total.relative_error, row.relative_error)
        total.saturated += row.saturated
        total.lossy |= row.lossy
    return list(table.values())


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A tensor of the source, its scale, and what becomes of them."""

    name: str
    kind: str
    tensor: Tensor
    scale: Tensor | None
    target: Storage
    is_adapted: bool

    @property
    def source(self) -> Storage:
        """How it is stored."""
        return Storage(self.tensor.tag, self.scale.tag if self.scale else None)

    @property
    def is_kept(self) -> bool:
        """Its bytes stay."""
        return self.source == self.target and not self.is_adapted

    @property
    def described(self) -> str:
        """What it is made of."""
        return f"{self.source} + adapter" if self.is_adapted else str(self.source)

    @property
    def shape(self) -> tuple[int, ...]:
        """One element per weight."""
        if self.tensor.tag == "I8":
            rows, cols = self.tensor.shape
            return rows, 2 * cols
        return self.tensor.shape


class Conversion:
    """A conversion, planned and checked; `run` does it.

    Args:
      source: a folder that `load` reads, or its URL.
      target: the folder to write: new, or that of an interrupted conversion of the same kind.
      to: a format of the table above.
      naming: "released", or "transformers" as `save_pretrained` of transformers 5 writes.
      allow_lossy: round, and report it, where a conversion that should be exact is not (FP4 to FP8
        with scales too far apart, F32 scales that are no powers of two ...), instead of stopping.
      adapter: folder of a LoRA that is added to its matrices.

    Attributes:
      num_bytes: of all tensors to write.

    Raises:
      CheckpointError: the source does not fit its config, or a file of it is broken; or the same of the
        adapter and the source.
      ValueError: an unknown option, matrices that the format cannot hold, or a target that has
        something else in it, or is a URL.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        target: str | os.PathLike,
        *,
        to: str = "stored",
        naming: str = "released",
        allow_lossy: bool = False,
        adapter: str | os.PathLike | None = None,
    ):
        if to not in FORMATS:
            raise ValueError(f"to={to!r}: expected one of {', '.join(FORMATS)}.")
        if naming not in NAMINGS:
            raise ValueError(f"naming={naming!r}: expected one of {', '.join(NAMINGS)}.")
        self.target, self.allow_lossy = os.fspath(stores.require_local(target)), allow_lossy
        self.checkpoint = Checkpoint(source)
        self._adapter = None if adapter is None else Adapter(adapter)
        stores.names(source)  # what else is in it is copied at the end
        self._rename = names.to_transformers if naming == "transformers" else str
        headers = hashlib.sha256(b"".join(file.header for file in self.checkpoint.files))
        self._what = {
            "source": os.fspath(source) if stores.is_url(source) else os.path.realpath(source),
            "source_headers": headers.hexdigest(),
            "to": to,
            "naming": naming,
            "adapter": None if self._adapter is None else self._adapter.digest.hex(),
        }
        self._files = self._plan(FORMATS[to])
        self._finished = self._recorded()
        self.num_bytes = sum(
            tensor.nbytes for name in self._files for tensor in self._tensors(name)
        )

    def _plan(
        self, storages: tuple[Storage, Storage] | None
    ) -> dict[str, list[tuple[_Planned, bool]]]:
        """File name -> (tensor, whether its scale is meant), in the order they are written.

        Tensors that stay keep their places. A scale that is new comes behind its weight.
        """
        tensors, planned, owners = self.checkpoint.tensors, {}, {}
        modules = frozenset[str]() if self._adapter is None else self._adapter.modules
        found = matched_leaves(self.checkpoint)
        if self._adapter is not None:
            able = [leaf.released_names().flat for leaf in found if may_have_adapter(leaf)]
            known = {name.removesuffix(".weight") for names_of in able for name in names_of}
            self._adapter.require_modules(known, self.checkpoint.path)
        for leaf in found:
            kind = leaf.slot.name.format(e="*").removesuffix(".weight")
            for name in leaf.released_names().flat:
                tensor, scale_name = tensors[name], names.scale_name(name)
                scale = tensors[scale_name] if tensor.tag in ("I8", "F8_E4M3") else None
                source = Storage(tensor.tag, scale.tag if scale else None)
                target = source if storages is None else _target(leaf, source, storages)
                is_adapted = name.removesuffix(".weight") in modules
                planned[name] = _Planned(name, kind, tensor, scale, target, is_adapted)
                owners[scale_name] = planned[name]
                if target == _FP4 and planned[name].shape[-1] % 32:
                    raise ValueError(
                        f"{name} has {planned[name].shape[-1]} inputs: fp4 needs a multiple of 32."
                    )
        files: dict[str, list[tuple[_Planned, bool]]] = {}
        for name, tensor in tensors.items():
            entries = files.setdefault(os.path.basename(tensor.file.path), [])
            if name in planned:
                entries.append((planned[name], False))
                if planned[name].target.scale_tag and not planned[name].is_kept:
                    entries.append((planned[name], True))
            elif owners[name].is_kept:
                entries.append((owners[name], True))
        return {name: entries for name, entries in files.items() if entries}

    def _recorded(self) -> dict[str, dict]:
        """What an interrupted conversion to this target had finished, by file."""
        if not os.path.isdir(self.target):
            return {}
        path = os.path.join(self.target, REPORT_NAME)
        if not os.path.isfile(path):
            present = sorted(os.listdir(self.target))
            if present:
                raise ValueError(
                    f"{self.target} is not empty (it has {present[0]}) and holds no conversion "
                    "that could be continued: give a new folder."
                )
            return {}
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        for key, value in self._what.items():
            if record.get(key) != value:
                raise ValueError(
                    f"{self.target} holds a conversion with {key}={record.get(key)!r}, not {value!r}: "
                    "continue with that, or give a new folder."
                )
        return record["files"]

    def run(self, progress: Callable[[int], object] = lambda num_bytes: None) -> dict:
        """Converts what is not finished yet, and returns the report, which is in the target too.

        Args:
          progress: called with the number of bytes whenever a tensor is done.

        Raises:
          CheckpointError: a tensor is damaged, or would be rounded and `allow_lossy` is not set.
            What is finished stays, and a new conversion to this target goes on behind it.
        """
        os.makedirs(self.target, exist_ok=True)
        sources = {os.path.basename(file.path): file for file in self.checkpoint.files}
        finished = dict(self._finished)
        self._write_report(finished)  # says from now on whose folder this is
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for name in self._files:
                path = os.path.join(self.target, name)
                if self._is_finished(name, path):
                    progress(sum(tensor.nbytes for tensor in self._tensors(name)))
                    continue
                _remove_leftovers(self.target, name)
                rows: list[Row] = []
                tensors = self._tensors(name, rows, pool, progress)
                write_safetensors(path, tensors, sources[name].metadata)
                sources[name].drop_pages()
                finished[name] = {
                    "bytes": os.path.getsize(path),
                    "sha256": _sha256(path),
                    "kinds": [dataclasses.asdict(row) for row in _merged(rows)],
                }
                self._write_report(finished)
        self._write_rest()
        return self._write_report(finished)

    def _is_finished(self, name: str, path: str) -> bool:
        record = self._finished.get(name)
        return (
            record is not None
            and os.path.isfile(path)
            and os.path.getsize(path) == record["bytes"]
            and _sha256(path) == record["sha256"]
        )

    def _write_report(self, files: dict[str, dict]) -> dict:
        files = {name: files[name] for name in self._files if name in files}
        rows = _merged(Row(**row) for file in files.values() for row in file["kinds"])
        kinds = [dataclasses.asdict(row) for row in rows]
        report = {**self._what, "notes": self.checkpoint.notes, "kinds": kinds, "files": files}
        write_text(os.path.join(self.target, REPORT_NAME), json.dumps(report, indent=1))
        return report

    def _write_rest(self) -> None:
        """Index, other files, and the config, last: with it the folder is a checkpoint."""
        weight_map = {t.name: name for name in self._files for t in self._tensors(name)}
        if stores.is_file(stores.join(self.checkpoint.path, INDEX_NAME)):
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            write_text(os.path.join(self.target, INDEX_NAME), json.dumps(index, indent=2))
        copy_other_files(self.checkpoint, self.target, besides=(REPORT_NAME,))
        planned = {entry.name: entry for entries in self._files.values() for entry, _ in entries}
        experts = planned["layers.0.ffn.experts.0.w1.weight"].target.tag
        fmt = {"I8": "fp4", "F8_E4M3": "fp8"}.get(experts)
        config = to_hf(dataclasses.replace(self.checkpoint.config, expert_format=fmt))
        floats = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
        config["torch_dtype"] = floats[planned["embed.weight"].target.tag]
        write_text(os.path.join(self.target, "config.json"), json.dumps(config, indent=2))

    def _tensors(
        self,
        name: str,
        rows: list[Row] | None = None,
        pool: concurrent.futures.Executor | None = None,
        progress: Callable[[int], object] = lambda num_bytes: None,
    ) -> Iterator[NewTensor]:
        """The tensors of a file of the target. Reading them appends to `rows`."""
        scales: dict[str, np.ndarray] = {}  # of the weight converted last
        rows = [] if rows is None else rows

        def read(entry: _Planned, is_scale: bool) -> np.ndarray:
            if is_scale and not entry.is_kept:
                data = scales.pop(entry.name)
            elif is_scale and entry.scale is not None:
                data = self._view(names.scale_name(entry.name), entry.scale)
            else:
                data, scale, row = self._convert(entry, pool)
                rows.append(row)
                if not entry.is_kept and scale is not None:
                    scales[entry.name] = scale
            progress(data.nbytes)
            return data.view(np.int8) if data.dtype == np.uint8 else data

        for entry, is_scale in self._files[name]:
            new, tag = entry.name, entry.target.tag
            shape = entry.target.data_shape(entry.shape)
            if is_scale and entry.target.scale_tag is not None:
                new, tag = names.scale_name(entry.name), entry.target.scale_tag
                shape = entry.target.scale_shape(entry.shape)
            yield NewTensor(self._rename(new), tag, shape, functools.partial(read, entry, is_scale))

    def _view(self, name: str, tensor: Tensor) -> np.ndarray:
        data = tensor.view()
        refuse_damage(self.checkpoint.config, name, data)
        return data

    def _convert(
        self, entry: _Planned, pool: concurrent.futures.Executor | None
    ) -> tuple[np.ndarray, np.ndarray | None, Row]:
        """Data and scale of a tensor in its target format, by the threads of a pool."""
        data, scale = self._view(entry.name, entry.tensor), None
        if entry.scale is not None:
            scale = self._view(names.scale_name(entry.name), entry.scale)
        row = Row(entry.kind, entry.described, str(entry.target), 1, int(np.prod(entry.shape)))
        if entry.is_kept:
            return data, scale, row
        source, matrix = entry.source, Matrix(data, scale)
        if entry.is_adapted:
            assert self._adapter is not None
            product = self._adapter.product(entry.name.removesuffix(".weight"), entry.shape)
            source, matrix = _F32, Matrix(matrix.decode() + product)
        convert = functools.partial(_recode_part, entry, source)
        pieces = parts(matrix)
        result = join(list(map(convert, pieces) if pool is None else pool.map(convert, pieces)))
        row.max_error, row.saturated = result.max_error, result.saturated
        row.relative_error = result.max_error / result.largest if result.max_error else 0.0
        if result.rounded:
            what = f"{result.rounded} values in {result.rounded_tiles} blocks of 128 x 128"
            row.lossy[entry.name] = what
            if not self.allow_lossy:
                raise CheckpointError(
                    f"{entry.name}: {what} change from {entry.source} to {entry.target}, which was "
                    "to lose nothing. Allow it (--allow-lossy), or choose a wider format."
                )
        return result.matrix.data, result.matrix.scale, row


def _recode_part(entry: _Planned, source: Storage, part: Matrix) -> Recoded:
    try:
        return recode(part, source, entry.target)
    except OverflowError as error:
        raise CheckpointError(f"{entry.name}: {error}") from error


def _target(leaf: Leaf, source: Storage, storages: tuple[Storage, Storage]) -> Storage:
    experts, linears = storages
    if leaf.slot.per_expert:
        return experts
    return {"fp8": linears, "bf16": _BF16, "f32": _F32, "int": source}[leaf.stored]


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_leftovers(folder: str, name: str) -> None:
    """Removes what a killed process had begun to write of a file."""
    for found in os.listdir(folder):
        if re.fullmatch(re.escape(name) + r"\.\d+\.new", found):
            os.unlink(os.path.join(folder, found))
