"""An optimizer's state in 8 bits a number, with a scale for every 256 of them.

    size = (|code| / levels)**p * scale     scale: the largest of 256 values along the second-last axis

A first moment (or Muon's momentum) has a sign and 127 levels, p = 2. A second moment, which optax calls
`nu`, has 255 levels and p = 4: it holds squares, and its root then has the same p. Levels lie close where
values are small, so that what is far below the largest is not lost: a moment is held down to 1 / 16,000 of
the block's largest, a root of a second moment to 1 / 65,000. A second moment that is not 0 never becomes 0,
which would make a step as large as 1 / eps.

Rounding is stochastic: up or down, such that the mean is the value. A mean that takes in a twentieth of
what is new changes by less than half of a level, and to nearest it would stay where it is for ever. What
rounds up follows from the step, the array and the place in it alone, so that a run that goes on computes
the same bits, and so does another mesh.

A block is 256 inputs of one output of a matrix: so blocks are whole tiles of a TPU's memory. They are
counted over the whole array, whatever a mesh does with it. Where a device's part of that axis is whole
blocks, it has their scales; where it is not, the largest values of parts of blocks are exchanged and every
device along that axis has all scales. Vectors and small arrays stay float32, and so do tables of the
vocabulary, whose rows have gradients of very different sizes.

Source: block-wise states, arXiv 2110.02861; the levels here are another choice.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sharding.rules import fitting

BLOCK = 256  # values with one scale
SMALLEST = 4096  # arrays of fewer numbers stay float32


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Packed:
    """Numbers [..., m, n] in 8 bits."""

    codes: jax.Array  # [..., m, n], int8 of a moment, uint8 of a second moment
    scale: jax.Array  # [..., ceil(m / 256), n] float32


class EightBitState(NamedTuple):
    """What a rule keeps between steps."""

    step: jax.Array  # [] int32, steps taken
    state: optax.OptState  # with `Packed` in the place of large arrays


def in_eight_bits(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """A rule whose state is packed between steps.

    Args:
      rule: one that treats every number by itself, as `optax.adam`: it gets arrays in other shapes.
    """

    def init(params):
        state = rule.init(params)
        pairs = zip(jax.tree.leaves(state), _are_packed(state), strict=True)
        views = [_view(x) if is_packed else None for x, is_packed in pairs]
        step = jnp.zeros((), jnp.int32)
        return EightBitState(step, _packed(_viewed(state), _scales(views), step))

    def update(updates, packed, params=None, **extra):
        viewed, params = _viewed(updates), _viewed(params)
        _, wide = rule.update(viewed, _unpacked(packed.state), params, **extra)
        # Once more with the scales at hand: both times what is wide stays within loops over the numbers.
        # Kept until the largest of its block is known, it would be in memory.
        before = jax.tree.leaves(packed.state, is_leaf=_is_packed)
        pairs = zip(jax.tree.leaves(wide), before, strict=True)
        scales = _scales([x if _is_packed(old) else None for x, old in pairs])
        once = (viewed, packed.state, scales)
        viewed, state, scales = jax.lax.optimization_barrier(once)
        viewed, wide = rule.update(viewed, _unpacked(state), params, **extra)
        step = packed.step + 1
        after = EightBitState(step, _packed(wide, scales, step))
        viewed, after = jax.lax.optimization_barrier((viewed, after))
        return jax.tree.map(lambda x, old: x.reshape(old.shape), viewed, updates), after

    return optax.GradientTransformation(init, update)


def _is_packed(x) -> bool:
    return isinstance(x, Packed)


def _unpacked(state: optax.OptState) -> optax.OptState:
    """With views in the place of packed arrays."""
    return jax.tree.map(lambda x: unpack(x) if _is_packed(x) else x, state, is_leaf=_is_packed)


def _viewed(tree):
    """With views in the place of arrays that are packed in a state."""
    leaves, structure = jax.tree.flatten(tree)
    pairs = zip(leaves, _are_packed(tree), strict=True)
    return jax.tree.unflatten(structure, [_view(x) if packed else x for x, packed in pairs])


def _are_packed(tree) -> list[bool]:
    """Of each array of a state, or of what it belongs to."""

    def one(x: jax.Array) -> bool:
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        return bool(is_float and x.ndim > 1 and x.size >= SMALLEST)

    def of(node):
        if not isinstance(node, nnx.Variable):
            return one(node)
        is_table = "vocab" in getattr(node, "axes", ())
        return node.replace(jax.tree.map(lambda x: one(x) and not is_table, node.get_value()))

    flags = jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return jax.tree.leaves(flags)


def _scales(views: list[jax.Array | None]) -> list[jax.Array | None]:
    return [None if view is None else scale_of(view) for view in views]


def _packed(
    state: optax.OptState, scales: list[jax.Array | None], step: jax.Array
) -> optax.OptState:
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    found = []
    for number, ((path, x), scale) in enumerate(zip(leaves, scales, strict=True)):
        if scale is not None:
            is_square = any(getattr(key, "name", None) == "nu" for key in path)
            seed = _mixed(step.astype(jnp.uint32) * jnp.uint32(2**16 + 1) + jnp.uint32(number))
            x = pack(x, scale, seed, is_square=is_square)
        found.append(x)
    return jax.tree.unflatten(tree, found)


def _view(x: jax.Array) -> jax.Array:
    """[..., m, n] -> [..., groups, size, n]: the numbers of a group are in one block and on one device."""
    *lead, m, n = x.shape
    sharding = jax.typeof(x).sharding
    size = math.gcd(m // _parts(sharding, -2), BLOCK)
    view = x.reshape(*lead, m // size, size, n)
    return jax.lax.optimization_barrier(
        view
    )  # XLA would work on the other shape, and copy in between


def _parts(sharding: jax.NamedSharding, axis: int) -> int:
    """Into how many parts an axis is cut."""
    axes = sharding.spec[axis] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def scale_of(view: jax.Array) -> jax.Array:
    """[..., groups, size, n] -> [..., ceil(m / 256), n], the largest size of each block."""
    *lead, groups, size, n = view.shape
    largest, spec = jnp.max(jnp.abs(view), axis=-2), _spec_of_scale(view)
    if not _is_whole(view):
        largest = _along_one_device(largest, spec)
    short = [*[(0, 0)] * len(lead), (0, -groups % (BLOCK // size)), (0, 0)]
    largest = jnp.pad(largest, short).reshape(*lead, -1, BLOCK // size, n)
    return _placed(jnp.max(largest, axis=-2), spec)


def pack(view: jax.Array, scale: jax.Array, seed: jax.Array, *, is_square: bool) -> Packed:
    """Rounds [..., groups, size, n].

    Args:
      scale: `scale_of(view)`.
      seed: [] uint32, of what is rounded up.
      is_square: a second moment, with no number below 0.
    """
    scales, size = _of_groups(scale, view), jnp.abs(view)
    ratio = size / jnp.where(scales > 0, scales, 1)
    levels = _levels(is_square)
    root = jnp.sqrt(jnp.sqrt(ratio)) if is_square else jnp.sqrt(ratio)
    low = jnp.clip(jnp.floor(root * levels), 0, levels - 1)
    below, above = (_of_level(level, is_square) for level in (low, low + 1))
    code = low + (_noise(view, seed) < (ratio - below) / (above - below))
    if is_square:
        codes = jnp.maximum(code, size > 0).astype(jnp.uint8)
    else:
        codes = (jnp.sign(view) * code).astype(jnp.int8)
    *lead, groups, width, n = view.shape
    return Packed(codes.reshape(*lead, groups * width, n), scale)


def unpack(packed: Packed) -> jax.Array:
    """The numbers, float32 [..., groups, size, n]."""
    view, is_square = _view(packed.codes), packed.codes.dtype == jnp.uint8
    level = view.astype(jnp.float32)
    size = _of_level(level, is_square) * _of_groups(packed.scale, view)
    return size if is_square else jnp.sign(level) * size


def _levels(is_square: bool) -> int:
    return 255 if is_square else 127


def _of_level(level: jax.Array, is_square: bool) -> jax.Array:
    """What a level stands for, relative to the block's largest."""
    root = jnp.square(level / _levels(is_square))
    return jnp.square(root) if is_square else root


