"""Which mesh serves a checkpoint on the devices that are there, and whether it fits at all.

choice = serving_mesh(cfg, jax.devices(), weight_bytes=160e9, batch=1, context=8192)
mesh = make_mesh(**choice.sizes) if choice.sizes is not None else None
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import jax
from flax import nnx

from pallas_kernels import chips
from sharding import TRAIN
from v4jax.config import V4Config
from v4jax.nn.cache import CacheFormat, init_cache
from v4jax.nn.model import Transformer
from v4jax.nn.numerics import released
from v4jax.nn.placement import check_mesh
from v4jax.nn.quantization import Chosen, to_released
from v4jax.planning.capacity import serving_seconds
from v4jax.planning.describe import count_parameters
from v4jax.planning.plan import HBM_SHARE, Job, choose_mesh, local_bytes
from v4jax.planning.topologies import Slice
from v4jax.train.step import trained_by

GiB = 2**30
_MOST_DEVICES = 1024  # what a message may advise


@dataclasses.dataclass(frozen=True)
class Device:
    """One of several equal devices."""

    kind: str
    hbm: float  # bytes of its memory


@dataclasses.dataclass(frozen=True)
class ServingMesh:
    """A mesh for the devices that are there, and why.

    `sizes` is None for programs without a mesh: there is one device. On a host with several, one of
    them is a mesh of sizes 1, since kernels run in programs of known devices only.
    """

    sizes: dict[str, int] | None
    reasons: tuple[str, ...]


def device_memory(device: jax.Device) -> float | None:
    """Bytes that programs can use: the host's for a CPU; None if the device does not say."""
    if device.platform == "cpu":
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def serving_mesh(
    cfg: V4Config,
    devices: Sequence[jax.Device],
    *,
    weight_bytes: float,
    batch: int = 1,
    context: int,
    cache: CacheFormat = None,
) -> ServingMesh:
    """One device where the model fits on it, else a mesh of as many as divide the model.

    CPU devices share the memory of their host: of them, one is taken.

    Args:
      weight_bytes: of the checkpoint's files.
      batch: sequences that are decoded together.
      context: tokens a sequence, prompt and answer.
      cache: see `v4jax.nn.cache.CacheFormat`; "float" for numerics that do not round rows.

    Raises:
      ValueError: it does not fit; names what would.
    """
    first = devices[0]
    alone: dict[str, int] | None = None if len(devices) == 1 else {}
    there = f"{len(devices)} x {first.device_kind}"
    memory = device_memory(first)
    if memory is None:
        return ServingMesh(alone, (f"{there}: one device, as they do not say their memory",))
    device = Device(first.device_kind, memory)
    job = _job(cfg, weight_bytes, batch, min(context, cfg.max_length), cache)
    needed, limit = weight_bytes + cache_bytes(cfg, job), HBM_SHARE * memory
    sum_of = f"weights {weight_bytes / GiB:.1f} + cache {cache_bytes(cfg, job) / GiB:.1f} GiB"
    if needed <= limit:
        reason = f"{there}: {sum_of} fit into the {limit / GiB:.1f} GiB that one device may fill"
        return ServingMesh(alone, (reason,))
    if first.platform != "cpu":
        for count in range(len(devices), 1, -1):
            try:
                choice = choose_mesh(
                    cfg, device, count, job, _seconds(cfg, device.kind, count, job)
                )
            except ValueError:  # no such number divides the model
                continue
            if choice.fits:
                return ServingMesh(choice.sizes, (f"{there}: {sum_of}", *choice.reasons))
    raise ValueError(
        f"{sum_of} do not fit into {there} of {memory / GiB:.1f} GiB each. What would do: "
        f"{_what_fits(cfg, device, len(devices), job, is_host=first.platform == 'cpu')}."
    )


