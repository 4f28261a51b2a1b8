"""Which implementation of an operation runs.

| name        | what                                                        | where          |
|-------------|-------------------------------------------------------------|----------------|
| "tpu"       | the Pallas kernel, compiled by Mosaic                       | TPU            |
| "interpret" | the same kernel in the Pallas interpreter: slow, for tests  | anywhere       |
| "xla"       | blockwise jax.numpy, no quadratic buffer                    | anywhere       |
| "reference" | the specification: dense, small shapes only                 | anywhere       |

A tuple of names is an order of preference: the first that can run does. `None` picks "tpu" where
the program is compiled for a TPU and the shapes are the kernel's, else "xla". A kernel works on one
device's arrays: under a mesh of several devices `None` picks it only inside `jax.shard_map`.
"""

import jax

IMPLEMENTATIONS = ("tpu", "interpret", "xla", "reference")


Implementation = str | tuple[str, ...] | None


def choose(implementation: Implementation, *, unsupported: str | None = None) -> str:
    """The implementation to run.

    Args:
      implementation: one of `IMPLEMENTATIONS`, several in order of preference, or None for the
        best one.
      unsupported: why the kernel cannot take these arguments, None if it can.

    Raises:
      ValueError: an unknown name, or one that cannot run here.
    """
    if isinstance(implementation, tuple):
        return _first(implementation, unsupported)
    if implementation is None:
        return "tpu" if unsupported is None and _kernels_run() else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=}: expected one of {IMPLEMENTATIONS} or None.")
    if implementation in ("tpu", "interpret") and unsupported is not None:
        raise ValueError(f'{implementation=}: {unsupported}; use "xla" or None.')
    if implementation == "tpu" and target_platform() != "tpu":
        raise ValueError(
            f'implementation="tpu" cannot run on {target_platform()}: use "xla", or "interpret" '
            "to run the kernel in the Pallas interpreter."
        )
    return implementation


def _first(names: tuple[str, ...], unsupported: str | None) -> str:
    reasons = []
    for name in names:
        try:
            return choose(name, unsupported=unsupported)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(f"implementation={names}: none can run. {' '.join(reasons)}")


def target_platform() -> str:
    """ "tpu", "gpu" or "cpu": what the program being traced is compiled for.

    The mesh set with `jax.set_mesh` says so, which may be of a machine that is not there
    (`v4jax.planning.topologies`); without one it is jax's default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def target_chip() -> str:
    """The TPU generation compiled for ("v5e", "v5p", "v6e", "v7x"), "v6e" when it is not a TPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.devices()[0]
    return _CHIP_OF_KIND.get(device.device_kind, "v6e")


_CHIP_OF_KIND = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
}


def _kernels_run() -> bool:
    """A TPU program of one device, or the body of a shard_map over all axes."""
    if target_platform() != "tpu":
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)
