"""Muon's direction: momentum whose matrices are made orthogonal, each by itself.

    X = M / |M|
    X = a X + b (X X^T) X + c (X X^T)^2 X      ten times: M = U S V^T becomes about U V^T
    update = rms * sqrt(max(in, out)) * X      entries of U V^T have RMS 1 / sqrt(max(in, out))

A matrix is what the report optimizes independently: one of each layer, one of each expert, one of each
group of the grouped output projection. A variable's `parts` says which lie side by side in it.

`optax.contrib.muon` was not taken: it cannot tell matrices that lie side by side, it needs a mesh whose
axes are not Explicit, and its AdamW has Nesterov's momentum too.

Source: report section 2.4 and algorithm 1; scale: arXiv 2502.16982, section 2.2.
"""

import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sharding import TRAIN, collectives
from v4jax.nn.lora import LoRAParam

AT_ONCE = 2**24  # numbers of matrices that are made orthogonal together
STEPS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2  # a, b and c of each step


def is_orthogonalized(variable: nnx.Variable) -> bool:
    """Whether Muon takes a variable: matrices but embedding, head and factors of adapters."""
    return (
        variable.matrix
        and not isinstance(variable, LoRAParam)
        and "vocab" not in getattr(variable, "axes", ())
    )


def orthogonalize(update_rms: float) -> optax.GradientTransformation:
    """Updates in the directions of `newton_schulz`, of entries with this RMS. Has no state.

    Updates are variables. On a mesh the devices that have parts of the same matrices exchange them, so
    that each works on whole ones, and exchange the results.
    """

    def of(variable: nnx.Variable) -> nnx.Variable:
        if isinstance(variable.get_value(), optax.MaskedNode):  # another rule's
            return variable
        parts = getattr(variable, "parts", ())

        def one(matrix: jax.Array) -> jax.Array:
            return _of_parts(matrix, parts, update_rms)

        return variable.replace(_spread(one, variable.get_value()))

    def update(updates, state, params=None):
        del params
        return jax.tree.map(of, updates, is_leaf=lambda x: isinstance(x, nnx.Variable)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def newton_schulz(matrices: jax.Array) -> jax.Array:
    """[..., n, m] -> about U V^T of each matrix's U S V^T, float32; zeros stay zeros.

    Singular values above 2e-4 of the matrix's norm become 1 to 1e-3; smaller ones may stay below it.
    Scales do not matter, also those whose squares float32 does not hold.
    """
    x = matrices.astype(jnp.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    tiny = jnp.finfo(jnp.float32).tiny
    x = x / jnp.maximum(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True), tiny)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), tiny)

    def step(x, coefficients):
        a, b, c = coefficients
        gram = x @ jnp.swapaxes(x, -1, -2)
        return a * x + (b * gram + c * gram @ gram) @ x, None

    x, _ = jax.lax.scan(step, x, jnp.array(STEPS, jnp.float32))
    return jnp.swapaxes(x, -1, -2) if tall else x


def _of_parts(matrix: jax.Array, parts: tuple[int, ...], update_rms: float) -> jax.Array:
    """Directions of [..., n, m], whose columns are several matrices, of these widths."""
    *lead, n, m = matrix.shape
    parts = parts or (m,)
    if len(set(parts)) > 1:
        ends = [sum(parts[: i + 1]) for i in range(len(parts) - 1)]
        pieces = jnp.split(matrix, ends, axis=-1)
        return jnp.concatenate([_of_parts(piece, (), update_rms) for piece in pieces], axis=-1)
    x = jnp.moveaxis(matrix.reshape(*lead, n, len(parts), parts[0]), -2, -3)
    x = update_rms * math.sqrt(max(n, parts[0])) * newton_schulz(x)
    return jnp.moveaxis(x, -3, -2).reshape(matrix.shape)


def _spread(function, matrices: jax.Array) -> jax.Array:
    """`function` of every matrix of [..., n, m], which has them whole wherever their parts lie."""
    if jax.sharding.get_abstract_mesh().empty:
        return _each(function, matrices)
    place = jax.typeof(matrices).sharding.spec
    rows, columns = ((axes,) if isinstance(axes, str) else axes or () for axes in place[-2:])

    def on_device(part):
        """A device has a part of each matrix, gets whole ones of some, and gives their parts back."""
        x = part.reshape(-1, *part.shape[-2:])
        devices = collectives.size_of_axes(rows) * collectives.size_of_axes(columns)
        x = jnp.pad(x, [(0, -len(x) % devices), (0, 0), (0, 0)])
        for axes, axis in ((rows, 1), (columns, 2)):
            x = _exchange(x, axes, 0, axis)
        x = _each(function, x)
        for axes, axis in ((columns, 2), (rows, 1)):
            x = _exchange(x, axes, axis, 0)
        return x[: math.prod(part.shape[:-2])].reshape(part.shape)

    return collectives.per_device(on_device, TRAIN, (place,), place)(matrices)


def _exchange(x: jax.Array, axes: tuple[str, ...], split: int, joined: int) -> jax.Array:
    """Cut along one axis instead of another, over mesh axes."""
    return jax.lax.all_to_all(x, axes, split, joined, tiled=True) if axes else x


def _each(function, matrices: jax.Array) -> jax.Array:
    """At once where they are small, else one by one, which needs no more copies than of one."""
    if matrices.ndim == 2 or matrices.size <= AT_ONCE:
        return function(matrices)
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    return jax.lax.map(function, flat).reshape(matrices.shape)
