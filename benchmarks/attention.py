"""Prefill and training attention at the shapes of V4-Flash and V4-Pro.

    python -m benchmarks.attention --only "Flash CSA 8k"

Products counted are those with the keys a query may see: its window, and all its visible entries.
CSA attends to the selected ones of them, but on a TPU multiplies with all (`selection.py` says
why); elsewhere it gathers those of a list, fewer than are counted here. A gradient takes 2.5 times
the products of a forward pass and twice its memory traffic (q, out and d_out read, d_q written);
cases named "gradient" run both.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.case import Case, Trips, main
from pallas_kernels.attention import block_sizes, selected_attention, window_attention
from pallas_kernels.attention.tpu_prefill import band_size
from pallas_kernels.selection import ENTRIES_PER_WORD_ROW, Selection
from v4jax.config import CSA, HCA, V4Config, flash, pro
from v4jax.planning.topologies import topology_mesh


@dataclasses.dataclass(frozen=True)
class Problem:
    """A chunk of one sequence in a layer of a model."""

    cfg: V4Config
    ratio: int  # 0: window only
    length: int  # queries
    start: int = 0  # tokens before them

    @property
    def num_entries(self) -> int:
        return (self.start + self.length) // self.ratio if self.ratio else 0

    def visible(self, tokens: np.ndarray) -> np.ndarray:
        """Entries visible after a number of tokens."""
        return tokens // self.ratio if self.ratio else 0 * tokens

    def make(self, has_bits: bool = True) -> tuple:
        """q, window, entries, selection or None, sink, positions."""
        width, heads, size = self.cfg.head_dim, self.cfg.num_heads, self.cfg.window
        keys = jax.random.split(jax.random.key(0), 4)
        q, window, entries = (
            jax.random.normal(key, shape, jnp.bfloat16)
            for key, shape in zip(
                keys,
                [
                    (1, self.length, heads, width),
                    (1, size + self.length, width),
                    (1, self.num_entries, width),
                ],
            )
        )
        positions = self.start + jnp.arange(self.length, dtype=jnp.int32)[None]
        selection = None
        if self.ratio == CSA.ratio:
            seen = (positions + 1) // self.ratio
            selection = (self._bits if has_bits else self._indices)(keys[3], seen)
        return q, window, entries, selection, jnp.zeros(heads), positions

    def _bits(self, key: jax.Array, seen: jax.Array) -> Selection:
        """A random half of the `seen` [1, T] first entries."""
        rows = -(-self.num_entries // ENTRIES_PER_WORD_ROW)
        bit = jnp.arange(32, dtype=jnp.uint32)[:, None]
        entry = jnp.arange(rows)[:, None, None] * ENTRIES_PER_WORD_ROW
        entry += bit.astype(jnp.int32) * 128 + jnp.arange(128)
        visible = entry < seen[..., None, None, None]
        visible = jnp.sum(visible.astype(jnp.uint32) << bit, axis=3, dtype=jnp.uint32)
        bits = visible & jax.random.bits(key, visible.shape)
        return Selection(None, bits, self.num_entries, self.num_entries)

    def _indices(self, key: jax.Array, seen: jax.Array) -> Selection:
        """As many as a layer selects: all that are seen, or one at random of each K-th of them."""
        topk = self.cfg.indexer.topk
        slot, seen = jnp.arange(topk), seen[..., None]
        at = (slot + jax.random.uniform(key, (*seen.shape[:2], topk))) * seen / topk
        listed = jnp.where(slot < seen, slot, -1)
        picked = jnp.minimum(at.astype(jnp.int32), seen - 1)
        return Selection.of_indices(jnp.where(seen > topk, picked, listed), self.num_entries)

    def attend(self, q, window, entries, selection, sink, positions, *, implementation):
        """out and log of the denominator."""
        options = dict(scale=self.cfg.head_dim**-0.5, implementation=implementation)
        if selection is not None:
            return selected_attention(q, window, entries, selection, sink, positions, **options)
        options["ratio"] = max(self.ratio, 1)
        return window_attention(q, window, entries, sink, positions, **options)

    def gradient(self, q, window, entries, selection, sink, positions, *, implementation):
        """Output and gradients, for the output itself as cotangent."""
        out, vjp = jax.vjp(
            lambda q, window, entries, sink: self.attend(
                *(q, window, entries, selection, sink, positions), implementation=implementation
            )[0],
            *(q, window, entries, sink),
        )
        return out, vjp(out)

    @property
    def flops(self) -> float:
        tokens = self.start + 1 + np.arange(self.length)
        seen = np.minimum(tokens, self.cfg.window) + self.visible(tokens)
        return 4.0 * self.cfg.head_dim * self.cfg.num_heads * int(seen.sum())

    @property
    def bytes(self) -> float:
        rows = 2 * self.length * self.cfg.num_heads + self.length + self.num_entries
        mask = self.length * self.num_entries / 8 if self.ratio == CSA.ratio else 0
        return 2.0 * self.cfg.head_dim * rows + 4 * self.length * self.cfg.num_heads + mask

    def counts(self, blocks: block_sizes.Blocks) -> np.ndarray:
        """Blocks of entries that each block of queries visits."""
        last = np.arange(blocks.queries, self.length + 1, blocks.queries)
        return -(-self.visible(self.start + last) // blocks.entries)

    def forward_trips(self) -> Trips:
        blocks = block_sizes.forward(self.length, self.cfg.num_heads, self.num_entries)
        counts = self.counts(blocks)
        if self.num_entries <= blocks.entries:
            return {"attention_forward": (len(counts),)}
        # The first block of entries shares the window's softmax.
        return {"attention_forward": (len(counts), np.maximum(counts - 1, 0).mean())}

    def gradient_trips(self) -> Trips:
        """Kernels are named after the transformations around them."""
        blocks = block_sizes.backward(self.length, self.cfg.num_heads, self.num_entries)
        step, rows, size = blocks.queries, block_sizes.WINDOW_ROWS, self.cfg.window
        last = self.length - step + band_size(size, blocks)
        first_row = np.arange(0, last, rows)
        first = np.maximum(first_row - size, 0) // step
        end = np.minimum(-(-(first_row + rows - 1) // step), self.length // step)
        trips = {
            "transpose_jvp_attention_query_gradient": self._streaming(blocks),
            "transpose_jvp_attention_window_gradient": (int(np.maximum(end - first, 0).sum()),),
        }
        if self.num_entries:
            trips["transpose_jvp_attention_entry_gradient"] = (int(self.counts(blocks).sum()),)
        forward = {f"jvp_{name}": loops for name, loops in self.forward_trips().items()}
        return forward | trips

    def _streaming(self, blocks) -> tuple:
        """Blocks of queries, and blocks of entries per block of queries."""
        counts = self.counts(blocks)
        return (len(counts), counts.mean()) if self.num_entries else (len(counts),)

    def case(self, name: str, *, gradient: bool = False) -> Case:
        return Case(
            op="attention",
            shape=name + " gradient" * gradient,
            run=self.gradient if gradient else self.attend,
            make=self.make,
            make_off_tpu=functools.partial(self.make, has_bits=False),
            flops=self.flops * (3.5 if gradient else 1),
            bytes=self.bytes * (3 if gradient else 1),
            trips=functools.partial(_on_chip, self, gradient),
        )


def _on_chip(problem: Problem, gradient: bool, chip: str) -> Trips:
    """Trips under the block sizes of a chip."""
    with jax.set_mesh(topology_mesh(chip)):
        return problem.gradient_trips() if gradient else problem.forward_trips()


def cases() -> list[Case]:
    """Both models, each kind of layer, forward and gradient."""
    found = []
    for cfg, name in ((flash(), "Flash"), (pro(), "Pro")):
        for gradient in (False, True):
            for kind, ratio in (("SWA", 0), ("HCA", HCA.ratio), ("CSA", CSA.ratio)):
                problem = Problem(cfg, ratio, 8192)
                found.append(problem.case(f"{name} {kind} 8k", gradient=gradient))
            problem = Problem(cfg, CSA.ratio, 32768)
            found.append(problem.case(f"{name} CSA 32k", gradient=gradient))
        late = Problem(cfg, CSA.ratio, 2048, 131072)
        found.append(late.case(f"{name} CSA 2k after 128k"))
    return found


if __name__ == "__main__":
    main(cases(), __doc__)
