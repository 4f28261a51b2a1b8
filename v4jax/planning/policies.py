"""Memory and FLOP of a training step under each policy of `v4jax.nn.remat`, by arithmetic."""

import dataclasses
import math

from v4jax.config import V4Config
from v4jax.nn.remat import POLICIES
from v4jax.planning import costs
from v4jax.planning.plan import Job
from v4jax.planning.roofline import job_flops


@dataclasses.dataclass(frozen=True)
class PolicyCosts:
    """One policy, per device and step."""

    name: str
    kept: float | None  # bytes that layers keep for the backward pass; None: everything
    host: float  # bytes that wait in the host's memory
    flops: float


def by_policy(cfg: V4Config, job: Job, sizes: dict[str, int]) -> list[PolicyCosts]:
    """Every policy's costs for a training job on a mesh of these sizes. MTP blocks keep everything."""
    devices = math.prod(sizes.values())
    tokens = job.batch * job.length * sizes["tensor"] / devices

    def kept(name: str) -> float | None:
        of_token = costs.kept_by_layers(cfg, job.length, name, tensor=sizes["tensor"])
        return None if of_token is None else tokens * of_token

    streams = kept("layers")
    return [
        PolicyCosts(
            name,
            kept(name),
            (streams or 0.0) if name == "offload" else 0.0,
            job_flops(cfg, dataclasses.replace(job, remat=name)).total / devices,
        )
        for name in POLICIES
    ]
