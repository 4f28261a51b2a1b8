"""The cost model against the report's claims and against counting one token at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from v4jax import Transformer, flash, nano, pro, tiny
from v4jax.planning import costs
from v4jax.planning.describe import abstract_model, bytes_by_part, count_parameters

MILLION = 10**6


@pytest.mark.parametrize(
    ("cfg", "flops", "cache"), [(pro(), 0.27, 0.10), (flash(), 0.10, 0.07)], ids=["pro", "flash"]
)
def test_the_report_s_shares_of_v32_at_a_million_tokens(cfg, flops, cache):
    ours, theirs = costs.decode_flops(cfg, MILLION), costs.v32_decode_flops(MILLION)

    assert round(ours.fp8_equivalent / theirs.fp8_equivalent, 2) == flops
    assert round(costs.cache_bytes(cfg, MILLION) / costs.v32_cache_bytes(MILLION), 2) == cache


def test_cache_bytes_per_token_of_the_released_layout():
    assert costs.kv_row_bytes(flash()) == 584
    assert costs.index_key_bytes(flash().indexer) == 68
    assert costs.cache_bytes_per_token(flash()) == 3514.25
    assert costs.cache_bytes_per_token(pro()) == 5031.4375


@pytest.mark.parametrize("make", [flash, pro, nano], ids=lambda f: f.__name__)
def test_without_context_a_token_costs_two_flop_per_active_parameter(make):
    cfg = make()
    flops = costs.decode_flops(cfg, 0)

    # Not in the products: norms, biases, tables. Beside the parameters: mixing the streams.
    assert flops.attention == flops.indexer == 0
    assert flops.total == pytest.approx(2 * count_parameters(cfg).active, rel=0.01)


@pytest.mark.parametrize("length", [1, 7, 128, 300, 1001])
def test_a_prompt_costs_what_its_tokens_cost(length):
    cfg = dataclasses.replace(tiny(), num_streams=2)
    one_by_one = [costs.decode_flops(cfg, t + 1) for t in range(length)]
    layers = sum(costs.layer_flops(cfg, spec, 1).wide for spec in cfg.layers)
    head = one_by_one[0].wide - layers

    whole = costs.prefill_flops(cfg, length)

    assert whole.attention == sum(f.attention for f in one_by_one)
    assert whole.indexer == sum(f.indexer for f in one_by_one)
    assert whole.linear == sum(f.linear for f in one_by_one)
    assert whole.wide == sum(f.wide for f in one_by_one) - (length - 1) * head


def test_experts_hit_grows_from_the_chosen_ones_to_all():
    assert costs.experts_hit(flash(), 1) == pytest.approx(6)
    assert costs.experts_hit(flash(), 10**5) == pytest.approx(256)
    assert costs.expert_bytes(flash()) == 3 * 4096 * 2048 * 0.53125


def test_costs_by_kind_of_layer_add_up_to_the_model():
    cfg, context = flash(), 131_072
    kinds = costs.by_kind(cfg, context)

    assert [(kind.kind, kind.layers) for kind in kinds] == [
        ("window, hash-routed", 2),
        ("CSA, hash-routed", 1),
        ("HCA", 20),
        ("CSA", 20),
    ]
    head = costs.head_flops(cfg).total
    assert costs.decode_flops(cfg, context).total == pytest.approx(
        head + sum(kind.layers * kind.flops.total for kind in kinds)
    )
    assert costs.cache_bytes(cfg, context) == pytest.approx(
        sum(kind.layers * kind.cache_bytes for kind in kinds)
    )


def test_a_decoded_token_reads_active_weights_and_its_rows():
    cfg = flash()
    csa = next(kind for kind in costs.by_kind(cfg, MILLION) if kind.kind == "CSA")

    assert csa.cache_bytes_read == (128 + 512) * 584 + MILLION // 4 * 68
    wide = costs.by_kind(cfg, MILLION, costs.BFLOAT16)[-1]
    assert wide.cache_bytes_read == (128 + 512) * 1024 + MILLION // 4 * 256
    # All that one token reads of the weights, in bfloat16: two bytes for each active parameter.
    read = costs.decode_bytes(cfg, 0, 1, costs.BFLOAT16)
    assert read == pytest.approx(2 * count_parameters(cfg).active, rel=0.01)
    # Two sequences share what is not experts.
    assert read < costs.decode_bytes(cfg, 0, 2, costs.BFLOAT16) < 2 * read


def test_weights_of_all_experts_are_the_released_model_s_bytes():
    cfg = flash()
    everything = costs.decode_bytes(cfg, 0, 10**6)
    model = abstract_model(cfg)
    parts = bytes_by_part(model)
    left_out = sum(parts[name] for name in ("embedding", "MTP block"))

    # Not counted: norms, biases, tables of experts by token.
    assert everything == pytest.approx(sum(parts.values()) - left_out, rel=0.002)


def test_training_is_four_forward_passes_with_a_head_for_every_token():
    cfg = dataclasses.replace(tiny(), mtp_layers=())
    forward = costs.prefill_flops(cfg, 100) + costs.head_flops(cfg) * 99

    assert costs.training_flops(cfg, 100).total == pytest.approx(4 * forward.total)
    assert costs.training_flops(cfg, 100, remat="none").total == pytest.approx(3 * forward.total)
    # Weights that stay need no gradient; scores and sums of attention have one in any case.
    lora = costs.training_flops(cfg, 100, remat="none", trainable="lora")
    assert lora.linear == pytest.approx(2 * forward.linear)
    assert lora.attention == pytest.approx(3 * forward.attention)
    experts = 2 * 3 * cfg.moe.experts_per_token * cfg.embed_dim * cfg.moe.expert_dim
    stays = costs.training_flops(cfg, 100, remat="none", trainable="no-experts")
    saved = 3 * forward.linear - stays.linear
    assert saved == pytest.approx(100 * len(cfg.layers) * experts)
    with pytest.raises(ValueError, match="trainable='some': expected 'all', 'no-experts'"):
        costs.training_flops(cfg, 100, trainable="some")
    with_mtp = costs.training_flops(tiny(), 100)
    assert with_mtp.total > costs.training_flops(cfg, 100).total


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_products_are_those_the_compiler_counts(ratio):
    """XLA's count of a layer on CPU, which is honest where no loop depends on data.

    So one expert, which one tile of rows goes through; and sizes beside which what the formulas
    leave out (norms, softmax, the masked part of attention) is small.
    """
    spec = next(s for s in tiny().layers if s.ratio == ratio)
    moe = dataclasses.replace(tiny().moe, num_experts=1, experts_per_token=1, expert_dim=1024)
    sizes = dict(embed_dim=1024, q_lora_rank=512, o_lora_rank=512, num_heads=2, head_dim=128)
    cfg = dataclasses.replace(tiny(), layers=(spec,), mtp_layers=(), moe=moe, **sizes)
    tokens = 128
    model = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
    streams = jax.ShapeDtypeStruct((1, tokens, cfg.num_streams * cfg.embed_dim), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    step = jax.jit(lambda model, streams, ids: model.stages[0].blocks[0](streams, ids)[0])
    counted = step.lower(model, streams, ids).compile().cost_analysis()["flops"]

    formula = costs.prefill_flops(cfg, tokens).total - costs.head_flops(cfg).total
    assert counted == pytest.approx(formula, rel=0.02)
