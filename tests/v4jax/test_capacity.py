"""What slices do when they are full: arithmetic against shapes, compiled plans and counting by hand."""

import dataclasses
import itertools
import json
import math
import sys

import jax
import pytest

from sharding import AXES
from tests.conftest import ROOT
from v4jax import flash, nano, pro, tiny
from v4jax.cli import full_slices, plan
from v4jax.inference.engine import PREFIXES, Engine
from v4jax.inference.steps import empty_slots
from v4jax.nn.cache import pages_of, pool_pages, ratios_of
from v4jax.planning import costs
from v4jax.planning.capacity import (
    CHUNK,
    Server,
    StateSizes,
    Workload,
    fullest,
    largest,
    temporary_bytes,
)
from v4jax.planning.plan import Job, abstract_model
from v4jax.planning.published import FIGURES, compare
from v4jax.planning.topologies import Slice

GiB, MILLION = 2**30, 2**20
V6E = Slice.of("v6e:2x4")


def _mesh(*sizes: int) -> dict[str, int]:
    return dict(zip(AXES, sizes, strict=True))


def _server(cfg, topology: str, sizes: dict[str, int], context: int) -> Server:
    job = Job(kind="decode", context=context, batch=1)
    return Server(cfg, Slice.of(topology), job, sizes)


@pytest.mark.parametrize("make", [tiny, nano, flash, pro], ids=lambda f: f.__name__)
def test_state_is_what_the_engine_allocates(make):
    cfg = make()
    model = abstract_model(cfg, Job(kind="decode", context=1, batch=1), scan_layers=True)
    sizes = StateSizes.of(model)
    pools = sum(bool(spec.compressor) + bool(spec.indexer) for spec in cfg.layers)
    rounding = pools * 7 * 512  # a pool is whole tiles of eight lines

    for slots, tokens in ((16, 8 * 16_384), (37, 123_456), (300, 5_000_000)):
        pages = pool_pages(cfg, tokens, slots)
        shapes = jax.eval_shape(lambda s=slots, p=pages: empty_slots(model, s, p))
        exact = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        assert 0 <= exact - sizes.nbytes(slots, pages) <= rounding


def test_a_snapshot_is_as_small_as_the_released_shapes_say():
    model = abstract_model(flash(), Job(kind="decode", context=1, batch=1), scan_layers=True)

    # Rings of 43 layers, 128 rows of 584 bytes; on top the open windows, some 16 kB a layer.
    assert 0 < StateSizes.of(model).snapshot - 43 * 128 * 584 < 43 * 20e3


@pytest.mark.parametrize("context", [100, 8192, 9216, 131_072, MILLION])
def test_the_command_s_cache_has_the_pages_of_every_slot(context):
    full = fullest(flash(), Slice.of("v6e:4x4"), Workload(context)).full
    words = full.command(flash()).split()
    tokens = int(words[words.index("--cache-tokens") + 1])
    pages = pool_pages(flash(), tokens, full.slots)

    for ratio in ratios_of(flash()):
        assert pages[ratio] - 1 >= full.slots * pages_of(context, ratio)
    assert tokens >= context  # of which no request may have more
    assert int(words[words.index("--slots") + 1]) == full.batch


@pytest.mark.parametrize(
    ("cfg", "topology", "sizes", "context", "weights", "cache", "step"),
    [
        (flash(), "v5p:2x2x1", (1, 4, 1, 1), 131_072, 42.5, 0.4, 4.0),
        (flash(), "v6e:2x4", (1, 8, 1, 1), 131_072, 25.4, 0.4, 6.7),
        (flash(), "tpu7x:2x2x1", (1, 8, 1, 1), 131_072, 25.4, 0.4, 3.0),
        (flash(), "v6e:2x4", (1, 8, 1, 1), MILLION, 25.4, 3.4, 7.0),
        (pro(), "v5p:2x2x4", (1, 16, 1, 1), MILLION, 74.6, 4.9, 14.1),
        (pro(), "v6e:8x8", (1, 16, 4, 1), MILLION, 21.1, 4.9, 7.9),
        (pro(), "tpu7x:2x2x2", (1, 16, 1, 1), MILLION, 74.6, 4.9, 10.6),
    ],
)
def test_one_sequence_a_device_is_what_compiled_plans_say(
    cfg, topology, sizes, context, weights, cache, step
):
    """GiB and ms of docs/measurements/plans.md."""
    server = _server(cfg, topology, _mesh(*sizes), context)
    held = server.held(1, Workload(context))

    assert held.weights / GiB == pytest.approx(weights, abs=0.06)
    assert held.state / GiB == pytest.approx(cache, abs=0.06)
    assert server.decode(1, sizes[1], context).seconds * 1e3 == pytest.approx(step, rel=0.02)