def training_mesh(cfg: V4Config, devices: Sequence[jax.Device]) -> tuple[dict[str, int], str]:
    """Axes that training is spread over, and why: none on CPUs, which share one memory.

    Experts go over as many devices as divide them, since they are nearly all of a model; what is
    left cuts sequences and parameters.
    """
    count, platform = len(devices), devices[0].platform
    if count == 1 or platform == "cpu":
        return {}, "one device"
    for expert in range(min(count, cfg.moe.num_experts), 0, -1):
        if count % expert or cfg.moe.num_experts % expert:
            continue
        sizes = {"fsdp": count // expert, "expert": expert}
        sizes = {axis: size for axis, size in sizes.items() if size > 1}
        try:
            check_mesh(cfg, TRAIN, sizes=sizes)
        except ValueError:
            continue
        shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        return sizes, f"{shown}, for {count} x {devices[0].device_kind}"
    return {}, f"one of {count} devices: no mesh of all divides {cfg.name}"


def require_room_to_train(
    model: Transformer,
    trainable: Chosen,
    sizes: dict[str, int],
    device: jax.Device,
    *,
    state_bytes: float = 8,
) -> None:
    """Refuses a run whose state alone is larger than the memory of its devices.

    What trains takes 8 bytes a parameter, itself and its gradient in float32, and the optimizer's state. The
    rest keeps its format. Activations come on top, and are not counted; nor are adapters, which are small.

    Args:
      model: float, of shapes alone (`nnx.eval_shape`).
      trainable: which of the model's own parameters train, see `Trainer`.
      sizes: of the mesh axes.
      state_bytes: of the optimizer's state for a parameter; two moments in float32 have 8.

    Raises:
      ValueError: names what is needed, what there is, and what would do.
    """
    memory = device_memory(device)
    if memory is None:
        return
    is_trained, held, trained = trained_by(trainable), 0.0, 0.0

    def stays(path: str, variable: nnx.Variable) -> bool:
        return not is_trained(path.split("."), variable)

    stored = nnx.eval_shape(functools.partial(to_released, only=stays), model)
    for path, variable in nnx.to_flat_state(nnx.state(stored)):
        local = local_bytes(variable, TRAIN, sizes)
        if is_trained(path, variable):
            trained += (2 + state_bytes / 4) * local
        else:
            held += local
    if held + trained <= HBM_SHARE * memory:
        return
    raise ValueError(
        f"training {model.cfg.name} needs at least {(held + trained) / GiB:,.1f} GiB on each device "
        f"({trained / GiB:,.1f} for parameters that train with gradients and moments, {held / GiB:,.1f} "
        f"for those that stay), of {memory / GiB:,.1f}: more devices, a narrower --optimizer-dtype, or "
        "--trainable no-experts or lora."
    )


def _seconds(
    cfg: V4Config, kind: str, count: int, job: Job
) -> Callable[[dict[str, int]], float] | None:
    """Of a job under a mesh; None for devices whose rates are not known here."""
    chip = chips.of_kind(kind)
    place = None if chip is None else Slice.holding(chip, count)
    return None if place is None else serving_seconds(cfg, place, job)


def cache_bytes(cfg: V4Config, job: Job) -> float:
    """Of all sequences of a job, on all devices together."""
    one = jax.eval_shape(lambda: init_cache(cfg, released(), 1, job.context, job.cache))
    return job.batch * one.nbytes


def _job(cfg: V4Config, weight_bytes: float, batch: int, context: int, cache: CacheFormat) -> Job:
    """Decoding; a checkpoint of fewer than 1.5 bytes a parameter is a quantized one."""
    quantized = weight_bytes < 1.5 * count_parameters(cfg).total
    experts = "fp4" if quantized else "float"
    return Job(kind="decode", context=context, batch=batch, experts=experts, cache=cache)


def _what_fits(cfg: V4Config, device: Device, count: int, job: Job, *, is_host: bool) -> str:
    """More devices of the kind, or a shorter context on those that are there."""
    found = []
    if not is_host:
        more = 1 << count.bit_length()
        while more <= _MOST_DEVICES:
            if _fits(cfg, device, more, job):
                found.append(f"{more} x {device.kind}")
                break
            more *= 2
    context = job.context // 2
    while context >= 1024:
        if not is_host and _fits(cfg, device, count, dataclasses.replace(job, context=context)):
            found.append(f"a context of {context:,} tokens")
            break
        context //= 2
    return " or ".join(found) or "a machine with more memory"


def _fits(cfg: V4Config, device: Device, count: int, job: Job) -> bool:
    try:
        return choose_mesh(cfg, device, count, job).fits
    except ValueError:
        return False
