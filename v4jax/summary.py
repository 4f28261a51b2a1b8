"""What a model consists of: parameters and bytes by part, also of models nobody could allocate."""

import dataclasses
import functools

from flax import nnx

from pallas_kernels.quantize import QuantizedArray
from v4jax.config import V4Config
from v4jax.layers import HashTable
from v4jax.model import Transformer
from v4jax.quantization import to_released


def abstract_model(cfg: V4Config, *, released: bool = True) -> Transformer:
    """The model with shapes and dtypes in the place of arrays; nothing is allocated.

    Args:
      released: in the storage formats of the released checkpoints, else in float32.
    """

    def make() -> Transformer:
        model = Transformer(cfg, rngs=nnx.Rngs(0))
        return to_released(model) if released else model

    return nnx.eval_shape(make)


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
        if path[-2:-1] == ("moe",) and path[0] != "mtp":
            sizes["routed"] += size
    idle = sizes["routed"] * (cfg.moe.num_experts - cfg.moe.experts_per_token)
    embedding = cfg.vocab_size * cfg.embed_dim
    active = sizes["main"] - idle // cfg.moe.num_experts - embedding
    return ParameterCount(sizes["main"], sizes["mtp"], active)


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


def bytes_by_part(model: Transformer) -> dict[str, int]:
    """Bytes of a model's arrays by part, quantisation scales and hash tables included."""
    parts: dict[str, int] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        is_quantized = isinstance(value, QuantizedArray)
        nbytes = value.nbytes if is_quantized else value.size * value.dtype.itemsize
        names = ("mtp",) if path[0] == "mtp" else path
        key = next((k for k in ("indexer", *_PARTS) if k in names), None)
        part = _PARTS.get(key, "norms and hyper-connections")
        parts[part] = parts.get(part, 0) + nbytes
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def describe(model: Transformer) -> str:
    """A table of `bytes_by_part`, with the total."""
    parts = bytes_by_part(model)
    parts["total"] = sum(parts.values())
    return "\n".join(f"{part:28s} {size:>20,d}" for part, size in parts.items())
