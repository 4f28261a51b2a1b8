"""Which mesh axis each logical axis of an array is split over."""

import dataclasses
import math

import jax
from jax import P

Axis = str | tuple[str, ...] | None

# Logical axes along which the parts of a weight are only kept apart: they are joined when their layer's
# turn comes. A weight is worked on in parts along any other axis.
KEPT = ("embed", "expert_embed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """Logical axis name -> mesh axis, or a tuple of them; `None` means replicated.

    `dispatch` says how rows reach the experts of other devices: "all_to_all" sends each row to its
    experts, "gather" shows all rows to all experts (better for few rows).
    """

    batch: Axis = ("fsdp", "expert")  # sequences
    seq: Axis = "context"  # positions of a sequence
    vocab: Axis = "tensor"
    embed: Axis = ("fsdp", "expert", "context")  # model width of weights, or another input width
    heads: Axis = "tensor"  # query heads, and the groups of the output projection
    expert: Axis = "expert"
    expert_embed: Axis = ("fsdp", "context")  # model width of experts
    expert_dim: Axis = "tensor"  # hidden width of an expert
    dispatch: str = "all_to_all"

    def __post_init__(self):
        if self.dispatch not in ("all_to_all", "gather"):
            raise ValueError(f'dispatch={self.dispatch!r}: expected "all_to_all" or "gather".')

    def mesh_axes(self, name: str) -> tuple[str, ...]:
        """The mesh axes behind a logical axis.

        Raises:
          ValueError: an unknown name.
        """
        known = [field.name for field in dataclasses.fields(self) if field.name != "dispatch"]
        if name not in known:
            raise ValueError(f"unknown logical axis {name!r}: expected one of {known}.")
        axes = getattr(self, name)
        return (axes,) if isinstance(axes, str) else axes or ()

    def spec(self, *names: str | None) -> P:
        """`rules.spec("expert", "expert_embed", None)` -> `P("expert", ("fsdp", "context"), None)`.

        Raises:
          ValueError: an unknown name, or one mesh axis for two axes of the array.
        """
        by_name = [() if name is None else self.mesh_axes(name) for name in names]
        used = [axis for axes in by_name for axis in axes]
        if len(used) != len(set(used)):
            raise ValueError(f"{names} map to {by_name}: a mesh axis may appear only once.")
        return P(*(None if name is None else getattr(self, name) for name in names))

    @property
    def tokens(self) -> P:
        """Of an array [B, T, ...]."""
        return self.spec("batch", "seq")


# Training: sequences over data and expert devices, parameters cut over all.
TRAIN = AxisRules()
# A prompt: experts are spread over the devices of a sequence too, other parameters are replicated.
PREFILL = AxisRules(embed=None, expert_embed=None, expert=("expert", "context"))
# One token of each sequence at a time: a device holds whole caches of some sequences. Parameters and
# caches lie as for PREFILL.
DECODE = dataclasses.replace(PREFILL, seq=None, dispatch="gather")


def kept_axis(axes: tuple[str | None, ...]) -> str | None:
    """The logical axis of a weight along which its parts are only kept apart, if it has one."""
    return next((name for name in KEPT if name in axes), None)


def summed_axis(axes: tuple[str | None, ...]) -> str | None:
    """The logical axis of a matrix's inputs if it is worked on in parts: products are summed over it."""
    return None if axes[-2] in KEPT else axes[-2]


def ambient(spec: P) -> P | None:
    """`spec` under a mesh (`with jax.set_mesh(mesh):`), None without one."""
    return None if jax.sharding.get_abstract_mesh().empty else spec


def fitting(spec: P, shape: tuple[int, ...], sizes: dict[str, int]) -> P:
    """`spec` without the axes that do not divide an array: block scales are replicated then."""
    padded = [*spec, *[None] * (len(shape) - len(spec))]
    for i, axes in enumerate(padded):
        names = (axes,) if isinstance(axes, str) else axes or ()
        if shape[i] % math.prod(sizes[name] for name in names):
            padded[i] = None
    return P(*padded)
