"""The check of a machine with a GPU or a TPU: is everything right there, and how fast is it?

    sh benchmarks/accelerator.sh --output docs/measurements/NAME.md
    sh benchmarks/accelerator.sh --rehearse          # small shapes, on whatever device there is

Every section is a process of its own with a time limit, and one that fails is reported and does not
stop the others. Ceilings (a copy, a matrix product) are measured in the same run, so that a figure
can be read as a share of what the machine does.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

Row = dict[str, str]
CASES = (  # of benchmarks/kernel_cases.py
    *(f"grouped_swiglu: Flash FP4, {rows} rows" for rows in (1, 16, 256, 4096)),
    "grouped_swiglu: Flash bf16, 256 rows",
    "linear: Flash output, 8 rows",
    "attention: Flash CSA 8k",
    "attention: Flash HCA 8k",
    "indexer: Flash prefill 8k",
    "indexer: Flash decode 128k x8",
    "decode_attention: Flash CSA 128k x8",
    "decode_attention: Flash HCA 1M x8",
    "hc_post_pre: Flash prefill 8k",
    "gated_pool: CSA entries 8k",
    "round: Flash input 8k",
)


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of a call that has run once before."""
    import jax

    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def in_loop(run: Callable, arguments: tuple, repeats: int) -> Callable[[], object]:
    """`run(*arguments)` so many times in one program: launching from Python takes microseconds too.

    The largest element of every result is used, so that none of it is left out, and the arguments of
    a turn wait for that of the turn before, so that nothing is hoisted out of the loop.
    """
    import jax
    import jax.numpy as jnp

    def body(_, carry):
        largest, args = carry
        for leaf in jax.tree.leaves(run(*args)):
            largest = jnp.maximum(largest, jnp.max(leaf.astype(jnp.float32)))
        return jax.lax.optimization_barrier((largest, args))

    def program(args):
        return jax.lax.fori_loop(0, repeats, body, (jnp.float32(-jnp.inf), args))[0]

    compiled = jax.jit(program)
    return lambda: compiled(arguments)


