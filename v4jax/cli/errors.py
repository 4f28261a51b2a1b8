"""How a command ends when its input is at fault: one message, no traceback."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator

import jax

# What a command takes that needs less memory.
_LESS = "a shorter context, a smaller batch, --cache packed"
_LESS_MEMORY = {
    "finetune": "--micro-batches, --dtype bfloat16, a shorter --seq-len, a smaller --batch-size, --remat layers, "
    "--optimizer-dtype bfloat16"
}


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """Errors that name a bad value (ValueError) or file (OSError) end the program with status 2.

    So does memory that a device has not. Ctrl-C ends it with 130, a reader that has gone (`| head`)
    with 141, as the shell has it; neither says anything. V4JAX_TRACEBACK=1 shows where an error comes
    from, for those who look for a fault of v4jax itself.
    """
    try:
        yield
        sys.stdout.flush()  # a reader that has gone shows here, not when Python ends
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # what is buffered goes there
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        if os.environ.get("V4JAX_TRACEBACK") or not _is_of_input(error):
            raise
        print(f"error: {_text(error, _command())}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_of_input(error: Exception) -> bool:
    """Whether the user can mend it: of errors inside jax, only those of memory."""
    return not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" in str(error)


def _command() -> str:
    """ "finetune" of `v4jax finetune` and of `python scripts/finetune.py`."""
    return pathlib.Path(sys.argv[0].split(" ")[-1]).stem


def _text(error: Exception, command: str) -> str:
    if isinstance(error, MemoryError):
        return f"this machine has too little memory: {error}".rstrip(": ")
    if isinstance(error, jax.errors.JaxRuntimeError):
        first = str(error).split("\n")[0]
        return (
            f"the device's memory is full ({first[:200]}): {_LESS_MEMORY.get(command, _LESS)}, or a mesh of more "
            "devices would need less."
        )
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
