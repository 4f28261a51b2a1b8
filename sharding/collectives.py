"""One program for every device of a mesh: collectives by the name of a logical axis.

    with jax.set_mesh(make_mesh(fsdp=2, expert=2, tensor=2)):
        step = jax.jit(per_device(fn, rules, in_specs, out_specs))

`fn` sees the part of each array that its device holds. Layers say which logical axis a sum or a
gather runs over ("heads", "expert", "seq" ...); the rules given to `per_device` say which axes of the mesh
that is. Without a mesh, or where those axes have one device, the functions below do nothing, so that
a layer is written once.

Gradients are taken inside `fn`, of the device's own share of the loss: the shares of all devices
that hold different tokens add up to the loss, and devices that hold the same tokens compute the same
share. Every collective below states its gradient under that rule (as in Megatron-LM, arXiv
1909.08053, section 3).
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from sharding.rules import AxisRules

_Tree = TypeVar("_Tree")
_rules: contextvars.ContextVar[AxisRules | None] = contextvars.ContextVar("rules", default=None)


def per_device(fn: Callable, followed: AxisRules, in_specs, out_specs) -> Callable:
    """`fn` on every device of the ambient mesh, under rules; `fn` itself without a mesh.

    Args:
      fn: positional arguments only.
      followed: the rules.
      in_specs, out_specs: pytrees of `jax.P` (or prefixes of them) of arguments and results.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return fn

    @functools.wraps(fn)
    def on_device(*args):
        with under(followed):
            return fn(*args)

    mapped = jax.shard_map(on_device, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def call(*args):
        return mapped(*reshard(args, in_specs))

    return call


def reshard(tree, specs):
    """Arrays moved to where `specs` (a tree, or a prefix of it) wants them."""

    def one(spec, part):
        return jax.tree.map(lambda x: jax.sharding.reshard(x, spec), part)

    return jax.tree.map(one, specs, tree, is_leaf=lambda s: isinstance(s, jax.P))


@contextlib.contextmanager
def under(followed: AxisRules):
    """Rules that the functions of this module follow meanwhile."""
    token = _rules.set(followed)
    try:
        yield
    finally:
        _rules.reset(token)


def rules() -> AxisRules | None:
    """The rules that are followed now. What is traced once for several programs depends on them."""
    return _rules.get()


def mesh_axes(*names: str) -> tuple[str, ...]:
    """The mesh axes of several devices behind logical axes, in order and each once."""
    followed = rules()
    if followed is None:
        return ()
    shape = jax.sharding.get_abstract_mesh().shape
    found = dict.fromkeys(axis for name in names for axis in followed.mesh_axes(name))
    return tuple(axis for axis in found if shape.get(axis, 1) > 1)


def dispatch_method() -> str:
    """How rows get to the experts of other devices: `AxisRules.dispatch`."""
    followed = rules()
    return "gather" if followed is None else followed.dispatch


def axis_size(*names: str) -> int:
    """Devices that logical axes are cut over."""
    return size_of_axes(mesh_axes(*names))


def size_of_axes(axes: tuple[str, ...]) -> int:
    """Devices of mesh axes."""
    return jax.lax.axis_size(axes) if axes else 1


def axis_index(*names: str) -> jax.Array:
    """This device's number among them, [] int32."""
    axes = mesh_axes(*names)
    return jax.lax.axis_index(axes) if axes else jnp.zeros((), jnp.int32)


def psum(x, *names: str):
    """Sum over devices, of arrays that carry no gradient."""
    axes = mesh_axes(*names)
    return jax.lax.psum(jax.lax.stop_gradient(x), axes) if axes else jax.lax.stop_gradient(x)


def pmax(x: jax.Array, *names: str) -> jax.Array:
    """Maximum over devices, without gradient."""
    axes = mesh_axes(*names)
    x = jax.lax.stop_gradient(x)
    return jax.lax.pmax(x, axes) if axes else x


def copy_to(x: _Tree, *names: str) -> _Tree:
    """Marks where arrays that devices share enter work that is cut over them. x itself.

    The gradient is the sum of the devices' parts.
    """
    return copy_to_over(x, mesh_axes(*names))


def copy_to_over(x: _Tree, axes: tuple[str, ...]) -> _Tree:
    """`copy_to` over mesh axes."""
    return _enter(x, axes) if axes else x


def reduce_from(x: jax.Array, *names: str) -> jax.Array:
    """The sum of the devices' parts of a result, on each of them. Its gradient goes to each part."""
    return reduce_from_over(x, mesh_axes(*names))


def reduce_from_over(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`reduce_from` over mesh axes."""
    return _leave(x, axes) if axes else x


def all_gather(x: jax.Array, *names: str, axis: int) -> jax.Array:
    """The devices' parts joined along `axis`. A part's gradient is the sum of what it got."""
    return all_gather_over(x, mesh_axes(*names), axis)


def all_gather_over(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """`all_gather` over mesh axes."""
    return _gather(x, axes, axis % x.ndim) if axes else x


def all_gather_together(
    x: jax.Array, numbers: jax.Array, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """Float32 and int32 arrays of all devices in one exchange: [..] -> [n, ..], both of one shape."""
    return _gather_together(x, numbers, axes)


def all_gather_as(x: jax.Array, dtype: jax.typing.DTypeLike, *names: str, axis: int) -> jax.Array:
    """`all_gather` of x rounded to `dtype`, which travels. Gradients of the parts sum in x's dtype."""
    axes = mesh_axes(*names)
    return _gather_as(x, axes, axis % x.ndim, dtype) if axes else x.astype(dtype)


def take_rows(table: jax.Array, index: jax.Array, *names: str) -> jax.Array:
    """Rows `index` [B, ...] of a table [V, D / n] whose columns lie on n devices: [B, ..., D].

    Rows travel, not the table: the devices tell each other what they want, and send their columns of
    it. Indices may differ between devices.
    """
    axes = mesh_axes(*names)
    if not axes:
        return table[index]
    rows = table[jax.lax.all_gather(index, axes)]  # [n, B, ..., D / n]
    return jax.lax.all_to_all(
        *(rows, axes), split_axis=0, concat_axis=rows.ndim - 1, tiled=True
    ).reshape(*index.shape, -1)


def psum_scatter_over(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """The sum over devices, of which each keeps its part along `axis`: what `all_gather` undoes."""
    return _scatter_sum(x, axes, axis % x.ndim) if axes else x


def row_at(x: jax.Array, at: jax.Array, *names: str) -> jax.Array:
    """Row `at` [B] of sequences [B, L, ...] that are cut over devices: [B, ...]. No gradient."""
    length = x.shape[1]
    local = at - axis_index(*names) * length
    index = local.reshape(-1, *[1] * (x.ndim - 1))
    found = jnp.take_along_axis(x, index, axis=1, mode="clip")[:, 0]
    mine = ((local >= 0) & (local < length)).reshape(-1, *[1] * (x.ndim - 2))
    return psum(jnp.where(mine, found, 0), *names)


def halo(x: jax.Array, count: int, *names: str) -> jax.Array:
    """The last `count` rows of what precedes this device's part of a sequence; zeros before it.

    Args:
      x: [B, L, ...], the device's part. `count` may exceed L.

    Returns:
      [B, count, ...]. Differentiable.
    """
    axes, length = mesh_axes(*names), x.shape[1]
    parts = []
    devices = size_of_axes(axes)
    for hop in range(1, min(-(-count // length), devices - 1) + 1):
        rows = min(length, count - (hop - 1) * length)
        moves = [(source, source + hop) for source in range(devices - hop)]
        parts.append(jax.lax.ppermute(x[:, length - rows :], axes, moves))
    missing = count - sum(part.shape[1] for part in parts)
    parts.append(jnp.zeros((x.shape[0], missing, *x.shape[2:]), x.dtype))
    return jnp.concatenate(parts[::-1], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _enter(x, axes):
    return x


_enter.defvjp(lambda x, axes: (x, None), lambda axes, _, d: (jax.lax.psum(d, axes),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _leave(x, axes):
    return jax.lax.psum(x, axes)


_leave.defvjp(lambda x, axes: (jax.lax.psum(x, axes), None), lambda axes, _, d: (d,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x, axes, axis):
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_as(x, axes, axis, dtype):
    # Of a layer's part of stacked weights: without this XLA rounds the whole stack before the loop.
    x = jax.lax.optimization_barrier(x)
    return jax.lax.all_gather(x.astype(dtype), axes, axis=axis, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _scatter_sum(x, axes, axis):
    return jax.lax.psum_scatter(x, axes, scatter_dimension=axis, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gather_together(x, numbers, axes):
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    both = jnp.concatenate([bits, numbers], axis=-1)[None]
    bits, numbers = jnp.split(jax.lax.all_gather(both, axes, axis=0, tiled=True), 2, axis=-1)
    return jax.lax.bitcast_convert_type(bits, jnp.float32), numbers


_gather_together.defvjp(
    lambda x, numbers, axes: (_gather_together(x, numbers, axes), None),
    lambda axes, _, d: (jax.lax.psum_scatter(d[0], axes, scatter_dimension=0, tiled=True)[0], None),
)
_gather.defvjp(
    lambda x, axes, axis: (_gather(x, axes, axis), None),
    lambda axes, axis, _, d: (_scatter_sum(d, axes, axis),),
)
_gather_as.defvjp(
    lambda x, axes, axis, dtype: (_gather_as(x, axes, axis, dtype), jnp.zeros((), x.dtype)),
    lambda axes, axis, dtype, like, d: (_scatter_sum(d.astype(like.dtype), axes, axis),),
)
_scatter_sum.defvjp(
    lambda x, axes, axis: (_scatter_sum(x, axes, axis), None),
    lambda axes, axis, _, d: (_gather(d, axes, axis),),
)
