"""Checkpoint folders: what is in them, and models loaded from them.

A folder holds `config.json` and safetensors files, with an index if there are several. Released
and transformers names are understood. Every tensor is checked against the model before the first
one is read, and then goes straight from the mapped file to its place on the devices.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import operator
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterator

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from pallas_kernels.formats.quantize import (
    FP4_WEIGHT_BLOCK,
    FP8_WEIGHT_BLOCK,
    QuantizedArray,
    expand_to_fp8,
    fp4_block,
    pack_planes,
)
from sharding import PREFILL, TRAIN, fitting
from v4jax import nano_path
from v4jax.checkpoint import names
from v4jax.checkpoint.errors import CheckpointError, read_json
from v4jax.checkpoint.hf_config import from_hf
from v4jax.checkpoint.safetensors import SafetensorsFile
from v4jax.config import V4Config
from v4jax.nn.model import Transformer
from v4jax.nn.numerics import Numerics, plain

READERS = 8  # threads
PIECE = 2048  # rows of a matrix that one of them copies
STRIP = 64  # rows of a matrix that are turned together
MAX_EXPERTS, MAX_NAMES = 1 << 16, 1 << 17
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_logger = logging.getLogger("v4jax")

_FLOATS = ("BF16", "F32", "F16")
_SCALES = ("F8_E8M0", "F32")
# How a parameter may be stored, by how the released checkpoints store it.
_ACCEPTED_TAGS = {
    "fp4": ("I8", "F8_E4M3", *_FLOATS),
    "fp8": ("F8_E4M3", *_FLOATS),
    "bf16": _FLOATS,
    "f32": _FLOATS,
    "int": ("I64", "I32"),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A stored tensor, or a part of one, under its released name."""

    file: SafetensorsFile
    stored_name: str
    part: tuple[slice | int, ...] = ()  # of a tensor that stacks several

    @property
    def tag(self) -> str:
        """The safetensors dtype."""
        return self.file.tensors[self.stored_name].tag

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored."""
        return self.view().shape

    def view(self) -> np.ndarray:
        """The data, mapped; packed FP4 as uint8."""
        view = self.file.view(self.stored_name)[self.part]
        return view.view(np.uint8) if self.tag == "I8" else view


class Checkpoint:
    """An opened folder.

    Attributes:
      path: the folder.
      config: its architecture, without MTP blocks if the folder has none that can be loaded.
      tensors: released name -> `Tensor`.
      notes: what is in the folder and will not be loaded, in words.

    Raises:
      CheckpointError: a file is broken or missing.
      ConfigError: the config describes another architecture.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        if not os.path.isfile(os.path.join(self.path, "config.json")):
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
                name.released_name(expert, part): (expert, slice(i * rows, (i + 1) * rows))
                for expert in range(shape[0])
                for i, part in enumerate(parts)
            }
        else:
            new = {re.sub(r"\.(weight_)?scale_inv$", ".scale", name): ()}
        for released_name, part in new.items():
            if released_name in self.tensors:
                raise CheckpointError(
                    f"{file.path}: {stored_name} has {released_name}, which occurs twice in "
                    f"{self.path}."
                )
            self.tensors[released_name] = Tensor(file, stored_name, part)

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


