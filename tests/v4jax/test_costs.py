"""The cost model against the report's claims and against counting one token at a time."""

import dataclasses

import pytest

from v4jax import costs, flash, nano, pro, tiny
from v4jax.summary import count_parameters

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
    assert costs.index_key_bytes(flash()) == 68
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
