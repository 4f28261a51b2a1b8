"""Compiles parts of a training step, and prints the memory that the compiler gives them and their products.

    python -m benchmarks.training_memory indexer head --chip v6e
    python -m benchmarks.training_memory step --chip cpu
    python -m benchmarks.training_memory optimizer --chip v6e
    python -m benchmarks.training_memory remat --chip cpu

`indexer` is the gradient of the selected scores of one layer of Flash, `head` that of a cross-entropy through
Flash's output head, and `step` a whole step of a small model: in bfloat16, with the rounding in the loop, and
with experts that stay packed. `optimizer` is AdamW's update of four arrays by each dtype of its state. `remat` is
a step of nano by each policy of what layers keep, which on a CPU also runs. A chip needs `pip install
'v4jax[tpu]'` and no TPU.
"""

import argparse
import collections
import dataclasses
import os
import re
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx
from jax import ShapeDtypeStruct

import v4jax
from pallas_kernels.indexer import selected_scores
from v4jax.nn.cross_entropy import cross_entropy
from v4jax.nn.quantization import everything, is_expert, not_expert, to_released
from v4jax.nn.remat import POLICIES
from v4jax.planning.topologies import compile_on
from v4jax.train.optimizers import STATE_DTYPES, adamw
from v4jax.train.step import TrainStep


def _compiled(chip: str, fn, *args) -> jax.stages.Compiled:
    if chip != "cpu":
        return compile_on(chip, fn, *args)
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)  # what it donates is not held twice
    return jitted.lower(*args).compile()


def _print(name: str, compiled: jax.stages.Compiled, held: float = 0) -> None:
    """A line: megabytes of temporaries (and of the state), and products by their precision."""
    found = re.findall(
        r" (?:convolution|dot)\(.*?(?:operand_precision=\{(\w+)|$)",
        compiled.as_text() or "",
        re.MULTILINE,
    )
    products = dict(collections.Counter(precision or "default" for precision in found))
    memory = compiled.memory_analysis()
    state = f", state {held / 1e6:.0f} MB" if held else ""
    print(
        f"{name}: temporaries {memory.temp_size_in_bytes / 1e6:.0f} MB{state}, products {products}"
    )


