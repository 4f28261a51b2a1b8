"""Compiled programs are kept on disk, so that a second process need not compile them again.

They lie in `V4JAX_CACHE`, by default `~/.cache/v4jax`; `V4JAX_CACHE=off` keeps none. A cache that is
configured in jax (`JAX_COMPILATION_CACHE_DIR`) stays as it is.
"""

import os
import pathlib

import jax
from jax.experimental.compilation_cache import compilation_cache

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
