"""DeepSeek-V4 in pure JAX.

    from v4jax import checkpoint
    from v4jax.generate import Generator
    from v4jax.tokenizer import Tokenizer

    generator = Generator(checkpoint.load(v4jax.nano_path(), v4jax.released()))
    tokenizer = Tokenizer(v4jax.nano_path())

Modules: `config`, `numerics`, `model`, `cache`, `checkpoint`, `encoding`, `tokenizer`, `generate`,
`sampling`, `scoring`, `quantization`, `summary`, `train`.
"""

import pathlib

from v4jax.config import (
    V4Config,
    flash,
    flash_base,
    from_hf,
    nano,
    pro,
    pro_base,
    tiny,
)
from v4jax.model import Transformer
from v4jax.numerics import Numerics, plain, released


def nano_path() -> pathlib.Path:
    """Folder of the small model that ships with the package, in the released layout."""
    return pathlib.Path(__file__).parent / "assets" / "nano"


__all__ = [
    "Numerics",
    "Transformer",
    "V4Config",
    "flash",
    "flash_base",
    "from_hf",
    "nano",
    "nano_path",
    "plain",
    "pro",
    "pro_base",
    "released",
    "tiny",
]
