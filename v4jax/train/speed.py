"""How fast a run goes, and what memory it takes."""

import resource
import sys
import time

import jax

from pallas_kernels import chips


class Speed:
    """A clock over steps. Evaluations and saves stand between `stop` and `start`.

    Args:
      step_tokens: tokens of a step.
      step_flops: FLOP of a step; None if nobody has counted.
      devices: that share the work.
    """

    def __init__(self, step_tokens: int, step_flops: float | None, devices: int):
        self._tokens, self._flops = step_tokens, step_flops
        chip = chips.of_kind(jax.devices()[0].device_kind)
        self._peak = None if chip is None else chip.flops * devices
        self.start()

    def start(self) -> None:
        """Begins to count anew."""
        self._steps, self._began = 0, time.monotonic()

    def step(self) -> None:
        """One more step."""
        self._steps += 1

    @property
    def tokens_per_second(self) -> float:
        """Since `start`."""
        return self._steps * self._tokens / max(time.monotonic() - self._began, 1e-9)

    @property
    def flop_utilisation(self) -> float | None:
        """Share of the devices' bfloat16 peak since `start`; None if FLOP or peak are not known."""
        if self._flops is None or self._peak is None:
            return None
        return self.tokens_per_second / self._tokens * self._flops / self._peak


def peak_memory() -> float | None:
    """Bytes that a device of this process had in use at most; of a CPU, the process. None: not said."""
    if jax.devices()[0].platform == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    found = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return float(max(found)) if found else None
