"""The rows of the recall figure, and that its script trains: not what it shows (docs/measurements)."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("matplotlib")

from scripts import plot_recall
from scripts.plot_recall import KEYS, LENGTH, PAIRS, VALUES, WINDOW, rows, small
from v4jax import Transformer
from v4jax.config import window_layer
from v4jax.train.losses import IGNORED


def test_answers_lie_behind_their_keys_and_beyond_both_windows():
    tokens, following = rows(0, 1, 200)

    assert tokens.shape == following.shape == (200, LENGTH)
    for row, answers in zip(tokens, following, strict=True):
        asked = np.flatnonzero(answers != IGNORED)
        assert list(asked) == list(range(LENGTH - PAIRS, LENGTH))
        assert len(set(row[asked])) == PAIRS
        for place in asked:
            first, again = np.flatnonzero(row == row[place])
            assert again == place
            assert row[first] in KEYS
            assert row[first + 1] == answers[place]
            assert answers[place] in VALUES
            # What two layers of windows can hand on, from a layer's last token to its first, twice.
            assert place - (first + 1) > 2 * (WINDOW - 1)


def test_rows_are_those_of_seed_and_step():
    once, again, next_step = rows(0, 1, 4), rows(0, 1, 4), rows(0, 2, 4)

    np.testing.assert_array_equal(once, again)
    assert (once[0] != next_step[0]).any()


def test_each_model_is_given_the_indexer_that_its_name_says(monkeypatch):
    """With training that adds 1 to every number, in place of one that takes minutes."""
    seen = []

    def add_one(model, rate, indexer, steps, seed):
        values = dict(nnx.to_flat_state(nnx.state(model)))
        seen.append(
            (model.cfg.indexer, indexer, steps, {k: v.get_value() for k, v in values.items()})
        )
        graphdef, state = nnx.split(model)
        return nnx.merge(graphdef, jax.tree.map(lambda x: x + 1, state)), []

    monkeypatch.setattr(plot_recall, "train", add_one)
    assert len(dict(plot_recall.curves(steps=9, rate=1e-3, seed=0))) == 4

    dense, sparse, untrained, window = seen
    assert [spec and spec.topk for spec, *_ in seen] == [LENGTH // 4, 3, 3, None]
    assert [weight for _, weight, *_ in seen] == [1.0, 1.0, 0.0, 0.0]
    assert [steps for _, _, steps, _ in seen] == [range(6), range(6, 9), range(6, 9), range(9)]
    for path, start in dense[3].items():
        np.testing.assert_array_equal(sparse[3][path], start + 1)
        of_indexer = "indexer" in path
        np.testing.assert_array_equal(untrained[3][path], start if of_indexer else start + 1)
    assert any("indexer" in path for path in dense[3])
    assert not any("indexer" in path for path in window[3])


def test_training_measures_held_out_answers(monkeypatch):
    """Two steps of the smallest model."""
    monkeypatch.setattr(plot_recall, "EVERY", 1)
    cfg = small(window_layer())
    model = Transformer(dataclasses.replace(cfg, layers=cfg.layers[:1]), rngs=nnx.Rngs(0))
    trained, curve = plot_recall.train(model, lambda _: 1e-3, 0.0, range(2), seed=0)

    assert [step for step, _, _ in curve] == [1, 2]
    for _, right, loss in curve:
        assert 0 <= right < 0.2
        assert 3 < loss < 6  # unlearnt: ln 32 is 3.5
    assert trained.cfg.layers == cfg.layers[:1]
