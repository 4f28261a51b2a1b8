"""Sizes of kernels for one call: they reach the kernels, and only them; files of them are read with care."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v4jax
from benchmarks import autotune
from pallas_kernels import chips, dispatch, tuning
from pallas_kernels.formats.quantize import quantize_weight
from pallas_kernels.linear import linear
from v4jax.planning.topologies import trace_on


def steps_of(implementation, chip="v6e") -> str:
    """The program of a product whose kernel unpacks weights in steps."""
    w = quantize_weight(jnp.ones((512, 2048)), "fp8")
    x = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16)
    run = lambda x: linear(x, w, implementation=implementation)
    return str(trace_on(chip, run, x).jaxpr)


def tuned(chip="v6e", op="linear", **sizes) -> dispatch.Tuned:
    return dispatch.Tuned(chip, ((op, tuning.with_sizes(chip, sizes)),))


def test_sizes_are_of_one_call_and_of_one_operation():
    own = steps_of(None)
    others = steps_of(tuned(grouped_step_weights=1 << 17))
    assert others != own
    assert steps_of(tuned(op="grouped_matmul", grouped_step_weights=1 << 17)) == own
    assert steps_of(None) == own
    with pytest.raises(ValueError, match="sizes of kernels for v7x, and this program is for v6e"):
        steps_of(tuned("v7x", grouped_step_weights=1 << 17))


def test_what_is_computed_stays():
    rng = np.random.default_rng(0)
    w = quantize_weight(jnp.asarray(rng.normal(size=(256, 512)), jnp.float32), "fp8")
    x = jnp.asarray(rng.normal(size=(40, 256)), jnp.bfloat16)
    own = linear(x, w, implementation="interpret")
    with chips.using(tuning.with_sizes("v6e", {"grouped_step_weights": 1 << 15})):
        np.testing.assert_array_equal(linear(x, w, implementation="interpret"), own)
    # Off a TPU a file for one changes nothing, and names of implementations hold.
    sizes = dispatch.Tuned("v7x", tuned(grouped_step_weights=1 << 15).sizes, "interpret")
    np.testing.assert_array_equal(linear(x, w, implementation=sizes), own)
    with pytest.raises(ValueError, match="expected one of"):
        v4jax.released(implementation=dispatch.Tuned("v6e", (), "unknown"))
    numerics = v4jax.released(implementation=sizes).with_names("interpret", "xla")
    assert numerics.implementation.implementation == ("interpret", "xla")
    assert numerics.implementation.sizes == sizes.sizes and hash(numerics) is not None


def test_every_size_is_taken_by_the_operation_that_the_file_names():
    assert {size for sizes in tuning.TAKEN.values() for size in sizes} == {
        field.name for field in chips.dataclasses.fields(chips.Sizes)
    }


def test_what_is_found_is_written_and_read(tmp_path):
    def seconds(case, sizes):
        (own,) = {tuple(given.items()) for given in sizes.values()} or {()}
        entries = dict(own).get("decode_entries", 7)  # 7: none is given
        if entries == 4096:
            raise ValueError("RESOURCE_EXHAUSTED: VMEM")
        return {7: 1.0, 512: 2.0, 1024: 0.9, 2048: 0.99}[entries] * (1 + len(case))

    values = (512, 1024, 2048, 4096)
    search = autotune.Search(("decode_attention",), "decode_entries", values, ("a case", "another"))
    path = tmp_path / "sizes.json"
    found = autotune.tune(
        "v6e", [search], seconds, lambda found: tuning.save(path, "v6e", found, found="here")
    )
    assert found == {"decode_attention": {"decode_entries": 1024}}
    (pair,) = tuning.load(path).sizes
    assert pair == ("decode_attention", tuning.with_sizes("v6e", {"decode_entries": 1024}))
    flat = lambda case, sizes: 1.0
    assert autotune.tune("v6e", [search], flat, lambda found: None) == {}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "Expected a JSON file"),
        ("[]", "Expected a JSON file"),
        ('{"chip": "v6e", "operations": [1]}', "Expected a JSON file"),
        ('{"chip": "v9", "operations": {}}', "chip 'v9': expected one of v5e"),
        (
            '{"chip": "v6e", "operations": {"x": {}}}',
            "operation 'x': expected one of window_attention",
        ),
        (
            '{"chip": "v6e", "operations": {"linear": {"decode_entries": 1}}}',
            "linear has the size 'decode_entries': expected one of grouped_step_weights",
        ),
        (
            '{"chip": "v6e", "operations": {"linear": {"grouped_vmem": true}}}',
            "grouped_vmem=True: expected a positive integer",
        ),
        (
            '{"chip": "v6e", "operations": {"window_attention": {"attention_blocks": [1, 2]}}}',
            r"attention_blocks=\[1, 2\]: expected three positive integers",
        ),
    ],
)
def test_odd_files_are_refused_by_what_is_odd(content, message, tmp_path):
    path = tmp_path / "sizes.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        tuning.load(path)
    with pytest.raises(ValueError, match="FileNotFoundError"):
        tuning.load(tmp_path / "none.json")


def test_commands_take_the_file(tmp_path, capsys):
    from v4jax.cli import options

    parser = options.command_parser("generate", "Text.")
    options.add_numerics_options(parser)
    path = tmp_path / "sizes.json"
    path.write_text(
        json.dumps({"chip": "v6e", "operations": {"linear": {"grouped_vmem": 1 << 25}}})
    )
    numerics = options.numerics_of(parser.parse_args(["--kernel-sizes", str(path)]))
    assert numerics.implementation.chip == "v6e"
    assert options.numerics_of(parser.parse_args([])).implementation is None
    with pytest.raises(SystemExit):
        parser.parse_args(["--kernel-sizes", str(tmp_path / "none.json")])
    assert "none.json" in capsys.readouterr().err
