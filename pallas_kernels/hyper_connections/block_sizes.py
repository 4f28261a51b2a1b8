"""Tokens per program of the kernels, and how wide their inner loops are.

All sizes are multiples of 128 tokens: coefficients have tokens on lanes. Larger blocks feed the
matrix units better (the projection holds a block's tokens as its stationary operand); what limits
them is VMEM, where every block of an array in HBM is held twice.
"""

from pallas_kernels import chips

LANES = 128
VMEM_LIMIT = chips.table("hyper_connections_vmem")
MOST_TOKENS = chips.table("hyper_connections_tokens")
COEFFICIENT_TOKENS = 8 * LANES  # a whole float32 register
_SCRATCH_PER_TOKEN = 24 * LANES * 4  # coefficients spread over lanes, float32


def vmem_limit(chip: str) -> int:
    """Bytes of VMEM a kernel asks for."""
    return VMEM_LIMIT[chip]


def block_tokens(chip: str, num_tokens: int, bytes_per_token: int, constant_bytes: int = 0) -> int:
    """Tokens of one program.

    Args:
      chip: a name of `chips.CHIPS`.
      num_tokens: tokens there are.
      bytes_per_token: of all operands and results of one token.
      constant_bytes: of operands every program reads.
    """
    limit, tokens = vmem_limit(chip), MOST_TOKENS[chip]
    room = limit - 2 * constant_bytes - (4 << 20)
    while tokens > 128 and (
        tokens >= 2 * num_tokens or tokens * (2 * bytes_per_token + _SCRATCH_PER_TOKEN) > room
    ):
        tokens //= 2
    return tokens


def fits(chip: str, dim: int, num_streams: int, itemsize: int) -> bool:
    """Whether the smallest block of the largest kernel fits in VMEM: the gradient of hc_post_pre.

    It reads the streams, their cotangent and that of u, and writes a gradient of the streams; of
    `fn` it reads three bfloat16 parts or float32, and writes a float32 gradient.
    """
    m = num_streams
    token = (3 * m + 1) * dim * itemsize
    fn = (2 + m) * m * m * dim * (4 + (6 if itemsize == 2 else 4))
    return 2 * (128 * token + fn) <= vmem_limit(chip)


def width(dim: int, limit: int) -> int:
    """Largest multiple of 128 that divides `dim` (a multiple of 128) and is at most `limit`."""
    return max(w for w in range(128, min(dim, limit) + 1, 128) if dim % w == 0)
