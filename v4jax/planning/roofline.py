"""How long a step must take at least: what compute, memory and links need for it.

Assumptions, which every figure below rests on:

* matrix products run at the chip's bfloat16 rate: quantised weights are unpacked to bfloat16;
* compute, memory traffic and links overlap perfectly, so a step takes the longest of the three;
* attention and indexer do only the work that a query sees; kernels that mask do more;
* experts are hit at random and evenly;
* memory traffic: weights once per pass (of the experts those that are hit); caches as decoding reads
  them, prefill all of them once; in prefill and training the residual streams 12 times a layer and
  pass; a training step reads and writes parameters that train and both moments, writes and reads
  their gradients, reads the others three times (forward, again, backward), and writes and reads what is
  gathered and scattered;
* a device sends over all its links at once, at full rate, and exchanges have no congestion.
"""

import dataclasses

from pallas_kernels.chips import Chip
from v4jax.config import V4Config
from v4jax.planning import costs
from v4jax.planning.hlo import Collective
from v4jax.planning.plan import Job

STREAM_PASSES = 12  # over the residual streams, per layer and pass


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Of one step on one device. Seconds."""

    flops: float
    hbm_bytes: float
    ici_bytes: float
    compute: float
    memory: float
    links: float
    tokens: int  # of all devices together, in a step

    @property
    def seconds(self) -> float:
        """The longest of the three."""
        return max(self.compute, self.memory, self.links)

    @property
    def bound(self) -> str:
        """Which of them that is."""
        terms = {"compute": self.compute, "HBM": self.memory, "ICI": self.links}
        return max(terms, key=lambda name: terms[name])

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.tokens / self.seconds


def roofline(
    cfg: V4Config,
    job: Job,
    chip: Chip,
    sizes: dict[str, int],
    held: dict[str, float],
    sent: list[Collective],
) -> Roofline:
    """The bound of a planned step.

    Args:
      sizes: of the mesh axes.
      held: `Program.held`.
      sent: the collectives of the compiled step.
    """
    devices = sizes["fsdp"] * sizes["expert"] * sizes["tensor"] * sizes["context"]
    flops = job_flops(cfg, job).total / devices
    if job.kind == "decode":  # a context axis repeats all work but the experts'
        flops *= sizes["context"]
    hbm, ici = _hbm_bytes(cfg, job, sizes, held, sent), sum(c.sent_bytes for c in sent)
    seconds = flops / chip.flops, hbm / chip.bandwidth, ici / chip.ici
    return Roofline(flops, hbm, ici, *seconds, job.batch * job.length)


def job_flops(cfg: V4Config, job: Job) -> costs.Flops:
    """FLOP of a step on all devices together."""
    match job.kind:
        case "train":
            one = costs.training_flops(cfg, job.length, remat=job.remat, trainable=job.trainable)
            return one * job.batch
        case "decode":
            return costs.decode_flops(cfg, job.context) * job.batch
        case _:  # the last chunk of the context, the dearest
            before = costs.prefill_flops(cfg, job.context - job.chunk)
            whole = costs.prefill_flops(cfg, job.context)
            return (whole + before * -1.0 + costs.head_flops(cfg)) * job.batch


def _hbm_bytes(
    cfg: V4Config,
    job: Job,
    sizes: dict[str, int],
    held: dict[str, float],
    sent: list[Collective],
) -> float:
    sequences = job.batch / (sizes["fsdp"] * sizes["expert"])
    weights = held["parameters"]
    streams = STREAM_PASSES * len(cfg.layers) * cfg.num_streams * cfg.embed_dim * 2
    if job.kind == "train":
        tokens = sequences * job.length / sizes["context"]
        # Parameters and two moments in and out, gradients out and in; weights as they are gathered.
        joined = sum(
            c.sent_bytes * c.group / (c.group - 1)
            for c in sent
            if c.kind in ("all-gather", "reduce-scatter")
        )
        trained = held["optimizer"] / 2  # as much as one of the two moments
        changed = 2 * (trained + held["optimizer"]) + 2 * trained
        return changed + 3 * (weights - trained) + 2 * joined + 4 * tokens * streams
    group = sizes["expert"] * sizes["context"]
    experts = cfg.moe.num_experts * len(cfg.layers) * costs.expert_bytes(cfg, job.recipe)
    experts /= group * sizes["tensor"]
    hit = costs.experts_hit(cfg, sequences * sizes["expert"] * job.length) / cfg.moe.num_experts
    table = (
        cfg.vocab_size * cfg.embed_dim * 2 / sizes["tensor"]
    )  # of embeddings: a few rows are read
    read = weights - experts * (1 - hit) - table
    caches = sum(costs.cache_bytes_read(cfg, s, job.context, job.recipe) for s in cfg.layers)
    if job.kind == "decode":
        return read + sequences * caches
    tokens = sequences * job.length / sizes["context"]
    return read + held["cache"] + tokens * streams
