"""Which gradients are too large to take a step by: those far above the steps before.

    limit = mean + deviations * (standard deviation of the norms of the last steps that were taken)

A skipped step does not count among them, so one spike does not make room for the next.

Source: the rule of OLMo's and MaxText's trainers, here of the gradient's norm alone.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

# Of the mean: norms that hardly differ are no reason to skip one that differs a little.
_LEAST = 0.01


@dataclasses.dataclass(frozen=True)
class Spikes:
    """For `Trainer(skip_above=Spikes())`: skips a step whose gradient has an unusually large norm.

    Attributes:
      deviations: above the mean. A deviation counts as 1 % of the mean at least.
      steps: that were taken last. Until there are so many, only `at_most` skips any.
      at_most: a larger norm is skipped whatever the norms before.

    Raises:
      ValueError: no positive number of deviations, or fewer than 2 steps.
    """

    deviations: float = 6.0
    steps: int = 128
    at_most: float = math.inf

    def __post_init__(self):
        if not self.deviations > 0:
            raise ValueError(f"Spikes deviations={self.deviations}: expected a number above 0.")
        if self.steps < 2:
            raise ValueError(f"Spikes steps={self.steps}: expected 2 or more.")

    def start(self) -> jax.Array:
        """[steps] float32, norms before the first step: -1 is none."""
        return jnp.full(self.steps, -1.0, jnp.float32)

    def limit(self, norms: jax.Array) -> jax.Array:
        """The largest norm that a step is taken by, float32.

        Args:
          norms: of the steps that were taken last, the oldest first.
        """
        mean = jnp.mean(norms)
        deviation = jnp.maximum(jnp.std(norms), _LEAST * mean)
        found = jnp.minimum(mean + self.deviations * deviation, self.at_most)
        return jnp.where(norms[0] >= 0, found, self.at_most)
