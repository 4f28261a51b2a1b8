"""What XLA's library for CPUs takes into its fusions, and what that costs: scores of an indexer.

    python -m benchmarks.cpu_products

Scores of 128 queries of four heads for 1,024 keys, in bfloat16: one product, relu, and a weighted sum over
heads. CPU milliseconds, the least of 50 runs: with XLA's default, with products alone given to the library
(what programs of the model ask for, `v4jax/nn/compilation.py`), and with nothing given to it.
"""

import time

import jax
import jax.numpy as jnp

from pallas_kernels.indexer.xla import scores_of

OPTION = "xla_cpu_experimental_ynn_fusion_type"
FORMS = {
    "XLA's default": {},
    "products alone": {OPTION: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"},
    "nothing": {OPTION: ""},
}
QUERIES, HEADS, WIDTH, KEYS, RUNS = 128, 4, 64, 1024, 50


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, QUERIES, HEADS, WIDTH), jnp.bfloat16)
    weights = jax.random.normal(keys[1], (1, QUERIES, HEADS))
    rows = jax.random.normal(keys[2], (1, KEYS, WIDTH), jnp.bfloat16)
    print("| given to the library | CPU ms | ns for a query and a key |\n|---|---|---|")
    for name, options in FORMS.items():
        scores = jax.jit(lambda q, w, k: scores_of(q, w, k, "bsi"), compiler_options=options)
        jax.block_until_ready(scores(q, weights, rows))
        took = []
        for _ in range(RUNS):
            started = time.process_time()
            jax.block_until_ready(scores(q, weights, rows))
            took.append(time.process_time() - started)
        each = min(took) / (QUERIES * KEYS)
        print(f"| {name} | {min(took) * 1e3:.2f} | {each * 1e9:.1f} |")


if __name__ == "__main__":
    main()
