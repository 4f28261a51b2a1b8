"""Plain building blocks: parameters, norm, matrices, rotary embedding."""

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32, Int32

from pallas_kernels import signatures
from pallas_kernels.dispatch import Implementation
from pallas_kernels.head_rows import Turn, finish_rows
from sharding import AxisRules, ambient, collectives, summed_axis
from v4jax.config import RopeConfig, V4Config
from v4jax.nn.numerics import Numerics

_Module = TypeVar("_Module", bound=nnx.Module)
STORED = ("fp4", "fp8", "bf16", "f32", "int")


class KeyStream:
    """A stream of random keys for initial values: call it for the next one.

    Plain Python on purpose. `nnx.Rngs` counts in a variable, and under a trace each count costs
    time that grows with what has been traced (36 s for an abstract Flash, 1.5 s with this). Modules
    take either.
    """

    def __init__(self, key: jax.Array):
        self._key, self._count = key, 0

    def __call__(self) -> jax.Array:
        """The next key."""
        self._count += 1
        return jax.random.fold_in(self._key, self._count)


class RoutingBias(nnx.Variable):
    """Per-expert bias of the router's selection. Updated by a rule of its own, not by gradients."""


class HashTable(nnx.Variable):
    """Experts of each token id in a hash-routed layer. Integers, fixed."""


@dataclasses.dataclass(frozen=True)
class ModelContext:
    """What every module of a model is built from."""

    cfg: V4Config
    numerics: Numerics
    rules: AxisRules
    rngs: KeyStream  # of initial values

    def param(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        stored: str,
        init: jax.nn.initializers.Initializer | None = None,
        kind: type[nnx.Variable] = nnx.Param,
        matrix: bool | None = None,
        parts: tuple[int, ...] = (),
    ) -> nnx.Variable:
        """A float32 parameter, placed by the rules when there is an ambient mesh.

        Args:
          axes: logical axis names, one per axis of `shape`.
          stored: how the released checkpoints store it; one of `STORED`. Kept as metadata.
          init: initializer; default normal with variance 1 / fan-in (second-last axis).
          matrix: whether it multiplies activations, which optimizers ask for; default: it has two
            axes or more. Kept as metadata, since layers that are stacked have one axis more.
          parts: widths of the matrices that lie side by side in it, if it is several (their sum is the
            last axis). Optimizers that work on whole matrices take each by itself.
        """
        if init is None:
            init = nnx.initializers.normal(1 / math.sqrt(shape[-2]))
        place = ambient(self.rules.spec(*axes))
        value = init(self.rngs(), shape, jnp.float32, out_sharding=place)
        matrix = len(shape) > 1 if matrix is None else matrix
        return kind(value, stored=stored, axes=axes, matrix=matrix, parts=parts)


def copied(module: _Module) -> _Module:
    """Modules and variables anew, with the same arrays: the copy can be given others."""
    return jax.tree.map(lambda array: array, module)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis; float32 inside, one rounding at the end."""

    def __init__(self, context: ModelContext, dim: int):
        self.weight = context.param((dim,), (None,), stored="bf16", init=nnx.initializers.ones)
        self.eps, self.numerics = context.cfg.norm_eps, context.numerics

    @jax.named_scope("norm")
    @signatures.shaped
    def __call__(
        self,
        x: Float[jax.Array, "B T *heads D"],
        turn: Turn | None = None,
        rounding: str | None = None,
    ) -> Float[jax.Array, "B T *heads D"]:
        """The norm in the dtype of x; then rotated and rounded, where that is asked for."""
        return self.numerics.finish(
            x, self.weight[...], turn, norm="rms", eps=self.eps, rounding=rounding
        )


class Matrix(nnx.Module):
    """A weight that multiplies activations. Every such weight of a model is one, found by its path.

    `kernel` is [in, out], with leading axes for stacked layers and for experts. `adapter` is None, or
    a module that changes the product: `adapter(x, out)` is what the matrix then gives for inputs x
    and product out (experts: `adapter(x, out, group_sizes)`, and `numbers` of its rows' adapters where it
    is several, see `adapter_of_row`). See docs/extending.md.
    """

    kernel: nnx.Variable
    groups: int = 1  # parts of inputs, each multiplied with its own columns

    def __init__(
        self,
        context: ModelContext,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        stored: str,
        parts: tuple[int, ...] = (),
    ):
        self.kernel = context.param(shape, axes, stored=stored, parts=parts)
        self.adapter: Callable[..., jax.Array] | None = nnx.data(None)
        self.numerics = context.numerics

    @property
    def adapter_of_row(self) -> jax.Array | None:
        """[B]: which adapter each sequence has, where they have their own (`v4jax.nn.adapter_rows`)."""
        rows = getattr(self.adapter, "rows", None)
        return None if rows is None else rows[...]

    def _adapted(self, x: jax.Array, out: jax.Array, *sizes: jax.Array) -> jax.Array:
        return out if self.adapter is None else self.adapter(x, out, *sizes)


class Linear(Matrix):
    """A linear without bias that the released checkpoints store in FP8, in the activations' dtype."""

    def __init__(
        self,
        context: ModelContext,
        in_dim: int,
        out_dim: int,
        axes: tuple[str | None, str | None],
        *,
        out_width: int | None = None,  # of heads that the result is cut into next
    ):
        super().__init__(context, (in_dim, out_dim), axes, stored="fp8")
        self.out_width = out_width

    @signatures.shaped
    def __call__(self, x: Float[jax.Array, "*rows in"]) -> Float[jax.Array, "*rows out"]:
        """[..., in] -> [..., out]"""
        summed = summed_axis(self.kernel.axes)
        out = self.numerics.linear(x, self.kernel[...], summed=summed, out_width=self.out_width)
        return self._adapted(x, out)


