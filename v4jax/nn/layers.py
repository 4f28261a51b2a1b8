"""Plain building blocks: parameters, norm, linear, rotary embedding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.formats.quantize import cast
from sharding import AxisRules, ambient
from v4jax.config import RopeConfig, V4Config
from v4jax.nn.numerics import Numerics, rms_normalize

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


def param(
    rngs: KeyStream,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    rules: AxisRules,
    *,
    stored: str,
    init: jax.nn.initializers.Initializer | None = None,
    kind: type[nnx.Variable] = nnx.Param,
    matrix: bool | None = None,
) -> nnx.Variable:
    """A float32 parameter, placed by `rules` when there is an ambient mesh.

    Args:
      axes: logical axis names, one per axis of `shape`.
      stored: how the released checkpoints store it; one of `STORED`. Kept as metadata.
      init: initializer; default normal with variance 1 / fan-in (second-last axis).
      matrix: whether it multiplies activations, which optimizers and adapters ask for; default: it
        has two axes or more. Kept as metadata, since layers that are stacked have one axis more.
    """
    if init is None:
        init = nnx.initializers.normal(1 / math.sqrt(shape[-2]))
    value = init(rngs(), shape, jnp.float32, out_sharding=ambient(rules.spec(*axes)))
    matrix = len(shape) > 1 if matrix is None else matrix
    return kind(value, stored=stored, axes=axes, matrix=matrix)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis; float32 inside, one rounding at the end."""

    def __init__(self, dim: int, eps: float, rules: AxisRules, *, rngs: KeyStream):
        ones = nnx.initializers.ones
        self.weight = param(rngs, (dim,), (None,), rules, stored="bf16", init=ones)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D] in the dtype of x."""
        return cast(self.weight[...].astype(jnp.float32) * rms_normalize(x, self.eps), x.dtype)


class Linear(nnx.Module):
    """A linear without bias that the released checkpoints store in FP8."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        numerics: Numerics,
        rules: AxisRules,
        *,
        axes: tuple[str | None, str | None],
        rngs: KeyStream,
    ):
        self.kernel = param(rngs, (in_dim, out_dim), axes, rules, stored="fp8")
        self.summed = axes[0] if axes[0] in ("heads", "expert_dim") else None
        self.numerics = numerics

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]"""
        return self.numerics.linear(x, self.kernel[...], summed=self.summed)


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


def rotate(
    x: jax.Array,  # [B, T, ..., H]
    positions: jax.Array,  # [B, T] int32
    frequencies: np.ndarray,  # [rope_head_dim / 2]
    *,
    inverse: bool = False,
) -> jax.Array:
    """Rotates the last `rope_head_dim` channels, in interleaved pairs; float32 inside."""
    dim = 2 * len(frequencies)
    angles = positions[..., None].astype(jnp.float32) * frequencies  # [B, T, dim / 2]
    angles = jnp.expand_dims(angles, tuple(range(2, x.ndim - 1)))  # heads share them
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    sin = -sin if inverse else sin
    tail = x[..., -dim:].astype(jnp.float32).reshape(*x.shape[:-1], dim // 2, 2)
    a, b = tail[..., 0], tail[..., 1]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    turned = cast(turned.reshape(*x.shape[:-1], dim), x.dtype)
    return jnp.concatenate([x[..., :-dim], turned], axis=-1)
