"""Adapters in the files of PEFT: `adapter_model.safetensors` and `adapter_config.json`.

A is stored [rank, in] and B [out, rank], under the name of the module that they belong to:

| names | module | read by |
|---|---|---|
| `released` | `base_model.model.layers.0.attn.wq_a` | vLLM, this project |
| `transformers` | `base_model.model.model.layers.0.self_attn.q_a_proj` | PEFT on transformers, this project |

Source: PEFT 0.18 `LoraConfig`; vLLM `lora/utils.py`; transformers 5.23 `models/deepseek_v4`.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx

from v4jax import stores
from v4jax.checkpoint import names as tensor_names
from v4jax.checkpoint.errors import CheckpointError, read_json
from v4jax.checkpoint.leaves import Leaf, leaves
from v4jax.checkpoint.safetensors import NewTensor, SafetensorsFile, write_safetensors
from v4jax.checkpoint.saving import write_text
from v4jax.nn.layers import Matrix
from v4jax.nn.lora import LoRA, LowRank, add_lora
from v4jax.nn.model import Transformer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAMES = ("released", "transformers")
_PREFIX = "base_model.model."
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_[AB])\.weight")
# Fields of PEFT's config that would change what an adapter computes, and the values that do not.
_PLAIN = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
}
_PIECE = 2**24  # bytes that are read at once


class Adapter:
    """An opened folder, here or in a store.

    Attributes:
      path: the folder, or its URL.
      lora: rank and scale; its targets say nothing.
      modules: released names of the matrices that it adapts, as `layers.0.attn.wq_a`.

    Raises:
      FileNotFoundError: a file is missing.
      CheckpointError: the files are damaged, or are no LoRA, or one of a kind that is not computed here.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        if not stores.is_file(stores.join(self.path, CONFIG)):
            inner = stores.join(self.path, "adapter")
            has_one = stores.is_file(stores.join(inner, CONFIG))
            hint = f" {inner} has one: give that." if has_one else ""
            raise FileNotFoundError(
                f"{self.path} has no {CONFIG}: expected an adapter's folder.{hint}"
            )
        config = read_json(stores.join(self.path, CONFIG), CheckpointError)
        if config.get("peft_type") != "LORA":
            raise CheckpointError(
                f"{self.path}: peft_type={config.get('peft_type')!r}: expected 'LORA'."
            )
        for field, plain in _PLAIN.items():
            if config.get(field, plain[0]) not in plain:
                raise CheckpointError(
                    f"{self.path}: {field}={config[field]!r} in {CONFIG}: expected {plain[0]!r}, or "
                    "nothing. Only plain LoRA of one rank is computed here."
                )
        try:
            self.lora = LoRA(
                rank=config["r"],
                alpha=float(config["lora_alpha"]),
                rslora=bool(config.get("use_rslora", False)),
                dropout=float(config.get("lora_dropout") or 0.0),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {CONFIG} does not say a LoRA: {error}") from error
        self._file = SafetensorsFile(stores.join(self.path, WEIGHTS))
        self._stored: dict[str, dict[str, str]] = {}  # module -> factor -> name in the file
        for name in self._file.tensors:
            match = _NAME.fullmatch(name)
            if match is None:
                raise CheckpointError(
                    f"{self.path}: {name} is no factor of a LoRA: expected MODULE.lora_A.weight and "
                    "MODULE.lora_B.weight."
                )
            module = tensor_names.from_transformers(f"{match[1]}.weight")
            assert isinstance(module, str)  # stacked experts have no .weight
            self._stored.setdefault(module.removesuffix(".weight"), {})[match[2]] = name
        for module, factors in self._stored.items():
            if len(factors) == 1:
                raise CheckpointError(
                    f"{self.path}: of lora_A and lora_B, {module} has {next(iter(factors))} only."
                )
        self.modules = self._stored.keys()

    @functools.cached_property
    def digest(self) -> bytes:
        """Of the two files: equal where an adapter computes the same."""
        sha = hashlib.sha256()
        for name in (CONFIG, WEIGHTS):
            file = stores.open_file(stores.join(self.path, name))
            for begin in range(0, file.size, _PIECE):
                sha.update(file.read(begin, min(begin + _PIECE, file.size)))
        return sha.digest()

    def factors(self, module: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """A [rank, in] and B [out, rank] of a matrix [out, in] of this shape, float32.

        Raises:
          CheckpointError: they do not fit it, or are not finite.
        """
        out, width = shape
        expected = {"lora_A": (self.lora.rank, width), "lora_B": (out, self.lora.rank)}
        found = []
        for factor, wanted in expected.items():
            name = self._stored[module][factor]
            data = self._file.view(name).astype(np.float32)
            if data.shape != wanted:
                raise CheckpointError(
                    f"{self.path}: {name} is {list(data.shape)}, expected {list(wanted)}."
                )
            if not np.isfinite(data).all():
                raise CheckpointError(f"{self.path}: {name} has values that are not finite.")
            found.append(data)
        return found[0], found[1]

    def product(self, module: str, shape: tuple[int, ...]) -> np.ndarray:
        """scale * B @ A [out, in] in float32: what merging adds to the matrix."""
        a, b = self.factors(module, shape)
        return np.float32(self.lora.scale) * (b @ a)

    def require_modules(self, known: set[str], where: str) -> None:
        """Refuses adapters of what is not there.

        Raises:
          CheckpointError: names one.
        """
        unknown = sorted(self.modules - known)
        if unknown:
            stored = next(iter(self._stored[unknown[0]].values()))
            raise CheckpointError(f"{self.path}: {stored} belongs to no matrix of {where}.")


def save_adapter(
    model: Transformer,
    folder: str | os.PathLike,
    *,
    base: str | None = None,
    names: str = "released",
) -> None:
    """Writes a model's LoRA adapters.

    Args:
      folder: made if missing.
      base: name or folder of the model that they belong to, for `base_model_name_or_path`.
      names: "released", or "transformers" for PEFT on the model of transformers 5.

    Raises:
      ValueError: other names; there is no adapter, or one that the files have no form for: of a grouped
        projection, and with names of transformers of routed experts.
    """
    if names not in NAMES:
        raise ValueError(f"names={names!r}: expected one of {', '.join(NAMES)}.")
    found = list(_adapters(model))
    if not found:
        raise ValueError(
            "the model has no adapter: v4jax.nn.lora.add_lora(model, LoRA()) adds some."
        )
    lora = found[0][1].lora
    tensors: list[NewTensor] = []
    for leaf, adapter in found:
        if adapter.groups > 1:
            raise ValueError(
                f"{leaf.slot.path.removesuffix('.kernel')} has an adapter for each of its groups, which "
                "PEFT's files have no form for: merge it (merge_lora), or leave it out of the targets."
            )
        if names == "transformers" and leaf.slot.per_expert:
            raise ValueError(
                f"{leaf.slot.path.removesuffix('.kernel')} has an adapter for each expert, and "
                "transformers keeps all experts of a layer in one tensor: expected names='released', or "
                "targets without routed experts."
            )
        tensors += _tensors(leaf, adapter, names)
    modules = {tensor.name.removeprefix(_PREFIX).rsplit(".", 2)[0] for tensor in tensors}
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": sorted(modules),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": lora.rslora,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }
    os.makedirs(folder, exist_ok=True)
    write_safetensors(os.path.join(folder, WEIGHTS), tensors, {"format": "pt"})
    write_text(os.path.join(folder, CONFIG), json.dumps(config, indent=2))


def load_adapter(model: Transformer, folder: str | os.PathLike | Adapter) -> Transformer:
    """A copy of the model, with the same arrays, that has the adapters of a folder.

    Raises:
      FileNotFoundError: a file is missing.
      CheckpointError: the files are damaged, are no LoRA, or do not fit the model.
    """
    adapter = folder if isinstance(folder, Adapter) else Adapter(folder)
    known = [(leaf, set(_modules(leaf).flat)) for leaf in leaves(model) if may_have_adapter(leaf)]
    adapter.require_modules({name for _, modules in known for name in modules}, "the model")
    targets = {
        leaf.slot.path.removesuffix(".kernel")
        for leaf, modules in known
        if not modules.isdisjoint(adapter.modules)
    }
    lora = dataclasses.replace(adapter.lora, targets=tuple(sorted(targets)))
    model = add_lora(model, lora)
    for leaf, beside in _adapters(model):
        table, (width, out) = _modules(leaf), leaf.shape
        if adapter.modules.isdisjoint(table.flat):  # another layer of its target has one
            assert isinstance(leaf.module, Matrix)
            leaf.module.adapter = nnx.data(None)
            continue
        variables = beside.a, beside.b
        new = [np.zeros(variable.get_value().shape, np.float32) for variable in variables]
        for index in np.ndindex(*table.shape):
            module = str(table[index])
            if module in adapter.modules:  # else another layer, or expert, of the same array
                for one, factor in zip(new, adapter.factors(module, (out, width))):
                    one[index] = factor.T
        for variable, value in zip(variables, new):
            variable.set_value(jax.device_put(value, variable.get_value().sharding))
    return model


def may_have_adapter(leaf: Leaf) -> bool:
    """Whether it is a matrix that PEFT's files have a form for."""
    is_matrix = isinstance(leaf.module, Matrix) and leaf.module.groups == 1
    return is_matrix and not leaf.prefixes[0].startswith("mtp.")


def _adapters(model: Transformer) -> Iterator[tuple[Leaf, LowRank]]:
    for leaf in leaves(model):
        adapter = getattr(leaf.module, "adapter", None)
        if isinstance(adapter, LowRank):
            yield leaf, adapter


def _modules(leaf: Leaf) -> np.ndarray:
    """Released names of the matrices in a parameter, without `.weight`."""
    names = leaf.released_names()
    return np.vectorize(lambda name: name.removesuffix(".weight"), otypes=[object])(names)


def _tensors(leaf: Leaf, adapter: LowRank, names: str) -> Iterator[NewTensor]:
    table = _modules(leaf)
    for factor, variable in (("lora_A", adapter.a), ("lora_B", adapter.b)):
        array = variable.get_value()
        for index in np.ndindex(*table.shape):

            def read(array=array, index=index) -> np.ndarray:
                return np.asarray(array[index], np.float32).T

            module: str | None = str(table[index])
            if names == "transformers":
                module = tensor_names.transformers_module(str(table[index]))
            name = f"{_PREFIX}{module}.{factor}.weight"
            yield NewTensor(name, "F32", array.shape[-2:][::-1], read)
