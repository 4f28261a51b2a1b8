"""Adapters in the files of PEFT: `adapter_model.safetensors` and `adapter_config.json`.

Names are those of the released modules (`base_model.model.layers.0.attn.wq_a.lora_A.weight`), A is
stored [rank, in] and B [out, rank], as PEFT and vLLM read them.

Source: PEFT 0.18 `LoraConfig`; vLLM `lora/utils.py`.
"""

import json
import os
from collections.abc import Iterator

import jax
import numpy as np

from v4jax.checkpoint.errors import CheckpointError, read_json
from v4jax.checkpoint.leaves import Leaf, leaves
from v4jax.checkpoint.safetensors import NewTensor, SafetensorsFile, write_safetensors
from v4jax.checkpoint.saving import write_text
from v4jax.nn.lora import LoRA, LowRank, add_lora
from v4jax.nn.model import Transformer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


def save_adapter(model: Transformer, folder: str | os.PathLike, *, base: str | None = None) -> None:
    """Writes a model's LoRA adapters.

    Args:
      folder: made if missing.
      base: name or folder of the model that they belong to, for `base_model_name_or_path`.

    Raises:
      ValueError: there is no adapter, or one that PEFT has no form for (of a grouped projection).
    """
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
        tensors += _tensors(leaf, adapter)
    modules = {tensor.name.removeprefix(_PREFIX).rsplit(".", 2)[0] for tensor in tensors}
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
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


def load_adapter(model: Transformer, folder: str | os.PathLike) -> Transformer:
    """A copy of the model, with the same arrays, that has the adapters of a folder.

    Raises:
      CheckpointError: the files are missing or damaged, are no LoRA, or do not fit the model.
    """
    config = read_json(os.path.join(folder, CONFIG), CheckpointError)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder}: peft_type={config.get('peft_type')!r}: expected 'LORA'.")
    file = SafetensorsFile(os.path.join(folder, WEIGHTS))
    stored = {name.removeprefix(_PREFIX): name for name in file.tensors}
    modules = {name.rsplit(".", 2)[0] for name in stored}
    targets = {
        leaf.slot.path.removesuffix(".kernel")
        for leaf in leaves(model)
        if not modules.isdisjoint(_modules(leaf).flat)
    }
    try:
        lora = LoRA(
            rank=config["r"],
            alpha=float(config["lora_alpha"]),
            targets=tuple(sorted(targets)),
            rslora=bool(config.get("use_rslora", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: {CONFIG} does not say a LoRA of this model: {error}"
        ) from error
    model = add_lora(model, lora)
    expected = set()
    for leaf, adapter in _adapters(model):
        table = _modules(leaf)
        for factor, variable in (("lora_A", adapter.a), ("lora_B", adapter.b)):
            value = variable.get_value()
            new = np.zeros(value.shape, np.float32)
            for index in np.ndindex(*table.shape):
                name = f"{table[index]}.{factor}.weight"
                expected.add(name)
                if name not in stored:  # PEFT may have adapted some layers only
                    continue
                data = file.view(stored[name]).astype(np.float32).T
                if data.shape != new[index].shape:
                    raise CheckpointError(
                        f"{folder}: {stored[name]} is {list(data.T.shape)}, expected "
                        f"{list(new[index].T.shape)}."
                    )
                new[index] = data
            variable.set_value(jax.device_put(new, value.sharding))
    unknown = sorted(set(stored) - expected)
    if unknown:
        raise CheckpointError(f"{folder}: {stored[unknown[0]]} belongs to no matrix of the model.")
    return model


def _adapters(model: Transformer) -> Iterator[tuple[Leaf, LowRank]]:
    for leaf in leaves(model):
        adapter = getattr(leaf.module, "adapter", None)
        if isinstance(adapter, LowRank):
            yield leaf, adapter


def _modules(leaf: Leaf) -> np.ndarray:
    """Released names of the matrices in a parameter, without `.weight`."""
    names = leaf.released_names()
    return np.vectorize(lambda name: name.removesuffix(".weight"), otypes=[object])(names)


def _tensors(leaf: Leaf, adapter: LowRank) -> Iterator[NewTensor]:
    table = _modules(leaf)
    for factor, variable in (("lora_A", adapter.a), ("lora_B", adapter.b)):
        array = variable.get_value()
        for index in np.ndindex(*table.shape):

            def read(array=array, index=index) -> np.ndarray:
                return np.asarray(array[index], np.float32).T

            name = f"{_PREFIX}{table[index]}.{factor}.weight"
            yield NewTensor(name, "F32", array.shape[-2:][::-1], read)
