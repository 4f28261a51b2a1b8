"""TPU generations: one record has all that this project knows of a chip.

Adding a chip is adding a record here: peak rates (what plans count with), the names its devices go
by, and the sizes that its kernels take, which were chosen by reading compiled schedules
(docs/kernels.md). A device of a kind that no record names runs the XLA forms.

Figures: Cloud TPU documentation; `jax.experimental.pallas.tpu.get_tpu_info_for_chip`. Clocks of
v6e and v7x are what the peak rates imply. The documentation gives both directions of the inter-chip
links together; `ici` is one of them.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

GiB, MiB = 2**30, 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of kernels. Others than a chip's own can be given to a call (`pallas_kernels.tuning`)."""

    attention_vmem: int  # bytes that a kernel may ask for
    attention_blocks: tuple[int, int, int] = (2048, 1024, 512)  # rows, rows of a chunk, entries
    decode_entries: int = 2048  # entries of a block that decoding streams
    grouped_budget: int  # bytes of VMEM for blocks of the experts' kernels
    grouped_vmem: int  # bytes that they may ask for
    grouped_step_weights: int  # weights that are unpacked by one step
    hyper_connections_vmem: int
    hyper_connections_tokens: int = 256  # of a block, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What one JAX device of a TPU generation can do (on v7x half a chip: one TensorCore)."""

    name: str
    kinds: tuple[str, ...]  # `jax.Device.device_kind`
    host: str  # topology of one host
    slices: tuple[str, ...]  # topologies one can rent, smallest first
    flops: float  # bfloat16 matrix multiply-adds, FLOP/s
    fp8_flops: float  # FLOP/s with both factors in FP8
    bandwidth: float  # HBM, bytes/s
    clock: float  # Hz
    hbm: float  # bytes the compiler can use
    vmem: int  # bytes of one core
    smem: int = MiB  # bytes of one core, for scalars
    ici: float  # bytes/s that a device can send over all its links together
    cores: int = 1  # TensorCores of a device; a kernel's parallel grid axes are split over them
    devices_per_chip: int = 1

    # How numbers are converted and multiplied.
    mxu_depth: int  # inputs of a matrix unit
    vector_bfloat16: bool  # the vector unit multiplies bfloat16; else products are in float32
    native_e4m3: bool  # converts e4m3fn itself; else e4m3b11fnuz is what is fast
    fast_e5m2: bool  # multiplies e5m2 faster than bfloat16

    sizes: Sizes  # of its kernels


def _slices(prefix: str, *shapes: str) -> tuple[str, ...]:
    return tuple(f"{prefix}:{shape}" for shape in shapes)


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_OF_128_MIB: dict[str, Any] = dict(
    attention_vmem=100 * MiB,
    grouped_budget=96 * MiB,
    grouped_vmem=112 * MiB,
    hyper_connections_vmem=100 * MiB,
)
_OF_64_MIB: dict[str, Any] = dict(
    attention_vmem=56 * MiB,
    grouped_budget=46 * MiB,
    grouped_vmem=58 * MiB,
    hyper_connections_vmem=60 * MiB,
)

V5E = Chip(
    name="v5e",
    kinds=("TPU v5 lite", "TPU v5e"),
    host="v5e:2x2",
    slices=_slices("v5e", *_FLAT),
    flops=197e12,
    fp8_flops=197e12,
    bandwidth=819e9,
    clock=1.5e9,
    hbm=15.75 * GiB,
    ici=200e9,
    mxu_depth=128,
    vector_bfloat16=False,
    native_e4m3=False,
    fast_e5m2=False,
    vmem=128 * MiB,
    sizes=Sizes(grouped_step_weights=1 << 20, **_OF_128_MIB),
)
V5P = Chip(
    name="v5p",
    kinds=("TPU v5", "TPU v5p"),
    host="v5p:2x2x1",
    slices=_slices("v5p", *_CUBES),
    flops=459e12,
    fp8_flops=459e12,
    bandwidth=2765e9,
    clock=1.75e9,
    hbm=95.74 * GiB,
    ici=600e9,
    cores=2,
    mxu_depth=128,
    vector_bfloat16=False,
    native_e4m3=False,
    fast_e5m2=False,
    vmem=64 * MiB,
    sizes=Sizes(grouped_step_weights=1 << 20, **_OF_64_MIB),
)
V6E = Chip(
    name="v6e",
    kinds=("TPU v6 lite", "TPU v6e"),
    host="v6e:2x2",
    slices=_slices("v6e", *_FLAT),
    flops=918e12,
    fp8_flops=918e12,
    bandwidth=1640e9,
    clock=1.75e9,
    hbm=31.25 * GiB,
    ici=400e9,
    mxu_depth=256,
    vector_bfloat16=True,
    native_e4m3=False,
    fast_e5m2=False,
    vmem=128 * MiB,
    sizes=Sizes(grouped_step_weights=1 << 23, **_OF_128_MIB),
)
V7X = Chip(
    name="v7x",
    kinds=("TPU7x",),
    host="tpu7x:2x2x1",
    slices=_slices("tpu7x", *_CUBES),
    flops=1153.5e12,
    fp8_flops=2307e12,
    bandwidth=3690e9,
    clock=2.2e9,
    hbm=94.75 * GiB,
    ici=300e9,
    devices_per_chip=2,
    mxu_depth=256,
    vector_bfloat16=True,
    native_e4m3=True,
    fast_e5m2=True,
    vmem=64 * MiB,
    sizes=Sizes(grouped_step_weights=1 << 23, **_OF_64_MIB),
)

CHIPS = {chip.name: chip for chip in (V5E, V5P, V6E, V7X)}
# The chip whose sizes the interpreter takes, on machines without a TPU.
INTERPRETED = V6E.name


def of_kind(kind: str) -> Chip | None:
    """The chip that a device of this kind is; None if no record names it."""
    return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)


_SIZES = frozenset(field.name for field in dataclasses.fields(Sizes))
_given: contextvars.ContextVar[Sizes | None] = contextvars.ContextVar("sizes", default=None)


@contextlib.contextmanager
def using(sizes: Sizes) -> Iterator[None]:
    """Kernels that are traced inside take these sizes, whatever the chip."""
    token = _given.set(sizes)
    try:
        yield
    finally:
        _given.reset(token)


class _Column(Mapping):
    """One field of every record, by name of the chip; of records that are added later, too."""

    def __init__(self, field: str):
        self._field = field

    def __getitem__(self, name: str):
        chip = CHIPS[name]
        record = (_given.get() or chip.sizes) if self._field in _SIZES else chip
        return getattr(record, self._field)

    def __iter__(self):
        return iter(CHIPS)

    def __len__(self) -> int:
        return len(CHIPS)


def table(field: str) -> Mapping[str, Any]:
    """Chip name -> one field of its record, or of the sizes that are in use."""
    return _Column(field)
