"""Checked mode: values that shapes cannot vouch for.

Operations trust their indices, positions and group sizes. Looking at them takes a copy to the host,
and while a program is traced there is nothing to look at. To find out where a bad one comes from,
run the code in question without `jax.jit`:

    with checks.checked(), jax.disable_jit():
        decode_attention(...)            # ValueError if an index is not an entry's

| argument              | accepted                                             |
|-----------------------|------------------------------------------------------|
| indices               | -1, or one of the entries; distinct in each query    |
| positions             | not negative; in attention, consecutive              |
| group_sizes           | not negative, and together no more than the rows     |
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import numpy as np

_IS_ON = contextvars.ContextVar("checked", default=False)


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Operations called inside check values too."""
    token = _IS_ON.set(True)
    try:
        yield
    finally:
        _IS_ON.reset(token)


def check_indices(indices: jax.Array, num_entries: int) -> None:
    """In checked mode, indices [..., K] of entries.

    Raises:
      ValueError: one is out of range or repeated, or they are traced.
    """
    if not _IS_ON.get():
        return
    values = _values("indices", indices)
    bad = values[(values < -1) | (values >= num_entries)]
    if bad.size:
        raise ValueError(f"indices has {bad[0]}: expected -1 (none) or 0..{num_entries - 1}.")
    ordered = np.sort(values, axis=-1)
    repeated = ordered[..., 1:][(ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)]
    if repeated.size:
        raise ValueError(f"indices has {repeated[0]} twice for one query: expected distinct ones.")


def check_positions(positions: jax.Array, *, are_consecutive: bool) -> None:
    """In checked mode, positions [B] or [B, T].

    Raises:
      ValueError: one is negative, those of a row do not follow each other, or they are traced.
    """
    if not _IS_ON.get():
        return
    values = _values("positions", positions)
    if (values < 0).any():
        raise ValueError(f"positions has {values.min()}: expected 0 or more.")
    if are_consecutive and (np.diff(values, axis=-1) != 1).any():
        raise ValueError(f"positions {values.tolist()} must be consecutive in each row.")


def check_group_sizes(group_sizes: jax.Array, num_rows: int) -> None:
    """In checked mode, rows [E] of each expert.

    Raises:
      ValueError: one is negative, they are more than the rows, or they are traced.
    """
    if not _IS_ON.get():
        return
    values = _values("group_sizes", group_sizes)
    if (values < 0).any() or values.sum() > num_rows:
        raise ValueError(
            f"group_sizes {values.tolist()}: expected none negative, and a sum of at most the "
            f"{num_rows} rows of x, not {values.sum()}."
        )


def _values(name: str, x: jax.Array) -> np.ndarray:
    has_values = not isinstance(x, jax.core.Tracer)
    if not has_values:
        raise ValueError(
            f"{name} {x.shape} is traced and has no values to check: in checked mode, call the "
            "operation outside jax.jit, or under jax.disable_jit()."
        )
    return np.asarray(x)
