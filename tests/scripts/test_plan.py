"""v4jax/cli/plan.py as a user runs it; needs libtpu, not a TPU."""

import json
import os
import subprocess
import sys
import tempfile

import jax
import pytest

from pallas_kernels.chips import CHIPS
from sharding import make_mesh
from tests.conftest import ROOT
from v4jax import tiny
from v4jax.cli.plan import GiB, memory_of_error
from v4jax.inference.sampling import TOP
from v4jax.inference.steps import MOST_STEPS
from v4jax.planning.hlo import collectives
from v4jax.planning.plan import Job, program
from v4jax.planning.topologies import topology_devices

pytest.importorskip("libtpu")


def _plan(*arguments: str) -> subprocess.CompletedProcess:
    """What it says. It leaves no temporary file behind."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "v4jax.cli.plan", *arguments],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert not os.listdir(folder)
    return done


def test_a_small_decode_is_planned():
    job = ["--job", "decode", "--context", "512", "--batch", "4"]
    done = _plan("--model", "tiny", "--layers", "3", "--topology", "v6e:2x2", *job, "--json")

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["mesh"] == dict(fsdp=4, expert=1, tensor=1, context=1)
    assert "it is fastest by the roofline" in done.stderr
    assert report["fits"]
    memory = report["memory"]
    assert 0 < memory["parameters"] + memory["cache"] + memory["temp"] <= memory["peak"] * 1.01
    assert memory["peak"] < memory["limit"]
    assert {c["kind"] for c in report["collectives"]} >= {"all-gather", "all-reduce"}
    bound = report["roofline"]
    assert bound["tokens"] == 4
    assert min(bound["compute"], bound["memory"], bound["links"]) > 0
    assert "fsdp=4: copies of the model" in done.stderr
    assert "compiled in" in done.stderr


def test_a_plan_that_stops_at_the_schedule_says_what_a_whole_one_does():
    job = ["--model", "tiny", "--layers", "2", "--topology", "v6e:2x2", "--job", "prefill"]
    job += ["--context", "512", "--batch", "4", "--mesh", "expert=4", "--json"]
    whole, scheduled = (json.loads(_plan(*job, *more).stdout) for more in ((), ("--schedule",)))

    assert whole["has_code"]
    assert not scheduled["has_code"]
    for name in ("collectives", "exchanges", "roofline"):
        assert scheduled[name] == whole[name], name
    assert "ragged-all-to-all" in {c["kind"] for c in whole["collectives"]}
    peaks = [report["memory"]["peak"] for report in (scheduled, whole)]
    assert 0 < peaks[0] < peaks[1] < peaks[0] + 16 * 2**20  # code, and what it uses beside


def test_a_layer_of_flash_is_planned_for_v5p():
    """libtpu 0.0.42 aborted there on the conversion of block scales (`quantize.float32_scale`).

    No dense weight is unpacked in memory, where the larger ones would take 64 MiB each, and none is
    copied: of the output projection's groups XLA held 32 MiB twice, for its loop and apart.
    """
    job = ["--job", "decode", "--context", "131072", "--batch", "4", "--mesh", "expert=4"]
    done = _plan("--model", "flash", "--layers", "1", "--topology", "v5p:2x2x1", *job, "--json")

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fits"]
    assert report["memory"]["temp"] < 80 * 2**20


def test_a_step_is_reported_by_kind_of_layer():
    job = ["--job", "decode", "--context", "512", "--batch", "4", "--mesh", "expert=4"]
    job += ["--step", "--json"]
    done = _plan("--model", "tiny", "--layers", "1", "--topology", "v6e:2x2", *job)

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["layers"] == {"window": 1}
    layer, once = report["kinds"]["window"], report["once"]
    scopes = {row["part"][0] for row in layer["xla"]}
    assert any("moe/experts" in scope for scope in scopes)
    assert any("head" in row["part"][0] for row in once["xla"])
    assert not any("head/" in scope for scope in scopes)
    assert all(row["seconds"] > 0 for row in layer["kernels"])
    assert {row["part"][0] for row in layer["sent"]} >= {"all-gather"}
    assert layer.get("no time", 0) < 0.2 * layer["launches"]
    assert report["total"]["seconds"] == pytest.approx(once["seconds"] + layer["seconds"])
    assert report["total"]["seconds"] > report["bound"]["seconds"] > 0


def test_wrong_topologies_and_meshes_are_refused_with_what_would_do():
    job = ["--model", "tiny", "--job", "decode", "--context", "512", "--batch", "4"]
    unknown = _plan(*job, "--topology", "v9:2x2")
    assert unknown.returncode == 2
    assert "expected one of v5e:2x2 .. v5e:16x16" in unknown.stderr
    assert "Traceback" not in unknown.stderr

    wrong = _plan(*job, "--topology", "v6e:2x2", "--mesh", "tensor=4")
    assert wrong.returncode == 2
    assert "tensor=4 cuts o_groups=2 into 4 parts: sizes that would do are 1, 2" in wrong.stderr

    few = _plan(*job, "--topology", "v6e:2x2", "--mesh", "expert=2,data=2")
    assert (
        "expected AXIS=SIZE with an axis of ('fsdp', 'expert', 'tensor', 'context')" in few.stderr
    )


def test_out_of_memory_errors_of_the_compiler_give_the_size():
    held = {"parameters": 10 * GiB, "optimizer": 20 * GiB}
    messages = (
        "the total memory required for HLO temporaries (105.83G) exceeds available HBM (95.74G).",
        "Ran out of memory in memory space hbm. Used 105.83G of 95.74G hbm.",
    )
    for message in messages:
        memory = memory_of_error(message, held, CHIPS["v5p"])
        assert memory.peak == pytest.approx(105.83 * GiB)
        assert memory.temp == pytest.approx(75.83 * GiB)
        assert not memory.fits
    with pytest.raises(ValueError, match="Mosaic failed"):
        memory_of_error("INTERNAL: Mosaic failed to compile", held, CHIPS["v5p"])


def test_decoding_gathers_no_weights_of_experts():
    """Packed experts are uint8 and their scales float8: nothing of them is ever sent."""
    cfg = tiny()
    job = Job(kind="decode", context=512, batch=4)
    mesh = make_mesh(expert=4, devices=topology_devices("v5e:2x2"))
    planned = program(cfg, job, mesh)
    shared = {x.dtype.name for x in jax.tree.leaves(planned.arguments[0])}
    assert {"uint8", "float8_e8m0fnu"} <= shared

    found = collectives(planned.lower().compile().as_text())

    assert {c.kind for c in found} == {"all-gather", "all-reduce"}
    output = f"[{job.batch},{MOST_STEPS},{TOP}]"  # the likeliest tokens of all steps, once a call
    for one in found:
        assert not one.result.startswith(("u8", "f8")), one
        # Rows of four sequences and their experts; a matrix of one expert has 8192 elements.
        if not one.result.endswith(output):
            assert one.sent_bytes / one.count < 4 * cfg.embed_dim * 4 * 2, one
