"""Models loaded from checkpoint folders, here or in an object store.

Every tensor is checked against the model before the first one is read, and then goes straight from
the mapped file, or from the store, to its place on the devices.
"""

import collections
import dataclasses
import logging
import os
import pathlib
from collections.abc import Collection, Iterator

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from pallas_kernels.formats.quantize import FP4_WEIGHT_BLOCK, FP8_WEIGHT_BLOCK
from sharding import PREFILL, TRAIN
from v4jax import nano_path, stores
from v4jax.checkpoint import names
from v4jax.checkpoint.errors import CheckpointError
from v4jax.checkpoint.folders import Checkpoint, Tensor
from v4jax.checkpoint.leaves import Leaf, leaves
from v4jax.checkpoint.reading import Reading
from v4jax.config import V4Config
from v4jax.nn.model import Transformer
from v4jax.nn.numerics import Numerics, plain

AHEAD_BYTES = 1 << 30  # of host memory, into which parameters are read ahead from a store
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


# How weights lie for what the model is to do. Prefill and decoding read them alike.
USES = {"serve": PREFILL, "train": TRAIN}


def folder_of(source: str | os.PathLike) -> pathlib.Path | str:
    """Of a checkpoint; "nano" is the model in the package, unless there is a folder of that name.

    The URL of one in an object store stays a str: `v4jax.stores` knows both.
    """
    if stores.is_url(source):
        return os.fspath(source)
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
      source: a folder, its URL ("gs://bucket/folder"), "nano" (the model in the package), or an
        opened checkpoint.
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
        Nothing has been loaded then. Or names experts that FP8 cannot hold, or that are damaged,
        or an object that its store does not give.
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
    whole, stored = checkpoint.config, checkpoint.config.expert_format
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
    total = sum(_stored_bytes(checkpoint, leaf) for leaf, *_ in plan)
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not progress) as bar:
        _fill(checkpoint, plan, bar)
    return model


# A parameter, the names of its tensors, and their formats.
_Plan = list[tuple[Leaf, np.ndarray, list[str]]]


def _fill(checkpoint: Checkpoint, plan: _Plan, bar: tqdm) -> None:
    """Sets every parameter: one at a time from mapped files, some ahead from a store."""
    ahead = AHEAD_BYTES if stores.is_url(checkpoint.path) else 0
    started: collections.deque[tuple[Leaf, Reading, int]] = collections.deque()
    held = 0

    def finish() -> int:
        leaf, reading, size = started[0]
        leaf.variable.set_value(reading.finish())
        started.popleft()
        bar.update(_stored_bytes(checkpoint, leaf))
        return size

    try:
        for leaf, table, tags in plan:
            reading = Reading(checkpoint, leaf, table, tags)
            size = reading.start()
            started.append((leaf, reading, size))
            del reading  # and with it, once finished, its memory
            held += size
            while started and held > ahead:
                held -= finish()
        while started:
            finish()
    finally:  # after an error
        for _, reading, _ in started:
            reading.cancel()


def _stored_bytes(checkpoint: Checkpoint, leaf: Leaf) -> int:
    """Of a parameter's tensors in the files, scales left out."""
    return sum(checkpoint.tensors[name].nbytes for name in leaf.released_names().flat)


def matched_leaves(checkpoint: Checkpoint) -> list[Leaf]:
    """The parameters of the checkpoint's model, without values, layer by layer.

    Raises:
      CheckpointError: as `load` does, the tensors do not fit them.
    """
    return [leaf for leaf, *_ in _check(checkpoint, _expected(checkpoint.config))]


def _expected(config: V4Config) -> list[Leaf]:
    """The parameters of an architecture, without values, layer by layer."""
    model = nnx.eval_shape(lambda: Transformer(config, scan_layers=False, rngs=nnx.Rngs(0)))
    return list(leaves(model))


def _check(checkpoint: Checkpoint, all_leaves: list[Leaf], left_out: Collection[str] = ()) -> _Plan:
    """What to read; `left_out` names tensors that may be there and are not read."""
    problems, plan = [], []
    expected = {*left_out, *map(names.scale_name, left_out)}
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
        plan.append((leaf, table, tags))
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