def _open_files(path: str) -> list[SafetensorsFile]:
    index = os.path.join(path, INDEX_NAME)
    if not os.path.lexists(index):
        # Hidden ones are a system's own, such as the ._ files of macOS.
        found = sorted(
            n for n in os.listdir(path) if n.endswith(".safetensors") and not n.startswith(".")
        )
        if not found:
            raise CheckpointError(f"{path} has no .safetensors file.")
        return [SafetensorsFile(os.path.join(path, name)) for name in found]
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map that is an object of file names.")
    for tensor, name in weight_map.items():
        if not _is_file_name(name):
            raise CheckpointError(
                f"{index} has {tensor!r} in {str(name)[:200]!r}: expected the name of a file in "
                "this folder, without a path."
            )
    problems, files = [], {}
    for name in sorted(set(weight_map.values())):
        try:
            files[name] = SafetensorsFile(os.path.join(path, name))
        except FileNotFoundError:
            problems.append(f"{name} is listed in {INDEX_NAME} but missing")
        except CheckpointError as error:
            problems.append(str(error))
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


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter of the model and the released tensors it is made of."""

    variable: nnx.Variable
    slot: names.Slot
    prefixes: tuple[str, ...]  # of the layers stacked in it; ("",) for the model's own
    is_stacked: bool
    module: nnx.Module  # that has it

    def released_names(self) -> np.ndarray:
        """Names by layer and expert, as an object array of the parameter's leading axes."""
        shape = self.variable.get_value().shape
        batch = shape[: self.is_stacked + self.slot.per_expert]
        table = np.empty(batch, dtype=object)
        for index in np.ndindex(*batch):
            prefix = self.prefixes[index[0] if self.is_stacked else 0]
            expert = index[-1] if self.slot.per_expert else None
            table[index] = prefix + self.slot.name.format(e=expert)
        return table

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one tensor in the orientation of the parameter."""
        return self.variable.get_value().shape[self.is_stacked + self.slot.per_expert :]

    @property
    def stored(self) -> str:
        """How the released checkpoints store it."""
        return self.variable.stored


def leaves(model: Transformer) -> Iterator[Leaf]:
    """Every parameter of the model, with the tensors that belong to it, in file order.

    Adapters are left out (`v4jax.checkpoint.adapters` has their files).
    """

    def of(module: nnx.Module, slots, prefixes, is_stacked=False) -> Iterator[Leaf]:
        variables = {
            ".".join(map(str, path)): variable
            for path, variable in nnx.to_flat_state(nnx.state(module))
        }
        for slot in slots:
            if slot.path in variables:
                owner = operator.attrgetter(slot.path.rpartition(".")[0])(module)
                yield Leaf(variables.pop(slot.path), slot, prefixes, is_stacked, owner)
        unnamed = [
            path
            for path in variables
            if not path.startswith(("stages.", "mtp.")) and ".adapter." not in path
        ]
        if unnamed:
            raise AssertionError(f"parameters without a released name: {unnamed}")

    first = 0
    for stage in model.stages:
        period = len(stage.blocks)
        for offset, block in enumerate(stage.blocks):
            layers = range(first + offset, first + period * stage.repeats, period)
            prefixes = tuple(f"layers.{layer}." for layer in layers)
            yield from of(block, names.BLOCK, prefixes, stage.repeats > 1)
        first += period * stage.repeats
    for depth, block in enumerate(model.mtp):
        yield from of(block, names.MTP, (f"mtp.{depth}.",))
    yield from of(model, names.TOP, ("",))


# How weights lie for what the model is to do. Prefill and decoding read them alike.
USES = {"serve": PREFILL, "train": TRAIN}


def folder_of(source: str | os.PathLike) -> pathlib.Path:
    """Of a checkpoint; "nano" is the model in the package, unless there is a folder of that name."""
    path = pathlib.Path(source)
    return nano_path() if os.fspath(source) == "nano" and not path.exists() else path


def load(
    source: str | os.PathLike | Checkpoint,
    numerics: Numerics = plain(),
    *,
    config: V4Config | None = None,
    mesh: jax.sharding.Mesh | None = None,
    use: str = "serve",
    scan_layers: bool | None = None,
    expert_format: str | None = None,
    progress: bool = False,
) -> Transformer:
    """Loads a model; weights keep the format they are stored in (FP4, FP8, bfloat16 ...).

    On a mesh each process reads only the parts that its devices hold. The model carries where its
    weights lie: what runs it asks the model.

    Args:
      source: a folder, "nano" (the model in the package), or an opened checkpoint.
      config: another architecture for the same weights, as
        `v4jax.from_hf(folder).with_indexer(topk=64)`; tensors that it does not need are left out.
      mesh: of `v4jax.make_mesh`; default the ambient one (`with jax.set_mesh(mesh):`), if any.
      use: "serve" lays weights as prefill and decoding read them, "train" as training does.
      scan_layers: stack repeating layers, see `Transformer`; default: for training.
      progress: show a bar with bytes and their rate on stderr.
      expert_format: "fp8" holds FP4 experts as FP8 with the same values, in twice the memory; they
        are read and expanded one parameter at a time. None: as stored.

    Raises:
      CheckpointError: lists every tensor that is missing, unknown, or has a wrong shape or dtype.
        Nothing has been loaded then. Or names experts that FP8 cannot hold, or that are damaged.
      ValueError: an `expert_format` that the stored experts cannot take without loss.
    """
    if use not in USES:
        raise ValueError(f"use={use!r}: expected one of {', '.join(map(repr, USES))}.")
    if mesh is not None:
        with jax.set_mesh(mesh):
            return load(
                source,
                numerics,
                config=config,
                use=use,
                scan_layers=scan_layers,
                expert_format=expert_format,
                progress=progress,
            )
    scan_layers = use == "train" if scan_layers is None else scan_layers
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(folder_of(source))
    for note in checkpoint.notes:
        _logger.warning("%s: %s", checkpoint.path, note)
    stored = checkpoint.config.expert_format
    whole = checkpoint.config
    config = whole if config is None else dataclasses.replace(config, expert_format=stored)
    if expert_format is not None:
        if expert_format != stored and (stored, expert_format) != ("fp4", "fp8"):
            raise ValueError(
                f"expert_format={expert_format!r}: {checkpoint.path} has experts in "
                f"{stored or 'a float format'}; expected None, or 'fp8' for experts in fp4 or fp8 "
                "(v4jax.cli.convert converts between all)."
            )
        config = dataclasses.replace(config, expert_format=expert_format)
    model = nnx.eval_shape(
        lambda: Transformer(config, numerics, USES[use], scan_layers=scan_layers, rngs=nnx.Rngs(0))
    )
    known: set[str] = set()
    if config.layers != whole.layers or config.mtp_layers != whole.mtp_layers:
        known = {name for leaf in _expected(whole) for name in leaf.released_names().flat}
    plan = _check(checkpoint, list(leaves(model)), known)
    sizes = [_stored_bytes(checkpoint, leaf) for leaf, _ in plan]
    with tqdm(
        total=sum(sizes), unit="B", unit_scale=True, desc="loading", disable=not progress
    ) as bar:
        for (leaf, read), size in zip(plan, sizes):
            leaf.variable.set_value(read())
            bar.update(size)
    return model


def _stored_bytes(checkpoint: Checkpoint, leaf: Leaf) -> int:
    """Of a parameter's tensors in the files, scales left out."""
    return sum(checkpoint.tensors[name].view().nbytes for name in leaf.released_names().flat)


