"""DeepSeek-V4 in pure JAX.

    import v4jax

    engine = v4jax.Engine(v4jax.load("nano", v4jax.released()), v4jax.Tokenizer(v4jax.nano_path()))
    print(engine.generate("Emma was", v4jax.Sampling(max_new_tokens=20)).text)

    trainer = v4jax.Trainer(v4jax.load("nano", use="train"), v4jax.train.adamw(1e-4))

Packages: `nn` (the model), `text` (prompts and tokens), `checkpoint`, `inference`, `train`,
`planning` (costs, memory, meshes) and `cli`. Names below are imported on first use.
"""

import glob
import importlib
import importlib.util
import os
import pathlib
import sys

_HOMES = {
    "AxisRules": "sharding",
    "Engine": "v4jax.inference.engine",
    "Grammar": "v4jax.inference.grammar",
    "LoRA": "v4jax.nn.lora",
    "Numerics": "v4jax.nn.numerics",
    "Sampling": "v4jax.inference.sampling",
    "Tokenizer": "v4jax.text.tokenizer",
    "Trainer": "v4jax.train.trainer",
    "Transformer": "v4jax.nn.model",
    "V4Config": "v4jax.config",
    "describe": "v4jax.planning.describe",
    "flash": "v4jax.config",
    "flash_base": "v4jax.config",
    "from_hf": "v4jax.checkpoint.hf_config",
    "load": "v4jax.checkpoint.loading",
    "make_mesh": "sharding",
    "nano": "v4jax.config",
    "plain": "v4jax.nn.numerics",
    "pro": "v4jax.config",
    "pro_base": "v4jax.config",
    "released": "v4jax.nn.numerics",
    "save": "v4jax.checkpoint.saving",
    "tiny": "v4jax.config",
}

_ROOMS = ("checkpoint", "config", "inference", "nn", "planning", "text", "train")

__version__ = "0.2.0"
__all__ = ["__version__", "nano_path", *_HOMES]  # noqa: PLE0604


def _leave_out_an_absent_tpu() -> None:
    """With libtpu installed and no accelerator, jax looks for a TPU and prints a page of warnings.

    `JAX_PLATFORMS` wins, if it is set.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    devices = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd")
    if any(glob.glob(pattern) for pattern in devices) or _has_google_device():
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # it has read the environment
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def _has_google_device() -> bool:
    for path in glob.glob("/sys/bus/pci/devices/*/vendor"):
        try:
            if pathlib.Path(path).read_text().strip() == "0x1ae0":
                return True
        except OSError:
            continue
    return False


_leave_out_an_absent_tpu()


def nano_path() -> pathlib.Path:
    """Folder of the small model that ships with the package, in the released layout."""
    return pathlib.Path(__file__).parent / "assets" / "nano"


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(f"v4jax.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'v4jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
