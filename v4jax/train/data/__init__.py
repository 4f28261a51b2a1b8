"""Training data: token arrays, and files of conversations, texts and pairs."""

from v4jax.train.data.examples import Examples
from v4jax.train.data.pairs import PreferencePairs
from v4jax.train.data.tokens import TokenStream

Data = TokenStream | Examples | PreferencePairs

__all__ = ["Data", "Examples", "PreferencePairs", "TokenStream"]
