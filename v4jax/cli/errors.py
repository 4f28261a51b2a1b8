"""How a command ends when its input is at fault: one message, no traceback."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """Errors that name a bad value (ValueError) or file (OSError) end the program with status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
