"""Choosing a mesh, what a device holds under it, and rooflines; nothing is compiled."""

import dataclasses
import math

import jax
import pytest

from pallas_kernels.chips import CHIPS
from sharding import make_mesh
from v4jax import LoRA, flash, pro, tiny
from v4jax.planning import describe
from v4jax.planning.capacity import serving_seconds
from v4jax.planning.describe import bytes_by_part
from v4jax.planning.hlo import Collective
from v4jax.planning.plan import Job, choose_mesh, program
from v4jax.planning.roofline import job_flops, roofline
from v4jax.planning.topologies import Slice, chip_of

MILLION = 2**20


def test_decoding_spreads_experts_over_all_devices_and_sequences_over_the_same():
    job = Job(kind="decode", context=MILLION, batch=16)

    choice = choose_mesh(flash(), CHIPS["v6e"], 16, job)

    assert choice.sizes == dict(fsdp=1, expert=16, tensor=1, context=1)
    assert choice.fits
    assert any("16 of 256 experts on a device" in reason for reason in choice.reasons)


def test_tensor_is_cut_where_the_rest_of_the_model_does_not_fit_beside_a_cache():
    job = Job(kind="decode", context=MILLION, batch=32)

    choice = choose_mesh(pro(), CHIPS["v6e"], 128, job)

    assert choice.fits
    assert choice.sizes["tensor"] > 1
    assert any("repeat" in reason for reason in choice.reasons)


def test_one_long_prompt_is_cut_over_context():
    job = Job(kind="prefill", context=MILLION, batch=1)

    choice = choose_mesh(flash(), CHIPS["v6e"], 16, job)

    assert choice.sizes == dict(fsdp=1, expert=1, tensor=1, context=16)


def test_training_long_sequences_cuts_them_and_the_weights():
    job = Job(kind="train", context=65_536, batch=16)

    choice = choose_mesh(flash(), CHIPS["v5p"], 512, job)

    assert choice.fits
    assert choice.sizes["context"] > 1
    assert choice.sizes["fsdp"] * choice.sizes["expert"] <= 16


def test_what_does_not_fit_is_said_to_not_fit_and_takes_the_least_memory():
    job = Job(kind="train", context=4096, batch=4)

    choice = choose_mesh(flash(), CHIPS["v6e"], 4, job)

    assert not choice.fits
    assert choice.estimate.parameters > 284e9  # float32 over four devices
    assert "none of" in choice.reasons[-1]


def test_serving_takes_the_mesh_that_is_fastest_by_the_roofline():
    """Flash at batch 8 on four chips of v7x, which was given expert=8: 1.8 times slower by the roofline."""
    place = Slice.of("tpu7x:2x2x1")
    job = Job(kind="decode", context=131072, batch=8)
    seconds = serving_seconds(flash(), place, job)

    choice = choose_mesh(flash(), place.chip, place.devices, job, seconds)

    assert choice.sizes == dict(fsdp=1, expert=1, tensor=8, context=1)
    assert seconds(choice.sizes) * 1.8 < seconds(dict(fsdp=1, expert=8, tensor=1, context=1))
    assert choice.reasons[-1].endswith(
        "it is fastest by the roofline: 1.63 ms for a step, expert=2,tensor=4 1.76"
    )
    assert serving_seconds(flash(), place, Job(kind="train", context=4096, batch=8)) is None


def test_a_batch_that_no_mesh_divides_is_refused():
    with pytest.raises(ValueError, match=r"no mesh of 9 devices suits tiny with batch=2"):
        choose_mesh(tiny(), CHIPS["v6e"], 9, Job(kind="train", context=27, batch=2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(kind="serve"), r"kind='serve': expected one of \('prefill', 'decode', 'train'\)"),
        (
            dict(experts="fp8"),
            r"experts='fp8': expected one of \('fp4', 'float'\) for decode",
        ),
        (dict(batch=0), r"batch=0: expected a positive number"),
    ],
)
def test_jobs_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Job(**{**dict(kind="decode", context=256, batch=8), **wrong})


