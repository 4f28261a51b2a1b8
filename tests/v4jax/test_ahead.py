"""A step that is compiled in a thread before it is called."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.inference.ahead import CompiledAhead


def test_a_step_is_compiled_once_and_its_arguments_may_be_donated_meanwhile(compilations):
    x, other, y = jnp.ones(173), jnp.zeros(173), np.float32(2)
    step = CompiledAhead(jax.jit(lambda a, x, y: a * x + y), contextlib.nullcontext, jnp.ones(173))
    before = compilations()

    step.prepare(x, y)
    x.delete()
    for thread in list(step._threads):
        thread.join()
    out = step(other, y)

    assert compilations() == before + 1
    assert (out == 2).all()


def test_a_call_waits_for_the_thread():
    """Or it would compile once more."""
    begun, go = threading.Event(), threading.Event()

    def traced(x):
        if not begun.is_set():
            begun.set()
            assert go.wait(30)
        return x + 1

    step = CompiledAhead(jax.jit(traced), contextlib.nullcontext)
    step.prepare(jnp.ones(3))
    assert begun.wait(30)
    done = threading.Event()
    caller = threading.Thread(target=lambda: (step(jnp.ones(3)), done.set()))
    caller.start()

    assert not done.wait(0.2)
    go.set()
    caller.join(30)
    assert done.is_set()


def test_an_error_is_told_where_the_step_is_called():
    step = CompiledAhead(jax.jit(lambda x: x @ x), contextlib.nullcontext)
    step.prepare(jnp.ones((2, 3)))

    with pytest.raises(TypeError, match="dot_general"):
        step(jnp.ones((2, 3)))
