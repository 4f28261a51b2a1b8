"""How programs of the model are compiled, and where they are kept.

Compiled programs are kept on disk, so that a second process need not compile them again. They lie in
`V4JAX_CACHE`, by default `~/.cache/v4jax`; `V4JAX_CACHE=off` keeps none. A cache that is configured in jax
(`JAX_COMPILATION_CACHE_DIR`) stays as it is.
"""

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels.dispatch import target_platform

VARIABLE = "V4JAX_CACHE"
_LEAST_SECONDS = 0.05  # of compiling, for a program to be kept


def jax_folder() -> str | None:
    """Where jax keeps programs, None if nowhere."""
    return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # made at run time


def keep_programs() -> pathlib.Path | None:
    """Turns the cache on, unless there is one. Commands, engines and trainers call it.

    Returns:
      the folder, None if nothing is kept or jax's own settings hold.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen == "off" or jax_folder() is not None:
        return None
    folder = pathlib.Path(chosen) if chosen else pathlib.Path.home() / ".cache" / "v4jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to: compile every time
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    compilation_cache.reset_cache()  # jax has looked once, if anything was compiled before
    return folder


# Products alone go to XLA's library for CPUs. It takes what surrounds them too by default, and is slow at
# that: ten times slower at a product whose rows are summed (docs/measurements/cpu.md).
_PRODUCTS: dict[str, Any] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
}


def jit(fn: Callable, *, level: int | None = None, **options: Any) -> Any:
    """`jax.jit` of a program that runs the model.

    Args:
      level: LLVM's level of optimisation on a CPU, default XLA's own, the third.
    """
    return jax.jit(fn, compiler_options=compiler_options(level), **options)


def jitted(**options: Any) -> Callable[[Callable], Callable]:
    """`jit` as a decorator: of a module's functions, before jax may be asked which platform it runs on."""

    def decorate(fn: Callable) -> Callable:
        @functools.cache
        def program() -> Callable:
            return jit(fn, **options)

        @functools.wraps(fn)
        def call(*args):
            return program()(*args)

        return call

    return decorate


def compiler_options(level: int | None = None) -> dict[str, Any] | None:
    """Of XLA, for programs that run the model on a CPU. None where jax asks for less anyway."""
    if target_platform() != "cpu" or jax.config.values["jax_disable_most_optimizations"]:
        return None
    chosen: dict[str, Any] = {} if level is None else {"xla_backend_optimization_level": level}
    return {**chosen, **_known_products()}


@functools.cache
def _known_products() -> dict[str, Any]:
    """The option above, if this jaxlib has it: it is called experimental."""
    try:
        jax.jit(lambda: 0).lower().compile(_PRODUCTS)
    except jax.errors.JaxRuntimeError:
        return {}
    return _PRODUCTS
