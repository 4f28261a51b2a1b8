"""Parameters by patterns: layers are counted through, and what cannot be meant is said."""

import pytest
from flax import nnx

from v4jax import Transformer, tiny
from v4jax.train.choosing import matching


def _model(**options) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(tiny(), **options, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def stacked() -> Transformer:
    """Layers 0 and 1 alone, and 2 to 5 as two arrays of two layers each: 2, 4 and 3, 5."""
    return _model()


def _chosen(model, *patterns, **options) -> set[str]:
    chosen = matching(model, *patterns, **options)
    flat = [(".".join(map(str, p)), v) for p, v in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    return {path for path, variable in flat if chosen(path, variable)}


def test_layers_are_counted_through_the_stages(stacked):
    assert [(stage.repeats, len(stage.blocks)) for stage in stacked.stages] == [
        (1, 1),
        (1, 1),
        (2, 2),
    ]
    one = _chosen(stacked, "layers.1")
    assert len(one) > 20 and all(path.startswith("stages.1.blocks.0.") for path in one)
    assert _chosen(stacked, "layers.2-5") == _chosen(stacked, "stages.2")
    assert _chosen(stacked, "layers.3", "layers.5") == _chosen(stacked, "stages.2.blocks.1")
    assert _chosen(_model(scan_layers=False), "layers.4.moe.shared.w1") == {
        "stages.4.blocks.0.moe.shared.w1.kernel"
    }


def test_patterns_take_and_leave(stacked):
    everything = _chosen(stacked, "*")
    assert len(everything) == len(nnx.to_flat_state(nnx.state(stacked, nnx.Param)))
    norms = _chosen(stacked, "*norm.weight")
    assert len(norms) > 20 and all(path.endswith("norm.weight") for path in norms)
    rest = _chosen(stacked, "*", but=["embed", "layers.0-1", "*.router"])
    assert everything - rest == {
        path
        for path in everything
        if path.startswith(("embed.", "stages.0.", "stages.1.")) or ".router." in path
    }
    assert not _chosen(stacked, "layers.1") & _chosen(stacked, "mtp", "hc_head")


def test_layers_of_one_array_train_together(stacked):
    with pytest.raises(ValueError, match=r"layers 2, 4 is one array, and of these 2 would train"):
        matching(stacked, "layers.0-3")
    with pytest.raises(ValueError, match=r"of these 5 would train: .*scan_layers=False"):
        matching(stacked, "*", but=["layers.0-4"])
    apart = _chosen(_model(scan_layers=False), "layers.0-3")
    assert {path.split(".")[1] for path in apart} == {"0", "1", "2", "3"}


@pytest.mark.parametrize("pattern", ["layers.6", "layers.10-12", "attention", "layers.1.attn.wq_a"])
def test_a_pattern_that_matches_nothing_lists_what_there_is(stacked, pattern):
    with pytest.raises(ValueError, match="matches no parameter of tiny") as error:
        matching(stacked, "*", but=[pattern])
    message = str(error.value)
    assert repr(pattern) in message and "0-5" in message
    assert "layers.N.attention.wq_a.kernel" in message and "embed.table" in message


def test_no_pattern_is_refused(stacked):
    with pytest.raises(ValueError, match="no patterns: expected some"):
        matching(stacked)