def test_the_allowance_for_temporaries_beside_compiled_ones():
    """GiB of docs/measurements/plans.md, prefill of 4,096 tokens at the end of 128k; decoding: 0.2."""
    prefill = temporary_bytes(flash(), 1, 8, 131_072, chunk=4096) / GiB
    decode = temporary_bytes(flash(), 1, 8, 131_072, chunk=0) / GiB

    assert [round(prefill / compiled - 1, 2) for compiled in (2.1, 2.8, 3.1)] == [0.46, 0.09, -0.01]
    assert decode == pytest.approx(0.2, abs=0.1)


def test_a_step_counted_by_hand():
    """Flash on 8 chips of v6e, 10 sequences a chip at 8k, everything read from the released shapes."""
    server = _server(flash(), "v6e:2x4", _mesh(1, 8, 1, 1), 8192)
    step = server.decode(10, 80, 8192)

    layers, dim, vocab = 43, 4096, 129_280
    hit = 1 - (1 - 6 / 256) ** 80
    experts = layers * 32 * 3 * dim * 2048 * (0.5 + 1 / 32)
    cache = layers * 128 * 584 + 21 * (512 * 584 + 2048 * 68) + 20 * 64 * 584
    row = cache + 12 * layers * 4 * dim * 2 + 3 * 4 * vocab
    copies = 80 * layers * 6 * dim * 2 * 2
    dense = server.weights.held - experts - 2 * vocab * dim
    assert server.weights.experts == experts
    assert step.hbm_bytes == pytest.approx(dense + hit * experts + 10 * row + copies, rel=1e-6)
    assert step.flops == pytest.approx(10 * costs.decode_flops(flash(), 8192).total, rel=0.01)
    # There: rows in bfloat16, six numbers of experts and weights. Back: float32. 7/8 leave a device.
    sent = layers * 80 * (2 * dim + 48 + 4 * dim) * 7 / 8
    assert step.ici_bytes == pytest.approx(sent)
    there, back = (layers * 80 * x * 7 / 8 / 400e9 for x in (2 * dim + 48, 4 * dim))
    hops = (2 + 4) / 2 * 1e-6 * layers  # half of each ring
    assert step.links == pytest.approx(max(there, hops) + max(back, hops))
    assert (step.tokens, step.bound) == (80, "HBM")


def test_a_tensor_axis_repeats_what_it_does_not_cut():
    cut, whole = (
        _server(flash(), "v6e:2x4", _mesh(1, *sizes, 1), 8192) for sizes in ((4, 2), (8, 1))
    )

    assert cut.weights.held < whole.weights.held
    # The same rows on the slice: halves of heads, but whole compressors, indexers and latents.
    flops = [s.decode(n, 80, 8192).flops for s, n in ((cut, 20), (whole, 10))]
    assert flops[0] > 1.05 * flops[1]


def test_prompts_are_computed_under_a_mask():
    cfg = flash()
    server = _server(cfg, "v6e:2x4", _mesh(1, 8, 1, 1), 8192)
    whole = costs.prefill_flops(cfg, 8192, masked=True)

    assert server.prefill(8192).flops == pytest.approx(whole.total, rel=0.01)
    assert server.prefill(8192).tokens == 8 * 8192
    assert server.prefill(8192).hbm_bytes > 8192 // CHUNK * 24e9  # weights for each chunk

    # A CSA layer's attention, MFLOP a token, of the table in the performance sheet: 84 masked at 4k.
    fewer = dataclasses.replace(cfg, layers=tuple(s for s in cfg.layers if s.indexer)[:1])
    masked, chosen = (costs.prefill_flops(fewer, 4096, masked=m) for m in (True, False))
    assert round(masked.attention / 4096 / 1e6) == 84
    assert round(chosen.attention / 4096 / 1e6) in (66, 67)
    assert masked.indexer == chosen.indexer


def test_the_largest_number_is_the_largest():
    for most in (0, 1, 2, 3, 7, 8, 1000):
        assert largest(lambda n, most=most: n <= most) == most


@pytest.mark.parametrize("cfg", [flash(), pro()], ids=lambda c: c.name)
@pytest.mark.parametrize("workload", [Workload(8192), Workload(MILLION), Workload(8192, 1024)])
def test_one_slot_more_does_not_fit_and_no_mesh_is_faster(cfg, workload):
    place = Slice.of("tpu7x:2x2x2")
    choice = fullest(cfg, place, workload)
    full = choice.full
    server = _server(cfg, place.topology, full.sizes, workload.context)

    assert server.fits(full.slots, workload)
    assert not server.fits(full.slots + 1, workload)
    assert full.held.total <= full.limit < place.chip.hbm
    everyone = [full, *choice.others]
    assert full.tokens_per_second == max(one.tokens_per_second for one in everyone)
    assert f"fastest of {len(everyone)} meshes" in choice.reason
    assert math.prod(full.sizes.values()) == place.devices


