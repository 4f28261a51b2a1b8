"""One record a chip; a kind that none names runs the XLA forms, and is named."""

import dataclasses
import re
import types
import warnings

import jax
import pytest

from pallas_kernels import chips, dispatch
from tests.conftest import ROOT


@pytest.fixture
def kind(monkeypatch):
    """Sets the kind of TPU that programs are compiled for."""

    def set_kind(name: str) -> None:
        monkeypatch.setattr(dispatch, "target_platform", lambda: "tpu")
        device = types.SimpleNamespace(device_kind=name)
        monkeypatch.setattr(dispatch.jax, "devices", lambda: [device])

    return set_kind


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=lambda chip: chip.name)
def test_devices_go_by_the_names_of_their_record(chip, kind):
    for name in chip.kinds:
        kind(name)
        assert dispatch.target_chip() == chip.name
        assert dispatch.choose(None) == dispatch.choose("tpu") == "tpu"


def test_a_kind_without_a_record_runs_the_xla_forms_and_says_so_once(kind):
    kind("TPU v99")

    with pytest.warns(
        UserWarning, match=r"kind 'TPU v99': known are TPU v5 lite, .* XLA forms run"
    ):
        assert dispatch.choose(None) == "xla"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose(None) == "xla"
    with pytest.raises(
        ValueError, match=r"no kernels for a TPU of kind 'TPU v99'.*chips\.py adds one"
    ):
        dispatch.choose("tpu")
    with pytest.raises(ValueError, match="'TPU v99'"):
        dispatch.target_chip()
    assert dispatch.choose(("tpu", "xla")) == "xla"


def test_no_other_file_knows_a_chip_by_name():
    """So that one more record is all that one more chip takes."""
    names = "|".join(chips.CHIPS)
    for package in ("pallas_kernels", "sharding", "v4jax"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name == "chips.py":
                continue
            code = re.sub(r'"""[\s\S]*?"""|#.*', "", path.read_text(encoding="utf-8"))
            assert not re.search(rf"[\"']({names})[\"']", code), path


def test_programs_of_one_device_run_kernels_however_many_the_host_has(kind):
    kind("TPU v6 lite")
    assert jax.device_count() == 8
    assert dispatch.choose(None) == "tpu"
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((8,), ("expert",))):
        assert dispatch.choose(None) == "xla"


def test_other_implementations_are_picked_by_name():
    calls = []

    @dispatch.operation
    def double(x, *, added_later=None, implementation=None):
        return 2 * x, implementation

    @dispatch.operation
    def halve(x, *, implementation=None):
        return x / 2, implementation

    try:

        @dispatch.register("by adding", double)
        def double_by_adding(x):
            calls.append(x)
            return x + x, "ours"

        assert double(3, implementation="by adding") == (6, "ours") and calls == [3]
        assert double(3, implementation=("by adding", "xla")) == (6, "ours")
        assert double(3, added_later=None, implementation="by adding") == (6, "ours")
        with pytest.raises(TypeError, match="added_later"):
            double(3, added_later=1, implementation="by adding")
        assert halve(4, implementation="by adding") == (2, None)
        assert halve(4, implementation=("by adding", "xla")) == (2, "xla")
        assert double(3) == (6, None)
        assert dispatch.choose("by adding") == "by adding"
        with pytest.raises(ValueError, match=r"'xla'.: expected another name than"):
            dispatch.register("xla", double)
        with pytest.raises(ValueError, match=r"expected one of .*by adding"):
            dispatch.choose("unknown")
    finally:
        dispatch._registered.pop("by adding", None)


def test_a_chip_that_is_added_later_is_in_every_table(monkeypatch):
    own = dataclasses.replace(chips.V7X.sizes, grouped_vmem=123)
    new = dataclasses.replace(chips.V7X, name="v99", kinds=("TPU v99",), sizes=own)
    sizes = chips.table("grouped_vmem")
    monkeypatch.setitem(chips.CHIPS, "v99", new)
    assert sizes["v99"] == 123 and "v99" in sizes
    assert chips.of_kind("TPU v99") is new