def matched_leaves(checkpoint: Checkpoint) -> list[Leaf]:
    """The parameters of the checkpoint's model, without values, layer by layer.

    Raises:
      CheckpointError: as `load` does, the tensors do not fit them.
    """
    return [leaf for leaf, _ in _check(checkpoint, _expected(checkpoint.config))]


def _expected(config: V4Config) -> list[Leaf]:
    """The parameters of an architecture, without values, layer by layer."""
    return list(
        leaves(nnx.eval_shape(lambda: Transformer(config, scan_layers=False, rngs=nnx.Rngs(0))))
    )


def _check(
    checkpoint: Checkpoint, all_leaves: list[Leaf], left_out: Collection[str] = ()
) -> list[tuple[Leaf, Callable[[], jax.Array | QuantizedArray]]]:
    """What to read; `left_out` names tensors that may be there and are not read."""
    problems, plan, expected = [], [], {*left_out, *map(names.scale_name, left_out)}
    for leaf in all_leaves:
        table = leaf.released_names()
        found: dict[str, str] = {}  # name -> tag
        for name in table.flat:
            expected.add(name)
            if name not in checkpoint.tensors:
                problems.append(f"missing: {name}")
                continue
            tensor = checkpoint.tensors[name]
            problems += _tensor_problems(checkpoint, leaf, name, tensor)
            found[name] = tensor.tag
            if tensor.tag in ("I8", "F8_E4M3"):
                expected.add(names.scale_name(name))
        tags = sorted(set(found.values()))
        if len(tags) > 1 and not set(tags) <= {*_FLOATS, "I32", "I64"}:
            problems.append(
                f"{table.flat[0]} and its likes are stored as {tags}: expected one format for all "
                "(layers of one kind can differ with scan_layers=False)"
            )
        plan.append((leaf, functools.partial(_read, checkpoint, leaf, table, tags)))
    problems += [f"unknown: {name}" for name in sorted(set(checkpoint.tensors) - expected)]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path} does not fit its config ({len(problems)} problems, nothing was "
            "loaded):\n  " + "\n  ".join(problems)
        )
    return plan


