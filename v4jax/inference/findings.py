"""What the checks of `v4jax verify` find, and how a check is run."""

import dataclasses
import time
from collections.abc import Callable, Mapping

import jax

PASS, FAIL, SKIPPED = "pass", "fail", "skipped"
_SHOWN = 3  # problems of a check


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
      result: `PASS`, `FAIL` or `SKIPPED`.
      figure: what was measured, as the table shows it.
      reason: why it failed or was skipped, or what else a reader should know.
      values: the same as numbers, for the JSON file.
    """

    result: str
    figure: str = ""
    reason: str = ""
    values: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(problems: list[str], figure: str, note: str = "", **values: object) -> "Finding":
        """Passed if there are no problems; otherwise the first ones are the reason."""
        shown = problems[:_SHOWN]
        if len(problems) > _SHOWN:
            shown.append(f"and {len(problems) - _SHOWN} more")
        return Finding(FAIL if problems else PASS, figure, "; ".join(shown) or note, values)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table."""

    check: str
    finding: Finding
    seconds: float


def run_check(check: str, function: Callable[..., Finding], *args: object) -> Row:
    """Runs a check and takes its time.

    An error that names a bad value (ValueError), and memory that a device has not, fail the check, so
    that the others are still run.
    """
    started = time.monotonic()
    try:
        finding = function(*args)
    except ValueError as error:
        finding = Finding(FAIL, reason=str(error))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).split("\n")[0]
        finding = Finding(FAIL, reason=f"the device's memory is full ({first})")
    return Row(check, finding, time.monotonic() - started)