def indexer(chip: str) -> None:
    """Of 4,096 and 16,384 tokens."""
    spec = v4jax.flash().indexer
    heads, width, topk = spec.num_heads, spec.head_dim, spec.topk

    def loss(q, weights, keys, indices, d_out):
        scores = selected_scores(q, weights, keys, indices)
        return jnp.sum(jnp.where(indices >= 0, scores, 0) * d_out)

    for length in (4096, 16384):
        compiled = _compiled(
            chip,
            jax.grad(loss, argnums=(0, 1, 2)),
            ShapeDtypeStruct((1, length, heads, width), jnp.bfloat16),
            ShapeDtypeStruct((1, length, heads), jnp.float32),
            ShapeDtypeStruct((1, length // 4, width), jnp.bfloat16),
            ShapeDtypeStruct((1, length, topk), jnp.int32),
            ShapeDtypeStruct((1, length, topk), jnp.float32),
        )
        _print(f"selected scores, {length} tokens", compiled)


def head(chip: str) -> None:
    """Of 4,096 tokens, with a head in float32 that trains."""
    flash = v4jax.flash()
    cfg = dataclasses.replace(
        v4jax.tiny(),
        vocab_size=flash.vocab_size,
        embed_dim=flash.embed_dim,
        layers=v4jax.tiny().layers[:1],
        mtp_layers=(),
    )
    for dtype in ("float32", "bfloat16"):
        model = _abstract(cfg, v4jax.plain(dtype))
        graphdef, table, rest = nnx.split(model, lambda path, _: path[0] == "head", ...)

        def loss(table, rest, hidden, targets, graphdef=graphdef):
            return jnp.mean(cross_entropy(nnx.merge(graphdef, table, rest), hidden, targets))

        hidden = ShapeDtypeStruct((1, 4096, cfg.embed_dim), dtype)
        targets = ShapeDtypeStruct((1, 4096), jnp.int32)
        compiled = _compiled(chip, jax.grad(loss, argnums=(0, 2)), table, rest, hidden, targets)
        _print(f"head, activations in {dtype}", compiled)


def step(chip: str) -> None:
    """Of 512 tokens through 16 layers with 32 experts each."""
    tiny = v4jax.tiny()
    moe = dataclasses.replace(tiny.moe, num_experts=32, expert_dim=256)
    layers = tiny.layers[3:5] * 8
    cfg = dataclasses.replace(tiny, layers=layers, mtp_layers=(), embed_dim=256, moe=moe)
    for name, trainable, qat in (
        ("all", everything, False),
        ("all, --qat", everything, True),
        ("no-experts", not_expert, False),
    ):
        model = _abstract(cfg, v4jax.released("bfloat16"), packed=trainable is not everything)
        training = TrainStep(model, v4jax.train.adamw(1e-3), trainable=trainable, qat=qat)
        state = jax.eval_shape(training.init)
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        tokens = [ShapeDtypeStruct((1, 512), jnp.int32)] * 3
        _print(f"step, {name}", _compiled(chip, training.compiled_step, state, *tokens), held)


def _abstract(cfg, numerics, *, packed: bool = False) -> v4jax.Transformer:
    def make():
        model = v4jax.Transformer(cfg, numerics, rngs=nnx.Rngs(0))
        return to_released(model, is_expert) if packed else model

    return nnx.eval_shape(make)


def optimizer(chip: str) -> None:
    """Of four arrays of 256 MiB; gradients, state and parameters are donated."""
    place = dict(matrix=True, axes=(None, None), parts=())
    arrays = {f"w{i}": ShapeDtypeStruct((16, 2048, 2048), jnp.float32) for i in range(4)}
    params = nnx.State({name: nnx.Param(array, **place) for name, array in arrays.items()})
    for dtype in STATE_DTYPES:
        rule = adamw(1e-3, state_dtype=dtype)
        state = jax.eval_shape(rule.init, params)

        def update(gradients, state, params, rule=rule):
            updates, state = rule.update(gradients, state, params)
            return jax.tree.map(jnp.add, params, updates), state

        update = jax.jit(update, donate_argnums=(0, 1, 2))
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        compiled = _compiled(chip, update, params, state, params)
        _print(f"AdamW, state in {dtype}", compiled, held)


def remat(chip: str) -> None:
    """Of 1,024 and 4,096 tokens through nano in float32; seconds are the least of three runs."""
    for length in (1024, 4096):
        for name in POLICIES:
            tokens = [ShapeDtypeStruct((1, length), jnp.int32)] * 3
            training = TrainStep(_abstract(v4jax.nano(), v4jax.plain()), adamw(1e-3), remat=name)
            state = jax.eval_shape(training.init)
            compiled = _compiled(chip, training.compiled_step, state, *tokens)
            memory = compiled.memory_analysis()
            kept = f"{memory.temp_size_in_bytes / 1e6:.0f} MB, on the host {memory.host_temp_size_in_bytes / 1e6:.0f}"
            print(
                f"{length} tokens, {name}: {kept}{_seconds(compiled, chip, state, tokens)}",
                flush=True,
            )


def _seconds(compiled: jax.stages.Compiled, chip: str, *arguments) -> str:
    """The least time of a training step, on arrays of these shapes."""
    if chip != "cpu":
        return ""
    state, tokens = jax.tree.map(lambda x: jnp.full(x.shape, 1e-2).astype(x.dtype), arguments)
    times = []
    for _ in range(3):
        started = time.process_time(), time.monotonic()
        state, metrics = compiled(state, *tokens)
        jax.block_until_ready((state, metrics))
        times.append((time.process_time() - started[0], time.monotonic() - started[1]))
    cpu, wall = min(times)
    return f"; {cpu:.2f} CPU s, {wall:.2f} s"


PARTS = {
    "indexer": indexer,
    "head": head,
    "step": step,
    "optimizer": optimizer,
    "remat": remat,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--chip", default="v6e", help='"cpu", or a TPU generation')
    args = parser.parse_args()
    for part in args.parts:
        PARTS[part](args.chip)


if __name__ == "__main__":
    main()