def _is_whole(view: jax.Array) -> bool:
    """Whether a device's part of the axis is whole blocks, or all of it."""
    parts = _parts(jax.typeof(view).sharding, -3)
    groups, size, _ = view.shape[-3:]
    return parts == 1 or groups // parts * size % BLOCK == 0


def _spec_of_scale(view: jax.Array) -> jax.P:
    spec = jax.typeof(view).sharding.spec
    return jax.P(*spec[:-2], spec[-1])


def _of_groups(scale: jax.Array, view: jax.Array) -> jax.Array:
    """[..., ceil(m / 256), n] -> [..., groups, 1, n], of the groups of a view."""
    *lead, groups, size, n = view.shape
    if size == BLOCK:
        return scale[..., None, :]
    spec = _spec_of_scale(view)
    if not _is_whole(view):
        scale = _along_one_device(scale, spec)
    each = jnp.broadcast_to(scale[..., None, :], (*scale.shape[:-1], BLOCK // size, n))
    return _placed(each.reshape(*lead, -1, n)[..., :groups, :], spec)[..., None, :]


def _along_one_device(x: jax.Array, spec: jax.P) -> jax.Array:
    """x with its second-last axis whole on each device."""
    return jax.sharding.reshard(x, jax.P(*spec[:-2], None, spec[-1]))


def _placed(x: jax.Array, spec: jax.P) -> jax.Array:
    """x by `spec`, as far as that divides it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.sharding.reshard(x, fitting(spec, x.shape, dict(mesh.shape)))


def _noise(x: jax.Array, seed: jax.Array) -> jax.Array:
    """Numbers from 0 to below 1 in the shape of x, of the place in it and the seed."""
    place = jnp.zeros((), jnp.uint32)
    where = jax.typeof(x).sharding
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=where)
        place = place + iota * jnp.uint32(stride)
    bits = _mixed(_mixed(place) ^ seed)
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def _mixed(x: jax.Array) -> jax.Array:
    """A hash of 32 bits (Wellons, "lowbias32")."""
    x = (x ^ x >> 16) * jnp.uint32(0x7FEB352D)
    x = (x ^ x >> 15) * jnp.uint32(0x846CA68B)
    return x ^ x >> 16