def test_longer_contexts_hold_fewer_and_are_slower():
    fulls = [fullest(flash(), V6E, Workload(2**n)).full for n in (12, 13, 15, 17, 20)]

    for shorter, longer in itertools.pairwise(fulls):
        assert longer.batch < shorter.batch
        assert longer.tokens_per_second < shorter.tokens_per_second


def test_answers_take_the_time_of_prompts_and_steps():
    full = fullest(flash(), V6E, Workload(8192, 1024)).full
    assert full.prompt is not None
    seconds = full.slots * full.prompt.seconds + 1024 * full.step.seconds

    assert full.seconds == pytest.approx(seconds)
    assert full.tokens_per_second == pytest.approx(full.batch * 9216 / seconds)
    assert full.generated_per_second == pytest.approx(full.tokens_per_second / 9)


def test_what_is_asked_for_is_looked_at_alone():
    one = fullest(flash(), V6E, Workload(8192), batch=20, sizes=_mesh(1, 8, 1, 1))

    assert (one.full.batch, one.full.slots) == (20, 3)  # of 24 slots
    assert one.full.step.tokens == 20
    assert one.reason == "the only mesh that it fits under"


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"v6e:2x2: a request of 8,192 tokens of pro fit under no"):
        fullest(pro(), Slice.of("v6e:2x2"), Workload(8192))
    with pytest.raises(ValueError, match=r"context=2097152: expected at most 1048576 of flash"):
        fullest(flash(), V6E, Workload(2 * MILLION))
    with pytest.raises(ValueError, match=r"mesh axis tensor=16 cuts o_groups=8"):
        fullest(flash(), V6E, Workload(8192), sizes=_mesh(1, 1, 16, 1))
    with pytest.raises(ValueError, match=r"no TPU topology 'v6e:2by4'"):
        Slice.of("v6e:2by4")


def test_slices_are_known_without_the_compiler():
    assert [Slice.of(name).devices for name in ("v6e:4x8", "v5p:2x2x4", "tpu7x:2x2x1")] == [
        32,
        16,
        8,
    ]
    assert V6E.hops(8) == 3
    assert Slice.of("v6e:4x4").hops(4) == 2
    assert Slice.of("v6e:4x4").hops(1) == 1


def test_engines_keep_as_many_prefixes_as_plans_count():
    assert Engine.__init__.__kwdefaults__["prefixes"] == PREFIXES


def test_published_figures_are_below_their_bounds():
    for figure in FIGURES:
        other = compare(flash(), figure)
        assert 0.01 < other.share < 1, figure


@pytest.mark.parametrize("path", ["README.md", "docs/measurements/plans.md"])
def test_tables_of_full_slices_are_what_the_commands_print(path):
    """Of Flash on the slices of the README."""
    cfg = flash()
    places = [Slice.of(name) for name in ("v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1")]
    workloads = [*map(Workload, full_slices.CONTEXTS), Workload(8192, full_slices.ANSWER)]
    found, refused = full_slices.choices(cfg, places, workloads)
    shown = full_slices.describe(cfg, found, refused, full_slices.comparisons(cfg, places))
    tables = shown.split("\n\n")
    text = (ROOT / path).read_text(encoding="utf-8")

    assert not refused
    for table in tables[:1] if path == "README.md" else tables[1:]:
        assert table in text


def test_the_command_plans_slices_without_the_compiler(monkeypatch, capsys):
    def run(*options: str) -> str:
        job = ["plan", "--model", "tiny", "--topology", "v5e:2x2", "--job", "serve"]
        monkeypatch.setattr(sys, "argv", [*job, *options])
        plan.serve(tiny(), plan.parse_args())
        return capsys.readouterr().out

    monkeypatch.setitem(sys.modules, "libtpu", None)
    (one,) = json.loads(run("--context", "512", "--answer", "64", "--batch", "4", "--json"))["full"]
    assert (one["batch"], one["topology"]) == (4, "v5e:2x2")
    assert one["held"]["weights"] > 0
    assert one["tokens_per_second"] == pytest.approx(4 * 576 / one["seconds"])
    assert one["command"].startswith("v4jax serve --checkpoint DIR --slots 4")
    assert "Tiny, decode at 512" in run("--context", "512,256", "--batch", "4")
    with pytest.raises(SystemExit):
        run("--answer", "64")
    assert "--answer: expected --context" in capsys.readouterr().err
