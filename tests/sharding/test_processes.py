"""Two and four processes compute what one does: training, saving and restoring, generating."""

import contextlib
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT, environment, free_port
from tests.models import random_model
from v4jax import checkpoint, tiny
from v4jax.config import csa_layer, hca_layer


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of a CSA and an HCA layer, one of them hash-routed."""
    layers = (csa_layer(tiny().indexer, hash_routed=True), hca_layer())
    cfg = dataclasses.replace(tiny(), layers=layers, mtp_layers=())
    path = tmp_path / "checkpoint"
    checkpoint.save(random_model(cfg), path)
    return path


def _run(count: int, checkpoint_folder, folder) -> list[dict]:
    """Runs the job as `count` processes and returns what each of them found."""
    folder.mkdir()
    command = [sys.executable, "-m", "tests.sharding.one_of_several", str(free_port()), str(count)]
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(open(folder / f"{i}.log", "w+")) for i in range(count)]
        processes = [
            subprocess.Popen(
                [*command, str(i), str(checkpoint_folder), str(folder)],
                cwd=ROOT,
                env=environment(devices=4 // count),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for i, log in enumerate(logs)
        ]
        try:
            for process in processes:
                process.wait(timeout=600)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for process, log in zip(processes, logs):
            log.seek(0)
            assert process.returncode == 0, log.read()[-4000:]
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(count)]


def _written(folder) -> dict[str, bytes]:
    """Checkpoints that all processes wrote together: files by name."""
    paths = [p for name in ("model", "adapter", "merged") for p in (folder / name).iterdir()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_several_processes_compute_what_one_does(folder, tmp_path):
    (alone,) = _run(1, folder, tmp_path / "1")
    assert alone["restored"] == alone["after"] != alone["trained"]
    *requests, _, preemptions = alone["led"]
    assert preemptions == 2 and [cached for *_, cached in requests] == [0] * 7 + [128, 0, 128, 128]

    for count, result in [
        (n, found) for n in (2, 4) for found in _run(n, folder, tmp_path / f"{n}")
    ]:
        assert result["share held"] == alone["share held"] / count  # each reads its part alone
        assert result["step"] == alone["step"]
        assert result["restored"] == result["after"]
        assert result["tokens"] == alone["tokens"]
        assert result.get("led", alone["led"]) == alone["led"]  # process 0 has it
        for name in ("trained", "after"):
            np.testing.assert_allclose(result[name], alone[name], rtol=1e-5)
    written = _written(tmp_path / "1")
    assert sum(name.endswith(".safetensors") for name in written) == 6  # four of a model in parts
    assert written == _written(tmp_path / "2") == _written(tmp_path / "4")
