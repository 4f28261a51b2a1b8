"""One token of each sequence into the windows that compressors are filling: a step of decoding.

    gate    = gate + bias[slot]                       of the token's place in its window
    current = current joined with (gate, value)       `gated_pool.Pool`
    mean    = of current, or of previous joined with the second half of current (overlapping windows)
    where the window is full: previous = the first half of current, current = nothing

Sequences without a token keep what they have.

Why a kernel: of one token XLA makes some twenty operations of it, each longer to start than to run. Here
it is one, which writes the sums where they were.

Source: report section 2.3, eqs. 9-14; released `inference/model.py` (Compressor).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float, Float32, Int32

from pallas_kernels import dispatch
from pallas_kernels.formats.quantize import cast
from pallas_kernels.gated_pool import LOWEST, Pool, joined

LANES = 128
BLOCK_VALUES = 1 << 15  # sequences of a program times channels


@dispatch.operation
def pool_token(
    current: Pool,  # [B, F]
    previous: Pool | None,  # [B, F / 2] of overlapping windows
    value: Float32[jax.Array, "B F"],
    gate: Float32[jax.Array, "B F"],
    bias: Float[jax.Array, "R F"],  # added to the gates of a window
    slot: Int32[jax.Array, " B"],  # in 0 .. R - 1: place of the token in its window
    valid: Bool[jax.Array, " B"],  # whether a sequence has a token
    *,
    dtype: jax.typing.DTypeLike,
    implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, Pool, Pool | None]:
    """The open windows' means [B, F] or [B, F / 2] in `dtype`, and the new sums. No gradient.

    A mean is a compressed row where the window is full, which is where the token was its last.

    Args:
      implementation: see `dispatch.choose`; "xla" is the specification, too.

    Raises:
      ValueError: shapes do not agree, or an implementation that cannot run.
    """
    shape = current.peak.shape
    if value.shape != shape or gate.shape != shape or bias.shape[1:] != shape[1:]:
        raise ValueError(
            f"value {value.shape} and gate {gate.shape} must be as the sums {shape}, and bias "
            f"{bias.shape} [R, F]."
        )
    if previous is not None and previous.peak.shape != (shape[0], shape[1] // 2):
        raise ValueError(
            f"sums of previous windows {previous.peak.shape}: expected {(shape[0], shape[1] // 2)}."
        )
    chosen = dispatch.choose(implementation, unsupported=_unsupported(current, previous))
    if chosen in ("tpu", "interpret"):
        return _call(
            current, previous, value, gate, bias, slot, valid, dtype, chosen == "interpret"
        )
    return _xla(current, previous, value, gate, bias, slot, valid, dtype)


def _unsupported(current: Pool, previous: Pool | None) -> str | None:
    width = current.peak.shape[-1] // (1 if previous is None else 2)
    if not current.peak.size or width % LANES:
        return f"sums {current.peak.shape}: the kernel takes parts of whole {LANES} channels"
    return None


def _xla(current, previous, value, gate, bias, slot, valid, dtype):
    token = Pool(gate + bias[slot], jnp.ones_like(gate), value)
    nothing = Pool.empty(gate.shape)
    token = jax.tree.map(lambda t, n: jnp.where(valid[:, None], t, n), token, nothing)
    filled = current.join(token)
    is_full = (valid & (slot == bias.shape[0] - 1))[:, None]
    after = jax.tree.map(lambda f, n: jnp.where(is_full, n, f), filled, nothing)
    if previous is None:
        return cast(filled.mean(), dtype), after, None
    width = previous.peak.shape[-1]
    whole = previous.join(jax.tree.map(lambda f: f[:, width:], filled))
    before = jax.tree.map(lambda f, p: jnp.where(is_full, f[:, :width], p), filled, previous)
    return cast(whole.mean(), dtype), after, before


def rows_of(batch: int, channels: int) -> int:
    """Sequences of a program."""
    return min(batch, max(8, BLOCK_VALUES // channels // 8 * 8))


def _call(current, previous, value, gate, bias, slot, valid, dtype, interpret):
    batch, channels = value.shape
    rows = rows_of(batch, channels)
    sums = [current] if previous is None else [current, previous]
    sums = [array for pool in sums for array in (pool.peak, pool.weight, pool.total)]

    def of_rows(width):
        return pl.BlockSpec((rows, width), lambda i, *_: (i, 0))

    out = [jax.ShapeDtypeStruct(array.shape, jnp.float32) for array in sums]
    width = sums[-1].shape[-1]
    out.append(jax.ShapeDtypeStruct((batch, width), dtype))
    padding = (0, -batch % rows)
    place = jnp.pad(jnp.where(valid, slot, -1).astype(jnp.int32), padding, constant_values=-1)
    *sums, mean = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(batch, rows),),
            in_specs=[
                of_rows(channels),
                of_rows(channels),
                pl.BlockSpec(bias.shape, lambda i, *_: (0, 0)),
                *[of_rows(array.shape[1]) for array in sums],
            ],
            out_specs=[of_rows(array.shape[1]) for array in out],
            scratch_shapes=[
                pltpu.VMEM((rows, channels), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.int32),
            ],
        ),
        out_shape=out,
        input_output_aliases={4 + i: i for i in range(len(sums))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=12 * value.size,
            transcendentals=3 * value.size,
            bytes_accessed=4 * (2 * value.size + bias.size + 2 * sum(s.size for s in sums)),
        ),
        interpret=interpret,
        name="pool_token",
    )(place, value, gate, bias.astype(jnp.float32), *sums)
    return mean, Pool(*sums[:3]), None if previous is None else Pool(*sums[3:])


def _kernel(place_ref, value_ref, gate_ref, bias_ref, *refs) -> None:
    *others, mean_ref, own_bias_ref, own_place_ref = refs
    count = len(others) // 2  # peaks, weights and totals of one set of sums, or of two
    sum_refs, new_refs = others[:count], others[count:]
    rows = value_ref.shape[0]
    first_row = pl.program_id(0) * rows

    def pick(i, carry):
        place = place_ref[first_row + i]
        own_bias_ref[pl.ds(i, 1), :] = bias_ref[pl.ds(jnp.maximum(place, 0), 1), :]
        own_place_ref[pl.ds(i, 1), :] = jnp.full((1, LANES), place, jnp.int32)
        return carry

    jax.lax.fori_loop(0, rows, pick, ())
    place = own_place_ref[:, :1]
    valid, is_full = place >= 0, place == bias_ref.shape[0] - 1
    width = mean_ref.shape[1]
    overlaps = value_ref.shape[1] > width
    filled = []
    for first in range(0, value_ref.shape[1], width):
        part = slice(first, first + width)
        token = Pool(
            jnp.where(valid, gate_ref[:, part] + own_bias_ref[:, part], LOWEST),
            jnp.where(valid, jnp.ones((rows, width), jnp.float32), 0.0),
            jnp.where(valid, value_ref[:, part], 0.0),
        )
        filled.append(joined(Pool(*(ref[:, part] for ref in sum_refs[:3])), token))
    mean = filled[-1]
    if overlaps:
        previous = Pool(*(ref[...] for ref in sum_refs[3:]))
        mean = joined(previous, mean)
        for ref, one, other in zip(new_refs[3:], _parts(filled[0]), _parts(previous), strict=True):
            ref[...] = jnp.where(is_full, one, other)
    mean_ref[...] = mean.mean().astype(mean_ref.dtype)
    for number, pool in enumerate(filled):
        part = slice(number * width, (number + 1) * width)
        for ref, value, none in zip(new_refs[:3], _parts(pool), (LOWEST, 0.0, 0.0), strict=True):
            ref[:, part] = jnp.where(is_full, none, value)


def _parts(pool: Pool) -> tuple[jax.Array, jax.Array, jax.Array]:
    return pool.peak, pool.weight, pool.total
