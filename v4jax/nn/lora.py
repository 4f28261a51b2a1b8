"""LoRA: low-rank adapters beside matrices that do not change, which may be packed in FP4 or FP8.

    out = x @ kernel + scale * (x @ A) @ B

A starts random and B at zero, so that a new adapter changes nothing. Experts have an A and a B each,
and so has each group of the grouped output projection. Adapters are modules at `Matrix.adapter`, and
follow their matrix on a mesh.

While an adapter trains, `dropout` is the share of A's inputs that are zero in a step; the others are
divided by 1 - dropout, so that means stay. Which ones follows from the step's key: a model without one, as
for evaluation and serving, drops nothing.

    model = dropping(model, key)     inside a step

Source: arXiv 2106.09685; rank-stabilised scale: arXiv 2312.03732; initial values as PEFT's.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.formats.quantize import QuantizedArray, cast, quantize_weight
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.linear import linear
from sharding import ambient, collectives, summed_axis
from sharding.rules import KEPT
from v4jax.nn.layers import Matrix, copied
from v4jax.nn.model import Transformer
from v4jax.nn.placement import entered, mesh_of, on_mesh

ATTENTION = ("attention.wq_a", "attention.wq_b", "attention.wkv", "attention.wo_b")
SHARED_EXPERT = ("shared.w1", "shared.w2", "shared.w3")
EXPERTS = ("moe.w1", "moe.w2", "moe.w3")

# Names of targets. All of them can be exported, and served side by side.
PRESETS = {
    "attention": ATTENTION,
    "attention+shared": ATTENTION + SHARED_EXPERT,
    "experts": EXPERTS,
    "all-linear": ATTENTION + SHARED_EXPERT + EXPERTS,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Which matrices get an adapter, and of what rank.

    Attributes:
      rank: columns of A.
      alpha: the scale is alpha / rank; default: 2 * rank.
      targets: one of `PRESETS` by name, or ends of the paths of matrices, as `attention.wq_a` or
        `moe.w1`, which are what the attribute then holds. Every layer that has one gets an adapter, MTP
        blocks do not.
      rslora: scale alpha / sqrt(rank) instead.
      dropout: share of A's inputs that a training step leaves out.

    Raises:
      ValueError: a rank below 1, a dropout outside of [0, 1), a name that is no preset, or no targets.
    """

    rank: int = 16
    alpha: float | None = None
    targets: str | tuple[str, ...] = "attention"
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        if not isinstance(self.rank, numbers.Integral) or self.rank < 1:
            raise ValueError(f"LoRA rank={self.rank}: expected a whole number from 1 on.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout={self.dropout}: expected a share from 0 to below 1.")
        targets = PRESETS.get(self.targets) if isinstance(self.targets, str) else self.targets
        if not targets:
            raise ValueError(
                f"LoRA targets={self.targets!r}: expected one of {', '.join(PRESETS)}, or names of "
                'matrices, say ("attention.wq_a",).'
            )
        object.__setattr__(self, "targets", tuple(targets))
        object.__setattr__(self, "alpha", 2.0 * self.rank if self.alpha is None else self.alpha)

    @property
    def scale(self) -> float:
        """Factor of the adapter's product."""
        assert self.alpha is not None  # a default was put in its place
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRAParam(nnx.Param):
    """A factor of an adapter."""


class _DropoutKey(nnx.Variable):
    """[2] uint32, the data of a random key. In a step alone: no state has one."""


class LowRank(nnx.Module):
    """The adapter of one matrix (or of its stacked layers)."""

    def __init__(self, matrix: Matrix, lora: LoRA, key: jax.Array, rules):
        kernel, groups = matrix.kernel, matrix.groups
        *lead, in_dim, out_dim = kernel.get_value().shape
        *lead_axes, in_axis, out_axis = kernel.axes
        worked_on = [None if axis in KEPT else axis for axis in (in_axis, out_axis)]
        # A group of outputs has its own A; where outputs are cut over devices, so are the groups.
        a_axes = (*lead_axes, worked_on[0], worked_on[1] if groups > 1 else None)
        b_axes = (*lead_axes, None, worked_on[1])

        def param(value, shape, axes) -> LoRAParam:
            unnamed = (None,) * (len(shape) - len(axes))  # stacked layers
            place = ambient(rules.spec(*unnamed, *axes))
            made = value(shape, place)
            return LoRAParam(made, stored="f32", axes=axes, matrix=True)

        def random(shape, place):
            bound = 1 / math.sqrt(in_dim)
            uniform = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
            return uniform if place is None else jax.sharding.reshard(uniform, place)

        def zeros(shape, place):
            return jnp.zeros(shape, jnp.float32, out_sharding=place)

        self.a = param(random, (*lead, in_dim, groups * lora.rank), a_axes)
        self.b = param(zeros, (*lead, lora.rank, out_dim), b_axes)
        self.lora, self.groups = lora, groups
        is_expert = (
            "expert" in kernel.axes
        )  # whose layer sums, and enters, for all matrices at once
        self.summed = None if is_expert else summed_axis(kernel.axes)
        self.cut = None if is_expert else worked_on[1]
        self.apart = tuple(axis for axis in ("batch", "seq", worked_on[0]) if axis)  # inputs' axes
        self.key: nnx.Variable | None = nnx.data(None)

    def __call__(self, x: jax.Array, out: jax.Array, sizes: jax.Array | None = None) -> jax.Array:
        """What `Matrix` gives: `out`, with the adapter's product of x added, in the dtype of `out`."""
        x = self._dropped(x)
        if sizes is not None:
            hidden = grouped_matmul(x, self.a[...].astype(x.dtype), sizes)
            added = grouped_matmul(hidden, self.b[...].astype(x.dtype), sizes)
            return cast(out + self.lora.scale * added.astype(jnp.float32), out.dtype)
        factors = self if self.cut is None else entered(self, self.cut)
        groups = self.groups // (collectives.axis_size("heads") if self.groups > 1 else 1)
        hidden = linear(x, factors.a[...].astype(x.dtype), groups=groups)
        if self.summed:
            hidden = collectives.reduce_from(hidden, self.summed)
        added = linear(cast(hidden, x.dtype), factors.b[...].astype(x.dtype), groups=groups)
        return cast(out + self.lora.scale * added, out.dtype)

    def _dropped(self, x: jax.Array) -> jax.Array:
        """Inputs with some left out, others on every device that holds others, and in every layer."""
        if self.key is None:
            return x
        key = jax.random.wrap_key_data(self.key[...])
        key = jax.random.fold_in(key, collectives.axis_index(*self.apart))
        kept = jax.random.bernoulli(key, 1 - self.lora.dropout, x.shape)
        return jnp.where(kept, x / (1 - self.lora.dropout), 0)

    def product(self) -> jax.Array:
        """scale * A @ B, in the shape of the matrix, float32."""
        a, b = self.a[...], self.b[...]
        a = a.reshape(*a.shape[:-1], self.groups, -1)
        b = b.reshape(*b.shape[:-1], self.groups, -1)
        product = jnp.einsum("...igr,...rgo->...igo", a, b, precision=jax.lax.Precision.HIGHEST)
        return self.lora.scale * product.reshape(*product.shape[:-2], -1)


