"""Writes a model in the released layout: names, orientation, packing, one file or one per layer."""

import dataclasses
import functools
import json
import os
import re
import tempfile
from collections.abc import Container, Iterator

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from pallas_kernels.formats.quantize import QuantizedArray, unpack_planes
from v4jax import stores
from v4jax.checkpoint import names
from v4jax.checkpoint.folders import INDEX_NAME, SINGLE_NAME, Checkpoint
from v4jax.checkpoint.hf_config import to_hf
from v4jax.checkpoint.leaves import Leaf, leaves
from v4jax.checkpoint.safetensors import NewTensor, write_safetensors
from v4jax.config import V4Config
from v4jax.nn.lora import matrices
from v4jax.nn.model import Transformer
from v4jax.nn.quantization import to_released

SINGLE_FILE_LIMIT = 5_000_000_000
_TAGS = {
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(np.uint8): "I8",  # packed FP4
    np.dtype(np.int32): "I64",  # hash tables
}


def save(
    model: Transformer,
    path: str | os.PathLike,
    *,
    like: Checkpoint | None = None,
    single_file_limit: int = SINGLE_FILE_LIMIT,
) -> None:
    """Writes `config.json` and safetensors with the released names.

    Parameters are written as they are held: a model that was loaded is written back byte for byte
    where it was not changed, and a float model becomes a float checkpoint (`to_released` quantises
    one first). Files are complete or absent; `config.json` comes last. What goes into a store is
    written to a temporary folder first, which takes as much room as the model.

    A model that is spread over several processes is saved by all of them together, into a folder that
    they share: the files are dealt out, and none holds more than a tensor of other processes.

    Args:
      path: the folder, made if missing, or its URL ("gs://bucket/folder").
      like: a checkpoint whose order of tensors, integer dtypes, metadata and other files
        (tokenizer ...) to keep.
      single_file_limit: bytes up to which everything goes into one file; beyond, one per layer.

    Raises:
      ValueError: `path` has another checkpoint's files, or the model has adapters.
      CheckpointError: a store does not take a file.
    """
    path = os.fspath(path)
    adapted = [name for name, matrix in matrices(model) if matrix.adapter is not None]
    if adapted:
        raise ValueError(
            f"{adapted[0]} has an adapter, which a checkpoint does not hold: merge it first "
            "(v4jax.nn.lora.merge_lora), or write it with v4jax.checkpoint.save_adapter."
        )
    is_spread = not all(array.is_fully_addressable for array in jax.tree.leaves(nnx.state(model)))
    together = _Together() if is_spread else _Alone()
    if stores.is_url(path):
        _require_no_weights(path, stores.names(path) if stores.is_folder(path) else [])
        together.wait("the folder was empty")
        with tempfile.TemporaryDirectory(prefix="v4jax-") as folder:
            _write(model, folder, together, like, single_file_limit)
            _upload(folder, path, together)
        return
    os.makedirs(path, exist_ok=True)
    _require_no_weights(path, os.listdir(path))
    together.wait("the folder was empty")
    _write(model, path, together, like, single_file_limit)
    together.wait("all is written")


class _Alone:
    """One process writes all files."""

    is_first = True

    def wait(self, what: str) -> None:
        """Until the others are there too."""

    def writes(self, number: int) -> bool:
        """Whether a file is this process's to write."""
        del number
        return True


class _Together(_Alone):
    """Every process writes some files, and gives its parts to the others'."""

    def __init__(self):
        self.is_first = jax.process_index() == 0

    def wait(self, what: str) -> None:
        multihost_utils.sync_global_devices(what)

    def writes(self, number: int) -> bool:
        return number % jax.process_count() == jax.process_index()


def _write(
    model: Transformer, path: str, together: _Alone, like: Checkpoint | None, limit: int
) -> None:
    """The files of this process; `config.json` when all processes have theirs."""
    tensors = {t.name: t for leaf in leaves(model) for t in _tensors(leaf, like)}
    metadata = {"format": "pt"}
    if like is not None:
        metadata = like.files[0].metadata
        order = {name: i for i, name in enumerate(like.tensors)}
        tensors = dict(sorted(tensors.items(), key=lambda t: order.get(t[0], len(order))))
        if together.is_first:
            copy_other_files(like, path)
    total = sum(t.nbytes for t in tensors.values())
    shards = {SINGLE_NAME: list(tensors.values())} if total <= limit else _shards(tensors)
    for number, (name, held) in enumerate(shards.items()):
        if together.writes(number):
            write_safetensors(os.path.join(path, name), held, metadata)
            continue
        for tensor in held:  # its writer needs this process's part
            tensor.read()
    together.wait("weights are written")
    if not together.is_first:
        return
    if total > limit:
        weight_map = {tensor.name: name for name, held in shards.items() for tensor in held}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(os.path.join(path, INDEX_NAME), json.dumps(index, indent=2))
    experts = next(t.tag for name, t in tensors.items() if name.endswith("experts.0.w1.weight"))
    fmt = {"I8": "fp4", "F8_E4M3": "fp8"}.get(experts)
    config = json.dumps(to_hf(dataclasses.replace(model.cfg, expert_format=fmt)), indent=2)
    write_text(os.path.join(path, "config.json"), config)


