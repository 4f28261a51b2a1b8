"""The host's time a decode step: with as many arrays as Flash has, on eight devices.

    python -m benchmarks.host_time
    python -m benchmarks.host_time --devices 1 --layers 5

An engine with Flash's 43 layers in nano's widths, everything packed as released, decodes a full set of
slots. Its decode program is replaced by one that takes the same arrays (they are all passed to it) and
computes nothing but new lengths, so what is left is the host: flattening arguments, handing buffers to
every device, fetching tokens, and the scheduler's Python. Reported for calls of 1, 8 and 16 steps.
"""

import argparse
import dataclasses
import os
import time


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--layers", type=int, default=43)
    parser.add_argument("--calls", type=int, default=200)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"

    import jax
    import jax.numpy as jnp
    from flax import nnx

    import v4jax
    from sharding import DECODE
    from v4jax import Engine, Sampling
    from v4jax.inference.sampling import TOP
    from v4jax.inference.steps import MOST_STEPS, Output
    from v4jax.nn.quantization import to_released

    cfg = dataclasses.replace(
        v4jax.nano(), layers=v4jax.flash().layers[: args.layers], mtp_layers=()
    )
    # Flash's order of layers with nano's indexers.
    indexer = v4jax.nano().layers[1].indexer
    layers = [
        dataclasses.replace(layer, indexer=indexer if layer.indexer else None)
        for layer in cfg.layers
    ]
    cfg = dataclasses.replace(cfg, layers=tuple(layers))

    def make(key: jax.Array) -> v4jax.Transformer:
        return v4jax.Transformer(
            cfg, v4jax.released(), DECODE, scan_layers=False, rngs=nnx.Rngs(key)
        )

    def idle(leaves, slots, tables, count, cancelled, allowed):
        """Tokens of value 5 for every slot, and slots that are `count` tokens longer."""
        shape = (slots.done.shape[0], MOST_STEPS)
        is_given = (jnp.arange(MOST_STEPS) < count)[None] & ~slots.done[:, None]
        top = (*shape, min(TOP, cfg.vocab_size))
        zeros = jnp.zeros(shape, jnp.float32)
        output = Output(
            jnp.where(is_given, 5, -1), zeros, jnp.zeros(top, jnp.int32), jnp.zeros(top, jnp.float32)
        )
        lengths = slots.cache.lengths + jnp.where(slots.done, 0, count)
        cache = dataclasses.replace(slots.cache, lengths=lengths)
        steps = slots.steps + jnp.where(slots.done, 0, count)
        return output, dataclasses.replace(slots, cache=cache, steps=steps)

    with jax.set_mesh(v4jax.make_mesh(expert=args.devices)):
        model = to_released(jax.jit(make)(jax.random.key(0)))
    print("| steps a call | arrays passed | us a call, dispatch | us a step, dispatch | us a step, engine |")
    print("|---|---|---|---|---|")
    for count in (1, 8, 16):
        engine = Engine(model, slots=8, steps_per_call=count, cache_tokens=4096, prefixes=0)
        program = jax.jit(idle, donate_argnums=(1,), keep_unused=True)
        scheduler, spent = engine._scheduler, []

        def decode(*given, program=program, spent=spent):
            started = time.perf_counter()
            result = program(engine.leaves, *given)
            spent.append(time.perf_counter() - started)
            return result

        def prefill(slots, *_):
            return slots

        scheduler.run = dataclasses.replace(scheduler.run, decode=decode, prefill=prefill)
        most = count * (args.calls + 8)
        for seed in range(8):
            engine.submit([3], Sampling(seed=seed, max_new_tokens=most), stop_ids=[])
        engine.step()
        while any(request is None or not request.tokens for request in scheduler.in_slot):
            engine.step()
        spent.clear()
        started = time.perf_counter()
        for _ in range(args.calls // 2):
            engine.step()
        total = time.perf_counter() - started
        arrays = len(jax.tree.leaves((engine.leaves, scheduler.slots)))
        call = sorted(spent)[len(spent) // 2] * 1e6
        print(
            f"| {count} | {arrays} | {call:.0f} | {call / count:.0f} "
            f"| {total / (args.calls // 2) / count * 1e6:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
