"""What `pip install` of the wheel gives somebody who has no checkout."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from email.parser import Parser

import numpy as np
import pytest

from tests.conftest import ROOT, environment
from tests.test_imports import ALLOWED
from v4jax.cli import COMMANDS


def _run(*words: object, cwd: pathlib.Path, **variables: str) -> str:
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> pathlib.Path:
    """A folder with what the wheel holds, its dependencies being those of this environment."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):  # a build leaves files where it works
        shutil.copy(ROOT / name, source)
    for name in ("v4jax", "pallas_kernels", "sharding"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    _run(*pip, "wheel", "--no-deps", "--wheel-dir", source / "dist", source, cwd=source)
    (wheel,) = (source / "dist").glob("*.whl")
    _run(*pip, "install", "--no-deps", "--target", target, wheel, cwd=source)
    return target


@pytest.fixture
def run(installed, tmp_path):
    """Runs words in an empty folder, with what the wheel holds ahead of this checkout."""

    def of(*words: object) -> str:
        return _run(*words, cwd=tmp_path, PYTHONPATH=os.fspath(installed))

    return of


def test_every_command_explains_itself(installed, run, tmp_path):
    program = (
        "import pathlib, sys, v4jax\n"
        "from v4jax.cli import COMMANDS, main\n"
        "print(pathlib.Path(v4jax.__file__).parent.parent)\n"
        "for command in COMMANDS:\n"
        "    try:\n"
        "        main([command, '--help'])\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, command\n"
    )
    out = run(sys.executable, "-c", program)

    assert out.split("\n")[0] == str(installed)
    assert re.findall(r"^usage: v4jax (\w+)", out, re.MULTILINE) == list(COMMANDS)


def test_the_installed_command_generates(installed, run):
    v4jax = installed / "bin" / "v4jax"

    assert run(v4jax, "--version").startswith("v4jax ")
    out = run(
        *(v4jax, "generate", "--checkpoint", "nano", "--mode", "raw", "--prompt", "Emma was"),
        *("--max-new-tokens", 4, "--temperature", 0, "--dtype", "float32"),
    )
    assert out.strip()


def test_the_installed_command_converts_and_scores(installed, run, tmp_path):
    v4jax = installed / "bin" / "v4jax"
    np.save(tmp_path / "tokens.npy", np.arange(3, 11, dtype=np.int32)[None])

    run(v4jax, "convert", "nano", "copy", "--to", "bf16")
    run(v4jax, "score", "--checkpoint", "copy", "--tokens", "tokens.npy", "--out", "logits.npz")

    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    logits = np.load(tmp_path / "logits.npz")["logits"]
    assert logits.shape == (1, 8, config["vocab_size"])
    assert np.isfinite(logits).all()


def test_the_wheel_says_what_it_is(installed):
    assert (installed / "v4jax" / "py.typed").exists()
    assert (installed / "v4jax" / "assets" / "text" / "mansfield_park.txt").exists()  # for verify
    assert (installed / "v4jax" / "inference" / "server" / "page.html").exists()
    (metadata,) = installed.glob("v4jax-*.dist-info/METADATA")
    fields = Parser().parsestr(metadata.read_text(encoding="utf-8"))
    version = re.search(
        r'^__version__ = "(.*)"', (ROOT / "v4jax/__init__.py").read_text(), re.MULTILINE
    )
    assert fields["Version"] == version[1]
    packages = {path.parent.name for path in installed.glob("*/__init__.py")}
    assert packages == {"v4jax", "pallas_kernels", "sharding"}


def test_a_plain_install_has_all_that_the_package_imports(installed):
    (metadata,) = installed.glob("v4jax-*.dist-info/METADATA")
    fields = Parser().parsestr(metadata.read_text(encoding="utf-8"))
    plain = [line for line in fields.get_all("Requires-Dist") if "extra ==" not in line]
    names = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in plain}
    homes = {"orbax": "orbax_checkpoint"}

    imported = {homes.get(name, name) for name in ALLOWED["v4jax"]}
    assert imported - {"pallas_kernels", "sharding"} <= names