def _tensor_problems(
    checkpoint: Checkpoint, leaf: Leaf, name: str, tensor: Tensor
) -> Iterator[str]:
    accepted = _ACCEPTED_TAGS[leaf.stored]
    if leaf.slot.per_expert:
        accepted = _ACCEPTED_TAGS["fp4"]
    if tensor.tag not in accepted:
        yield f"dtype: {name} is {tensor.tag}, expected one of {', '.join(accepted)}"
        return
    shape = leaf.shape[::-1] if leaf.slot.transposed else leaf.shape
    if tensor.tag == "I8":
        shape = (shape[0], shape[1] // 2)
    if tensor.shape != shape:
        yield f"shape: {name} is {list(tensor.shape)}, expected {list(shape)}"
    if tensor.tag not in ("I8", "F8_E4M3"):
        return
    scale_name = names.scale_name(name)
    scale = checkpoint.tensors.get(scale_name)
    if scale is None:
        yield f"missing: {scale_name} (the scale of a quantised weight)"
        return
    if scale.tag not in _SCALES:
        yield f"dtype: {scale_name} is {scale.tag}, expected one of {', '.join(_SCALES)}"
    block = FP4_WEIGHT_BLOCK if tensor.tag == "I8" else FP8_WEIGHT_BLOCK
    rows, cols = leaf.shape[::-1]
    shape = (-(-rows // block[1]), -(-cols // block[0]))
    if scale.shape != shape:
        yield f"shape: {scale_name} is {list(scale.shape)}, expected {list(shape)}"


def _read(
    checkpoint: Checkpoint, leaf: Leaf, table: np.ndarray, tags: list[str]
) -> jax.Array | QuantizedArray:
    sharding = leaf.variable.get_value().sharding
    make = functools.partial(_make_array, checkpoint, leaf, sharding)
    if tags[0] in ("I8", "F8_E4M3"):
        block = FP4_WEIGHT_BLOCK if tags[0] == "I8" else FP8_WEIGHT_BLOCK
        scale_table = np.vectorize(names.scale_name, otypes=[object])(table)
        weight = QuantizedArray(make(table), make(scale_table), block)
        return _expand(leaf, weight) if weight.is_fp4 and leaf.stored == "fp8" else weight
    return make(table)


def _expand(leaf: Leaf, weight: QuantizedArray) -> QuantizedArray:
    """FP4 experts as FP8, placed as FP8 ones would have been."""
    try:
        expanded = expand_to_fp8(weight)
    except ValueError as error:
        first = leaf.released_names().flat[0]
        raise CheckpointError(f"{first} and its likes: {error}") from error
    sharding = leaf.variable.get_value().sharding
    if sharding is None:
        return expanded
    place = lambda array: jax.device_put(array, _fitting(sharding, array.shape))
    return dataclasses.replace(expanded, values=place(expanded.values), scale=place(expanded.scale))


def _make_array(
    checkpoint: Checkpoint, leaf: Leaf, sharding: jax.sharding.Sharding | None, table: np.ndarray
) -> jax.Array:
    """An array [layers?, experts?, ...] read from one tensor per element of `table`."""
    sample = checkpoint.tensors[table.flat[0]].view()
    matrix = sample.shape[::-1] if leaf.slot.transposed else sample.shape
    dtypes = {checkpoint.tensors[name].view().dtype for name in table.flat}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    dtype = np.dtype(np.int32) if leaf.stored == "int" else dtype
    shape = (*table.shape, *matrix)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        outer, inner = index[: table.ndim], index[table.ndim :]
        chosen = np.asarray(table[outer], dtype=object)
        stored_index = inner[::-1] if leaf.slot.transposed else inner
        parts = np.empty(
            (*chosen.shape, *(len(range(*s.indices(n))) for s, n in zip(inner, matrix))), dtype
        )
        pieces = []
        for position in np.ndindex(*chosen.shape):
            part = parts[position] if chosen.ndim else parts
            part = part.T if leaf.slot.transposed else part
            pieces += _pieces(checkpoint.tensors[chosen[position]], stored_index, part)
        for _ in _readers().map(lambda piece: _copy(checkpoint, *piece), pieces):
            pass  # raises what a reader has raised
        return parts

    if sharding is None:
        return jax.device_put(read(tuple(slice(None) for _ in shape)))
    return jax.make_array_from_callback(shape, _fitting(sharding, shape), read)


@functools.cache
def _readers() -> concurrent.futures.ThreadPoolExecutor:
    """Threads that copy parts of files; what they call lets go of Python's lock."""
    return concurrent.futures.ThreadPoolExecutor(min(READERS, os.cpu_count() or 1))


def _pieces(
    tensor: Tensor, index: tuple[slice, ...], out: np.ndarray
) -> Iterator[tuple[Tensor, tuple[slice, ...], np.ndarray]]:
    """A part of a tensor and where it goes, in the file's orientation: some rows at a time."""
    start, stop, _ = index[0].indices(tensor.shape[0])
    for first in range(start, stop, PIECE):
        rows = slice(first, min(first + PIECE, stop))
        yield tensor, (rows, *index[1:]), out[first - start : rows.stop - start]


def _copy(
    checkpoint: Checkpoint, tensor: Tensor, index: tuple[slice, ...], out: np.ndarray
) -> None:
    """Rows of a tensor into `out`, few enough at a time that they stay in the processor's cache.

    A whole matrix is turned several times more slowly.
    """
    for first in range(index[0].start, index[0].stop, STRIP):
        rows = (slice(first, min(first + STRIP, index[0].stop)), *index[1:])
        data = _planes(tensor, rows) if tensor.tag == "I8" else tensor.view()[rows]
        refuse_damage(checkpoint.config, tensor.stored_name, data)
        at = first - index[0].start
        out[at : at + len(data)] = data


def _planes(tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
    """A part [out, in / 2] of packed FP4, in the order it has in memory."""
    rows, cols = index
    width = tensor.shape[1]
    half = fp4_block(2 * width) // 2
    start, stop, _ = cols.indices(width)
    first, last = start - start % half, stop + -stop % half  # whole blocks
    return pack_planes(tensor.view()[rows, first:last])[:, start - first : stop - first]


def _fitting(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The sharding on real devices, replicated along axes it does not divide (block scales)."""
    if not isinstance(sharding, jax.NamedSharding):
        return sharding
    mesh = jax.sharding.get_mesh()  # the sharding of an abstract model has an abstract one
    return jax.NamedSharding(mesh, fitting(sharding.spec, shape, dict(mesh.shape)))


# Codes that no weight has: NaN in e4m3 (either sign) and in E8M0.
_NAN_CODES = {"float8_e4m3fn": (0x7F, 0x7F), "float8_e8m0fnu": (0xFF, 0xFF)}


def refuse_damage(config: V4Config, name: str, data: np.ndarray) -> None:
    """Raises for values that no checkpoint has: NaN codes, and experts that do not exist."""
    if data.dtype.name in _NAN_CODES:
        mask, code = _NAN_CODES[data.dtype.name]
        if np.any((data.view(np.uint8) & mask) == code):
            raise CheckpointError(f"{name} has NaN codes ({data.dtype.name}): it is damaged.")
    elif data.dtype.kind == "i":
        experts = config.moe.num_experts
        if data.size and not (0 <= data.min() and data.max() < experts):
            raise CheckpointError(
                f"{name} has values in {data.min()}..{data.max()}: expected experts 0..{experts - 1}."
            )
    elif data.size and _has_nan_or_infinity(data):
        raise CheckpointError(f"{name} has NaN or infinite values: it is damaged.")


# Where a float's exponent is all ones, it is NaN or infinite.
_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F80_0000}


def _has_nan_or_infinity(data: np.ndarray) -> bool:
    """By the bits: NumPy's own test of bfloat16 takes longer than reading the file."""
    if data.dtype.name not in _EXPONENTS:
        return not np.isfinite(data).all()
    bits = data.view(f"u{data.dtype.itemsize}")
    mask = bits.dtype.type(_EXPONENTS[data.dtype.name])
    return bool(np.max(bits & mask) == mask)
