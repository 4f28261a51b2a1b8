"""Which package may import which: the rooms of the house, and the doors between them."""

import ast
import pathlib
import sys

import pytest

from tests.conftest import ROOT

# Third-party packages and packages of this repository that each package may import.
ALLOWED = {
    "pallas_kernels": {"jax", "jaxtyping", "numpy"},
    "sharding": {"jax", "jaxtyping", "numpy"},
    "v4jax": {
        *("jax", "numpy", "ml_dtypes", "flax", "optax", "orbax", "tokenizers", "tqdm", "treescope"),
        *("fsspec", "jaxtyping"),
        *("pallas_kernels", "sharding"),
    },
    "scripts": {"jax", "numpy", "ml_dtypes", "flax", "matplotlib", "playwright", "v4jax"},
    "benchmarks": {
        *("jax", "numpy", "flax", "pallas_kernels", "sharding", "v4jax"),
        *("torch", "transformers"),  # wide_transformers.py, in an environment of its own
    },
}
# What comes with an extra, by the folder or file that alone may import it.
EXTRAS = {
    ROOT / "v4jax" / "inference" / "server": {"starlette", "uvicorn", "prometheus_client"},
    ROOT / "v4jax" / "inference" / "grammar.py": {"llguidance"},
    ROOT / "v4jax" / "train" / "log.py": {"tensorboardX"},
}
# Rooms of v4jax, and the rooms that each may import. No circles.
ROOMS = {
    "config": set(),
    "stores": set(),
    "text": {"stores"},
    "nn": {"config"},
    "checkpoint": {"config", "nn", "stores"},
    "inference": {"config", "nn", "text", "stores", "checkpoint"},
    "train": {"config", "nn", "checkpoint", "stores", "text"},
    "planning": {"config", "nn", "inference", "train"},
    "cli": {
        *("config", "nn", "text", "stores", "checkpoint", "inference", "train", "planning"),
    },
}


def _imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _files(package: str) -> list[pathlib.Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


def _room(path: pathlib.Path) -> str:
    return path.relative_to(ROOT / "v4jax").with_suffix("").parts[0]


@pytest.mark.parametrize("package", list(ALLOWED))
def test_packages_import_only_what_they_may(package):
    for path in _files(package):
        top = {name.split(".")[0] for name in _imports(path)}
        extra = top - ALLOWED[package] - set(sys.stdlib_module_names) - {package}
        for home, names in EXTRAS.items():
            extra -= names if path.is_relative_to(home) else set()
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}"


def test_rooms_of_v4jax_import_only_through_their_doors():
    for path in _files("v4jax"):
        room = _room(path)
        if room.startswith("__"):  # the public names
            continue
        for imported in _imports(path):
            parts = imported.split(".")
            if parts[0] == "v4jax" and len(parts) > 1 and parts[1] in ROOMS and parts[1] != room:
                assert parts[1] in ROOMS[room], f"{path.relative_to(ROOT)}: {imported}"


def test_every_module_of_v4jax_is_in_a_room():
    found = {_room(path) for path in _files("v4jax")}

    assert {room for room in found if not room.startswith("__")} == set(ROOMS)


def test_there_is_no_circle():
    done: set[str] = set()
    while len(done) < len(ROOMS):
        new = {room for room, doors in ROOMS.items() if room not in done and doors <= done}
        assert new, f"a circle among {sorted(set(ROOMS) - done)}"
        done |= new


def test_there_is_no_circle_of_files():
    """Imports for type checkers alone count too. Packages' `__init__` name what is below them."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for package in ("pallas_kernels", "sharding", "v4jax")
        for path in _files(package)
        if path.stem != "__init__"
    }
    needs = {name: _imports(path) & set(modules) for name, path in modules.items()}
    while free := {name for name, others in needs.items() if not others & set(needs)}:
        needs = {name: others for name, others in needs.items() if name not in free}
    assert not needs, f"circles are among {sorted(needs)}"
