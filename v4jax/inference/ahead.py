"""A compiled step that is compiled in a thread, while the device or the host does something else."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import jax


class CompiledAhead:
    """A step that can be compiled before it is called.

    jax keeps what `lower(...).compile()` makes, and a call with the same shapes finds it.

    Args:
      step: from `jax.jit`.
      context: makes what it is traced, and called, under: the ambient mesh.
      bound: its first arguments, of every call.
    """

    def __init__(
        self,
        step: Any,
        context: Callable[[], contextlib.AbstractContextManager],
        *bound: object,
    ):
        self._step, self._context, self._bound = step, context, bound
        self._threads: list[threading.Thread] = []

    def prepare(self, *args: object) -> None:
        """Begins to compile for the shapes of these arguments, and does not wait."""
        shapes = jax.tree.map(_shape, (*self._bound, *args))

        def compile_for() -> None:
            # An error comes up again where the step is called, and is told there.
            with self._context(), contextlib.suppress(Exception):
                self._step.lower(*shapes).compile()

        thread = threading.Thread(target=compile_for, name="v4jax-compile", daemon=True)
        self._threads.append(thread)
        thread.start()

    def __call__(self, *args: object) -> Any:
        """The step. Waits for what is being compiled, or it would be compiled twice."""
        while self._threads:
            self._threads.pop().join()
        with self._context():
            return self._step(*self._bound, *args)


def _shape(x: Any) -> Any:
    """What a trace needs of an argument, which may be donated before it begins."""
    if not isinstance(x, jax.Array):
        return x
    placed = x.sharding if x.committed else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed, weak_type=x.weak_type)