def matrices(model: nnx.Module) -> Iterator[tuple[str, Matrix]]:
    """Every matrix with its path, as `stages.0.blocks.0.attention.wq_a`, in the order of the model."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Matrix):
            yield ".".join(map(str, path)), module


def add_lora(model: Transformer, lora: LoRA, *, seed: int = 0) -> Transformer:
    """A copy of the model, with the same arrays, that has new adapters.

    Raises:
      ValueError: a target that no matrix's path ends with; lists those there are.
    """
    model = copied(model)
    found = [(path, m) for path, m in matrices(model) if not path.startswith("mtp.")]
    ends = {
        target: [m for path, m in found if f".{path}".endswith(f".{target}")]
        for target in lora.targets
    }
    unknown = [target for target, ones in ends.items() if not ones]
    if unknown:
        known = sorted({path.split(".", 4)[-1] for path, _ in found})
        raise ValueError(
            f"LoRA target {unknown[0]!r}: no matrix's path ends with it. Known: {', '.join(known)}."
        )
    targets = {id(m): m for ones in ends.values() for m in ones}
    keys = jax.random.split(jax.random.key(seed), len(targets))
    with on_mesh(mesh_of(model)):
        for key, matrix in zip(keys, targets.values()):
            matrix.adapter = LowRank(matrix, lora, key, model.rules)
    return model


def lora_of(model: nnx.Module) -> LoRA:
    """What the adapters of a model are.

    Raises:
      ValueError: it has none.
    """
    for _, matrix in matrices(model):
        if isinstance(matrix.adapter, LowRank):
            return matrix.adapter.lora
    raise ValueError(
        "the model has no adapter: expected one from v4jax.checkpoint.load_adapter(model, folder), or "
        "trainable=v4jax.LoRA(rank=16) for a new one."
    )


def drops(model: nnx.Module) -> bool:
    """Whether an adapter of the model has dropout."""
    adapters = (matrix.adapter for _, matrix in matrices(model))
    return any(isinstance(one, LowRank) and one.lora.dropout > 0 for one in adapters)


def dropping(model: Transformer, key: jax.Array) -> Transformer:
    """The model, whose adapters leave out inputs by a key. Inside a step; changes the model.

    Each matrix draws by itself, as does each of its stacked layers.
    """
    for number, (_, matrix) in enumerate(matrices(model)):
        adapter = matrix.adapter
        if isinstance(adapter, LowRank) and adapter.lora.dropout:
            shape, own = adapter.a.get_value().shape, jax.random.fold_in(key, number)
            stacked = shape[: len(shape) - len(adapter.a.axes)]
            keys = jax.random.split(own, stacked) if stacked else own
            adapter.key = _DropoutKey(jax.random.key_data(keys), axes=(None,), stored="int")
    return model


def merge_lora(model: Transformer) -> Transformer:
    """A copy without adapters, whose matrices have their products added.

    A packed matrix is packed again, which rounds: the small changes of an adapter are lost in FP4 in
    part. `to_float` first keeps them.
    """
    model = copied(model)
    with on_mesh(mesh_of(model)):
        for _, matrix in matrices(model):
            if isinstance(matrix.adapter, LowRank):
                matrix.kernel.set_value(_merged(matrix.kernel, matrix.adapter))
                matrix.adapter = nnx.data(None)
    return model


def _merged(kernel: nnx.Variable, adapter: LowRank) -> jax.Array | QuantizedArray:
    value = kernel.get_value()

    @functools.partial(jax.jit, static_argnums=2)
    def packed(value, adapter, fmt):
        return quantize_weight(value.dequantize() + adapter.product(), fmt)

    if isinstance(value, QuantizedArray):
        return packed(value, adapter, "fp4" if value.is_fp4 else "fp8")
    return (value.astype(jnp.float32) + adapter.product()).astype(value.dtype)
