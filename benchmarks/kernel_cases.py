"""All cases of all kernels, at the shapes of V4-Flash and V4-Pro."""

import importlib
import importlib.util

from benchmarks.case import Case

MODULES = (
    "attention",
    "decode_attention",
    "decode_step",
    "float_rows",
    "gated_pool",
    "grouped_matmul",
    "head_rows",
    "hyper_connections",
    "indexer",
    "linear",
    "quantize",
)


def all_cases() -> list[Case]:
    """Every case."""
    found = [m for m in MODULES if importlib.util.find_spec(f"benchmarks.{m}")]
    return [c for m in found for c in importlib.import_module(f"benchmarks.{m}").cases()]
