"""Matmuls of rows sorted by expert with one weight matrix per expert.

Rows of expert e are the `group_sizes[e]` rows after those of experts 0 .. e-1; results of rows past the
last expert's are zero. Weights are float [E, in, out], or a `QuantizedArray` of that logical shape (FP8 or
packed FP4), which is unpacked one expert at a time and gets no gradient. Products accumulate in float32.

Source: report section 2.4; clamp and place of the routing weight as in the released
`inference/model.py` (Expert).
"""

import jax
from jaxtyping import Float, Float32, Int32

from pallas_kernels import checks
from pallas_kernels.dispatch import Implementation, choose, operation
from pallas_kernels.formats import quantize
from pallas_kernels.formats.quantize import QuantizedArray
from pallas_kernels.formats.quantize_rows import round_rows
from pallas_kernels.formats.records import Format
from pallas_kernels.grouped_matmul import order, reference, vjp, xla


@operation
def grouped_matmul(
    x: Float[jax.Array, "P inputs"],  # rows sorted by expert
    w: Float[jax.Array, "E inputs outputs"] | QuantizedArray,
    group_sizes: Int32[jax.Array, " E"],  # sum P
    *,
    position: Int32[jax.Array, "T K"] | None = None,
    rounding: Format | None = None,
    in_fp8: bool = False,
    implementation: Implementation = None,
) -> Float[jax.Array, "rows outputs"]:  # [P, outputs] in the dtype of x
    """Each row times its expert's matrix. Differentiable in x, and in w if it is float.

    Args:
      position: the place in x of each of a token's K experts, T * K = P. The result is then [T, outputs]
        in float32, each token's sum over its experts.
      rounding: what x is rounded to before, as `quantize_rows.round_rows` does; the gradient goes through
        as if it did nothing. Of few rows the kernel does it.
      in_fp8: round x to e4m3 and multiply that with weights in FP8 (`fp8_matmul`); XLA only.
      implementation: see `pallas_kernels.dispatch`.

    Raises:
      ValueError: shapes do not agree, or `implementation` cannot run.
    """
    _check(x, w, group_sizes)
    checks.check_group_sizes(group_sizes, x.shape[0])
    if position is not None and position.size != x.shape[0]:
        raise ValueError(
            f"position {position.shape} must be [T, K] with T * K = {x.shape[0]} rows."
        )
    match choose(implementation, unsupported=_unsupported(x, [w], in_fp8)):
        case "tpu" | "interpret" as kernel:
            if position is not None:
                return vjp.summed_matmul(
                    x, w, group_sizes, position, rounding, kernel == "interpret"
                )
            x = rounded_to_format(x, rounding, implementation)
            return vjp.grouped_matmul(x, w, group_sizes, kernel == "interpret")
        case "xla":
            x = rounded_to_format(x, rounding, implementation)
            out = xla.grouped_matmul(x, w, group_sizes, in_fp8)
        case _:
            x = rounded_to_format(x, rounding, implementation)
            x = quantize.round_fp8(x) if in_fp8 else x
            out = reference.grouped_matmul_reference(x, w, group_sizes)
    return out if position is None else order.summed(out, position)


@operation
def grouped_swiglu(
    x: Float[jax.Array, "*T inputs"],  # rows [P] sorted by expert; with `pair` those of tokens
    w_gate: Float[jax.Array, "E inputs hidden"] | QuantizedArray,
    w_up: Float[jax.Array, "E inputs hidden"] | QuantizedArray,
    group_sizes: Int32[jax.Array, " E"],  # sum P
    row_weights: Float32[jax.Array, " P"],  # routing weight of each row
    *,
    limit: float,
    pair: Int32[jax.Array, " P"] | None = None,
    rounding: Format | None = None,
    in_fp8: bool = False,
    implementation: Implementation = None,
) -> Float[jax.Array, "P hidden"]:  # in the dtype of x
    """First half of an expert: row_weight * silu(min(gate, limit)) * clip(up, -limit, limit).

    Differentiable in x and row_weights, and in the weights if they are float.

    Args:
      pair: which pair of a token and one of its K experts each row of the result is; pair i is of token
        i // K. x is then in the order of tokens, which may have an axis of devices before them.
      rounding: see `grouped_matmul`.

    Raises:
      ValueError: shapes do not agree, or `implementation` cannot run.
    """
    tokens = x if pair is None else x.reshape(-1, x.shape[-1])
    for w in (w_gate, w_up):
        _check(tokens, w, group_sizes)
    num_rows = tokens.shape[0] if pair is None else pair.shape[0]
    if row_weights.shape != (num_rows,):
        raise ValueError(f"row_weights {row_weights.shape} must be [P] with P={num_rows} rows.")
    if tokens.shape[0] and num_rows % tokens.shape[0]:
        raise ValueError(f"{num_rows} pairs must be a multiple of the {tokens.shape[0]} rows of x.")
    checks.check_group_sizes(group_sizes, num_rows)
    chosen = choose(implementation, unsupported=_unsupported(tokens, [w_gate, w_up], in_fp8))
    if pair is not None and chosen in ("tpu", "interpret"):
        interpret = chosen == "interpret"
        return vjp.swiglu_of_pairs(
            x, w_gate, w_up, group_sizes, row_weights, pair, limit, rounding, interpret
        )
    x = rounded_to_format(tokens, rounding, implementation)
    x = x if pair is None else order.of_pairs(x, pair)
    match chosen:
        case "tpu" | "interpret" as kernel:
            interpret = kernel == "interpret"
            return vjp.grouped_swiglu(x, w_gate, w_up, group_sizes, row_weights, limit, interpret)
        case "xla":
            return xla.grouped_swiglu(x, w_gate, w_up, group_sizes, row_weights, limit, in_fp8)
        case _:
            x = quantize.round_fp8(x) if in_fp8 else x
            return reference.grouped_swiglu_reference(
                x, w_gate, w_up, group_sizes, row_weights, limit
            )


def rounded_to_format(
    x: jax.Array, rounding: Format | None, implementation: Implementation
) -> jax.Array:
    """x rounded, if it is to be."""
    if rounding is None:
        return x
    return round_rows(x, rounding.values, rounding.block, implementation=implementation)


def _unsupported(x, ws, in_fp8) -> str | None:
    return "FP8 products have no kernel" if in_fp8 else vjp.unsupported(x, ws)


def _check(x, w, group_sizes):
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or group_sizes.shape != w.shape[:1]:
        raise ValueError(
            f"x {x.shape} must be [P, in], weights {w.shape} [E, in, out] and group_sizes "
            f"{group_sizes.shape} [E]."
        )
