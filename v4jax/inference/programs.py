"""The compiled steps of one engine, with its model's arrays and its mesh bound."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from v4jax.inference.ahead import CompiledAhead
from v4jax.inference.steps import Slots


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a scheduler runs. See `v4jax.inference.steps` for each."""

    prefill: Callable[..., Slots]  # (slots, tables, tokens, counts, slot)
    decode: CompiledAhead  # (slots, tables, count, cancelled, allowed) -> Output, slots
    start: Callable[..., Slots]
    snapshot: Callable[..., Any]
    restore: Callable[..., Slots]
    copy_pages: Callable[..., Slots]
    take_rows: Callable[..., Slots]
    put_rows: Callable[..., Slots]
    read_pages: Callable[..., Any]
    write_pages: Callable[..., Slots]
    place: Callable[[np.ndarray], jax.Array]  # an array with a row a slot, on the devices
    spread: Callable[[Any], Any]  # rows [1, ...] in host memory as arrays [G, ...]
