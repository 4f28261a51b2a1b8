"""Reports of kernels: which part a core runs, floors, estimates, and where schedules are written."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks import cores
from benchmarks.kernel_report import Report, markdown, xla_estimate


def _copy(name: str, grid: tuple[int, ...], semantics: tuple[str, ...] | None):
    def kernel(x, out):
        out[...] = x[...]

    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        compiler_params=semantics and pltpu.CompilerParams(dimension_semantics=semantics),
    )


def _program(x):
    x = _copy("silent", (4,), None)(_copy("whole", (4,), ("arbitrary",))(x))
    x = _copy("one", (1, 6), ("parallel", "arbitrary"))(x)
    x = jax.lax.fori_loop(0, 3, lambda _, y: _copy("three", (3,), ("parallel",))(y), x)
    return jax.jit(_copy("even", (5, 4), ("parallel", "parallel")))(x)


def test_a_kernel_is_cut_where_its_grid_has_an_axis_of_several_steps():
    program = jax.make_jaxpr(_program)(jax.ShapeDtypeStruct((8, 128), jnp.float32))

    parts = cores.busiest(program.jaxpr, 2)

    assert parts == {"whole": 1.0, "silent": 1.0, "one": 1.0, "three": 2 / 3, "even": 1 / 2}
    assert set(cores.busiest(program.jaxpr, 1).values()) == {1.0}
    assert cores.part_of({"a": 1.0, "a_gradient": 0.5}, "transpose_jvp_a_gradient") == 0.5
    with pytest.raises(ValueError, match="other is none of the kernels"):
        cores.part_of(parts, "other")


def _report(chip: str, schedule: float, mxu: float, hbm: float) -> Report:
    return Report("op: shape", chip, 1.0, 10**6, 0, 0, 0, schedule, mxu, hbm, 1.0, 3, 0.5, {})


def test_no_figure_is_below_a_floor():
    reports = [_report("v6e", 90.0, 100.0, 20.0), _report("v7x", 9.0, 1.0, 2.0)]

    assert [(r.least_us, r.bound) for r in reports] == [(100.0, "mxu"), (9.0, "schedule")]
    assert markdown(reports)[-1] == "| op: shape | 1 / 1 | 100 m · 0.90 · 50 | 9.0 s · 4.50 · 50 |"


LOOP = """HloModule jit_f, is_scheduled=true

%body (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  ROOT %fusion.1 = f32[8,128]{1,0} fusion(%p), kind=kLoop, backend_config={"estimated_cycles":"3500"}
}

%condition (p: s32[]) -> pred[] {
  %p.1 = s32[] parameter(0)
  ROOT %compare = pred[] compare(%p.1, %p.1), direction=LT
}

ENTRY %main (x: s32[]) -> s32[] {
  %x = s32[] parameter(0)
  %fusion.2 = f32[8,128]{1,0} fusion(%x), kind=kLoop, backend_config={"estimated_cycles":"7000"}
  ROOT %while.1 = s32[] while(%x), condition=%condition, body=%bodyTRIPS
}
"""


@pytest.mark.parametrize(
    ("trips", "expected"),
    [("", (6.0, True)), (', backend_config={"known_trip_count":{"n":"4"}}', (12.0, False))],
)
def test_an_estimate_says_where_it_is_too_low(trips, expected):
    assert xla_estimate(LOOP.replace("TRIPS", trips), clock=1.75e9) == expected


def test_the_folder_of_schedules_goes_with_its_process():
    program = "from v4jax.planning import schedules; print(schedules.start_dump())"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )

    assert not pathlib.Path(done.stdout.strip()).exists() and "llo-" in done.stdout
