"""Sizes of kernels that were found on a chip, in a file: `python -m benchmarks.autotune` writes it.

    numerics = v4jax.released(implementation=tuning.load("sizes.json"))

    {
      "chip": "v6e",
      "operations": {"decode_attention": {"decode_entries": 2048}}
    }

What the file does not name is as in the record of the chip (`chips.py`).
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from pallas_kernels import chips, dispatch

_ATTENTION = ("attention_blocks", "attention_vmem")
_PRODUCTS = ("grouped_step_weights", "grouped_budget", "grouped_vmem")
_STREAMS = ("hyper_connections_tokens", "hyper_connections_vmem")
# Operation -> the sizes that its kernels take.
TAKEN: dict[str, tuple[str, ...]] = {
    "window_attention": _ATTENTION,
    "selected_attention": _ATTENTION,
    "decode_attention": ("decode_entries",),
    "linear": _PRODUCTS,
    "linear_swiglu": _PRODUCTS,
    "grouped_matmul": _PRODUCTS,
    "grouped_swiglu": _PRODUCTS,
    "hc_pre": _STREAMS,
    "hc_post": _STREAMS,
    "hc_post_pre": _STREAMS,
    "hc_head": _STREAMS,
}


def load(
    path: str | os.PathLike, implementation: str | tuple[str, ...] | None = None
) -> dispatch.Tuned:
    """Sizes from a file.

    Args:
      implementation: what runs, see `pallas_kernels.dispatch`.

    Raises:
      ValueError: the file cannot be read, or names a chip, an operation or a size that there is not.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        chip, operations = content["chip"], content["operations"]
        pairs = [(name, dict(sizes)) for name, sizes in dict(operations).items()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: {type(error).__name__}: {error}. Expected a JSON file of `python -m benchmarks.autotune`, "
            'with "chip" and "operations".'
        ) from error
    if chip not in chips.CHIPS:
        raise ValueError(f"{path}: chip {chip!r}: expected one of {', '.join(chips.CHIPS)}.")
    for name, sizes in pairs:
        if name not in TAKEN:
            raise ValueError(f"{path}: operation {name!r}: expected one of {', '.join(TAKEN)}.")
        for size, value in sizes.items():
            _check(path, name, size, value)
    found = tuple((name, with_sizes(chip, sizes)) for name, sizes in pairs)
    return dispatch.Tuned(chip, found, implementation)


def save(path: str | os.PathLike, chip: str, operations: Mapping[str, Mapping], **notes) -> None:
    """Writes what `load` reads, and notes of where it comes from."""
    content = {"chip": chip, **notes, "operations": operations}
    pathlib.Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def with_sizes(chip: str, sizes: Mapping[str, Any]) -> chips.Sizes:
    """A chip's sizes but for some."""
    given: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in sizes.items()
    }
    return dataclasses.replace(chips.CHIPS[chip].sizes, **given)


def _check(path, operation: str, size: str, value) -> None:
    if size not in TAKEN[operation]:
        known = ", ".join(TAKEN[operation])
        raise ValueError(f"{path}: {operation} has the size {size!r}: expected one of {known}.")
    count = 3 if size == "attention_blocks" else 1
    values = value if isinstance(value, list) else [value]
    if len(values) != count or not all(type(v) is int and v > 0 for v in values):
        wanted = "three positive integers" if count == 3 else "a positive integer"
        raise ValueError(f"{path}: {operation}: {size}={value!r}: expected {wanted}.")
