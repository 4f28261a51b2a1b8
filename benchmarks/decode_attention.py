"""Decode attention at the sizes of V4-Flash and V4-Pro: picked entries (CSA) and all (HCA).

    python -m benchmarks.decode_attention --only "Flash CSA"

Contexts are full: every sequence is at the last position its cache has room for.
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.case import Case, Trips, main
from pallas_kernels.attention import decode_attention, tpu_decode
from pallas_kernels.formats.packed_rows import PackedColumns, PackedRows
from pallas_kernels.formats.pages import PAGE, Pages, num_pages
from v4jax import config
from v4jax.planning.kernel_trips import decode_stream_trips

ROPE = config.flash().rope_head_dim
ROW_BYTES = {False: 1024, True: 584}  # of an entry: bfloat16, packed


def _make(cfg: config.V4Config, batch: int, num_entries: int, ratio: int, is_packed: bool):
    picks = cfg.indexer.topk if ratio == 4 else 0
    keys = jax.random.split(jax.random.key(0), 5)
    rows = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    pages = num_pages(num_entries)
    held = rows(keys[2], (1, batch * pages * PAGE, cfg.head_dim))
    if is_packed:
        held = (PackedRows if picks else PackedColumns).pack(held, ROPE)
    table = jax.random.permutation(keys[4], batch * pages).reshape(batch, pages)
    places = jax.random.uniform(keys[3], (batch, num_entries))
    return (
        rows(keys[0], (batch, cfg.num_heads, cfg.head_dim)),
        rows(keys[1], (batch, cfg.window, cfg.head_dim)),
        Pages(held, table.astype(jnp.int32)) if num_entries else None,
        jnp.argsort(places)[:, :picks] if picks else None,
        jnp.zeros(cfg.num_heads),
        jnp.full(batch, max(num_entries * ratio, cfg.window) - 1, jnp.int32),
    )


def _trips(batch: int, num_entries: int, num_picked: int, chip: str) -> Trips:
    if not num_entries:
        return {"decode_ring": (batch,)}
    if num_picked:
        turns = [tpu_decode.LANES // tpu_decode.GATHER_UNROLL] * (num_picked // tpu_decode.LANES)
        looked_up = (-(-batch // 8),) if batch > 8 else ()
        return {"decode_gather": (batch, *turns)[batch == 1 :], "pool_rows": looked_up}
    stream = decode_stream_trips(chip, batch, num_pages(num_entries))
    return {"decode_stream": stream}


def _case(cfg, kind: str, batch: int, context: int, is_packed: bool = False) -> Case:
    ratio = {"CSA": 4, "HCA": 128, "window": 1}[kind]
    num_entries = 0 if kind == "window" else context // ratio
    num_picked = cfg.indexer.topk if kind == "CSA" else 0
    num_used = min(num_entries, num_picked or num_entries)
    heads = batch * cfg.num_heads * cfg.head_dim
    length = f"{context >> 10}k" if context < 1 << 20 else f"{context >> 20}M"
    parts = [cfg.name.capitalize(), kind, length, f"x{batch}", "packed" * is_packed]
    return Case(
        op="decode_attention",
        shape=" ".join(filter(None, parts)),
        run=functools.partial(decode_attention, ratio=ratio, scale=cfg.head_dim**-0.5),
        make=functools.partial(_make, cfg, batch, num_entries, ratio, is_packed),
        flops=4.0 * heads * (cfg.window + num_used),
        bytes=4.0 * heads + batch * (1024 * cfg.window + ROW_BYTES[is_packed] * num_used),
        trips=functools.partial(_trips, batch, num_entries, num_picked),
    )


def cases() -> list[Case]:
    """Flash and Pro at several batch sizes and contexts."""
    flash, pro = config.flash(), config.pro()
    sizes = [("CSA", 8, 8 << 10), ("CSA", 8, 32 << 10), ("CSA", 1, 128 << 10)]
    sizes += [("CSA", 8, 128 << 10), ("CSA", 64, 128 << 10), ("CSA", 8, 1 << 20)]
    sizes += [
        ("CSA", 64, 1 << 20),
        ("HCA", 8, 128 << 10),
        ("HCA", 1, 1 << 20),
        ("HCA", 8, 1 << 20),
        ("HCA", 64, 1 << 20),
    ]
    found = [_case(flash, *size) for size in [*sizes, ("window", 8, 128 << 10)]]
    packed = [
        (k, b, c) for k in ("CSA", "HCA") for b in (8, 64) for c in (32 << 10, 128 << 10, 1 << 20)
    ]
    found += [_case(flash, *size, is_packed=True) for size in packed]
    return found + [_case(pro, *size) for size in [sizes[0], sizes[3], ("HCA", 8, 1 << 20)]]


if __name__ == "__main__":
    main(cases(), __doc__)
