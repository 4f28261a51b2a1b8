"""Small arrays side by side in one, and apart again.

Why a kernel: XLA makes a launch of every array, 312 to join the partial sums of Flash and a hundred to take
them apart. Here all of the copies are under way at once.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from pallas_kernels import dispatch

LANES = 128


@dispatch.operation
def side_by_side(
    arrays: Sequence[jax.Array],  # [S, w], of any widths and one dtype
    *,
    implementation: dispatch.Implementation = None,
) -> Float[jax.Array, "S W"]:
    """The arrays, one after the other along the last axis. No gradient.

    Args:
      implementation: see `dispatch.choose`.

    Raises:
      ValueError: an implementation that cannot run.
    """
    widths = [array.shape[1] for array in arrays]
    chosen = dispatch.choose(implementation, unsupported=_unsupported(arrays[0], widths))
    if chosen not in ("tpu", "interpret"):
        return jnp.concatenate(arrays, axis=1)
    whole = jax.ShapeDtypeStruct((arrays[0].shape[0], sum(widths)), arrays[0].dtype)

    def kernel(*refs):
        *parts, out_ref, arrived = refs
        _copy(zip(parts, _parts(out_ref, widths), strict=True), arrived)

    return _call(kernel, arrays, whole, "side_by_side", chosen == "interpret")


@dispatch.operation
def apart(
    whole: Float[jax.Array, "S W"],
    widths: Sequence[int],  # of the parts, which make up W
    *,
    implementation: dispatch.Implementation = None,
) -> list[jax.Array]:
    """The parts [S, w], what `side_by_side` undoes. No gradient.

    Args:
      implementation: see `dispatch.choose`.

    Raises:
      ValueError: an implementation that cannot run.
    """
    chosen = dispatch.choose(implementation, unsupported=_unsupported(whole, widths))
    if chosen not in ("tpu", "interpret"):
        return jnp.split(whole, list(itertools.accumulate(widths))[:-1], axis=1)
    results = [jax.ShapeDtypeStruct((whole.shape[0], width), whole.dtype) for width in widths]

    def kernel(whole_ref, *refs):
        *parts, arrived = refs
        _copy(zip(_parts(whole_ref, widths), parts, strict=True), arrived)

    return _call(kernel, [whole], results, "apart", chosen == "interpret")


def _unsupported(array: jax.Array, widths: Sequence[int]) -> str | None:
    if any(width % LANES for width in widths) or not array.size:
        return f"{array.shape[0]} rows of parts of {list(widths)}: the kernel copies whole {LANES}"
    return None


def _call(kernel, arrays, results, name: str, interpret: bool):
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        in_specs=[anywhere] * len(arrays),
        out_specs=jax.tree.map(lambda _: anywhere, results),
        out_shape=results,
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        interpret=interpret,
        name=name,
    )(*arrays)


def _parts(ref, widths: Sequence[int]) -> list:
    """Columns of a reference that belong to each part."""
    starts = itertools.accumulate(widths, initial=0)
    return [ref.at[:, pl.ds(start, width)] for start, width in zip(starts, widths)]


def _copy(pairs, arrived) -> None:
    """Of each pair the first to the second, all at once."""
    copies = [pltpu.make_async_copy(source, target, arrived) for source, target in pairs]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.wait()