@pytest.mark.parametrize("kind", ["decode", "prefill", "train"])
def test_a_plan_holds_what_the_estimate_says(kind):
    cfg, job = tiny(), Job(kind=kind, context=512, batch=8)
    choice = choose_mesh(cfg, CHIPS["v5e"], 8, job)

    held = program(cfg, job, make_mesh(**choice.sizes)).held

    # Block scales that a mesh does not divide are replicated; the estimate cuts them.
    assert held["parameters"] == pytest.approx(choice.estimate.parameters, rel=0.03)
    if kind == "train":
        assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.05)
    else:
        assert held["cache"] == pytest.approx(choice.estimate.cache, rel=0.01)


def test_frozen_experts_have_no_optimizer_state():
    cfg, mesh = tiny(), make_mesh(expert=8)
    whole, frozen = (
        program(cfg, Job(kind="train", context=64, batch=8, trainable=trainable), mesh).held
        for trainable in ("all", "no-experts")
    )

    assert frozen["parameters"] < whole["parameters"]
    assert frozen["optimizer"] < 2 * frozen["parameters"]


SMALL = dataclasses.replace(tiny(), layers=tiny().layers[3:4], mtp_layers=())  # CSA


def _matrices(cfg) -> int:
    """Inputs and outputs of the four targets of a layer, counted from the architecture."""
    heads = cfg.num_heads * cfg.head_dim
    sides = (
        *(cfg.embed_dim, cfg.q_lora_rank, cfg.q_lora_rank, heads, cfg.embed_dim, cfg.head_dim),
        *(cfg.o_groups * cfg.o_lora_rank, cfg.embed_dim),
    )
    return sum(sides)


def test_adapters_are_planned_beside_a_model_as_released():
    cfg, job = tiny(), Job(kind="train", context=64, batch=2, trainable="lora", lora=LoRA(rank=3))
    held = program(cfg, job, make_mesh()).held

    factors = 3 * len(cfg.layers) * _matrices(cfg)
    stored = sum(bytes_by_part(describe.abstract_model(cfg)).values())
    assert held["optimizer"] == pytest.approx(2 * 4 * factors, abs=8)
    assert held["parameters"] == stored + 4 * factors
    choice = choose_mesh(cfg, CHIPS["v5e"], 1, job)
    assert choice.estimate.parameters == held["parameters"]
    assert choice.estimate.optimizer == 3 * 4 * factors


@pytest.mark.parametrize("trainable", ["lora", "indexer"])
def test_what_trains_beside_packed_weights_is_a_program(trainable):
    job = Job(kind="train", context=64, batch=2, trainable=trainable)
    planned = program(SMALL, job, make_mesh())
    held = {x.dtype.name for x in jax.tree.leaves(planned.arguments[0])}

    assert {"uint8", "float8_e4m3fn", "float32"} <= held
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), planned.lower().out_info[0])
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), planned.arguments[0])


