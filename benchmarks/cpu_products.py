"""What XLA's library for CPUs takes into its fusions, and what an indexer's choice costs on a CPU.

    python -m benchmarks.cpu_products

First the scores of 128 queries of four heads for 1,024 keys, in bfloat16: one product, relu, and a weighted
sum over heads, with XLA's default, with products alone given to the library (what programs of the model ask
for, `v4jax/nn/compilation.py`), and with nothing given to it. Then the choice of 32 among 65,536 packed keys,
for 1,024 queries and for one. CPU milliseconds, the mean of several runs.
"""

import functools
import time

import jax
import jax.numpy as jnp

from pallas_kernels.formats.packed_rows import PackedKeys
from pallas_kernels.formats.pages import Pages
from pallas_kernels.formats.quantize import round_fp4
from pallas_kernels.indexer.xla import index_topk, scores_of
from v4jax.nn.compilation import jit

OPTION = "xla_cpu_experimental_ynn_fusion_type"
FORMS = {
    "XLA's default": {},
    "products alone": {OPTION: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"},
    "nothing": {OPTION: ""},
}
HEADS, WIDTH, TOPK = 4, 64, 32


def queries_of(count: int) -> tuple[jax.Array, jax.Array]:
    """Queries [1, count, HEADS, WIDTH] and the weights of their heads."""
    draw, other = jax.random.split(jax.random.key(0))
    queries = jax.random.normal(draw, (1, count, HEADS, WIDTH), jnp.bfloat16)
    return round_fp4(queries), jax.random.normal(other, (1, count, HEADS))


def keys_of(count: int) -> jax.Array:
    """[1, count, WIDTH]"""
    return round_fp4(jax.random.normal(jax.random.key(1), (1, count, WIDTH), jnp.bfloat16))


def line(name: str, pairs: int, runs: int, program, *args) -> None:
    """Prints the mean CPU time of a program, of all threads: the clock of a short run is too coarse."""
    jax.block_until_ready(program(*args))
    started = time.process_time()
    for _ in range(runs):
        jax.block_until_ready(program(*args))
    each = (time.process_time() - started) / runs
    print(f"| {name} | {each * 1e3:.2f} | {each / pairs * 1e9:.1f} |")


def main() -> None:
    heading = "CPU ms | ns for a query and a key |\n|---|---|---|"
    print(f"| given to the library | {heading}")
    for name, options in FORMS.items():
        scores = jax.jit(lambda q, w, k: scores_of(q, w, k, "bsi"), compiler_options=options)
        line(name, 128 * 1024, 200, scores, *queries_of(128), keys_of(1024))
    print(f"\n| choosing | {heading}")
    keys = Pages.of(keys_of(65_536))
    pages = Pages(PackedKeys.pack(keys.pool), keys.table)
    choose = jit(functools.partial(index_topk, topk=TOPK))
    for count, name in ((1024, "1,024 queries"), (1, "one query")):
        num_keys = pages.shape[1]
        visible = jnp.full((1, count), num_keys, jnp.int32)
        line(name, count * num_keys, 5, choose, *queries_of(count), pages, visible)


if __name__ == "__main__":
    main()
