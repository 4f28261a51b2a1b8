"""Cross-entropy of a model's next token, in blocks of tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32

from pallas_kernels import signatures
from sharding import collectives
from v4jax.nn.model import Transformer


@signatures.shaped
def cross_entropy(
    model: Transformer,
    hidden: Float[jax.Array, "B T D"],
    targets: Int32[jax.Array, "B T"],
    *,
    chunk: int = 1024,
) -> Float32[jax.Array, "B T"]:
    """-log p(target) per token. Logits are formed for `chunk` tokens at a time, twice."""
    return cross_entropy_and_normalizer(model, hidden, targets, chunk=chunk)[0]


@signatures.shaped
def cross_entropy_and_normalizer(
    model: Transformer,
    hidden: Float[jax.Array, "B T D"],
    targets: Int32[jax.Array, "B T"],
    *,
    chunk: int = 1024,
) -> tuple[Float32[jax.Array, "B T"], Float32[jax.Array, "B T"]]:
    """`cross_entropy`, and log of the sum of exp(logits) over the vocabulary, per token."""
    shape = targets.shape
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    size = min(chunk, targets.shape[0])
    padding = -targets.shape[0] % size
    hidden = jnp.pad(hidden, [(0, padding), (0, 0)]).reshape(-1, size, hidden.shape[-1])
    labels = jnp.pad(targets, (0, padding)).reshape(-1, size)

    @jax.checkpoint
    def one(args):
        hidden, labels = args
        logits = model.local_logits(hidden)  # a part of the vocabulary, if it is cut over devices
        peak = collectives.pmax(jnp.max(logits, axis=-1), "vocab")
        index = labels - collectives.axis_index("vocab") * logits.shape[-1]
        clipped = jnp.clip(index, 0, logits.shape[-1] - 1)
        chosen = jnp.take_along_axis(logits, clipped[:, None], axis=-1, mode="clip")[:, 0]
        chosen = jnp.where(clipped == index, chosen, 0.0)
        weight = jnp.sum(jnp.exp(logits - peak[:, None]), axis=-1)
        normalizer = jnp.log(collectives.reduce_from(weight, "vocab")) + peak
        return normalizer - collectives.reduce_from(chosen, "vocab"), normalizer

    losses, normalizers = jax.lax.map(one, (hidden, labels))
    count = targets.shape[0]
    return losses.reshape(-1)[:count].reshape(shape), normalizers.reshape(-1)[:count].reshape(shape)
