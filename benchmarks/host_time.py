"""The host's time to start a decode call: with as many arrays as Flash has, on eight devices.

    python -m benchmarks.host_time
    python -m benchmarks.host_time --devices 1 --layers 5

The arguments are those of the engine's decode step for Flash's 43 layers in nano's widths, everything packed
as released: weights, slots and tables. The program takes them all, computes new lengths and gives the
slots back, so what is left is the host: flattening arguments and handing buffers to every device. Beside them
what weights alone and slots alone take, and the slots with every sum of an open window in an array of its
own. The devices are idle. Of time on the clock the median and the least of so many calls, and the least of the
processor time of the calling thread and of the whole process: other work on the machine adds to all of them,
and calls of all rows take turns.
"""

import argparse
import dataclasses
import os
import statistics
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

    def states_apart(slots):
        cache = dataclasses.replace(slots.cache, states=slots.states.apart())
        return dataclasses.replace(slots, cache=cache, states=None)

    def whole(leaves, slots, tables, count, *_):
        return longer(slots, count)

    clocks = (time.perf_counter, time.thread_time, time.process_time)

    def timed(call) -> list[float]:
        """Seconds by each of `clocks`; the process's are up to the end of the call's program."""
        started = [clock() for clock in clocks]
        result = call()
        taken = [clock() - begin for clock, begin in zip(clocks, started)]
        jax.block_until_ready(result)
        taken[2] = time.process_time() - started[2]
        return taken

    with jax.set_mesh(mesh):
        step = jax.jit(whole, donate_argnums=(1,), keep_unused=True)
        grown = jax.jit(longer, donate_argnums=(0,))
        read = jax.jit(lambda leaves: jnp.zeros(()), keep_unused=True)

        def whole_of(slots):
            held = [slots]

            def call():
                held[0] = step(leaves, held[0], *rest)
                return held[0]

            return call

        def slots_of(slots):
            held = [slots]

            def call():
                held[0] = grown(held[0])
                return held[0]

            return call

        apart = jax.jit(states_apart)(slots)
        copies = [jax.tree.map(jnp.copy, tree) for tree in (slots, apart)]  # each is donated
        print(f"{len(layers)} layers, {args.devices} devices")
        print("| what | arrays | ms a call, median | least | of its thread | of all threads |")
        print("|---|---|---|---|---|---|")
        rows = (
            ("weights, slots and tables", (leaves, slots, rest), whole_of(slots)),
            ("the same, sums of windows apart", (leaves, apart, rest), whole_of(apart)),
            ("slots alone, given back", slots, slots_of(copies[0])),
            ("the same, sums of windows apart", apart, slots_of(copies[1])),
            ("weights alone", leaves, lambda: read(leaves)),
        )
        counts = [len(jax.tree.leaves(tree)) for _, tree, _ in rows]
        for _, _, call in rows:  # compiles
            call()
        times = [[timed(call) for _, _, call in rows] for _ in range(args.calls)]
        for (name, *_), count, taken in zip(rows, counts, zip(*times)):
            found = [statistics.median(one[0] for one in taken), *map(min, zip(*taken))]
            shown = " | ".join(f"{seconds * 1e3:.2f}" for seconds in found)
            print(f"| {name} | {count} | {shown} |")


if __name__ == "__main__":
    main()
