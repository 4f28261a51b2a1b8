"""What the programs of the engine are made of, and what a CPU takes to compile them.

    python -m benchmarks.operations                                   nano, tiny; both numerics
    python -m benchmarks.operations --models nano --numerics released --repeats 3

For prefill (128 tokens) and decode (one token) of one sequence: operations as lowered and as XLA
optimised them, the different kernels among these, CPU seconds to trace, lower and compile, and the
parts of a layer that the operations come from. Seconds are user and system time of the process, the
least of the repeats. On a busy machine they are larger: compare figures of one hour only.
"""

import argparse
import collections
import re
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import v4jax
from v4jax import Numerics, Transformer, checkpoint
from v4jax.config import VARIANTS
from v4jax.inference.steps import decode_shapes, decode_step, prefill_step

NUMERICS = {"released": "bfloat16", "plain": "float32"}
CHUNK, CAPACITY = 128, 4096
# Scopes that the model names, and what else can be told from where an operation was traced.
PARTS = (
    *("attention/project", "attention/output", "decode", "csa", "hca", "swa"),
    *("hc/post_pre", "hc/post", "hc/pre", "hc/head", "moe/route", "moe/experts", "moe/shared"),
    *("compressor", "indexer/queries", "indexer/select", "cache/append", "cache/window", "norm"),
    "head",
)
REST = "other parts of layers"
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*? ([\w\-]+)\(")
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}


def part_of(name: str) -> str:
    """Which part of the model an operation's name belongs to."""
    scope = "/".join(piece for piece in name.split("/") if "(" not in piece) + "/"
    for part in PARTS:
        if f"/{part}/" in f"/{scope}":
            return part
    if "_extend" in name:
        return REST
    return "sampling, embedding and steps" if name else "without a name"


def operations(text: str) -> Iterator[tuple[str, str]]:
    """Opcode and name of every instruction of an HLO module, those in fusions included."""
    for line in text.splitlines():
        if found := _OPERATION.match(line):
            name = re.search(r'op_name="([^"]*)"', line)
            yield found[1], name[1] if name else ""


def different_kernels(text: str) -> int:
    """Operations that run by themselves, but for those that are the same as others."""
    bodies = {}
    for computation in text.split("\n\n"):
        if found := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", computation.strip()):
            bodies[found[1]] = computation
    inner = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", text))
    kernels = set()
    for name, body in bodies.items():
        if name in inner:
            continue
        for line in body.splitlines():
            if (found := _OPERATION.match(line)) and found[1] not in _FREE:
                called = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", line)
                kernels.add(_anonymous(bodies[called[1]] if called else line.split(" = ", 1)[1]))
    return len(kernels)


def _anonymous(text: str) -> str:
    """A computation without the names that tell it from an equal one."""
    text = re.sub(r", (metadata|backend_config)=\{.*", "", text)
    names: dict[str, str] = {}
    return re.sub(r"%[\w.\-]+|\b(?:param|fused)[\w.\-]+", lambda m: _short(names, m[0]), text)


def _short(names: dict[str, str], name: str) -> str:
    return names.setdefault(name, f"v{len(names)}")


def load(name: str, numerics: Numerics) -> Transformer:
    """nano from its files; others with random weights."""
    if name == "nano":
        return checkpoint.load(v4jax.nano_path(), numerics)
    return Transformer(VARIANTS[name](), numerics, scan_layers=False, rngs=nnx.Rngs(0))


def programs(model: Transformer) -> dict[str, tuple]:
    """Steps of one sequence, as `Engine` makes them, and their arguments."""
    leaves = jax.tree.leaves(nnx.split(model)[1])
    decoded = decode_shapes(model, 1, min(CAPACITY, model.cfg.max_length))
    slots, tables, *_ = decoded
    chunk, one = np.zeros((1, CHUNK), np.int32), np.zeros(1, np.int32)
    return {
        "prefill": (lambda: prefill_step(model), (leaves, slots, tables, chunk, one + CHUNK, one)),
        "decode": (lambda: decode_step(model), (leaves, *decoded)),
    }


def measure(make_step, arguments, repeats: int):
    """Least CPU seconds to trace, lower and compile, and the texts of both programs."""
    seconds = []
    for _ in range(repeats):
        jax.clear_caches()
        times = [time.process_time()]
        traced = make_step().trace(*arguments)
        times.append(time.process_time())
        lowered = traced.lower()
        times.append(time.process_time())
        compiled = lowered.compile()
        times.append(time.process_time())
        seconds.append(np.diff(times))
    return min(seconds, key=sum), lowered.as_text(), compiled.as_text()


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=["nano", "tiny"], default=["nano", "tiny"])
    parser.add_argument("--numerics", nargs="+", choices=list(NUMERICS), default=list(NUMERICS))
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()

    jax.config.update("jax_enable_compilation_cache", False)
    parts = {}
    print("| program | lowered | optimised | kernels | trace s | lower s | compile s | sum s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.models:
        for numerics in args.numerics:
            model = load(name, Numerics(numerics, jnp.dtype(NUMERICS[numerics])))
            for step, (make_step, arguments) in programs(model).items():
                seconds, lowered, compiled = measure(make_step, arguments, args.repeats)
                label = f"{name} {numerics} {step}"
                counts = collections.Counter(part_of(name) for _, name in operations(compiled))
                parts[label] = len(model.cfg.layers), counts
                shown = " | ".join(f"{s:.2f}" for s in (*seconds, sum(seconds)))
                print(
                    f"| {label} | {lowered.count(' = ')} | {sum(counts.values())} "
                    f"| {different_kernels(compiled)} | {shown} |",
                    flush=True,
                )
    print("\nOptimised operations by part, per layer:\n")
    print("| part |", " | ".join(parts), "|")
    print("|---|" + "---|" * len(parts))
    for part in (*PARTS, REST, "sampling, embedding and steps", "without a name"):
        row = [counts[part] / layers for layers, counts in parts.values()]
        print(f"| {part} |", " | ".join(f"{n:.0f}" for n in row), "|")


if __name__ == "__main__":
    main()
