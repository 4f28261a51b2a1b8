"""Learning rates over a run."""

import jax.numpy as jnp
import optax

SHAPES = ("constant", "linear", "cosine", "wsd")


def schedule(
    shape: str,
    peak: float,
    total_steps: int,
    *,
    warmup_steps: int = 100,
    final_fraction: float = 0.1,
    decay_fraction: float = 0.2,
) -> optax.Schedule:
    """Learning rate of a step: a linear warm-up to `peak`, and then a shape.

    The first step takes the first rate of the warm-up, not 0, and the last one the final rate.

    Args:
      shape: "constant"; "linear" or "cosine" decay from the end of the warm-up on; or "wsd" (warm-up,
        stable, decay), which stays at `peak` and decays by a cosine at the end, as the report trains.
      total_steps: of the run. Steps after them take the final rate.
      warmup_steps: the step that takes `peak`; at most `total_steps - 1`.
      final_fraction: the final rate relative to `peak`; the report takes 0.1.
      decay_fraction: the part of the run in which "wsd" decays; the report gives none.

    Raises:
      ValueError: an unknown shape, no steps, or a fraction outside 0 to 1.

    Source: report section 4.2.2; wsd: arXiv 2404.06395.
    """
    if shape not in SHAPES:
        raise ValueError(f"schedule {shape!r}: expected one of {', '.join(SHAPES)}.")
    if total_steps < 1 or warmup_steps < 0:
        raise ValueError(
            f"total_steps={total_steps}, warmup_steps={warmup_steps}: expected at least 1, and 0."
        )
    for name, part in (("final_fraction", final_fraction), ("decay_fraction", decay_fraction)):
        if not 0 <= part <= 1:
            raise ValueError(f"{name}={part}: expected a number from 0 to 1.")
    warmup = min(warmup_steps, total_steps - 1)
    start = warmup
    if shape == "wsd":
        start = max(warmup, total_steps - max(round(decay_fraction * total_steps), 1))

    def rate(count):
        step = jnp.minimum(count + 1, total_steps).astype(jnp.float32)  # the first step is 1
        done = jnp.clip((step - start) / (total_steps - start), 0, 1)
        left = {
            "constant": jnp.ones_like(done),
            "linear": 1 - done,
            "cosine": (1 + jnp.cos(jnp.pi * done)) / 2,
        }["cosine" if shape == "wsd" else shape]
        decayed = final_fraction + (1 - final_fraction) * left
        return peak * jnp.where(step < warmup, step / max(warmup, 1), decayed)

    return rate