class WideLinear(Matrix):
    """A linear without bias that the released checkpoints store in bfloat16; its result is float32.

    Inputs are not rounded. With activations in bfloat16 a float32 kernel is, as the files hold it: factors
    of bfloat16 are one pass of a TPU's matrix units, and those of float32 six.
    """

    def __init__(
        self, context: ModelContext, in_dim: int, out_dim: int, *, parts: tuple[int, ...] = ()
    ):
        axes = ("embed", None)
        super().__init__(context, (in_dim, out_dim), axes, stored="bf16", parts=parts)

    @signatures.shaped
    def __call__(self, x: Float[jax.Array, "*rows in"]) -> Float32[jax.Array, "*rows out"]:
        """[..., in] -> [..., out] float32"""
        return self._adapted(x, self.numerics.product(x, self.kernel[...]))


class GroupedLinear(Matrix):
    """Groups of inputs, each times its own matrix: `groups` matrices [in, out] side by side, in FP8.

    Inputs are heads of `in_width` channels.
    Inputs are not rounded, as in the released code.
    """

    def __init__(
        self, context: ModelContext, in_dim: int, out_dim: int, groups: int, *, in_width: int
    ):
        axes, parts = ("embed", "heads"), (out_dim,) * groups
        super().__init__(context, (in_dim, groups * out_dim), axes, stored="fp8", parts=parts)
        self.groups, self.in_width = groups, in_width

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., groups * in] -> [..., groups * out], of this device's groups."""
        groups = self.groups // collectives.axis_size("heads")
        out = self.numerics.product(
            x, self.kernel[...], groups, self.numerics.dtype, in_width=self.in_width
        )
        return self._adapted(x, out)


def rope_frequencies(cfg: V4Config, compressed: bool) -> np.ndarray:
    """[rope_head_dim / 2] float32 angles per position.

    Layers with a compressor use `compress_theta` with YaRN interpolation, for everything they
    rotate; other layers use `theta` alone. No amplitude factor in either case.
    """
    rope, dim = cfg.rope, cfg.rope_head_dim
    theta = rope.compress_theta if compressed else rope.theta
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies = np.float32(1) / np.float32(theta) ** exponents
    return _yarn(frequencies, rope, dim, theta) if compressed else frequencies


def _yarn(frequencies: np.ndarray, rope: RopeConfig, dim: int, theta: float) -> np.ndarray:
    def correction(rotations: float) -> float:
        turns = rope.yarn_original_length / (2 * math.pi * rotations)
        return dim * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(correction(rope.yarn_beta_fast)), 0)
    high = min(math.ceil(correction(rope.yarn_beta_slow)), dim - 1)
    index = np.arange(dim // 2, dtype=np.float32)
    ramp = np.clip((index - low) / np.float32(max(high - low, 1e-3)), 0, 1)
    return (frequencies / np.float32(rope.yarn_factor) * ramp + frequencies * (1 - ramp)).astype(
        np.float32
    )


@dataclasses.dataclass(frozen=True)
class Rope:
    """Angles of positions, and what rotates by them."""

    frequencies: np.ndarray  # [rope_head_dim / 2], see `rope_frequencies`
    implementation: Implementation = None

    def turn(self, positions: jax.Array, *, inverse: bool = False) -> Turn:
        """By the angles of positions [B, T], or back."""
        return Turn(positions, tuple(self.frequencies.tolist()), inverse)


@signatures.shaped
def rotate(
    x: Float[jax.Array, "B T *heads H"],
    positions: Int32[jax.Array, "B T"],
    rope: Rope,
    *,
    inverse: bool = False,
) -> Float[jax.Array, "B T *heads H"]:
    """Rotates the last `rope_head_dim` channels, in interleaved pairs; float32 inside."""
    turn = rope.turn(positions, inverse=inverse)
    return finish_rows(x, None, turn, implementation=rope.implementation)
