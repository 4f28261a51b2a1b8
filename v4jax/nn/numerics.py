"""How numbers are held, rounded and computed, as named values.

`plain` simulates no rounding: it is the function that transformers computes. `released` has every
quantise-dequantise point of the released inference code, which the weights were trained with:

| point                                                     | rounding                       |
|-----------------------------------------------------------|--------------------------------|
| window and compressed KV, the unrotated channels          | e4m3, blocks of 64             |
| indexer queries and keys, after a Hadamard transform      | e2m1, blocks of 32             |
| input of every linear that is stored in FP8 or FP4        | e4m3, blocks of 128            |

A recipe says how `released` computes the linears that are stored in FP8 or FP4:

| recipe   | inputs                          | weights                    | products                |
|----------|---------------------------------|----------------------------|-------------------------|
| released | rounded to e4m3, blocks of 128  | unpacked, which is exact   | in `dtype`              |
| bf16     | not rounded                     | unpacked, which is exact   | bfloat16                |
| fp8      | codes in e4m3, blocks of 128    | codes in e4m3, 128 x 128   | e4m3, then scaled       |

All compute with float32 accumulation, and norms, hyper-connections, softmax, and what comes of the products
of router, compressors and head, in float32. Source: released `inference/model.py`; report section 5.2.1.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, Tuned, choose
from pallas_kernels.formats.quantize import QuantizedArray, cast
from pallas_kernels.formats.quantize_rows import round_rows
from pallas_kernels.formats.records import ACTIVATIONS, Format
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu, swiglu
from pallas_kernels.grouped_matmul.block_sizes import FEW_ROWS
from pallas_kernels.head_rows import Steps, Turn, finish_rows
from pallas_kernels.linear import linear, linear_swiglu, row_products
from sharding import collectives

RECIPES = ("released", "bf16", "fp8")


@dataclasses.dataclass(frozen=True)
class Numerics:
    """A numerics by name, the dtype of activations, and what computes it. Hashable."""

    name: str
    dtype: jax.typing.DTypeLike = jnp.float32
    implementation: Implementation = None  # of every operation, see pallas_kernels.dispatch
    recipe: str | None = None  # of `RECIPES`; default "released" for `released`, none for `plain`

    def __post_init__(self):
        if self.name not in ("plain", "released"):
            raise ValueError(f'numerics name={self.name!r}: expected "plain" or "released".')
        dtype = jnp.dtype(self.dtype)
        if dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"numerics dtype={dtype}: expected float32 or bfloat16.")
        recipe = self.recipe or ("released" if self.is_released else None)
        if recipe is not None and not self.is_released:
            raise ValueError(f"recipe={recipe!r} with plain numerics: only released ones have any.")
        if recipe is not None and recipe not in RECIPES:
            raise ValueError(f"{recipe=}: expected one of {RECIPES}.")
        if recipe == "bf16" and dtype != jnp.bfloat16:
            raise ValueError(f'recipe="bf16" with dtype={dtype}: expected bfloat16.')
        object.__setattr__(self, "recipe", recipe)
        named = self.implementation
        named = named.implementation if isinstance(named, Tuned) else named
        if named is not None:  # None must not ask for devices: it is a default
            choose(named)  # an unknown name, or one that cannot run here
        object.__setattr__(self, "dtype", dtype)

    @property
    def is_released(self) -> bool:
        """Rounds where the released inference code does."""
        return self.name == "released"

    def with_names(self, *names: str) -> "Numerics":
        """The same with these implementations in order of preference; sizes of kernels stay."""
        given = self.implementation
        tuned = (
            dataclasses.replace(given, implementation=names) if isinstance(given, Tuned) else names
        )
        return dataclasses.replace(self, implementation=tuned)

    def finish(
        self,
        x: jax.Array,  # [B, T, H] or [B, T, N, H]
        weight: jax.Array | None = None,  # [H], of the norm
        turn: Turn | None = None,
        *,
        norm: str | None = None,
        eps: float = 0.0,
        rounding: str | None = None,
    ) -> jax.Array:
        """Rows after norm, rotation and rounding, see `pallas_kernels.head_rows`; `plain` rounds none.

        Without rounding the Hadamard transform of keys cancels in the dot product: `plain` leaves it out.
        """
        steps = Steps(norm, eps, rounding if self.is_released else None)
        return finish_rows(x, weight, turn, steps=steps, implementation=self.implementation)

    def finish_query(self, q: jax.Array, turn: Turn, eps: float) -> jax.Array:
        """q / rms(q) of each head [B, T, N, H], rotated; `released` rounds every step to `dtype`."""
        return self.finish(q, None, turn, norm="steps" if self.is_released else "rms", eps=eps)

    def round_input(self, x: jax.Array) -> jax.Array:
        """Rounds the input [..., D] of a linear that is stored in FP8 or FP4.

        With recipe "fp8" the product does that, which needs the codes.
        """
        if self.recipe != "released":
            return x
        to = ACTIVATIONS
        return round_rows(x, to.values, to.block, implementation=self.implementation)

    def linear(
        self,
        x: jax.Array,
        w: jax.Array | QuantizedArray,
        *,
        summed: str | None = None,
        out_width: int | None = None,
    ) -> jax.Array:
        """A linear that is stored in FP8: x [..., in] times w [in, out], in `dtype`.

        Args:
          summed: the logical axis that inputs are cut over, if they are: parts are summed before the
            result is rounded.
          out_width: of heads that the result is cut into next (see `pallas_kernels.linear`).

        Block scales are powers of two, so the factors are exact in bfloat16 and only the order of
        the float32 sum differs from the released kernels.
        """
        if self.recipe == "fp8":
            out = fp8_matmul(x, w)
        else:
            is_whole = summed is None or collectives.axis_size(summed) == 1
            dtype = self.dtype if is_whole else jnp.float32
            rounding = self._rounding(True)
            out = self.product(x, w, dtype=dtype, rounding=rounding, out_width=out_width)
        return cast(collectives.reduce_from(out, summed) if summed else out, self.dtype)

    def product(
        self,
        x: jax.Array,
        w: jax.Array | QuantizedArray,
        groups: int = 1,
        dtype: jax.typing.DTypeLike = jnp.float32,
        *,
        rounding: Format | None = None,
        in_width: int | None = None,
        out_width: int | None = None,
    ) -> jax.Array:
        """x [..., groups * in] times w [in, groups * out], [..., groups * out] in `dtype`.

        Other arguments are those of `pallas_kernels.linear`.
        """
        w = w if isinstance(w, QuantizedArray) else w.astype(self.dtype)
        return linear(
            x,
            w,
            groups=groups,
            rounding=rounding,
            in_width=in_width,
            out_width=out_width,
            out_dtype=dtype,
            implementation=self.implementation,
        )

    def swiglu(
        self, x: jax.Array, w_gate: jax.Array | QuantizedArray, w_up, limit: float
    ) -> jax.Array:
        """Two linears that are stored in FP8, and what an expert makes of them; in `dtype`."""
        if self.recipe == "fp8":
            out = swiglu(self.linear(x, w_gate), self.linear(x, w_up), limit)
            return cast(out, self.dtype)
        if not isinstance(w_gate, QuantizedArray):
            w_gate, w_up = w_gate.astype(self.dtype), w_up.astype(self.dtype)
        rounding = self._rounding(True)
        return linear_swiglu(
            x, w_gate, w_up, limit=limit, rounding=rounding, implementation=self.implementation
        )

    def row_products(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """x [..., D] with every row of a table [V, D]: [..., V] float32."""
        return row_products(x, table.astype(self.dtype), implementation=self.implementation)

    def grouped_swiglu(
        self, rows, w_gate, w_up, group_sizes, row_weights, *, limit, pair=None, rounds=False
    ) -> jax.Array:
        """First half of the experts, for rows that `round_input` has rounded, or that it `rounds`."""
        args = (rows, w_gate, w_up, group_sizes, row_weights)
        return grouped_swiglu(
            *args, limit=limit, pair=pair, rounding=self._rounding(rounds), **self._products
        )

    def grouped_matmul(self, rows, w, group_sizes, *, position=None, rounds=False) -> jax.Array:
        """Second half of the experts, for rows that `round_input` has rounded, or that it `rounds`."""
        args = (rows, w, group_sizes)
        rounding = self._rounding(rounds)
        return grouped_matmul(*args, position=position, rounding=rounding, **self._products)

    def rounds_few(self, num_rows: int) -> bool:
        """Whether products round such inputs, so that nothing need do it before rows travel."""
        return self.recipe == "released" and num_rows <= max(FEW_ROWS)

    def _rounding(self, rounds: bool) -> Format | None:
        return ACTIVATIONS if rounds and self.recipe == "released" else None

    @property
    def _products(self) -> dict:
        return dict(in_fp8=self.recipe == "fp8", implementation=self.implementation)


def plain(
    dtype: jax.typing.DTypeLike = jnp.float32, *, implementation: Implementation = None
) -> Numerics:
    """No rounding simulated."""
    return Numerics("plain", dtype, implementation)


def released(
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    *,
    implementation: Implementation = None,
    recipe: str | None = None,
) -> Numerics:
    """The rounding of the released inference code."""
    return Numerics("released", dtype, implementation, recipe)