def section_ceilings(rehearse: bool) -> list[Row]:
    """What the machine does at best: a copy and two matrix products."""
    import jax
    import jax.numpy as jnp

    count, width, loops = ((1 << 20), 512, 2) if rehearse else ((1 << 31), 8192, 10)
    device = jax.devices()[0]
    rows = [{"what": "device", "figure": f"{device.device_kind} ({device.platform})"}]
    rows.append({"what": "jax", "figure": jax.__version__})
    x = jnp.ones((count // 2,), jnp.bfloat16)
    program = jax.jit(lambda x: jax.lax.fori_loop(0, loops, lambda _, y: y + 1, x))
    taken = seconds(lambda: program(x)) / loops
    rows.append({"what": "copy", "figure": f"{2 * x.nbytes / taken / 1e9:.0f} GB/s"})
    for dtype in (jnp.bfloat16, jnp.float32):
        a = jax.random.normal(jax.random.key(0), (width, width)).astype(dtype)
        product = jax.jit(
            lambda a: jax.lax.fori_loop(
                0, loops, lambda _, b: (a @ b * (width**-0.5)).astype(a.dtype), a
            )
        )
        taken = seconds(lambda p=product, a=a: p(a)) / loops
        name = jnp.dtype(dtype).name
        figure = f"{2 * width**3 / taken / 1e12:.0f} TFLOP/s"
        rows.append({"what": f"{name} product of {width} x {width}", "figure": figure})
    return rows


def section_op_tests(rehearse: bool) -> list[Row]:
    """The tests of the operations, run on the device."""
    import jax

    platform = jax.devices()[0].platform
    environment = {**os.environ, "V4JAX_TEST_PLATFORM": {"gpu": "cuda"}.get(platform, platform)}
    chosen = "xla and not interpret" if platform != "tpu" else "tpu or xla"
    tests = ["tests/pallas_kernels"]
    if rehearse:
        tests = ["tests/pallas_kernels/test_gated_pool.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *tests]
    command += ["-n", "0" if rehearse else "8", "-W", "default", "--no-header", "--tb=line"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    lines = done.stdout.strip().splitlines()
    rows = [{"what": "tests/pallas_kernels", "figure": lines[-1] if lines else done.stderr[-300:]}]
    failed = [line for line in lines if line.startswith("FAILED")]
    rows += [{"what": "failed", "figure": line[7:200]} for line in failed[:12]]
    return rows


def section_nano(rehearse: bool) -> list[Row]:
    """nano's logits on the device against the CPU's."""
    import jax
    import numpy as np
    from flax import nnx

    import v4jax
    from v4jax import checkpoint

    length = 140 if rehearse else 600
    tokens = np.random.default_rng(0).integers(3, 1280, (2, length)).astype(np.int32)
    rows = []
    for numerics in (v4jax.plain("float32"), v4jax.released("float32"), v4jax.released("bfloat16")):
        graphdef, params = nnx.split(checkpoint.load(v4jax.nano_path(), numerics))
        whole = jax.jit(lambda p, t, g=graphdef: nnx.merge(g, p)(t))
        here = np.asarray(whole(params, tokens))
        with jax.default_device(jax.devices("cpu")[0]):
            on_cpu = jax.device_put(params, jax.devices("cpu")[0])
            there = np.asarray(whole(on_cpu, jax.device_put(tokens, jax.devices("cpu")[0])))
        difference = np.abs(here - there)
        same = (here.argmax(-1) == there.argmax(-1)).mean()
        figure = (
            f"largest difference {difference.max():.2g}, median {np.median(difference):.2g}, "
            f"argmax equal at {same:.2%} of {same.size * here.shape[0] * length} positions"
        )
        rows.append({"what": f"{numerics.name} {numerics.dtype}", "figure": figure})
    return rows


def _wide(rehearse: bool):
    """Flash's widths with a layer of each kind and eight experts, in the released formats."""
    import jax
    from flax import nnx

    import v4jax
    from v4jax.config import csa_layer, hca_layer, window_layer
    from v4jax.nn.quantization import to_released

    cfg = v4jax.tiny() if rehearse else v4jax.flash()
    layers = (window_layer(), csa_layer(cfg.indexer), hca_layer())
    moe = dataclasses.replace(cfg.moe, num_experts=8, experts_per_token=min(6, 8))
    cfg = dataclasses.replace(cfg, name="wide", layers=layers, mtp_layers=(), moe=moe)

    def make():
        return v4jax.Transformer(cfg, v4jax.released(), scan_layers=False, rngs=nnx.Rngs(0))

    return to_released(jax.jit(make)())


def section_wide(rehearse: bool) -> list[Row]:
    """Prefill and decoding of three layers (sliding window, CSA, HCA) at Flash's widths."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    model = _wide(rehearse)
    graphdef, params = nnx.split(model)
    rng, vocab = np.random.default_rng(0), model.cfg.vocab_size
    rows = []

    def extend(params, tokens, cache):
        model = nnx.merge(graphdef, params)
        counts = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
        streams, cache = model.extend(tokens, counts, cache)
        return model.logits(model.hidden(streams[:, -1:])), cache

    step = jax.jit(extend, donate_argnums=2)
    chunk = 256 if rehearse else 2048
    for length in (512,) if rehearse else (8192, 32768):
        started = time.perf_counter()
        tokens = rng.integers(0, vocab, (1, chunk)).astype(np.int32)
        times = []
        for _ in range(2):  # the first one compiles
            started = time.perf_counter()
            cache = model.init_cache(1, length)
            for _ in range(length // chunk):
                logits, cache = step(params, tokens, cache)
            jax.block_until_ready(logits)
            times.append(time.perf_counter() - started)
        figure = f"{length / times[1]:,.0f} tokens/s (first run {times[0]:.1f} s)"
        rows.append({"what": f"prefill {length:,} in chunks of {chunk:,}", "figure": figure})
    contexts = (300,) if rehearse else (32_768, 131_072, 1_048_576)
    loops = 4 if rehearse else 32
    for context in contexts:
        for batch in (1, 8):
            cache = model.init_cache(batch, context)
            lengths = jnp.full(batch, context - loops - 1, jnp.int32)
            cache = dataclasses.replace(cache, lengths=lengths)
            tokens = jnp.asarray(rng.integers(0, vocab, (batch, 1)), jnp.int32)

            def decode(params, tokens, cache):
                def one(_, carry):
                    tokens, cache = carry
                    logits, cache = extend(params, tokens, cache)
                    return jnp.argmax(logits, -1).astype(jnp.int32), cache

                return jax.lax.fori_loop(0, loops, one, (tokens, cache))

            program = jax.jit(decode)
            taken = seconds(lambda p=program, t=tokens, c=cache: p(params, t, c), 3) / loops
            figure = f"{taken * 1e3:.3f} ms a step, {batch / taken:,.0f} tokens/s"
            rows.append({"what": f"decode at {context:,}, batch {batch}", "figure": figure})
    return rows


def section_wide_logits(rehearse: bool) -> list[Row]:
    """The same model's logits on the device against the CPU's, 300 tokens."""
    import jax
    import numpy as np
    from flax import nnx

    graphdef, params = nnx.split(_wide(rehearse))
    tokens = np.random.default_rng(1).integers(0, 256, (1, 300)).astype(np.int32)
    whole = jax.jit(lambda p, t: nnx.merge(graphdef, p)(t)[:, ::7])
    here = np.asarray(whole(params, tokens))
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        there = np.asarray(whole(jax.device_put(params, cpu), jax.device_put(tokens, cpu)))
    difference = np.abs(here - there)
    same = (here.argmax(-1) == there.argmax(-1)).mean()
    figure = (
        f"largest difference {difference.max():.2g}, median {np.median(difference):.2g}, standard "
        f"deviation of logits {there.std():.2g}, argmax equal at {same:.0%}"
    )
    return [{"what": "released bfloat16", "figure": figure}]


def section_training(rehearse: bool) -> list[Row]:
    """Steps of nano's training, float32."""
    import jax
    import numpy as np
    from flax import nnx

    import v4jax
    from v4jax.train.losses import shifted
    from v4jax.train.optimizers import adamw
    from v4jax.train.step import TrainStep

    cfg = v4jax.tiny() if rehearse else v4jax.nano()
    make = jax.jit(lambda: v4jax.Transformer(cfg, v4jax.plain(), rngs=nnx.Rngs(0)))
    trainer = TrainStep(make(), adamw(1e-3))
    shape = (2, 142) if rehearse else (8, 514)
    tokens = shifted(np.random.default_rng(0).integers(3, 256, shape).astype(np.int32))
    state, losses, times = trainer.init(), [], []
    for _ in range(3 if rehearse else 12):
        started = time.perf_counter()
        state, metrics = trainer.step(state, tokens)
        losses.append(float(metrics.loss))
        times.append(time.perf_counter() - started)
    figure = (
        f"first step {times[0]:.1f} s (compilation), then {statistics.median(times[1:]) * 1e3:.1f} ms "
        f"a step; loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    )
    return [{"what": f"{cfg.name}, {shape[0]} x {shape[1] - 2} tokens", "figure": figure}]


def section_operations(rehearse: bool) -> list[Row]:
    """Operations at Flash's shapes, the implementation that is picked here, in a loop in one program."""
    import functools

    import jax

    from benchmarks import kernel_cases

    platform = jax.default_backend()
    cases = {case.name: case for case in kernel_cases.all_cases()}
    chosen = [cases[name] for name in CASES if name in cases]
    rows = []
    for case in chosen[:1] if rehearse else chosen:
        started = time.perf_counter()
        try:
            if rehearse:  # the shapes are those of an accelerator: only trace them
                jax.eval_shape(functools.partial(case.run, implementation=None), *case.arguments())
                rows.append({"what": case.name, "figure": "traced"})
                continue
            arguments = jax.jit(case.maker(platform))()
            run = functools.partial(case.run, implementation=None)
            loops = 10
            taken = seconds(in_loop(run, arguments, loops), 3) / loops
            figure = (
                f"{taken * 1e6:,.0f} us, {case.flops / taken / 1e12:.1f} TFLOP/s, "
                f"{case.bytes / taken / 1e9:,.0f} GB/s"
            )
        except Exception as error:  # noqa: BLE001 - one case must not end the others
            figure = f"failed: {type(error).__name__}: {str(error)[:160]}"
        rows.append({"what": case.name, "figure": figure})
        print(rows[-1], f"{time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    return rows


SECTIONS = {  # name -> (function, seconds it may take)
    "ceilings": (section_ceilings, 60),
    "operations": (section_operations, 150),
    "wide": (section_wide, 200),
    "training": (section_training, 150),
    "nano": (section_nano, 180),
    "op_tests": (section_op_tests, 200),
    "wide_logits": (section_wide_logits, 120),
}


def run_section(name: str, rehearse: bool, limit: float) -> tuple[list[Row], float]:
    """The rows of a section that runs in a process of its own, and the seconds it took."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.accelerator", "--section", name]
        command += ["--rows", str(path), *(["--rehearse"] if rehearse else [])]
        try:
            done = subprocess.run(
                command, check=False, timeout=limit, capture_output=True, text=True
            )
            rows = json.loads(path.read_text()) if path.exists() else None
            if rows is None:
                rows = [{"what": "failed", "figure": done.stderr.strip()[-1500:]}]
        except subprocess.TimeoutExpired as error:
            said = (error.stderr or b"").decode(errors="replace")[-1500:]
            rows = [{"what": "failed", "figure": f"more than {limit:.0f} s. {said}"}]
    return rows, time.monotonic() - started


def page(results: dict[str, tuple[list[Row], float]]) -> str:
    """The results as Markdown."""
    lines = [f"# Accelerator check, {time.strftime('%Y-%m-%d')}", ""]
    lines += ["Made by `sh benchmarks/accelerator.sh`.", ""]
    for name, (rows, taken) in results.items():
        doc = SECTIONS[name][0].__doc__.split("\n")[0]
        lines += [f"## {name}", "", f"{doc} ({taken:.0f} s)", "", "| what | figure |", "|---|---|"]
        for row in rows:
            cells = [
                str(row[key]).replace("|", "/").replace("\n", " ") for key in ("what", "figure")
            ]
            lines.append(f"| {cells[0]} | {cells[1]} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Runs the sections and writes the page after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, help="Markdown file (default: print it)")
    parser.add_argument("--rehearse", action="store_true", help="small shapes, for a test on a CPU")
    parser.add_argument("--only", choices=list(SECTIONS), action="append", help="these sections")
    parser.add_argument("--seconds", type=float, default=540, help="of all sections together")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        rows = SECTIONS[args.section][0](args.rehearse)
        args.rows.write_text(json.dumps(rows))
        return
    deadline = time.monotonic() + args.seconds
    results = {}
    for name in args.only or SECTIONS:
        limit = min(SECTIONS[name][1], deadline - time.monotonic())
        if limit < 5:
            results[name] = ([{"what": "not run", "figure": "no time was left"}], 0.0)
            continue
        results[name] = run_section(name, args.rehearse, limit)
        for row in results[name][0]:
            print(f"{name}: {row['what']}: {row['figure']}", flush=True)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(page(results) + "\n", encoding="utf-8")
    if not args.output:
        print(page(results))


if __name__ == "__main__":
    main()
