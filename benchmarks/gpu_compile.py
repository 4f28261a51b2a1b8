"""Compiles the XLA forms for an NVIDIA H200, on any machine, and prints the memory they take.

    python -m benchmarks.gpu_compile --only indexer

Needs `pip install 'v4jax[cuda12]'`, no GPU and no driver. Says nothing about speed: autotuning is
skipped. Exits with 1 if a case does not compile, or if temporaries grow faster than the prompt, the
context or the number of rows they are for: something quadratic is then written down.
"""

import argparse
import sys
import time

import jax
from jax.experimental import topologies

from benchmarks import kernel_cases
from benchmarks.case import Case

# A `GpuTargetConfigProto`: what the compiler asks a device. Figures of the H200 SXM data sheet and
# of compute capability 9.0 in the CUDA programming guide.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000 device_memory_size: 141000000000 l2_cache_size: 52428800
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "12.9.0" runtime_version: "12.9.0" dnn_version: "9.8.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H200"
"""
CASES = {  # the case, and one that is so many times as long
    "attention: Flash HCA 8k": None,
    "attention: Flash CSA 8k": ("attention: Flash CSA 32k", 4),
    "attention: Flash CSA 8k gradient": ("attention: Flash CSA 32k gradient", 4),
    "decode_attention: Flash CSA 32k x8": ("decode_attention: Flash CSA 128k x8", 4),
    "decode_attention: Flash CSA 128k x8": ("decode_attention: Flash CSA 1M x8", 8),
    "decode_attention: Flash HCA 1M x8": None,
    "indexer: Flash prefill 8k": ("indexer: Flash prefill 32k", 4),
    "indexer: Flash decode 32k x8": ("indexer: Flash decode 128k x8", 4),
    "indexer: Flash decode 128k x8": ("indexer: Flash decode 1M x8", 8),
    "grouped_swiglu: Flash FP4, 1 rows": ("grouped_swiglu: Flash FP4, 16 rows", 16),
    "grouped_swiglu: Flash FP4, 16 rows": ("grouped_swiglu: Flash FP4, 256 rows", 16),
    "grouped_swiglu: Flash FP4, 256 rows": ("grouped_swiglu: Flash FP4, 4096 rows", 16),
    "hc_post_pre: Flash prefill 8k": None,
    "gated_pool: CSA entries 8k": None,
    "round: Flash input 8k": None,
}


def compile_on_h200(case: Case) -> jax.stages.Compiled:
    """Compiles what `implementation=None` picks on a GPU."""
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", topology="1x1x1", target_config=H200
        )
    except Exception as error:  # noqa: BLE001 - jax raises several types here
        sys.exit(f"no CUDA compiler: install it with pip install 'v4jax[cuda12]' ({error}).")
    mesh = topologies.make_mesh(topology, (1,), ("d",))
    placed = jax.NamedSharding(mesh, jax.P())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), case.arguments("gpu")
    )
    with jax.set_mesh(mesh):
        run = jax.jit(lambda *a: case.run(*a, implementation=None))
        return run.lower(*arguments).compile()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    wanted = dict.fromkeys([*CASES, *(longer[0] for longer in CASES.values() if longer)])
    cases = [c for c in kernel_cases.all_cases() if c.name in wanted and args.only in c.name]
    print(f"{'case':42} {'compile s':>9} {'arguments':>10} {'results':>9} {'temp':>8}   (MB)")
    temp = {}
    for case in cases:
        started = time.perf_counter()
        memory = compile_on_h200(case).memory_analysis()
        temp[case.name] = memory.temp_size_in_bytes
        sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, temp[case.name]
        arguments, results, temporary = (size / 1e6 for size in sizes)
        print(
            f"{case.name:42} {time.perf_counter() - started:9.1f} {arguments:10.1f} "
            f"{results:9.1f} {temporary:8.1f}",
            flush=True,
        )
    for name, longer in CASES.items():
        if longer and {name, longer[0]} <= temp.keys() and temp[longer[0]] > longer[1] * temp[name]:
            sys.exit(f"{longer[0]}: its temporaries are more than {longer[1]} those of {name}.")


if __name__ == "__main__":
    main()
