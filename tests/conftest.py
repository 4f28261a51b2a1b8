"""Eight fake CPU devices, warnings as errors, and models that several tests share."""

import contextlib
import ctypes
import gc
import os
import pathlib
import socket

# V4JAX_TEST_PLATFORM runs the tests of operations on an accelerator (benchmarks/accelerator.py).
PLATFORM = os.environ.get("V4JAX_TEST_PLATFORM", "cpu")


def _flags(devices: int) -> str:
    """Of XLA: on CPUs without its fusion emitters and in one module, a quarter less time to compile."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    if PLATFORM == "cpu":
        flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    return flags


# Before jax is imported, here or in a test.
os.environ["JAX_PLATFORMS"] = PLATFORM
# Threads of XLA. It makes one a device, and a program whose devices wait for each other needs all of
# them: where other work has one, all wait until XLA ends the process (seen with two cores at work).
os.environ["NPROC"] = "16"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " " + _flags(8)

import jax
import numpy as np
import pytest

from pallas_kernels import signatures

signatures.enable()
ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
NANO = ROOT / "v4jax" / "assets" / "nano"

SETTINGS = {
    # Workers compile many of the same programs, and so does the next run.
    "jax_compilation_cache_dir": str(ROOT / ".pytest_cache" / "jax"),
    "jax_persistent_cache_min_compile_time_secs": 0.3,
    # Most programs run once, and a third of the time to compile them is LLVM's.
    "jax_disable_most_optimizations": PLATFORM == "cpu",
}
for name, value in SETTINGS.items():
    jax.config.update(name, value)

# Tracing makes many small objects that stay: to look through them after every 700 takes a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 50)


def environment(devices: int = 1, **settings: object) -> dict[str, str]:
    """Of a process that a test starts, with so many devices and, but for `settings`, ours."""
    settings = {name.upper(): str(value) for name, value in {**SETTINGS, **settings}.items()}
    return {**os.environ, **settings, "XLA_FLAGS": _flags(devices)}


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def hf_small() -> dict[str, np.ndarray]:
    """What transformers 5.23 computed in float32 (tests/golden/README.md)."""
    return dict(np.load(GOLDEN / "hf_small" / "reference.npz"))


@pytest.fixture(scope="session")
def official_small() -> dict[str, np.ndarray]:
    """What the official model code computed in bfloat16 (tests/golden/README.md)."""
    return dict(np.load(GOLDEN / "official_small" / "reference_bf16.npz"))


@pytest.fixture(scope="session")
def official_small_f32() -> dict[str, np.ndarray]:
    """The official code in float32, with weights that are not quite those of the file.

    Good for inputs of layers; its outputs belong to other weights (docs/numerics.md).
    """
    return dict(np.load(GOLDEN / "official_small" / "reference_f32.npz"))


MOST_MEMORY = 2 * 2**30  # bytes of a worker, before it forgets its programs


@pytest.fixture(scope="module", autouse=True)
def memory_is_given_back():
    """Compiled programs stay in memory: after a thousand tests two workers would fill 24 GiB."""
    yield
    used = pathlib.Path("/proc/self/statm")
    if not used.exists():  # not on Linux
        return
    pages = int(used.read_text(encoding="ascii").split()[1])
    if pages * os.sysconf("SC_PAGE_SIZE") > MOST_MEMORY:
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(AttributeError):  # not of every C library
            ctypes.CDLL(None).malloc_trim(0)  # or freed memory stays the process's


@pytest.fixture
def not_kept():
    """Programs for absent devices can be kept on disk, but not be read again: keeps none."""
    yield from _configured(
        jax_persistent_cache_min_compile_time_secs=1e9, jax_disable_most_optimizations=False
    )


@pytest.fixture
def optimized():
    """Programs are compiled as users compile them."""
    yield from _configured(jax_disable_most_optimizations=False)


def _configured(**options):
    before = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def compilations():
    """Call it for the number of programs compiled since the test began."""
    count = 0

    def listen(event: str, duration: float, **_) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: count
    jax.monitoring.unregister_event_duration_listener(listen)
