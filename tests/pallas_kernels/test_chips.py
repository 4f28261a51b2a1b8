"""One record a chip; a kind that none names runs the XLA forms, and is named."""

import re
import types
import warnings

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
        monkeypatch.setattr(dispatch.jax, "device_count", lambda: 1)

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
