"""What layers keep for the backward pass, and what they compute again: policies by name.

| name        | kept of a layer, of each token                                                         |
|-------------|----------------------------------------------------------------------------------------|
| "none"      | everything                                                                             |
| "attention" | that of "outputs"; attention's heads with their log denominators, and the picked entries |
| "outputs"   | its residual streams, and the outputs of attention and of the experts                  |
| "layers"    | its residual streams                                                                   |
| "offload"   | nothing: the residual streams go to the host's memory and come back                    |

Gradients are the same under all of them, up to rounding. `costs.training_flops` and `costs.kept_bytes`
(`v4jax.planning`) say what each computes and keeps; docs/training.md says when to take which.
"""

from collections.abc import Callable

import jax
from jax import checkpoint_policies
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.residuals import ATTENDED

STREAMS, ATTENTION, EXPERTS, PICKED = "streams", "attention_out", "experts_out", "picked"

_KEPT = checkpoint_policies.save_only_these_names
# Name -> a policy of `jax.checkpoint`; None keeps everything.
POLICIES: dict[str, Callable | None] = {
    "none": None,
    "attention": _KEPT(ATTENTION, EXPERTS, ATTENDED, PICKED),
    "outputs": _KEPT(ATTENTION, EXPERTS),
    "layers": checkpoint_policies.nothing_saveable,
    "offload": checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[STREAMS],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def require_policy(remat: str) -> None:
    """Raises ValueError for a name that is none of `POLICIES`."""
    if remat not in POLICIES:
        names = ", ".join(map(repr, POLICIES))
        raise ValueError(
            f"remat={remat!r}: expected one of {names}, from most memory to least. 'layers' computes "
            "every layer again in the backward pass, 'none' nothing."
        )


def named(tree, name: str):
    """The same arrays, which policies know by a name."""
    return jax.tree.map(lambda array: checkpoint_name(array, name), tree)


def recomputed(layer: Callable, remat: str) -> Callable:
    """A function of a layer that keeps for its gradient what the policy says.

    Raises:
      ValueError: an unknown policy.
    """
    require_policy(remat)
    policy = POLICIES[remat]
    return layer if policy is None else jax.checkpoint(layer, policy=policy)
