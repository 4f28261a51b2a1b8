"""Where a model's parameters lie on a mesh, and what that means for a step: gather, reduce, check."""

import contextlib
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from pallas_kernels.formats.quantize import QuantizedArray, fp4_block
from pallas_kernels.formats.records import FP4_PLANES, FP8_WEIGHTS
from sharding import AxisRules, collectives, fitting, kept_axis
from sharding.rules import KEPT
from v4jax.config import V4Config
from v4jax.nn.rounding import BLOCKS, rounded

FP8_BLOCK, FP4_BLOCK = FP8_WEIGHTS.block, FP4_PLANES  # a device's part of an axis has whole ones


def _is_variable(x) -> bool:
    return isinstance(x, nnx.Variable)


def _map(function, tree):
    return jax.tree.map(function, tree, is_leaf=_is_variable)


def specs(state, rules: AxisRules):
    """A tree like `state` (of variables) with the `jax.P` of each array, for the ambient mesh.

    Stacked layers have a leading axis that is not cut. Block scales that a mesh does not divide are
    replicated.

    Raises:
      ValueError: a device's part of a quantised weight would not be whole blocks.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape)

    def of(variable: nnx.Variable):
        spec = rules.spec(*variable.axes)
        if isinstance(variable.get_value(), QuantizedArray):
            weight = variable.get_value()
            block = (fp4_block(weight.shape[-2]), 1) if weight.is_fp4 else weight.block
            _check_blocks(weight.shape, block, spec, sizes)

        def one(array) -> P:
            lead = [None] * (array.ndim - len(spec))
            whole = P(*lead, *spec)
            return fitting(whole, array.shape, sizes) if sizes else whole

        return variable.replace(jax.tree.map(one, variable.get_value()))

    return _map(of, state)


def _check_blocks(
    shape: tuple[int, ...], blocks: tuple[int, int], spec: P, sizes: dict[str, int]
) -> None:
    for axis, whole, block in zip((-2, -1), shape[-2:], blocks):
        names = spec[axis]
        names = (names,) if isinstance(names, str) else names or ()
        parts = math.prod(sizes.get(name, 1) for name in names)
        if parts > 1 and (whole % parts or whole // parts % block):
            label = " x ".join(f"{name}={sizes[name]}" for name in names)
            good = [n for n in range(1, whole // block + 1) if whole % (n * block) == 0]
            raise ValueError(
                f"mesh axis {label} cuts {whole} {'inputs' if axis == -2 else 'outputs'} of a "
                f"weight of {tuple(shape)} into {parts} parts, but its scales need blocks of "
                f"{block} whole: sizes that would do are {', '.join(map(str, good)) or 1}."
            )


def require_whole_blocks(state, rules: AxisRules) -> None:
    """Refuses an ambient mesh under which a device cannot round its part of a weight by itself.

    Parts that are only kept apart are joined before a layer, so blocks of those may be cut.

    Raises:
      ValueError: a device's part of a weight in FP4 or FP8 would not be whole blocks.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    for _, variable in nnx.to_flat_state(state):
        value, block = variable.get_value(), BLOCKS.get(variable.stored)
        if block is not None and not isinstance(value, QuantizedArray):
            spec = rules.spec(*(None if name in KEPT else name for name in variable.axes))
            _check_blocks(value.shape, block, spec, sizes)


def mesh_of(module: nnx.Module) -> jax.sharding.Mesh | None:
    """The mesh that a module's arrays lie on; None on one device."""
    for leaf in jax.tree.leaves(nnx.state(module)):
        if isinstance(leaf, jax.core.Tracer):  # lies nowhere, and takes long to say so
            continue
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.NamedSharding) and isinstance(sharding.mesh, jax.sharding.Mesh):
            return sharding.mesh
    return None


