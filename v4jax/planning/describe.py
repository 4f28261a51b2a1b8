"""What a model consists of: parameters and bytes by part, also of models nobody could allocate."""

import dataclasses
import functools
import math

import jax
from flax import nnx

from v4jax.config import V4Config
from v4jax.nn.layers import HashTable
from v4jax.nn.model import Transformer
from v4jax.nn.quantization import to_released


def abstract_model(cfg: V4Config, *, released: bool = True) -> Transformer:
    """The model with shapes and dtypes in the place of arrays; nothing is allocated.

    Under a mesh (`with jax.set_mesh(mesh):`) the arrays know how they would be spread.

    Args:
      released: in the storage formats of the released checkpoints, else in float32.
    """
    model = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
    if not released:
        return model
    graphdef, state = nnx.split(model)
    convert = lambda state: nnx.state(to_released(nnx.merge(graphdef, state)))
    return nnx.merge(graphdef, jax.eval_shape(convert, state))


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; scales of quantised weights and hash tables are not parameters."""

    total: int  # without MTP blocks
    mtp: int
    active: int  # per token: the chosen experts and all else, the embedding table excluded

    @property
    def total_with_mtp(self) -> int:
        """Everything."""
        return self.total + self.mtp


@functools.cache
def count_parameters(cfg: V4Config) -> ParameterCount:
    """Counts the parameters of an architecture without allocating any."""
    sizes = {"main": 0, "mtp": 0, "routed": 0}
    model = abstract_model(cfg, released=False)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if isinstance(variable, HashTable):
            continue
        size = variable.get_value().size
        sizes["mtp" if path[0] == "mtp" else "main"] += size
        if "expert" in variable.axes and path[0] != "mtp":
            sizes["routed"] += size
    idle = sizes["routed"] * (cfg.moe.num_experts - cfg.moe.experts_per_token)
    embedding = cfg.vocab_size * cfg.embed_dim
    active = sizes["main"] - idle // cfg.moe.num_experts - embedding
    return ParameterCount(sizes["main"], sizes["mtp"], active)


@dataclasses.dataclass(frozen=True)
class Part:
    """Memory of a part of a model."""

    parameters: int = 0
    nbytes: int = 0  # quantisation scales included
    device_nbytes: int = 0  # on each device of a mesh; without one, `nbytes`

    @property
    def bits(self) -> float | None:
        """Bits per weight, scales included; None for what has no parameters."""
        return 8 * self.nbytes / self.parameters if self.parameters else None

    def __add__(self, other: "Part") -> "Part":
        return Part(
            self.parameters + other.parameters,
            self.nbytes + other.nbytes,
            self.device_nbytes + other.device_nbytes,
        )


_HASH_TABLES = "hash tables"
_PARTS = {
    "embed": "embedding",
    "head": "head",
    "mtp": "MTP block",
    "compressor": "compressors",
    "indexer": "indexers",
    "attention": "attention",
    "router": "routers",
    "shared": "shared experts",
    "moe": "routed experts",
}


def memory_by_part(model: Transformer) -> dict[str, Part]:
    """Parameters and memory of a model by part, largest first. Abstract models will do.

    Hash tables are a part of their own, without parameters. Under a mesh arrays may be spread:
    `device_nbytes` is what one device holds.
    """
    parts: dict[str, Part] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        names = ("mtp",) if path[0] == "mtp" else path
        key = next((k for k in ("indexer", *_PARTS) if k in names), None)
        name = _PARTS.get(key or "", "norms and hyper-connections")
        size = value.size
        if isinstance(variable, HashTable):
            name, size = _HASH_TABLES, 0
        arrays = jax.tree.leaves(value)
        nbytes = sum(a.size * a.dtype.itemsize for a in arrays)
        part = Part(size, nbytes, sum(map(_device_nbytes, arrays)))
        parts[name] = parts.get(name, Part()) + part
    return dict(sorted(parts.items(), key=lambda item: -item[1].nbytes))


def _device_nbytes(array: jax.Array | jax.ShapeDtypeStruct) -> int:
    shape = array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)
    return math.prod(shape) * array.dtype.itemsize


def bytes_by_part(model: Transformer) -> dict[str, int]:
    """Bytes of a model's arrays by part, quantisation scales and hash tables included."""
    return {name: part.nbytes for name, part in memory_by_part(model).items()}


def describe(model: Transformer) -> str:
    """`memory_by_part` as a table, with totals.

    The last line is what `v4jax.checkpoint.save` writes, without headers: hash tables are int32 in
    memory and int64 in files.
    """
    parts = memory_by_part(model)
    total = sum(parts.values(), Part())
    is_spread = total.device_nbytes != total.nbytes
    lines = [_line("part", "parameters", "bytes", "bits each", is_spread and "bytes per device")]
    for name, part in [*parts.items(), ("total", total)]:
        bits = f"{part.bits:.2f}" if part.parameters else ""
        device = is_spread and f"{part.device_nbytes:,}"
        lines.append(_line(name, f"{part.parameters:,}", f"{part.nbytes:,}", bits, device))
    in_files = total.nbytes + parts.get(_HASH_TABLES, Part()).nbytes
    lines.append(_line("total in files", "", f"{in_files:,}", "", is_spread and ""))
    return "\n".join(lines)


def _line(name: str, parameters: str, nbytes: str, bits: str, device: str | bool) -> str:
    line = f"{name:28s}{parameters:>20s}{nbytes:>20s}{bits:>11s}"
    return (line + (f"{device:>18s}" if device is not False else "")).rstrip()
