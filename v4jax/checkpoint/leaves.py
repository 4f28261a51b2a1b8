"""The parameters of a model, and the released tensors that each is made of."""

import dataclasses
import operator
from collections.abc import Iterator

import numpy as np
from flax import nnx

from v4jax.checkpoint import names
from v4jax.nn.model import Transformer


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter of the model and the released tensors it is made of."""

    variable: nnx.Variable
    slot: names.Slot
    prefixes: tuple[str, ...]  # of the layers stacked in it; ("",) for the model's own
    is_stacked: bool
    module: nnx.Module  # that has it

    def released_names(self) -> np.ndarray:
        """Names by layer and expert, as an object array of the parameter's leading axes."""
        shape = self.variable.get_value().shape
        batch = shape[: self.is_stacked + self.slot.per_expert]
        table = np.empty(batch, dtype=object)
        for index in np.ndindex(*batch):
            prefix = self.prefixes[index[0] if self.is_stacked else 0]
            expert = index[-1] if self.slot.per_expert else None
            table[index] = prefix + self.slot.name.format(e=expert)
        return table

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one tensor in the orientation of the parameter."""
        return self.variable.get_value().shape[self.is_stacked + self.slot.per_expert :]

    @property
    def stored(self) -> str:
        """How the released checkpoints store it."""
        return self.variable.stored


def leaves(model: Transformer) -> Iterator[Leaf]:
    """Every parameter of the model, with the tensors that belong to it, in file order.

    Adapters are left out (`v4jax.checkpoint.adapters` has their files).
    """

    def of(module: nnx.Module, slots, prefixes, is_stacked=False) -> Iterator[Leaf]:
        variables = {
            ".".join(map(str, path)): variable
            for path, variable in nnx.to_flat_state(nnx.state(module))
        }
        for slot in slots:
            if slot.path in variables:
                owner = operator.attrgetter(slot.path.rpartition(".")[0])(module)
                yield Leaf(variables.pop(slot.path), slot, prefixes, is_stacked, owner)
        unnamed = [
            path
            for path in variables
            if not path.startswith(("stages.", "mtp.")) and ".adapter." not in path
        ]
        if unnamed:
            raise AssertionError(f"parameters without a released name: {unnamed}")

    first = 0
    for stage in model.stages:
        period = len(stage.blocks)
        for offset, block in enumerate(stage.blocks):
            layers = range(first + offset, first + period * stage.repeats, period)
            prefixes = tuple(f"layers.{layer}." for layer in layers)
            yield from of(block, names.BLOCK, prefixes, stage.repeats > 1)
        first += period * stage.repeats
    for depth, mtp in enumerate(model.mtp):
        yield from of(mtp, names.MTP, (f"mtp.{depth}.",))
    yield from of(model, names.TOP, ("",))
