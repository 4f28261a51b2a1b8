"""The host's time to start a decode call: with as many arrays as Flash has, on eight devices.

    python -m benchmarks.host_time
    python -m benchmarks.host_time --devices 1 --layers 5

The arguments are those of the engine's decode step for Flash's 43 layers in nano's widths, everything packed
as released: weights, slots and tables. The program takes them all, computes new lengths and gives the
slots back, so what is left is the host: flattening arguments and handing buffers to every device. Medians,
the devices being idle; beside them what weights alone and slots alone take.
"""

import argparse
import dataclasses
import os
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--layers", type=int, default=43)
    parser.add_argument("--calls", type=int, default=100)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"

    import jax
    import jax.numpy as jnp

    import v4jax
    from v4jax.planning.plan import Job, program

    indexer = v4jax.nano().layers[1].indexer
    layers = [
        dataclasses.replace(layer, indexer=indexer if layer.indexer else None)
        for layer in v4jax.flash().layers[: args.layers]
    ]
    cfg = dataclasses.replace(v4jax.nano(), layers=tuple(layers), mtp_layers=())
    mesh = v4jax.make_mesh(expert=args.devices)
    shapes = program(cfg, Job(kind="decode", context=4096, batch=8), mesh).arguments

    def make(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(jnp.zeros(shape.shape, shape.dtype), shape.sharding)

    leaves, slots, *rest = jax.tree.map(make, shapes)

    def longer(slots, count=1):
        cache = dataclasses.replace(slots.cache, lengths=slots.cache.lengths + count)
        return dataclasses.replace(slots, cache=cache)

    def whole(leaves, slots, tables, count, *_):
        return longer(slots, count)

    def median(call) -> float:
        times = []
        for _ in range(args.calls):
            started = time.perf_counter()
            result = call()
            times.append(time.perf_counter() - started)
            jax.block_until_ready(result)
        return sorted(times)[len(times) // 2] * 1e3

    with jax.set_mesh(mesh):
        step = jax.jit(whole, donate_argnums=(1,), keep_unused=True)
        grown = jax.jit(longer, donate_argnums=(0,))
        read = jax.jit(lambda leaves: jnp.zeros(()), keep_unused=True)

        def call_whole():
            nonlocal slots
            slots = step(leaves, slots, *rest)
            return slots

        def call_slots():
            nonlocal slots
            slots = grown(slots)
            return slots

        print(f"{len(layers)} layers, {args.devices} devices")
        print("| what | arrays | ms a call |")
        print("|---|---|---|")
        for name, tree, call in (
            ("weights, slots and tables", (leaves, slots, rest), call_whole),
            ("slots alone, given back", slots, call_slots),
            ("weights alone", leaves, lambda: read(leaves)),
        ):
            count = len(jax.tree.leaves(tree))
            call()
            print(f"| {name} | {count} | {median(call):.2f} |", flush=True)


if __name__ == "__main__":
    main()
