"""Lightning indexer at the sizes of V4-Flash and V4-Pro: prefill (bits) and decoding (indices).

    python -m benchmarks.indexer --only "Flash prefill 8k"

"prefill 8k" is a whole sequence; "prefill 8k of 128k" its last 8192 queries. Decoding is at the last
position of the context. FLOPs are those of the scores of visible entries, where any are left out.
How often the search for the threshold halves its interval depends on the scores: `PASSES` is what random
queries and keys need in prefill that are normal numbers rounded to FP4, as the model rounds them.
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.case import Case, Trips, main
from pallas_kernels.formats.packed_rows import PackedKeys, key_words
from pallas_kernels.formats.pages import Pages
from pallas_kernels.formats.quantize import round_fp4
from pallas_kernels.indexer import block_sizes, index_topk, threshold, tpu_prefill
from v4jax import config
from v4jax.planning.kernel_trips import index_list_trips

RATIO = 4
PASSES = 20


def _make(cfg: config.V4Config, batch: int, num_queries: int, context: int, is_packed: bool):
    heads, width = cfg.indexer.num_heads, cfg.indexer.head_dim
    keys = jax.random.split(jax.random.key(0), 3)
    start = context - num_queries
    positions = start + jnp.arange(num_queries, dtype=jnp.int32)
    queries = jax.random.normal(keys[0], (batch, num_queries, heads, width), jnp.bfloat16)
    entries = jax.random.normal(keys[2], (batch, context // RATIO, width), jnp.bfloat16)
    queries, entries = round_fp4(queries), round_fp4(entries)
    return (
        queries,
        jax.random.normal(keys[1], (batch, num_queries, heads)),
        _pages(entries, is_packed) if num_queries == 1 else entries,
        jnp.broadcast_to(positions, (batch, num_queries)),
    )


def _pages(keys: jax.Array, is_packed: bool) -> Pages:
    """Keys [B, S, I] in pages in any order."""
    pages = Pages.of(keys)
    pool = PackedKeys.pack(pages.pool) if is_packed else pages.pool
    order = jax.random.permutation(jax.random.key(1), pages.num_pages)
    return Pages(pool, order.astype(jnp.int32)[pages.table])


def _prefill_trips(cfg, batch: int, num_queries: int, context: int, chip: str) -> Trips:
    """Averages over the grid steps that score, of which several may belong to one query block."""
    num_entries = context // RATIO
    groups = block_sizes.lane_groups(num_entries)
    block = threshold.LANES // groups
    ends = range(context - num_queries + block, context + 1, block)
    last = [end // RATIO for end in ends if end // RATIO > cfg.indexer.topk]
    key_block = min(4096, num_entries)
    chunks = [  # of each step
        -(-min(n - first, key_block // groups) // block_sizes.CHUNK)
        for n in last
        for first in range(0, n, key_block)
    ]
    steps = len(chunks)
    blocks = len(last) / steps  # per step
    pairs = sum(chunks) / len(last) / 2
    num_words = -(-num_entries // 4096)
    pack = (2 * pairs * block_sizes.CHUNK / 128,)
    if num_words > 1:
        pack = (blocks * num_words, pack[0] / num_words)
    else:
        pack = (blocks * pack[0],)
    columns = (blocks * block // 16,) if block > 16 else ()
    scores = (sum(n // 2 for n in chunks) / steps, sum(n % 2 for n in chunks) / steps)
    if tpu_prefill.FAST_E5M2[chip]:  # converts columns, and has loops over bfloat16 as well
        columns += (blocks * cfg.indexer.num_heads / groups / tpu_prefill.CONVERTED_AT_ONCE,)
        scores += (0, 0)
    search = blocks * PASSES
    trips = (batch * steps, *columns, *scores, 0, search, pairs, 0, 0, 0, 0, *pack)
    return {"index_bits": trips}


def _decode_trips(cfg, batch: int, context: int, chip: str) -> Trips:
    return {"index_list": index_list_trips(chip, batch, context // RATIO, cfg.indexer.topk)}


def _case(cfg, batch: int, num_queries: int, context: int, is_packed: bool = False) -> Case:
    heads, width, topk = cfg.indexer.num_heads, cfg.indexer.head_dim, cfg.indexer.topk
    seen = [p // RATIO for p in range(context - num_queries + 1, context + 1)]
    scored = sum(n for n in seen if n > topk)
    num_entries = context // RATIO
    length, total = (
        f"{n >> 10}k" if n < 1 << 20 else f"{n >> 20}M" for n in (num_queries, context)
    )
    if num_queries == 1:
        shape, out_bytes = f"decode {total} x{batch}", 4 * topk
        trips = functools.partial(_decode_trips, cfg, batch, context)
    else:
        shape = f"prefill {length}" + (f" of {total}" if total != length else "")
        out_bytes = 512 * -(-num_entries // 4096)
        trips = functools.partial(_prefill_trips, cfg, batch, num_queries, context)
    shape += " packed" * is_packed
    key_bytes = 4 * key_words(width) if is_packed else 2 * width
    per_query = heads * (2 * width + 4) + out_bytes
    return Case(
        op="indexer",
        shape=f"{cfg.name.capitalize()} {shape}",
        run=functools.partial(index_topk, topk=topk, ratio=RATIO),
        make=functools.partial(_make, cfg, batch, num_queries, context, is_packed),
        flops=2.0 * batch * heads * width * scored,
        bytes=float(batch * (num_queries * per_query + key_bytes * num_entries)),
        trips=trips,
    )


def cases() -> list[Case]:
    """Flash and Pro: whole and late prefills, and decoding."""
    k = 1 << 10
    prefills = [(1, 8 * k, 8 * k), (1, 32 * k, 32 * k), (1, 8 * k, 128 * k), (1, 4 * k, 1024 * k)]
    decodes = [(1, 1, 32 * k), (8, 1, 32 * k), (1, 1, 128 * k), (8, 1, 128 * k)]
    decodes += [(1, 1, 1024 * k), (8, 1, 1024 * k)]
    flash, pro = config.flash(), config.pro()
    found = [_case(flash, *size) for size in prefills + decodes]
    packed = [(b, 1, context * k) for b in (8, 64) for context in (32, 128, 1024)]
    found += [_case(flash, *size, is_packed=True) for size in packed]
    return found + [_case(pro, *size) for size in [*prefills[:3], decodes[3], decodes[4]]]


if __name__ == "__main__":
    main(cases(), __doc__)
