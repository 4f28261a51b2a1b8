"""The low-precision formats of the released models, one record each.

Source: released `config.json` (quantization_config) and `inference/kernel.py`; report section 5.2.1.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Format:
    """Which numbers, and how many of them share a scale."""

    values: str  # "fp8": e4m3; "fp4": e2m1
    block: int  # channels of an activation, or inputs of a weight, that share a scale
    outputs: int = 1  # of a weight, that do


FP8_WEIGHTS = Format("fp8", 128, 128)  # linears, and the experts of base models
FP4_WEIGHTS = Format("fp4", 32)  # experts
FP4_PLANES = 256  # inputs of packed FP4 whose codes share bytes
ACTIVATIONS = Format("fp8", 128)  # inputs of linears
KV_ROWS = Format("fp8", 64)  # window and compressed KV, the channels that are not rotated
INDEX_KEYS = Format("fp4", 32)  # queries and keys of the indexer, after the Hadamard transform
