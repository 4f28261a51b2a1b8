"""Training data: token arrays, and files of conversations, texts and pairs."""

from v4jax.train.data.examples import Examples
from v4jax.train.data.tokens import TokenStream

Data = TokenStream | Examples

__all__ = ["Data", "Examples", "TokenStream"]
