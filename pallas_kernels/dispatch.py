"""Which implementation of an operation runs.

| name        | what                                                        | where          |
|-------------|-------------------------------------------------------------|----------------|
| "tpu"       | the Pallas kernel, compiled by Mosaic                       | TPU            |
| "interpret" | the same kernel in the Pallas interpreter: slow, for tests  | anywhere       |
| "xla"       | blockwise jax.numpy, no quadratic buffer                    | anywhere       |
| "reference" | the specification: dense, small shapes only                 | anywhere       |

A tuple of names is an order of preference: the first that can run does. `None` picks "tpu" where
the program is compiled for a TPU and the shapes are the kernel's, else "xla". A kernel works on one
device's arrays: under a mesh of several devices `None` picks it only inside `jax.shard_map`. Arrays that
are spread over devices need such a mesh around the program (`jax.set_mesh`); without one jax says that
it cannot partition the kernel.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import TypeVar, cast

import jax

from pallas_kernels import chips, signatures

IMPLEMENTATIONS = ("tpu", "interpret", "xla", "reference")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """An implementation whose kernels take other sizes than their chip's: see `pallas_kernels.tuning`.

    Gradients that jax asks for after the call take the chip's own.
    """

    chip: str  # that the sizes are for, a name of `chips.CHIPS`
    sizes: tuple[tuple[str, chips.Sizes], ...]  # by operation
    implementation: str | tuple[str, ...] | None = None  # as without sizes


_Operation = TypeVar("_Operation", bound=Callable)
Implementation = str | tuple[str, ...] | Tuned | None
_registered: dict[str, dict[str, Callable]] = {}  # name -> operation -> function


def operation(function: _Operation) -> _Operation:
    """Makes an operation of this package one that `register` can give other implementations.

    Tests check every call against the signature (`signatures.py`), also of such implementations.
    """

    parameters = inspect.signature(function).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}

    @signatures.shaped
    @functools.wraps(function)
    def call(*args, implementation: Implementation = None, **options):
        if isinstance(implementation, Tuned):
            return _tuned(implementation, call, function.__name__, args, options)
        names = implementation if isinstance(implementation, tuple) else (implementation,)
        for name in names:
            if name not in _registered:
                break
            if function.__name__ in _registered[name]:
                given = {k: v for k, v in options.items() if v is not defaults[k]}
                return _registered[name][function.__name__](*args, **given)
        own = tuple(name for name in names if name is not None and name not in _registered)
        return function(*args, **options, implementation=_one(own))

    return cast(_Operation, call)


def _tuned(tuned: Tuned, call: Callable, name: str, args: tuple, options: dict):
    """A call with the sizes that are given for an operation of this name, if any are."""
    sizes = dict(tuned.sizes).get(name)
    if sizes is None or target_platform() != "tpu":
        return call(*args, implementation=tuned.implementation, **options)
    if target_chip() != tuned.chip:
        raise ValueError(
            f"sizes of kernels for {tuned.chip}, and this program is for {target_chip()}: expected those of "
            f"`python -m benchmarks.autotune` on {target_chip()}, or none."
        )
    with chips.using(sizes):
        return call(*args, implementation=tuned.implementation, **options)


def _one(names: tuple[str, ...]) -> Implementation:
    """A name by itself where there is one, None where there is none."""
    return names if len(names) > 1 else next(iter(names), None)


def register(name: str, operation: Callable) -> Callable:
    """`@register("mine", grouped_matmul)`: an implementation that `implementation="mine"` picks.

    The function takes the operation's arguments but `implementation`, and has to be differentiable
    where the operation is, if it is to train. Options that are as they are by default are not passed. Operations without one of that name run as without a name.

    Raises:
      ValueError: the name is one of `IMPLEMENTATIONS`.
    """
    if name in IMPLEMENTATIONS:
        raise ValueError(f"register({name!r}): expected another name than {IMPLEMENTATIONS}.")

    def add(function: Callable) -> Callable:
        _registered.setdefault(name, {})[operation.__name__] = function
        return function

    return add


def choose(implementation: Implementation, *, unsupported: str | None = None) -> str:
    """The implementation to run.

    Args:
      implementation: one of `IMPLEMENTATIONS`, several in order of preference, or None for the
        best one.
      unsupported: why the kernel cannot take these arguments, None if it can.

    Raises:
      ValueError: an unknown name, or one that cannot run here.
    """
    if isinstance(implementation, Tuned):
        return choose(implementation.implementation, unsupported=unsupported)
    if isinstance(implementation, tuple):
        return _first(implementation, unsupported)
    if implementation in _registered:
        return implementation
    if implementation is None:
        return "tpu" if unsupported is None and _kernels_run() else "xla"
    if implementation not in IMPLEMENTATIONS:
        known = (*IMPLEMENTATIONS, *_registered)
        raise ValueError(f"{implementation=}: expected one of {known} or None.")
    if implementation in ("tpu", "interpret") and unsupported is not None:
        raise ValueError(f'{implementation=}: {unsupported}; use "xla" or None.')
    if implementation == "tpu" and target_platform() != "tpu":
        raise ValueError(
            f'implementation="tpu" cannot run on {target_platform()}: use "xla", or "interpret" '
            "to run the kernel in the Pallas interpreter."
        )
    if implementation == "tpu":
        kind = _tpu_kind()
        if kind is not None and chips.of_kind(kind) is None:
            raise ValueError(f'implementation="tpu": {_unknown(kind)}')
    return implementation


def _first(names: tuple[str, ...], unsupported: str | None) -> str:
    reasons = []
    for name in names:
        try:
            return choose(name, unsupported=unsupported)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(f"implementation={names}: none can run. {' '.join(reasons)}")


def target_platform() -> str:
    """ "tpu", "gpu" or "cpu": what the program being traced is compiled for.

    The mesh set with `jax.set_mesh` says so, which may be of a machine that is not there
    (`v4jax.planning.topologies`); without one it is jax's default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def target_chip() -> str:
    """Name of the chip compiled for; off a TPU, the one whose sizes the interpreter takes.

    Raises:
      ValueError: a TPU of a kind that no record of `chips.py` names.
    """
    kind = _tpu_kind()
    if kind is None:
        return chips.INTERPRETED
    chip = chips.of_kind(kind)
    if chip is None:
        raise ValueError(_unknown(kind))
    return chip.name


def _tpu_kind() -> str | None:
    """Kind of the TPU that is compiled for, None off a TPU."""
    if target_platform() != "tpu":
        return None
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.devices()[0] if device is None else device).device_kind


def _unknown(kind: str) -> str:
    known = ", ".join(name for chip in chips.CHIPS.values() for name in chip.kinds)
    return (
        f"no kernels for a TPU of kind {kind!r}: known are {known}. A record in "
        "pallas_kernels/chips.py adds one."
    )


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(f"{message} The XLA forms run.", stacklevel=2)


def _kernels_run() -> bool:
    """A TPU program of one device, or the body of a shard_map over all axes."""
    kind = _tpu_kind()
    if kind is None:
        return False
    if chips.of_kind(kind) is None:
        _say_once(_unknown(kind))
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:  # of one device of a host, however many it has
        return True
    return mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)
