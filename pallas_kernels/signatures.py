"""Shapes and dtypes that stand in signatures, checked in tests.

    @signatures.shaped
    def scores(q: Float[jax.Array, "B T H"], key: Float[jax.Array, "B S H"]) -> Float[jax.Array, "B T S"]:

The words are jaxtyping's: a name is the same length wherever it stands in one call, `*B` any number of
axes. Functions refuse wrong arguments themselves, with messages that say what to do. What is checked here
comes after that: an implementation that returns another shape or dtype than it promises, and a signature
that does not tell the truth. It runs while a program is traced, and only between `enable()` and the
end of the process.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax.numpy as jnp
import jaxtyping
import numpy as np

_Function = TypeVar("_Function", bound=Callable)
_are_checked = False


class SignatureError(TypeError):
    """An argument or a result is not what the signature says."""


def enable() -> None:
    """Checks every call of a `shaped` function from now on."""
    global _are_checked
    _are_checked = True


def shaped(function: _Function) -> _Function:
    """A function whose arrays are checked against its annotations, if that is enabled.

    Raises:
      SignatureError: when called with an array, or returning one, that is not as annotated.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args, **options):
        result = function(*args, **options)
        if _are_checked:
            arguments = signature.bind(*args, **options).arguments
            _check(function.__qualname__, signature, arguments, result)
        return result

    return cast(_Function, call)


@jaxtyping.jaxtyped(typechecker=None)  # names of axes are known until it returns
def _check(name: str, signature: inspect.Signature, arguments: dict[str, Any], result) -> None:
    for argument, value in arguments.items():
        _check_value(f"{argument} of {name}", signature.parameters[argument].annotation, value)
    hint = signature.return_annotation
    if typing.get_origin(hint) is tuple and ... not in typing.get_args(hint):
        for number, (part, value) in enumerate(zip(typing.get_args(hint), result, strict=True)):
            _check_value(f"result {number} of {name}", part, value)
    else:
        _check_value(f"result of {name}", hint, result)


def _check_value(what: str, hint, value) -> None:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    parts = typing.get_args(hint) if is_union else (hint,)
    if not any(_is_shape(part) for part in parts):
        return
    if isinstance(value, np.ndarray):  # which jax takes, too
        value = jnp.asarray(value)
    if not any(isinstance(value, part) for part in parts if isinstance(part, type)):
        expected = " or ".join(getattr(part, "__name__", str(part)) for part in parts)
        found = getattr(value, "shape", None), getattr(value, "dtype", type(value))
        raise SignatureError(f"{what}: expected {expected}, found {found[1]} {found[0]}.")


def _is_shape(hint) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
