"""Rows of a batch to the devices that compute with them."""

from collections.abc import Callable

import jax
import numpy as np


def placed(
    read: Callable[[tuple[slice, ...]], np.ndarray],
    shape: tuple[int, int],
    sharding: jax.NamedSharding | None,
) -> jax.Array:
    """An array [B, T], of which every process reads the parts that its devices hold.

    Args:
      read: gives the part at an index.
      sharding: where it goes; None: to the default device.
    """
    if sharding is None:
        return jax.device_put(read((slice(None), slice(None))))
    # jax says that an index may be None; it never is.
    return jax.make_array_from_callback(shape, sharding, read)  # type: ignore[arg-type]
