"""Which mesh axis each logical axis of an array is split over."""

import dataclasses

import jax
from jax import P

Axis = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """Logical axis name -> mesh axis, or a tuple of them; `None` means replicated."""

    vocab: Axis = "tensor"
    embed: Axis = "fsdp"  # model width of weights
    heads: Axis = "tensor"  # query heads, and the groups of the output projection
    expert: Axis = "expert"
    expert_dim: Axis = "tensor"  # hidden width of an expert

    def spec(self, *names: str | None) -> P:
        """`rules.spec("expert", "embed", None)` -> `P("expert", "fsdp", None)`.

        Raises:
          ValueError: an unknown name, or one mesh axis for two axes of the array.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in names:
            if name is not None and name not in known:
                raise ValueError(f"unknown logical axis {name!r}: expected one of {known}.")
        axes = [None if name is None else getattr(self, name) for name in names]
        used = [a for axis in axes if axis for a in ((axis,) if isinstance(axis, str) else axis)]
        if len(used) != len(set(used)):
            raise ValueError(f"{names} map to {axes}: a mesh axis may appear only once.")
        return P(*axes)


def ambient(spec: P) -> P | None:
    """`spec` under a mesh (`with jax.set_mesh(mesh):`), None without one."""
    return None if jax.sharding.get_abstract_mesh().empty else spec
