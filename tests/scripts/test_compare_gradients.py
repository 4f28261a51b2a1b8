"""The comparison of gradients with transformers': names and the report, without torch."""

import dataclasses
import re

import numpy as np
import pytest

import v4jax
from benchmarks import compare_gradients
from tests.models import random_model
from v4jax import tiny
from v4jax.checkpoint.convert import Conversion


def test_tensors_meet_under_one_name_whoever_wrote_them(tmp_path):
    cfg = dataclasses.replace(tiny(), layers=tiny().layers[3:4])  # CSA, and an MTP block
    v4jax.save(random_model(cfg), tmp_path / "ours")
    Conversion(tmp_path / "ours", tmp_path / "theirs", naming="transformers").run()

    ours, theirs = (compare_gradients.tensors_of(tmp_path / side) for side in ("ours", "theirs"))

    compare_gradients.require_same_names(ours, theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert {"layers.0.attn.indexer.wq_b.weight", "layers.0.ffn.experts.3.w2.weight"} < set(ours)
    # Their model has no MTP block, and these two no gradient.
    assert not any(re.match(r"mtp\.|.*gate\.bias|.*tid2eid", name) for name in ours)


def test_the_worst_tensor_of_a_kind_is_named():
    one = np.ones((2, 3), np.float32)
    theirs = {
        "layers.0.ffn.experts.0.w1.weight": one,
        "layers.0.ffn.experts.11.w1.weight": 2 * one,
        "layers.12.ffn.experts.3.w1.weight": 0 * one,
        "head.weight": 0 * one,
    }
    ours = theirs | {"layers.0.ffn.experts.11.w1.weight": 2 * one + np.float32(0.5)}

    found = compare_gradients.by_kind(ours, theirs)

    assert list(found) == ["ffn.experts.w1.weight", "head.weight"]
    line, apart = compare_gradients.row("experts", found["ffn.experts.w1.weight"])
    assert apart == pytest.approx(0.25)
    assert line == "| `experts` | 3 | 1 | 2.5e-01 | `layers.0.ffn.experts.11.w1.weight` |"
    assert compare_gradients.row("head", found["head.weight"]) == ("| `head` | 1 | 1 | | |", 0.0)


def test_a_gradient_on_one_side_alone_is_no_match():
    none, some = np.zeros(3, np.float32), np.ones(3, np.float32)

    assert compare_gradients.difference(some, none) == np.inf
    assert compare_gradients.difference(none, some) == 1.0
    with pytest.raises(ValueError, match=r"1 tensors are on one side alone: head.weight \(ours\)"):
        compare_gradients.by_kind({"head.weight": some}, {})


def test_choices_count_by_layer_in_any_order():
    ours = np.array([[[[0, 1], [2, 3]], [[4, 5], [6, 7]]]])  # [B, T, layers, K]
    theirs = np.array([[[[1, 0], [2, 9]], [[5, 4], [8, 7]]]])

    assert compare_gradients.other_choices(ours, theirs).tolist() == [0, 2]
