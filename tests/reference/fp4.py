"""How two FP4 codes lie in a byte of memory, bit by bit: s1 eem2 eem1 s2, highest bit first."""

import numpy as np

FIRST, SECOND = (0, 4, 5, 6), (7, 1, 2, 3)  # where the bits of a code are, highest first


def two_codes(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and second codes 0..15 of bytes of any shape."""
    bits = np.unpackbits(packed[..., None], axis=-1)
    weights = np.array([8, 4, 2, 1], np.uint8)
    return bits[..., FIRST] @ weights, bits[..., SECOND] @ weights


def two_codes_joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The inverse of `two_codes`."""
    bits = np.zeros((*first.shape, 8), np.uint8)
    for code, places in ((first, FIRST), (second, SECOND)):
        bits[..., places] = np.unpackbits(code[..., None], axis=-1)[..., 4:]
    return np.packbits(bits, axis=-1)[..., 0]