def _require_no_weights(path: str, present: list[str]) -> None:
    weights = [name for name in present if name.endswith(".safetensors") or name == INDEX_NAME]
    if weights:
        raise ValueError(
            f"{path} already holds {weights[0]}: give an empty folder, or remove the old checkpoint."
        )


def _upload(folder: str, url: str, together: _Alone) -> None:
    """Copies a folder into a store, `config.json` last: with it the folder is a checkpoint."""
    files = [
        os.path.relpath(os.path.join(where, name), folder)
        for where, _, found in os.walk(folder)
        for name in found
    ]
    for name in sorted(set(files) - {"config.json"}):
        stores.upload(os.path.join(folder, name), stores.join(url, name))
    together.wait("weights are uploaded")
    if together.is_first:
        stores.upload(os.path.join(folder, "config.json"), stores.join(url, "config.json"))
    together.wait("all is uploaded")


@dataclasses.dataclass(frozen=True)
class _Announced:
    """Shape and dtype of an array that does not exist, as the writer asks for them."""

    shape: tuple[int, ...]
    dtype: np.dtype


def announced(config: V4Config, *, scan_layers: bool = False) -> list[NewTensor]:
    """What `save` would write of a model in the released formats; nothing is allocated.

    The tensors have names, formats and shapes; `read` has no data to give.
    """

    def make() -> Transformer:
        return to_released(Transformer(config, scan_layers=scan_layers, rngs=nnx.Rngs(0)))

    model = jax.tree.map(lambda a: _Announced(a.shape, a.dtype), nnx.eval_shape(make))
    return [tensor for leaf in leaves(model) for tensor in _tensors(leaf, None)]


def _shards(tensors: dict[str, NewTensor]) -> dict[str, list[NewTensor]]:
    """One file per layer, embedding, head and MTP block, as the releases have it: tensors by file."""
    groups: dict[str, list[NewTensor]] = {}
    for name, tensor in tensors.items():
        match = re.match(r"(layers|mtp)\.\d+\.", name)
        group = match[0] if match else ("embed" if name.startswith("embed.") else "head")
        groups.setdefault(group, []).append(tensor)

    def rank(group: str) -> tuple[int, int]:
        kind, _, number = group.rstrip(".").partition(".")
        return ["embed", "layers", "head", "mtp"].index(kind), int(number or 0)

    return {
        f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": groups[group]
        for i, group in enumerate(sorted(groups, key=rank))
    }


def write_text(path: str, text: str) -> None:
    """Writes a text file, which appears whole or not at all."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write(text + "\n")
    os.replace(f"{path}.new", path)


def copy_other_files(checkpoint: Checkpoint, path: str, besides: Container[str] = ()) -> None:
    """Copies what is neither config nor weights: tokenizer, licence ..., and the encoding module.

    That one tells whose prompts the model expects (`v4jax/text/release.py`).
    """
    encoder = os.path.join("encoding", "encoding_dsv4.py")
    source = stores.join(checkpoint.path, encoder)
    if stores.is_file(source):
        os.makedirs(os.path.join(path, "encoding"), exist_ok=True)
        stores.copy_here(source, os.path.join(path, encoder))
    for name in stores.names(checkpoint.path):
        source = stores.join(checkpoint.path, name)
        written = name in ("config.json", INDEX_NAME) or name.endswith(".safetensors")
        if not written and name not in besides and stores.is_file(source):
            stores.copy_here(source, os.path.join(path, name))


def _tensors(leaf: Leaf, like: Checkpoint | None) -> Iterator[NewTensor]:
    value = leaf.variable.get_value()
    table = leaf.released_names()
    arrays = [(value, lambda name: name)]
    if isinstance(value, QuantizedArray):
        arrays = [(value.values, lambda name: name), (value.scale, names.scale_name)]
    for array, rename in arrays:
        for position in np.ndindex(*table.shape):
            name = rename(table[position])
            tag = _TAGS[np.dtype(array.dtype)]
            if like is not None and tag == "I64" and name in like.tensors:
                tag = like.tensors[name].tag
            yield _tensor(name, tag, array, position, leaf.slot.transposed)


def one(array: jax.Array, position: tuple[int, ...]) -> jax.Array:
    """`array[position]`, gathered from wherever a mesh has its parts."""
    if isinstance(array.sharding, jax.NamedSharding) and (
        position or not array.is_fully_addressable
    ):
        whole = jax.NamedSharding(array.sharding.mesh, jax.P())
        return array.at[position].get(out_sharding=whole) if position else _gather(whole)(array)
    return array[position] if position else array


@functools.cache
def _gather(whole: jax.NamedSharding):
    """A program that brings an array to every device."""
    return jax.jit(lambda array: array, out_shardings=whole)


def _tensor(
    name: str, tag: str, array: jax.Array, position: tuple[int, ...], transposed: bool
) -> NewTensor:
    shape = array.shape[len(position) :]

    def read() -> np.ndarray:
        data = np.asarray(one(array, position))
        if tag == "I8":
            return np.ascontiguousarray(unpack_planes(data).T).view(np.int8)
        data = data.T if transposed else data
        return data.astype(np.int64) if tag == "I64" else data

    return NewTensor(name, tag, shape[::-1] if transposed else shape, read)