def test_a_warm_up_counted_token_by_token():
    """Attention to all entries once, its scores twice more, and an indexer's products four times in all."""
    cfg, length = SMALL, 70
    (spec,) = cfg.layers
    rows = sum(min(t, cfg.window) + t // spec.ratio for t in range(1, length + 1))
    entries = sum(t // spec.ratio for t in range(1, length + 1))
    index, pair = spec.indexer, 4.0 * cfg.num_heads * cfg.head_dim
    own = cfg.q_lora_rank * index.num_heads * index.head_dim
    own += cfg.embed_dim * (index.num_heads + 2 * 2 * index.head_dim)

    found = job_flops(cfg, Job(kind="train", context=length, batch=1, trainable="indexer"))
    once = job_flops(cfg, Job(kind="prefill", context=length, batch=1, experts="float"))

    scoring = 2.0 * index.num_heads * index.head_dim * entries
    assert found.attention == pytest.approx(pair * rows * (1 + 2 / 2))
    assert found.indexer == pytest.approx(4 * scoring)
    head = 2 * cfg.embed_dim * (cfg.vocab_size + cfg.num_streams * (cfg.num_streams + 1))
    rest = found.linear + found.wide - once.linear - once.wide
    assert rest == pytest.approx(3 * 2.0 * own * length + head * (length - 1))


def test_what_trains_is_of_training_alone():
    with pytest.raises(ValueError, match=r"trainable='lora': expected one of .*for kind='train'"):
        Job(kind="decode", context=64, batch=2, trainable="lora")
    with pytest.raises(
        ValueError, match=r"trainable='head': expected one of \('all', 'no-experts'"
    ):
        Job(kind="train", context=64, batch=2, trainable="head")
    job = Job(kind="train", context=64, batch=64, trainable="lora")
    with pytest.raises(ValueError, match=r"cuts embed_dim=4096 into 64 parts in multiples of 128"):
        job.check(flash(), dict(fsdp=1, expert=64, tensor=1, context=1))


def test_a_mesh_that_does_not_suit_is_refused_before_compilation():
    with pytest.raises(ValueError, match=r"expert=8 cuts batch=4 into 8 parts"):
        program(tiny(), Job(kind="decode", context=256, batch=4), make_mesh(expert=8))


def test_steps_of_a_prompt_cost_what_the_prompt_costs():
    cfg = tiny()
    steps = [
        job_flops(cfg, Job(kind="prefill", context=n, batch=1, chunk=64)).total
        for n in (64, 128, 192)
    ]
    whole = job_flops(cfg, Job(kind="prefill", context=192, batch=1, chunk=192)).total

    assert steps[0] < steps[1] < steps[2]
    head = 2 * cfg.embed_dim * (cfg.vocab_size + cfg.num_streams * (cfg.num_streams + 1))
    assert sum(steps) == pytest.approx(whole + 2 * head)


def test_frozen_experts_save_the_gradients_of_their_weights():
    cfg = tiny()
    whole, frozen = (
        job_flops(cfg, Job(kind="train", context=64, batch=2, trainable=trainable)).total
        for trainable in ("all", "no-experts")
    )

    expert = 2 * 3 * cfg.embed_dim * cfg.moe.expert_dim  # FLOP of a row
    rows = 2 * 64 * cfg.moe.experts_per_token * (len(cfg.layers) + len(cfg.mtp_layers))
    assert whole - frozen == pytest.approx(rows * expert)


def test_a_roofline_is_bound_by_its_longest_term():
    cfg, chip = flash(), CHIPS["v5p"]
    job = Job(kind="decode", context=131_072, batch=8)
    sizes = dict(fsdp=1, expert=8, tensor=1, context=1)
    held = {"parameters": 30e9, "cache": 1e9}
    sent = [Collective("all-reduce", "f32[8]", 8, 1, 6e12)]

    bound = roofline(cfg, job, chip, sizes, held, sent)
    quiet = roofline(cfg, job, chip, sizes, held, [])

    assert (bound.bound, bound.seconds) == ("ICI", pytest.approx(6e12 / chip.ici))
    assert quiet.bound == "HBM"
    assert quiet.hbm_bytes < 30e9  # eight tokens do not hit all experts
    assert quiet.tokens_per_second == pytest.approx(8 / quiet.memory)


def test_topologies_belong_to_chips():
    assert chip_of("tpu7x:2x2x1").name == "v7x"
    assert chip_of("v5p:4x4x4").name == "v5p"
    with pytest.raises(ValueError, match=r"no TPU topology 'v9:2x2': expected one of v5e:2x2"):
        chip_of("v9:2x2")


def test_a_plan_allocates_nothing():
    cfg = dataclasses.replace(pro(), layers=pro().layers[:4])
    before = len(jax.live_arrays())

    planned = program(cfg, Job(kind="decode", context=MILLION, batch=8), make_mesh(expert=8))

    assert planned.held["parameters"] > 4 * math.prod((48, 7168, 3072)) * 3 / 2
    assert len(jax.live_arrays()) == before