def on_mesh(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
    """`with on_mesh(mesh_of(model)):` programs run where the model lies."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def by_row(mesh: jax.sharding.Mesh | None, rules: AxisRules) -> jax.NamedSharding | None:
    """Where arrays lie that have a row a sequence; None on one device."""
    return None if mesh is None else jax.NamedSharding(mesh, rules.spec("batch"))


def require_placed(state, rules: AxisRules) -> None:
    """Refuses variables that lie otherwise than a step under `rules` reads them on the ambient mesh.

    The step would bring them there each time it runs: all weights, for every token.

    Raises:
      ValueError: names the first such variable, where it lies and where it should.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return
    mesh = jax.sharding.get_mesh()
    wanted = dict(nnx.to_flat_state(specs(state, rules)))
    for path, variable in nnx.to_flat_state(state):
        arrays = jax.tree.leaves(variable.get_value())
        places = jax.tree.leaves(wanted[path].get_value(), is_leaf=lambda s: isinstance(s, P))
        for array, spec in zip(arrays, places, strict=True):
            place = jax.NamedSharding(mesh, spec)
            if array.sharding.is_equivalent_to(place, array.ndim):
                continue
            found = getattr(array.sharding, "spec", array.sharding)
            raise ValueError(
                f"{'.'.join(map(str, path))} lies by {found}, and this step reads it by {spec}: it "
                "would be moved in every step. Load the model for what it is to do: "
                'v4jax.load(folder, mesh=mesh, use="serve"), or use="train".'
            )


def is_rounded(variable: nnx.Variable) -> bool:
    """Whether a float weight is computed with in the dtype of activations, whatever it is kept in."""
    return variable.stored in ("fp4", "fp8") or (variable.stored == "bf16" and variable.matrix)


def joined(
    variable: nnx.Variable, dtype: jax.typing.DTypeLike, *, as_released: bool = False
) -> jax.Array:
    """A float variable's array on this device, its parts joined if it is only kept apart.

    One that is computed with in `dtype` (`is_rounded`) travels in that, if it is the narrower one.

    Args:
      as_released: with the values that the released format would hold (`rounding.rounded`), which
        bfloat16 holds too. Parts that are not whole blocks are joined before they are rounded.
    """
    name, value, stored = kept_axis(variable.axes), variable.get_value(), variable.stored
    if name is None or not collectives.mesh_axes(name):
        return rounded(value, stored) if as_released else value
    axis = variable.axes.index(name) - len(variable.axes)
    is_late = as_released and value.shape[axis] % BLOCKS.get(stored, (1, 1))[axis] != 0
    if as_released and not is_late:
        value = rounded(value, stored)
    is_narrow = is_rounded(variable) and jnp.dtype(dtype).itemsize < value.dtype.itemsize
    travels = dtype if is_narrow and not is_late else value.dtype
    value = collectives.all_gather_as(value, travels, name, axis=axis)
    return rounded(value, stored) if is_late else value


def gathered(module, dtype: jax.typing.DTypeLike, *, as_released: bool = False):
    """A copy of a module on this device with the parts joined that are only kept apart.

    Weights that the layer would round to `dtype`, that of activations, are rounded before they travel.

    Args:
      as_released: float weights get the values that the released format would hold, see `joined`.
    """

    def whole(variable: nnx.Variable) -> nnx.Variable:
        name, value = kept_axis(variable.axes), variable.get_value()
        if not isinstance(value, QuantizedArray):
            return variable.replace(joined(variable, dtype, as_released=as_released))
        if name is None or not collectives.mesh_axes(name):
            return variable
        axis = variable.axes.index(name) - len(variable.axes)
        values = collectives.all_gather(value.values, name, axis=axis)
        scale, width = value.scale, values.shape[axis] * (2 if value.is_fp4 and axis == -2 else 1)
        if scale.shape[axis] < -(-width // value.block[axis]):
            scale = collectives.all_gather(scale, name, axis=axis)
        return variable.replace(QuantizedArray(values, scale, value.block))

    return _map(whole, module)


def entered(module, name: str):
    """A copy for work that is cut over a logical axis: gradients of what is not cut are summed."""

    def enter(variable: nnx.Variable) -> nnx.Variable:
        if name in variable.axes or variable.stored == "int":
            return variable
        return variable.replace(collectives.copy_to(variable.get_value(), name))

    return _map(enter, module)


def reduce_gradients(gradients):
    """Sums gradients over the devices that saw other tokens, unless a gather's gradient did."""
    token_axes = collectives.mesh_axes("batch", "seq")

    def reduce(variable: nnx.Variable) -> nnx.Variable:
        cut = collectives.mesh_axes(*(name for name in variable.axes if name is not None))
        axes = tuple(axis for axis in token_axes if axis not in cut)
        value = variable.get_value()
        return variable.replace(jax.lax.psum(value, axes)) if axes else variable

    return _map(reduce, gradients)


def check_mesh(
    cfg: V4Config,
    rules: AxisRules,
    *,
    batch: int | None = None,
    length: int | None = None,
    quantized: bool = False,
    sizes: dict[str, int] | None = None,
) -> None:
    """Refuses a mesh that does not divide what it cuts.

    Args:
      batch, length: sequences and tokens of a sequence, if they are known.
      quantized: weights are held in FP8 or FP4, whose blocks must stay whole.
      sizes: mesh axes and their sizes; default the ambient mesh.

    Raises:
      ValueError: names the axis, what it cuts, and the sizes that would do. Lists all problems.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape) if sizes is None else sizes
    moe, heads_dim = cfg.moe, cfg.num_heads * cfg.head_dim
    block = FP4_BLOCK if cfg.expert_format == "fp4" else FP8_BLOCK
    cuts = [
        ("vocab", "vocab_size", cfg.vocab_size, 1),
        ("embed", "embed_dim", cfg.embed_dim, FP8_BLOCK if quantized else 1),
        ("embed", "q_lora_rank", cfg.q_lora_rank, FP8_BLOCK if quantized else 1),
        ("embed", "heads_dim / o_groups", heads_dim // cfg.o_groups, FP8_BLOCK if quantized else 1),
        ("heads", "num_heads", cfg.num_heads, 1),
        ("heads", "o_groups", cfg.o_groups, 1),
        ("expert", "moe.num_experts", moe.num_experts, 1),
        ("expert_embed", "embed_dim", cfg.embed_dim, block if quantized else 1),
        ("expert_dim", "moe.expert_dim", moe.expert_dim, block if quantized else 1),
    ]
    cuts += [("batch", "batch", batch, 1)] if batch is not None else []
    cuts += [("seq", "length", length, 1)] if length is not None else []
    problems = []
    for logical, name, whole, unit in cuts:
        axes = [axis for axis in rules.mesh_axes(logical) if sizes.get(axis, 1) > 1]
        parts = math.prod(sizes[axis] for axis in axes)
        if parts == 1 or (whole % parts == 0 and whole // parts % unit == 0):
            continue
        good = [n for n in range(1, whole + 1) if whole % n == 0 and whole // n % unit == 0]
        shown = f"{', '.join(map(str, good[:12]))}{' ...' if len(good) > 12 else ''}"
        multiple = f" in multiples of {unit}" if unit > 1 else ""
        label = " x ".join(f"{axis}={sizes[axis]}" for axis in axes)
        problems.append(
            f"mesh axis {label} cuts {name}={whole} into {parts} parts{multiple}: "
            f"sizes that would do are {shown}"
        )
    if problems:
        raise ValueError("; ".join(problems) + ".")


def num_batch_parts(rules: AxisRules) -> int:
    """The number of parts that sequences are cut into by the ambient mesh."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(sizes.get(axis, 1) for axis in rules.mesh_axes("batch"))
