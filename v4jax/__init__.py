"""DeepSeek-V4 in pure JAX."""

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

__all__ = [
    "Numerics",
    "Transformer",
    "V4Config",
    "flash",
    "flash_base",
    "from_hf",
    "nano",
    "plain",
    "pro",
    "pro_base",
    "released",
    "tiny",
]
